"""IQL: implicit Q-learning (Kostrikov et al. 2022, arXiv 2110.06169), as published.

    min_psi    E[ L2^expectile(min Q'(s, a) - V_psi(s)) ]                  V: an upper expectile of Q over the data
    max_phi    E[ exp(beta (min Q'(s, a) - V(s))) log policy_phi(a | s) ]  advantage-weighted regression
    min_theta  E[ (r + discount V(s') - Q_theta(s, a))^2 ]                 no action outside of the data is ever valued

In this order, each with what the one before it left (official code, learner.py); Q' is the critics' average.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from agents.parts.adam import Adam, cosine_decay
from agents.parts.agent import Agent, Batch, Draws
from agents.parts.critics import TwinCritic, ValueNetwork
from agents.parts.draws import Rng, keep_masks
from agents.parts.losses import advantage_weights, expectile_loss
from agents.parts.parameters import average, orthogonal_init
from agents.parts.policies import BoxGaussian
from agents.parts.published import required

LAYERS = 2  # hidden layers of every network


class IQL(Agent):
    """The agent of `--algo iql`; `config` is a `hyperparameters.IQLConfig`."""

    METRICS = (
        "value_loss", "actor_loss", "bc_loss", "critic_loss", "advantage", "q_mean",
        "value_grad_norm", "actor_grad_norm", "critic_grad_norm",
    )  # fmt: skip
    COMPILED = ("value_loss", "policy_loss", "critic_loss")

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        max_action: float,
        config: Any,
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(state_dim, action_dim, max_action, config, seeds, device)
        c, n, on = config, self.num_seeds, self.device
        self.actor = BoxGaussian(self.sizes, [c.hidden_dim] * LAYERS, own_std=False, dropout=c.dropout)
        self.critic = TwinCritic(self.sizes, [c.hidden_dim] * LAYERS, torch.relu)
        self.value = ValueNetwork(self.sizes, [c.hidden_dim] * LAYERS, torch.relu)
        generators = self.init_generators()
        for network in (self.actor, self.critic, self.value):
            orthogonal_init(network.parameters, generators, gain=math.sqrt(2))
        self.critic_target = self.critic.averaged()
        self.clock = torch.zeros((), device=on)
        self.networks = {
            "actor": self.actor.parameters,
            "critic": self.critic.parameters,
            "value": self.value.parameters,
            "critic_target": self.critic_target.parameters,
        }
        self.optimizers = {
            "actor": Adam(self.actor.parameters, n, c.learning_rate, c.grad_norm),
            "critic": Adam(self.critic.parameters, n, c.critic_learning_rate, c.grad_norm),
            "value": Adam(self.value.parameters, n, c.critic_learning_rate, c.grad_norm),
        }

    def schedule(self, step: int) -> tuple[float, ...]:
        """Rate factor of the policy; `lr_decay`'s is computed at every update instead."""
        return (1.0,) if self.config.lr_decay else super().schedule(step)

    def apply_schedule(self, values: tuple[float, ...]) -> None:
        self.optimizers["actor"].set_rate(values[0])  # the critics' rate stays

    def prepare(self) -> None:
        super().prepare()
        if self.config.lr_decay:
            self.clock.fill_(self.step)

    def _draw(self, rng: Rng, batch_size: int, steps: int) -> dict[str, Tensor]:
        c = self.config
        if c.dropout == 0:
            return {}
        return {"kept": keep_masks(rng, self.num_seeds, steps, c.dropout, (batch_size, LAYERS * c.hidden_dim))}

    # --- The update -----------------------------------------------------------------------------------

    def gradient_step(self, batch: Batch, draws: Draws, step: int) -> dict[str, Tensor]:
        c = self.config
        if c.lr_decay:
            cosine_decay([self.optimizers["actor"]], self.clock, c.num_epochs * c.num_steps_per_epoch)
        loss, metrics = self.value_loss(batch, draws)
        metrics["value_grad_norm"] = self.optimizers["value"].step(self.value.parameters.gradient(loss))
        loss, policy_metrics = self.policy_loss(batch, draws)
        metrics["actor_grad_norm"] = self.optimizers["actor"].step(self.actor.parameters.gradient(loss))
        loss, critic_metrics = self.critic_loss(batch, draws)
        metrics["critic_grad_norm"] = self.optimizers["critic"].step(self.critic.parameters.gradient(loss))
        average(self.critic_target.parameters, self.critic.parameters, c.tau)
        return metrics | policy_metrics | critic_metrics

    def value_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Expectile loss of min Q' - V (eq. 5) [S]."""
        q = self.critic_target(batch["states"], batch["actions"]).amin(dim=1)
        loss = expectile_loss(q - self.value(batch["states"]), self.config.expectile).mean(dim=1)
        return loss, {"value_loss": loss.detach()}

    def policy_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Negative log-likelihood of the data, weighted by exp(beta (min Q' - V)) up to 100 (eq. 7) [S]."""
        states, actions = batch["states"], batch["actions"]
        with torch.no_grad():
            advantages = self.critic_target(states, actions).amin(dim=1) - self.value(states)
            weights = advantage_weights(advantages, self.config.beta)
        likelihood = self.actor.log_density(*self.actor(states, draws.get("kept")), actions)
        loss = -(weights * likelihood).mean(dim=1)
        metrics = {"actor_loss": loss.detach(), "bc_loss": -likelihood.detach().mean(dim=1)}
        return loss, {**metrics, "advantage": advantages.mean(dim=1)}

    def critic_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Both critics' squared errors against r + discount V(s') (eq. 6) [S]."""
        with torch.no_grad():
            bootstrap = self.value(batch["next_states"])
            target = batch["rewards"][..., 0] + self.config.discount * batch["not_dones"][..., 0] * bootstrap
        errors = self.critic(batch["states"], batch["actions"]) - target.unsqueeze(1)
        loss = errors.square().mean(dim=2).sum(dim=1)
        return loss, {"critic_loss": loss.detach(), "q_mean": target.mean(dim=1)}

    # --- Acting ---------------------------------------------------------------------------------------

    def act_draws(self, rng: Rng, states: int) -> dict[str, Tensor]:
        return {}

    def actions_for(self, states: Tensor, noise: Mapping[str, Tensor]) -> Tensor:
        """The policy's mean: the published evaluation has temperature 0."""
        return self.actor.actions(*self.actor(states))

    # --- Weights by name ------------------------------------------------------------------------------

    def load_published(self, networks: Mapping[str, Mapping[str, Tensor]]) -> None:
        """`actor`, `critic` (with V) and perhaps `critic_target`, named as `published_state` names them.

        A missing average is copied from the critics. Raises ValueError for missing or misshapen weights.
        """
        actor, critic = required(networks, "actor"), required(networks, "critic")
        for seed in range(self.num_seeds):
            self.actor.parameters.load_member(seed, actor)
            self.critic.load_seed(seed, critic)
            self.value.parameters.load_member(seed, critic)
            self.critic_target.load_seed(seed, networks.get("critic_target", critic))

    def published_state(self) -> list[dict[str, Any]]:
        """One dict a seed. The official code is JAX and saves nothing in PyTorch's form: the names are ours."""
        return [
            {
                "actor": self.actor.parameters.member_state(seed),
                "critic": self.critic.seed_state(seed) | self.value.parameters.member_state(seed),
                "critic_target": self.critic_target.seed_state(seed),
            }
            for seed in range(self.num_seeds)
        ]
