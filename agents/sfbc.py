"""SfBC: selecting from behaviour candidates (Chen et al. 2023, arXiv 2209.14548).

    mu(a | s)    a diffusion model of the data's actions
    R_n^k = max(r_n + gamma R_{n+1}^k, V^{k-1}(s_n))       in-sample planning, R^0 the data's own returns
    Q <- min E[(Q(s, a) - R^k)^2]                          anew for every k
    V(s) = sum_j softmax_j(alpha Q(s, a_j)) Q(s, a_j),   a_j ~ mu(. | s)

At evaluation candidates are drawn from mu and one is taken with probability softmax(alpha Q), or a few, which are
averaged (locomotion, as published). The behaviour model is trained first, in steps with negative numbers, and then
stands still; Q's steps count from 0, with new returns every `plan_interval` steps.

The official code (ChenDRAG/SfBC) is followed; Q learns returns of mean 0 and deviation 1 and starts from its first
weights after each planning. Its plan also lifts the return of a bad action to its state's value, and takes 0 for what
comes after a time limit; the paper's, by `paper_planning`, is R_n = r_n + gamma max(R_{n+1}, V(s_{n+1})), and goes on
with V there. Its solver integrates the predicted noise. With few steps such samples fly apart, since the first stride
begins where next to no signal is left: `predict_data` integrates the predicted action. V's candidates are drawn anew at
each planning (the code keeps one set).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import silu

from agents.parts.agent import Agent, Batch, Draws, Outcome, Transitions, blocks
from agents.parts.draws import Rng, exponentials, normals, uniforms
from agents.parts.layers import MLP
from agents.parts.returns import backward
from agents.parts.sde import ScorePolicy, Solver

PRETRAINING, TRAINING = 0, 1  # phases
EARLIEST = 1e-5  # least time of the denoising loss, as published
LEAST_DEVIATION = 0.1  # of the returns, as published


class SfBC(Agent):
    """The agent of `--algo sfbc`; `config` is a `hyperparameters.SfBCConfig`."""

    METRICS = ("bc_loss", "critic_loss", "q_mean", "actor_grad_norm", "critic_grad_norm")
    COMPILED = ("behaviour_loss", "critic_loss")

    def build(self) -> None:
        c = self.config
        hidden = [2 * c.hidden_dim] * (c.critic_layers - 2) + [c.hidden_dim] * min(c.critic_layers, 2)
        widths = [self.state_dim + self.action_dim, *hidden, 1]
        # First: a planning makes the same weights again.
        self.critic = self.learn("critic", MLP(widths, self.sizes, silu, "sort"), c.critic_learning_rate)
        solver = Solver(c.diffusion_steps, order=3, data=c.predict_data, device=self.device)
        self.actor = self.learn("actor", ScorePolicy(self.sizes, solver, c.hidden_dim), c.learning_rate)
        # The returns, and the same with mean 0 and deviation 1, which Q learns; a planning reads the scale off both.
        self.planned = {"returns": 1, "targets": 1}

    def phase(self, step: int) -> int:
        return PRETRAINING if step < 0 else TRAINING

    def _draw(self, rng: Rng, batch_size: int, steps: int) -> dict[str, Tensor]:
        times = uniforms(rng, self.num_seeds, steps, (batch_size,))
        return {
            "times": EARLIEST + (1 - EARLIEST) * times,
            "noise": normals(rng, self.num_seeds, steps, (batch_size, self.action_dim)),
        }

    def value(self, states: Tensor, actions: Tensor) -> Tensor:
        """Q in units of the targets: states [S, B, state_dim], actions [S, B * R, A] -> [S, B * R]."""
        states = states.repeat_interleave(actions.shape[1] // states.shape[1], dim=1)
        return self.critic(torch.cat([states, actions], dim=-1)).squeeze(-1)

    # --- Numbers made of the whole table ----------------------------------------------------------------

    def plan_step(self, step: int) -> int | None:
        return None if step < 0 else step // self.config.plan_interval * self.config.plan_interval

    def plan(self, transitions: Transitions, rng: Rng, columns: Mapping[str, Tensor]) -> None:
        """The data's returns before the first step, planned returns later; then Q starts anew."""
        ends, rewards = transitions.ends, self._column(transitions, "rewards")
        factors = (self.config.discount * (~ends).float()).expand(rewards.shape)
        if self.plan_step(self.step) == 0:
            returns = backward(rewards, factors)
        else:
            if self.config.paper_planning:
                # Where a trajectory ends there is no R_{n+1}, only V, if the environment goes on.
                ahead = self._values(transitions, "next_states", rng, columns)
                bootstrapped = rewards + self.config.discount * ahead * self._column(transitions, "not_dones")
                returns = backward(torch.where(ends, bootstrapped, rewards), factors, bootstrapped)
            else:
                returns = backward(rewards, factors, self._values(transitions, "states", rng, columns))
            self.critic.initialize(self.init_generators())
            self.optimizers["critic"].reset()
        mean, deviation = _scale(returns)
        columns["returns"].copy_(returns.unsqueeze(2))
        columns["targets"].copy_(((returns - mean) / deviation).unsqueeze(2))

    def _column(self, transitions: Transitions, name: str) -> Tensor:
        """Every transition's number of that name, the same for all seeds: [S, N]."""
        rows = [transitions.block(start, stop)[name][:, 0] for start, stop in blocks(transitions.size)]
        return torch.cat(rows).expand(self.num_seeds, -1)

    def _values(self, transitions: Transitions, at: str, rng: Rng, columns: Mapping[str, Tensor]) -> Tensor:
        """V, by the Q at hand, of each transition's states or next_states: [S, N]."""
        c, n = self.config, self.num_seeds
        mean, deviation = _scale(columns["returns"].squeeze(2))
        values = torch.empty(n, transitions.size, device=self.device)
        for start, stop in blocks(transitions.size):
            states = transitions.block(start, stop)[at].expand(n, -1, -1)
            noise = normals(rng, n, 1, (stop - start, c.plan_actions, self.action_dim))[0].flatten(1, 2)
            q = self.value(states, self.actor.sample(states, noise)).unflatten(1, (stop - start, -1))
            v = ((c.alpha * q).softmax(dim=2) * q).sum(dim=2)
            values[:, start:stop] = v * deviation + mean
        return values

    # --- The update: Algorithm 1 ------------------------------------------------------------------------

    def gradient_step(self, batch: Batch, draws: Draws, step: int) -> dict[str, Tensor]:
        if self.phase(step) == PRETRAINING:
            return self.descend("actor", self.behaviour_loss(batch, draws))
        return self.descend("critic", self.critic_loss(batch, draws))

    def behaviour_loss(self, batch: Batch, draws: Draws) -> Outcome:
        """The denoising loss of the data's actions [S]."""
        loss = self.actor.loss(batch["actions"], batch["states"], draws["times"], draws["noise"])
        return loss, {"bc_loss": loss.detach()}

    def critic_loss(self, batch: Batch, draws: Draws) -> Outcome:
        """Q's squared error against the planned returns, both with mean 0 and deviation 1 over the data [S]."""
        errors = self.value(batch["states"], batch["actions"]) - batch["targets"][..., 0]
        loss = errors.square().mean(dim=1)
        return loss, {"critic_loss": loss.detach(), "q_mean": batch["returns"].mean(dim=(1, 2))}

    # --- Acting -----------------------------------------------------------------------------------------

    def act_draws(self, rng: Rng, states: int) -> dict[str, Tensor]:
        n, candidates = self.num_seeds, self.config.action_candidates
        noise = normals(rng, n, 1, (states, candidates, self.action_dim))[0]
        return {"noise": noise, "exponential": exponentials(rng, n, (states, candidates))}

    def actions_for(self, states: Tensor, noise: Mapping[str, Tensor]) -> Tensor:
        """The mean of `actions_averaged` candidates, drawn without replacement by softmax(select_alpha Q).

        The largest values of alpha Q plus Gumbel noise are such a draw.
        """
        shape = noise["exponential"].shape
        actions = self.actor.sample(states, noise["noise"].flatten(1, 2))
        values = self.config.select_alpha * self.value(states, actions).view(shape)
        chosen = (values - noise["exponential"].log()).topk(self.config.actions_averaged, dim=2).indices
        index = chosen.unsqueeze(-1).expand(-1, -1, -1, self.action_dim)
        average = actions.view(*shape, -1).gather(2, index).mean(dim=2)
        return average.clamp(-self.max_action, self.max_action)


def _scale(returns: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each seed's returns [S, N] -> two [S, 1]."""
    deviation = returns.std(dim=1, correction=0, keepdim=True).clamp(min=LEAST_DEVIATION)
    return returns.mean(dim=1, keepdim=True), deviation
