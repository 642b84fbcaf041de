"""BCQ: batch-constrained Q-learning (Fujimoto et al. 2019, arXiv 1812.02900), as published.

    max_xi  E[Q1(s, a + xi(s, a))]      a ~ the data's policy, modelled by a variational autoencoder; |xi| <= phi

A perturbation of the behaviour model's actions, and the best of many of them by Q1. The official code is
sfujim/BCQ, continuous_BCQ/.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from agents.parts.adam import Adam
from agents.parts.agent import Agent, Batch, Draws
from agents.parts.critics import TwinCritic
from agents.parts.draws import Rng, candidates_best, normals
from agents.parts.losses import soft_clipped_backup
from agents.parts.parameters import average, default_init
from agents.parts.policies import Perturbation
from agents.parts.published import required
from agents.parts.vae import VariationalAutoencoder

BACKUP_ACTIONS = 10  # actions a next state in the critics' target


class BCQ(Agent):
    """The agent of `--algo bcq`; `config` is a `hyperparameters.BCQConfig`."""

    METRICS = (
        "vae_loss", "q_loss", "critic_loss", "q_mean", "vae_grad_norm", "actor_grad_norm", "critic_grad_norm",
    )  # fmt: skip
    COMPILED = ("behaviour_loss", "critic_loss", "policy_loss")

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
        c, n = config, self.num_seeds
        widths = [c.hidden_dim, 3 * c.hidden_dim // 4]
        self.actor = Perturbation(self.sizes, widths, c.phi)
        self.critic = TwinCritic(self.sizes, widths, torch.relu, names=("l",))
        self.vae = VariationalAutoencoder(self.sizes, c.vae_hidden_dim)
        generators = self.init_generators()
        for network in (self.actor, self.critic, self.vae):
            default_init(network.parameters, generators)
        self.actor_target, self.critic_target = self.actor.averaged(), self.critic.averaged()
        self.constant_critic = self.critic.frozen()
        self.networks = {
            "actor": self.actor.parameters,
            "critic": self.critic.parameters,
            "vae": self.vae.parameters,
            "actor_target": self.actor_target.parameters,
            "critic_target": self.critic_target.parameters,
        }
        self.optimizers = {
            "actor": Adam(self.actor.parameters, n, c.learning_rate, c.grad_norm),
            "critic": Adam(self.critic.parameters, n, c.critic_learning_rate, c.grad_norm),
            "vae": Adam(self.vae.parameters, n, c.vae_learning_rate, c.grad_norm),
        }

    def _draw(self, rng: Rng, batch_size: int, steps: int) -> dict[str, Tensor]:
        n, codes = self.num_seeds, self.vae.latent_dim
        return {
            "vae_noise": normals(rng, n, steps, (batch_size, codes)),
            "next_code_noise": normals(rng, n, steps, (batch_size * BACKUP_ACTIONS, codes)),
            "code_noise": normals(rng, n, steps, (batch_size, codes)),
        }

    # --- The update: Algorithm 1 ------------------------------------------------------------------------

    def gradient_step(self, batch: Batch, draws: Draws, step: int) -> dict[str, Tensor]:
        metrics: dict[str, Tensor] = {}
        parts = (("vae", self.behaviour_loss), ("critic", self.critic_loss), ("actor", self.policy_loss))
        for name, compute in parts:
            loss, found = compute(batch, draws)
            metrics |= found
            metrics[f"{name}_grad_norm"] = self.optimizers[name].step(self.networks[name].gradient(loss))
        average(self.critic_target.parameters, self.critic.parameters, self.config.tau)
        average(self.actor_target.parameters, self.actor.parameters, self.config.tau)
        return metrics

    def behaviour_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """The autoencoder's loss of the data's actions [S]."""
        loss = self.vae.loss(batch["states"], batch["actions"], draws["vae_noise"])
        return loss, {"vae_loss": loss.detach()}

    def critic_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Both critics' squared errors against r + gamma (best of 10 perturbed actions, soft clipped) [S]."""
        c, next_states = self.config, batch["next_states"]
        with torch.no_grad():
            likely = self.vae.actions(self.vae.sample(next_states, draws["next_code_noise"]))
            values = self.critic_target(next_states, self.actor_target(next_states, likely))
            bootstrap = soft_clipped_backup(values, c.min_weight, BACKUP_ACTIONS)
            target = batch["rewards"][..., 0] + c.discount * batch["not_dones"][..., 0] * bootstrap
        errors = self.critic(batch["states"], batch["actions"]) - target.unsqueeze(1)
        loss = errors.square().mean(dim=2).sum(dim=1)
        return loss, {"critic_loss": loss.detach(), "q_mean": target.mean(dim=1)}

    def policy_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """-Q1 of the perturbed actions; the gradient goes to the perturbation alone [S]."""
        states = batch["states"]
        with torch.no_grad():
            likely = self.vae.actions(self.vae.sample(states, draws["code_noise"]))
        loss = -self.constant_critic(states, self.actor(states, likely))[:, 0].mean(dim=1)
        return loss, {"q_loss": loss.detach()}

    # --- Acting -----------------------------------------------------------------------------------------

    def act_draws(self, rng: Rng, states: int) -> dict[str, Tensor]:
        shape = (states, self.config.action_candidates, self.vae.latent_dim)
        return {"code_noise": normals(rng, self.num_seeds, 1, shape)[0]}

    def actions_for(self, states: Tensor, noise: Mapping[str, Tensor]) -> Tensor:
        """The best of `action_candidates` perturbed actions a state by Q1."""
        likely = self.vae.actions(self.vae.sample(states, noise["code_noise"].flatten(1, 2)))
        actions = self.actor(states, likely)
        shape = noise["code_noise"].shape[:3]
        values = self.critic(states, actions)[:, 0]
        return candidates_best(values.view(shape), actions.view(*shape, -1))

    # --- Published names --------------------------------------------------------------------------------

    def load_published(self, networks: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Weights under the published modules' names (`actor`, `critic`, `vae`); missing targets are copied from these.

        Raises ValueError for missing or misshapen weights.
        """
        actor, critic = required(networks, "actor"), required(networks, "critic")
        for seed in range(self.num_seeds):
            self.actor.parameters.load_member(seed, actor)
            self.critic.load_seed(seed, critic)
            self.vae.parameters.load_member(seed, required(networks, "vae"))
            self.actor_target.parameters.load_member(seed, networks.get("actor_target", actor))
            self.critic_target.load_seed(seed, networks.get("critic_target", critic))

    def published_state(self) -> list[dict[str, Any]]:
        """One dict a seed: `actor`, `critic`, `vae`, `actor_target`, `critic_target` by published names."""
        return [
            {
                "actor": self.actor.parameters.member_state(seed),
                "critic": self.critic.seed_state(seed),
                "vae": self.vae.parameters.member_state(seed),
                "actor_target": self.actor_target.parameters.member_state(seed),
                "critic_target": self.critic_target.seed_state(seed),
            }
            for seed in range(self.num_seeds)
        ]
