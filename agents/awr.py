"""AWR: advantage-weighted regression (Peng et al. 2019, arXiv 1910.00177) on a fixed dataset.

    V <- min E[(R^lambda - V(s))^2]      pi <- max E[log pi(a | s) min(exp(A / beta), w_max)],   A = R^lambda - V(s)

R^lambda are TD(lambda) returns along the data's trajectories. They and the weights are made of the whole table every
`plan_interval` steps, the advantages normalised over it, as the official code does (xbpeng/awr, with temperature 1; the
paper does not normalise and has beta = 0.05). The policy is a Gaussian with a fixed deviation, so it has one mode.

What differs from the official code: Adam instead of gradient descent with momentum; `hidden_dim` is the width of both
hidden layers (there 128 and 64); states are taken as they are (there normalised by running statistics); and V and
the policy move together at every step (there V takes 200 steps, then the policy 1,000), so the weights come from the V
of an interval ago, and those of the first interval from an untrained one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from agents.parts.agent import Agent, Batch, Draws, Outcome, Transitions, blocks
from agents.parts.critics import ValueNetwork
from agents.parts.draws import Rng, normals
from agents.parts.layers import MLP
from agents.parts.returns import backward

# Beside the advantages' deviation. Published, but there of A, here of A (1 - discount): where all actions are equally
# good, as in the circle's bandit, V's last digits must not pass for advantages.
ADVANTAGE_EPSILON = 1e-5
BOUND_WEIGHT = 10.0  # of the penalty on means outside of the action box, as published


class AWR(Agent):
    """The agent of `--algo awr`; `config` is a `hyperparameters.AWRConfig`."""

    METRICS = (
        "actor_loss", "bc_loss", "critic_loss", "q_mean", "weight_mean", "actor_grad_norm", "critic_grad_norm"
    )  # fmt: skip
    COMPILED = ("critic_loss", "policy_loss")

    def build(self) -> None:
        c, widths = self.config, [self.config.hidden_dim] * 2
        self.actor = self.learn("actor", MLP([self.state_dim, *widths, self.action_dim], self.sizes), c.learning_rate)
        critic = ValueNetwork(self.sizes, widths, torch.relu)
        self.critic = self.learn("critic", critic, c.critic_learning_rate)
        self.planned = {"returns": 1, "weights": 1}
        # The value network learns V (1 - discount), as published: numbers of the rewards' size.
        self.value_scale = 1 / (1 - c.discount) if c.discount < 1 else 1.0

    def _draw(self, rng: Rng, batch_size: int, steps: int) -> dict[str, Tensor]:
        return {}  # both regressions need no random numbers beside the batch

    def value(self, states: Tensor) -> Tensor:
        """V(s): states [S, B, state_dim] -> [S, B]."""
        return self.critic(states) * self.value_scale

    # --- Numbers made of the whole table ----------------------------------------------------------------

    def plan_step(self, step: int) -> int | None:
        return step // self.config.plan_interval * self.config.plan_interval

    def plan(self, transitions: Transitions, rng: Rng, columns: Mapping[str, Tensor]) -> None:
        """TD(lambda) returns of the current V, and the weights of their advantages, normalised seed by seed."""
        c, shape = self.config, (self.num_seeds, transitions.size)
        values, increments = torch.empty(shape, device=self.device), torch.empty(shape, device=self.device)
        for start, stop in blocks(transitions.size):
            rows = transitions.block(start, stop)
            states, next_states = (rows[k].expand(self.num_seeds, -1, -1) for k in ("states", "next_states"))
            values[:, start:stop] = self.value(states)
            # R_i = r_i + gamma ((1 - lambda) V(s') + lambda R_{i+1}), and at the end of a trajectory r_i + gamma V(s')
            share = torch.where(transitions.ends[start:stop], 1.0, 1 - c.td_lambda)
            bootstrap = rows["not_dones"][:, 0] * self.value(next_states)
            increments[:, start:stop] = rows["rewards"][:, 0] + c.discount * share * bootstrap
        factors = c.discount * c.td_lambda * (~transitions.ends).float()
        returns = backward(increments, factors.expand(shape))
        advantages = (returns - values) / self.value_scale
        deviation = advantages.std(dim=1, correction=0, keepdim=True)
        advantages = (advantages - advantages.mean(dim=1, keepdim=True)) / (deviation + ADVANTAGE_EPSILON)
        columns["returns"].copy_(returns.unsqueeze(2))
        columns["weights"].copy_((advantages / c.temperature).exp().clamp(max=c.weight_max).unsqueeze(2))

    # --- The update: Algorithm 1 ------------------------------------------------------------------------

    def gradient_step(self, batch: Batch, draws: Draws, step: int) -> dict[str, Tensor]:
        metrics = self.descend("critic", self.critic_loss(batch, draws))
        return metrics | self.descend("actor", self.policy_loss(batch, draws))

    def critic_loss(self, batch: Batch, draws: Draws) -> Outcome:
        """Half the squared error of V against the returns, both divided by `value_scale` [S]."""
        returns = batch["returns"][..., 0]
        loss = 0.5 * (self.critic(batch["states"]) - returns / self.value_scale).square().mean(dim=1)
        return loss, {"critic_loss": loss.detach(), "q_mean": returns.mean(dim=1)}

    def policy_loss(self, batch: Batch, draws: Draws) -> Outcome:
        """The weighted negative log-likelihood without its constant, and a penalty on means outside of the box [S]."""
        weights, mean = batch["weights"][..., 0], self.actor(batch["states"])
        deviations = (batch["actions"] / self.max_action - mean) / self.config.action_std
        errors = 0.5 * deviations.square().sum(dim=2)
        outside = 0.5 * (mean.abs() - 1).clamp(min=0).square().sum(dim=2)
        loss = (weights * errors + BOUND_WEIGHT * outside).mean(dim=1)
        metrics = {"actor_loss": loss.detach(), "bc_loss": errors.detach().mean(dim=1)}
        return loss, {**metrics, "weight_mean": weights.mean(dim=1)}

    # --- Acting -----------------------------------------------------------------------------------------

    def act_draws(self, rng: Rng, states: int) -> dict[str, Tensor]:
        return {"noise": normals(rng, self.num_seeds, 1, (states, self.action_dim))[0]}

    def actions_for(self, states: Tensor, noise: Mapping[str, Tensor]) -> Tensor:
        """The policy's mean, or with `sample_actions` a sample of it, cut to the action box."""
        scaled = self.actor(states)
        if self.config.sample_actions:
            scaled = scaled + self.config.action_std * noise["noise"]
        return scaled.clamp(-1, 1) * self.max_action
