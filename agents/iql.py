"""IQL: implicit Q-learning (Kostrikov et al. 2022, arXiv 2110.06169), as published.

    min_psi    E[ L2^expectile(min Q'(s, a) - V_psi(s)) ]                  V: an upper expectile of Q over the data
    max_phi    E[ exp(beta (min Q'(s, a) - V(s))) log policy_phi(a | s) ]  advantage-weighted regression
    min_theta  E[ (r + discount V(s') - Q_theta(s, a))^2 ]                 no action outside of the data is ever valued

In this order, each with what the one before it left (official code, learner.py); Q' is the critics' average.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from agents.parts.agent import Agent, Batch, Draws, Outcome
from agents.parts.critics import TwinCritic, ValueNetwork
from agents.parts.draws import Rng, keep_masks
from agents.parts.losses import advantage_weights, expectile_loss, td_target, twin_error
from agents.parts.parameters import orthogonal_init
from agents.parts.policies import BoxGaussian

LAYERS = 2  # hidden layers of every network


class IQL(Agent):
    """The agent of `--algo iql`; `config` is a `hyperparameters.IQLConfig`."""

    METRICS = (
        "value_loss", "actor_loss", "bc_loss", "critic_loss", "advantage", "q_mean",
        "value_grad_norm", "actor_grad_norm", "critic_grad_norm",
    )  # fmt: skip
    COMPILED = ("value_loss", "policy_loss", "critic_loss")

    def build(self) -> None:
        c, widths = self.config, [self.config.hidden_dim] * LAYERS
        init = partial(orthogonal_init, gain=math.sqrt(2))
        policy = BoxGaussian(self.sizes, widths, own_std=False, dropout=c.dropout)
        critic, value = TwinCritic(self.sizes, widths, torch.relu), ValueNetwork(self.sizes, widths, torch.relu)
        self.actor = self.learn("actor", policy, c.learning_rate, init)
        self.critic = self.learn("critic", critic, c.critic_learning_rate, init)
        self.value = self.learn("value", value, c.critic_learning_rate, init, published="critic")
        self.critic_target = self.average_of("critic_target", self.critic, 1 - c.tau)
        self.decay_every_step("actor")  # the critics' rates stay

    def _draw(self, rng: Rng, batch_size: int, steps: int) -> dict[str, Tensor]:
        c = self.config
        if c.dropout == 0:
            return {}
        return {"kept": keep_masks(rng, self.num_seeds, steps, c.dropout, (batch_size, LAYERS * c.hidden_dim))}

    # --- The update -------------------------------------------------------------------------------------

    def gradient_step(self, batch: Batch, draws: Draws, step: int) -> dict[str, Tensor]:
        self.decay_rates()
        batch = self.shared(batch)
        metrics = self.descend("value", self.value_loss(batch, draws))
        metrics |= self.descend("actor", self.policy_loss(batch, draws))
        metrics |= self.descend("critic", self.critic_loss(batch, draws))
        self.critic_target.follow(self.critic)
        return metrics

    def shared(self, batch: Batch) -> Batch:
        """With min Q' [S, B], which stays until the end of a step: V's loss and the policy's read it."""
        return {**batch, "target_values": self.target_values(batch)}

    @torch.no_grad()
    def target_values(self, batch: Batch) -> Tensor:
        """min Q' of the data's actions [S, B]."""
        if "target_values" in batch:
            return batch["target_values"]
        return self.critic_target(batch["states"], batch["actions"]).amin(dim=1)

    def value_loss(self, batch: Batch, draws: Draws) -> Outcome:
        """Expectile loss of min Q' - V (eq. 5) [S]."""
        differences = self.target_values(batch) - self.value(batch["states"])
        loss = expectile_loss(differences, self.config.expectile).mean(dim=1)
        return loss, {"value_loss": loss.detach()}

    def policy_loss(self, batch: Batch, draws: Draws) -> Outcome:
        """Negative log-likelihood of the data, weighted by exp(beta (min Q' - V)) up to 100 (eq. 7) [S]."""
        states, actions = batch["states"], batch["actions"]
        with torch.no_grad():
            advantages = self.target_values(batch) - self.value(states)
            weights = advantage_weights(advantages, self.config.beta)
        likelihood = self.actor.log_density(*self.actor(states, draws.get("kept")), actions)
        loss = -(weights * likelihood).mean(dim=1)
        metrics = {"actor_loss": loss.detach(), "bc_loss": -likelihood.detach().mean(dim=1)}
        return loss, {**metrics, "advantage": advantages.mean(dim=1)}

    def critic_loss(self, batch: Batch, draws: Draws) -> Outcome:
        """Both critics' squared errors against r + discount V(s') (eq. 6) [S]."""
        with torch.no_grad():
            target = td_target(batch, self.config.discount, self.value(batch["next_states"]))
        loss = twin_error(self.critic(batch["states"], batch["actions"]), target)
        return loss, {"critic_loss": loss.detach(), "q_mean": target.mean(dim=1)}

    # --- Acting -----------------------------------------------------------------------------------------

    def act_draws(self, rng: Rng, states: int) -> dict[str, Tensor]:
        return {}

    def actions_for(self, states: Tensor, noise: Mapping[str, Tensor]) -> Tensor:
        """The policy's mean: the published evaluation has temperature 0."""
        return self.actor.actions(*self.actor(states))
