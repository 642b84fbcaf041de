"""QGPO: Q-guided policy optimisation by contrastive energy prediction (Lu et al. 2023, arXiv 2304.12824).

    pi(a | s)  proportional to  mu(a | s) exp(beta Q(s, a)),      mu: a diffusion model of the data's actions
    Q <- r + gamma sum_j softmax_j(beta_q Q(s', a'_j)) Q(s', a'_j)                       in-support softmax backup
    f <- min -E_t sum_i softmax_i(beta Q(s, a_i)) log softmax_i(f(a_i^t, s, t))          in-support contrastive loss

a_i, a'_j are the support actions: `support_actions` samples of mu for every state of the data, drawn once. The loss'
optimum is the energy of the diffused actions up to a constant, log E[exp(beta Q(s, a)) | a^t], so that sampling mu with
`guidance_scale` times its gradient added to the score draws from pi where the scale is 1.

As in the official code (ChenDRAG/CEP-energy-guided-diffusion) mu is trained first, in steps with negative numbers and
whole batches; Q and f learn from the first `critic_batch_size` rows of a batch, and after `critic_epochs` f alone. The
clipped double Q of its target network labels the support. A checkpoint holds no support actions: mu does not change
any more, so they are drawn again, the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from agents.parts.agent import Agent, Batch, Draws, Outcome, Transitions, blocks
from agents.parts.critics import TwinCritic
from agents.parts.draws import Rng, normals, uniforms
from agents.parts.losses import td_target
from agents.parts.sde import EnergyNetwork, ScorePolicy, Solver, signal_and_spread

PRETRAINING, TRAINING, ENERGY_ALONE = 0, 1, 2  # phases
EARLIEST = 1e-3  # least time of both losses, as published


class QGPO(Agent):
    """The agent of `--algo qgpo`; `config` is a `hyperparameters.QGPOConfig`."""

    METRICS = (
        "bc_loss", "critic_loss", "energy_loss", "q_mean", "actor_grad_norm", "critic_grad_norm", "energy_grad_norm"
    )  # fmt: skip
    COMPILED = ("behaviour_loss", "critic_loss", "energy_loss")
    PLAN_REPEATS = True

    def build(self) -> None:
        c = self.config
        self.solver = Solver(c.diffusion_steps, order=2, data=True, device=self.device)
        self.spread = signal_and_spread(self.solver.times.double())[1].tolist()
        self.actor = self.learn("actor", ScorePolicy(self.sizes, self.solver, c.hidden_dim), c.learning_rate)
        critic = TwinCritic(self.sizes, [c.hidden_dim] * 3, torch.relu, names=("q1", "q2"), action_first=True)
        # The published file of the critic has Q, its average and f.
        self.critic = self.learn("critic", critic, c.critic_learning_rate, published="critic/q0.")
        energy = EnergyNetwork(self.sizes, c.hidden_dim)
        self.energy = self.learn("energy", energy, c.critic_learning_rate, published="critic/qt.")
        self.critic_target = self.average_of("critic_target", self.critic, 1 - c.tau, published="critic/q0_target.")
        width = c.support_actions * self.action_dim
        self.planned = {"support": width, "next_support": width}

    def phase(self, step: int) -> int:
        if step < 0:
            return PRETRAINING
        return TRAINING if step < self.config.critic_epochs * self.config.num_steps_per_epoch else ENERGY_ALONE

    def _draw(self, rng: Rng, batch_size: int, steps: int) -> dict[str, Tensor]:
        c, n, rows = self.config, self.num_seeds, min(batch_size, self.config.critic_batch_size)
        return {
            "times": EARLIEST + (1 - EARLIEST) * uniforms(rng, n, steps, (batch_size,)),
            "noise": normals(rng, n, steps, (batch_size, self.action_dim)),
            "energy_times": EARLIEST + (1 - EARLIEST) * uniforms(rng, n, steps, (rows,)),
            "energy_noise": normals(rng, n, steps, (rows, c.support_actions, self.action_dim)),
        }

    # --- Numbers made of the whole table ----------------------------------------------------------------

    def plan_step(self, step: int) -> int | None:
        return None if step < 0 else 0

    def plan(self, transitions: Transitions, rng: Rng, columns: Mapping[str, Tensor]) -> None:
        """The support: samples of the behaviour model, without guidance, for every state and every next state."""
        n = self.num_seeds
        for start, stop in blocks(transitions.size):
            rows = transitions.block(start, stop)
            for column, states in (("support", rows["states"]), ("next_support", rows["next_states"])):
                noise = normals(rng, n, 1, (stop - start, self.config.support_actions, self.action_dim))[0]
                actions = self.actor.sample(states.expand(n, -1, -1), noise.flatten(1, 2))
                columns[column][:, start:stop] = actions.view(n, stop - start, -1)

    # --- The update: Algorithm 1 ------------------------------------------------------------------------

    def gradient_step(self, batch: Batch, draws: Draws, step: int) -> dict[str, Tensor]:
        if self.phase(step) == PRETRAINING:
            return self.descend("actor", self.behaviour_loss(batch, draws))
        batch, metrics = {name: value[:, : self.config.critic_batch_size] for name, value in batch.items()}, {}
        if self.phase(step) == TRAINING:
            metrics = self.descend("critic", self.critic_loss(batch, draws))
            self.critic_target.follow(self.critic)
        return metrics | self.descend("energy", self.energy_loss(batch, draws))

    def behaviour_loss(self, batch: Batch, draws: Draws) -> Outcome:
        """The denoising loss of the data's actions [S]."""
        loss = self.actor.loss(batch["actions"], batch["states"], draws["times"], draws["noise"])
        return loss, {"bc_loss": loss.detach()}

    def support_values(self, states: Tensor, support: Tensor) -> Tensor:
        """min(Q1, Q2) of the target critics: states [S, B, state_dim], support [S, B, M A] -> [S, B, M]."""
        actions = support.unflatten(2, (-1, self.action_dim))
        values = self.critic_target(states, actions.flatten(1, 2)).amin(dim=1)
        return values.view(actions.shape[:3])

    def critic_loss(self, batch: Batch, draws: Draws) -> Outcome:
        """Mean of both critics' squared errors against r + gamma softmax(beta_q Q)-weighted Q over the support [S]."""
        c = self.config
        with torch.no_grad():
            values = self.support_values(batch["next_states"], batch["next_support"])
            bootstrap = ((c.beta_q * values).softmax(dim=2) * values).sum(dim=2)
            target = td_target(batch, c.discount, bootstrap)
        errors = self.critic(batch["states"], batch["actions"]) - target.unsqueeze(1)
        loss = errors.square().mean(dim=(1, 2))
        return loss, {"critic_loss": loss.detach(), "q_mean": target.mean(dim=1)}

    def energy_loss(self, batch: Batch, draws: Draws) -> Outcome:
        """Cross-entropy between softmax(beta Q) of the support and softmax f of the same, diffused to one time [S]."""
        states, support = batch["states"], batch["support"]
        with torch.no_grad():
            labels = (self.config.beta * self.support_values(states, support)).softmax(dim=2)
        times = draws["energy_times"]
        signal, spread = (x[..., None, None] for x in signal_and_spread(times))
        diffused = signal * support.view_as(draws["energy_noise"]) + spread * draws["energy_noise"]
        part = self.energy.state_part(states) + self.energy.time_part(times)
        logits = self.energy(diffused.flatten(1, 2), part).view_as(labels)
        loss = -(labels * logits.log_softmax(dim=2)).sum(dim=2).mean(dim=1)
        return loss, {"energy_loss": loss.detach()}

    # --- Acting -----------------------------------------------------------------------------------------

    def act_draws(self, rng: Rng, states: int) -> dict[str, Tensor]:
        return {"noise": normals(rng, self.num_seeds, 1, (states, self.action_dim))[0]}

    def actions_for(self, states: Tensor, noise: Mapping[str, Tensor]) -> Tensor:
        """One sample per state of the behaviour model, guided: the score plus `guidance_scale` times grad f."""
        times = self.solver.times.expand(states.shape[0], -1)
        part, parts = self.actor.state_part(states), self.actor.time_part(times)
        energy_part, energy_parts = self.energy.state_part(states), self.energy.time_part(times)

        def guided(x: Tensor, i: int) -> Tensor:
            predicted = self.actor.noise(x, part + parts[:, i : i + 1])
            gradient = self.energy.gradient(x, energy_part + energy_parts[:, i : i + 1])
            return predicted - self.config.guidance_scale * self.spread[i] * gradient

        return self.solver.sample(guided, noise["noise"]).clamp(-self.max_action, self.max_action)
