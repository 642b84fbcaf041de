"""TD3+BC (Fujimoto & Gu 2021, arXiv 2106.06860): TD3 with the data's actions as a second aim, as published.

    max_pi  E[lambda Q1(s, pi(s)) - (pi(s) - a)^2]      lambda = alpha / mean |Q1(s, pi(s))| over the batch

A deterministic policy over states of mean 0 and deviation 1. Its official code is sfujim/TD3_BC.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from agents.parts.agent import Agent, Batch, Draws, Outcome, Transitions
from agents.parts.critics import TwinCritic
from agents.parts.draws import Rng, normals
from agents.parts.losses import td_target, twin_error
from agents.parts.parameters import Parameters
from agents.parts.policies import DeterministicActor

LEAST_DEVIATION = 1e-3  # added to the states' deviations, as published: a constant state is no division by zero


class TD3BC(Agent):
    """The agent of `--algo td3_bc`; `config` is a `hyperparameters.TD3BCConfig`."""

    METRICS = ("bc_loss", "q_loss", "actor_loss", "critic_loss", "q_mean", "actor_grad_norm", "critic_grad_norm")
    COMPILED = ("critic_loss", "policy_loss")

    def build(self) -> None:
        c, widths = self.config, [self.config.hidden_dim] * 2
        self.actor = self.learn("actor", DeterministicActor(self.sizes, widths), c.learning_rate)
        critic = TwinCritic(self.sizes, widths, torch.relu, names=("l",))
        self.critic = self.learn("critic", critic, c.critic_learning_rate)
        self.actor_target = self.average_of("actor_target", self.actor, 1 - c.tau)
        self.critic_target = self.average_of("critic_target", self.critic, 1 - c.tau)
        self.constant_critic = self.critic.frozen()
        shapes = {"mean": (self.state_dim,), "deviation": (self.state_dim,)}
        self.normalizer = Parameters(shapes, self.num_seeds, self.device, trainable=False)
        self.normalizer["deviation"].fill_(1.0)
        self.networks["normalizer"] = self.normalizer  # saved, but not learnt and not published

    @property
    def period(self) -> int:
        return self.config.policy_interval

    def _draw(self, rng: Rng, batch_size: int, steps: int) -> dict[str, Tensor]:
        return {"target_noise": normals(rng, self.num_seeds, steps, (batch_size, self.action_dim))}

    # --- The data as a whole ----------------------------------------------------------------------------

    def observe(self, transitions: Transitions) -> None:
        """The mean and deviation of the data's states, for `normalize_states`."""
        if self.config.normalize_states:
            states = transitions.block(0, transitions.size)["states"].double()
            self.normalizer["mean"].copy_(states.mean(dim=0))
            self.normalizer["deviation"].copy_(states.std(dim=0, correction=0) + LEAST_DEVIATION)

    def normalized(self, states: Tensor) -> Tensor:
        """States as the networks see them, [S, B, state_dim]."""
        return (states - self.normalizer["mean"].unsqueeze(1)) / self.normalizer["deviation"].unsqueeze(1)

    # --- The update -------------------------------------------------------------------------------------

    def gradient_step(self, batch: Batch, draws: Draws, step: int) -> dict[str, Tensor]:
        metrics = self.descend("critic", self.critic_loss(batch, draws))
        if (step + 1) % self.config.policy_interval == 0:  # the published loop counts from 1
            metrics |= self.descend("actor", self.policy_loss(batch, draws))
            self.critic_target.follow(self.critic)
            self.actor_target.follow(self.actor)
        return metrics

    def critic_loss(self, batch: Batch, draws: Draws) -> Outcome:
        """Both critics' squared errors against r + gamma min(Q1', Q2')(s', pi'(s') + clipped noise) [S]."""
        c, box = self.config, self.max_action
        with torch.no_grad():
            next_states = self.normalized(batch["next_states"])
            bound = c.target_noise_clip * box
            noise = (draws["target_noise"] * (c.target_noise * box)).clamp(-bound, bound)
            next_actions = (self.actor_target(next_states) + noise).clamp(-box, box)
            target = td_target(batch, c.discount, self.critic_target(next_states, next_actions).amin(dim=1))
        loss = twin_error(self.critic(self.normalized(batch["states"]), batch["actions"]), target)
        return loss, {"critic_loss": loss.detach(), "q_mean": target.mean(dim=1)}

    def policy_loss(self, batch: Batch, draws: Draws) -> Outcome:
        """(pi(s) - a)^2 - alpha Q1(s, pi(s)) / mean |Q1| [S]."""
        states = self.normalized(batch["states"])
        actions = self.actor(states)
        q = self.constant_critic.first(states, actions)
        q_loss = -q.mean(dim=1) / q.detach().abs().mean(dim=1)
        bc_loss = (actions - batch["actions"]).square().mean(dim=(1, 2))
        loss = self.config.alpha * q_loss + bc_loss
        return loss, {"bc_loss": bc_loss.detach(), "q_loss": q_loss.detach(), "actor_loss": loss.detach()}

    # --- Acting -----------------------------------------------------------------------------------------

    def act_draws(self, rng: Rng, states: int) -> dict[str, Tensor]:
        return {}  # the policy is deterministic

    def actions_for(self, states: Tensor, noise: Mapping[str, Tensor]) -> Tensor:
        return self.actor(self.normalized(states))
