"""TD3+BC (Fujimoto & Gu 2021, arXiv 2106.06860): TD3 with the data's actions as a second aim, as published.

    max_pi  E[lambda Q1(s, pi(s)) - (pi(s) - a)^2]      lambda = alpha / mean |Q1(s, pi(s))| over the batch

A deterministic policy over states of mean 0 and deviation 1. Its official code is sfujim/TD3_BC.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from agents.agent import Adam, Agent, Batch, Draws, Rng, Transitions, average, normals
from agents.networks import DeterministicActor, Parameters, TD3Critic, default_init
from agents.published import required

__all__ = ["TD3BC"]

LEAST_DEVIATION = 1e-3  # added to the states' deviations, as published: a constant state is no division by zero


class TD3BC(Agent):
    """The agent of `--algo td3_bc`; `config` is a `hyperparameters.TD3BCConfig`."""

    METRICS = (
        "bc_loss", "q_loss", "actor_loss", "critic_loss", "q_mean", "actor_grad_norm", "critic_grad_norm",
    )  # fmt: skip
    COMPILED = ("critic_loss", "policy_loss")

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
        c, n, widths = config, self.num_seeds, [config.hidden_dim] * 2
        self.actor = DeterministicActor(state_dim, action_dim, self.max_action, n, self.device, widths)
        self.critic = TD3Critic(state_dim, action_dim, n, self.device, widths)
        generators = self.init_generators()
        default_init(self.actor.parameters, generators)
        default_init(self.critic.parameters, generators)
        self.actor_target, self.critic_target = self.actor.averaged(), self.critic.averaged()
        self.constant_critic = self.critic.frozen()
        shapes = {"mean": (state_dim,), "deviation": (state_dim,)}
        self.normalizer = Parameters(shapes, n, self.device, trainable=False)
        self.normalizer["deviation"].fill_(1.0)
        self.networks = {
            "actor": self.actor.parameters,
            "critic": self.critic.parameters,
            "actor_target": self.actor_target.parameters,
            "critic_target": self.critic_target.parameters,
            "normalizer": self.normalizer,
        }
        self.optimizers = {
            "actor": Adam(self.actor.parameters, n, c.learning_rate, c.grad_norm),
            "critic": Adam(self.critic.parameters, n, c.critic_learning_rate, c.grad_norm),
        }

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
        c = self.config
        loss, metrics = self.critic_loss(batch, draws)
        metrics["critic_grad_norm"] = self.optimizers["critic"].step(self.critic.parameters.gradient(loss))
        if (step + 1) % c.policy_interval == 0:  # the published loop counts from 1
            loss, policy_metrics = self.policy_loss(batch, draws)
            metrics["actor_grad_norm"] = self.optimizers["actor"].step(self.actor.parameters.gradient(loss))
            metrics |= policy_metrics
            average(self.critic_target.parameters, self.critic.parameters, c.tau)
            average(self.actor_target.parameters, self.actor.parameters, c.tau)
        return metrics

    def critic_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Both critics' squared errors against r + gamma min(Q1', Q2')(s', pi'(s') + clipped noise) [S]."""
        c, box = self.config, self.max_action
        with torch.no_grad():
            next_states = self.normalized(batch["next_states"])
            bound = c.target_noise_clip * box
            noise = (draws["target_noise"] * (c.target_noise * box)).clamp(-bound, bound)
            next_actions = (self.actor_target(next_states) + noise).clamp(-box, box)
            bootstrap = self.critic_target(next_states, next_actions).amin(dim=1)
            target = batch["rewards"][..., 0] + c.discount * batch["not_dones"][..., 0] * bootstrap
        errors = self.critic(self.normalized(batch["states"]), batch["actions"]) - target.unsqueeze(1)
        loss = errors.square().mean(dim=2).sum(dim=1)
        return loss, {"critic_loss": loss.detach(), "q_mean": target.mean(dim=1)}

    def policy_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """(pi(s) - a)^2 - alpha Q1(s, pi(s)) / mean |Q1| [S]."""
        states = self.normalized(batch["states"])
        actions = self.actor(states)
        q = self.constant_critic(states, actions)[:, 0]
        q_loss = -q.mean(dim=1) / q.detach().abs().mean(dim=1)
        bc_loss = (actions - batch["actions"]).square().mean(dim=(1, 2))
        loss = self.config.alpha * q_loss + bc_loss
        return loss, {"bc_loss": bc_loss.detach(), "q_loss": q_loss.detach(), "actor_loss": loss.detach()}

    # --- Acting -----------------------------------------------------------------------------------------

    def act_draws(self, rng: Rng, states: int) -> dict[str, Tensor]:
        """Nothing: the policy is deterministic."""
        return {}

    def actions_for(self, states: Tensor, noise: Mapping[str, Tensor]) -> Tensor:
        return self.actor(self.normalized(states))

    # --- Published names --------------------------------------------------------------------------------

    def load_published(self, networks: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Weights as the published code saves them (`actor`, `critic`); missing targets are copied from these.

        The states' mean and deviation are not among them: they come from the data. Raises ValueError for missing or
        misshapen weights.
        """
        actor, critic = required(networks, "actor"), required(networks, "critic")
        for seed in range(self.num_seeds):
            self.actor.parameters.load_member(seed, actor)
            self.critic.load_seed(seed, critic)
            self.actor_target.parameters.load_member(seed, networks.get("actor_target", actor))
            self.critic_target.load_seed(seed, networks.get("critic_target", critic))

    def published_state(self) -> list[dict[str, Any]]:
        """One dict a seed: `actor`, `critic`, `actor_target`, `critic_target` by published names."""
        return [
            {
                "actor": self.actor.parameters.member_state(seed),
                "critic": self.critic.seed_state(seed),
                "actor_target": self.actor_target.parameters.member_state(seed),
                "critic_target": self.critic_target.seed_state(seed),
            }
            for seed in range(self.num_seeds)
        ]
