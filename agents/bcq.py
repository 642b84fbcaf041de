"""BCQ: batch-constrained Q-learning (Fujimoto et al. 2019, arXiv 1812.02900), as published.

    max_xi  E[Q1(s, a + xi(s, a))]      a ~ the data's policy, modelled by a variational autoencoder; |xi| <= phi

A perturbation of the behaviour model's actions, and the best of many of them by Q1. The official code is
sfujim/BCQ, continuous_BCQ/.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from agents.parts.agent import Agent, Batch, Draws, Outcome
from agents.parts.critics import TwinCritic
from agents.parts.draws import Rng, candidates_best, normals
from agents.parts.losses import soft_clipped_backup, td_target, twin_error
from agents.parts.policies import Perturbation
from agents.parts.vae import VariationalAutoencoder

BACKUP_ACTIONS = 10  # actions per next state in the critics' target


class BCQ(Agent):
    """The agent of `--algo bcq`; `config` is a `hyperparameters.BCQConfig`."""

    METRICS = (
        "vae_loss", "q_loss", "critic_loss", "q_mean", "vae_grad_norm", "actor_grad_norm", "critic_grad_norm",
    )  # fmt: skip
    COMPILED = ("behaviour_loss", "critic_loss", "policy_loss")

    def build(self) -> None:
        c, widths = self.config, [self.config.hidden_dim, 3 * self.config.hidden_dim // 4]
        self.actor = self.learn("actor", Perturbation(self.sizes, widths, c.phi), c.learning_rate)
        critic = TwinCritic(self.sizes, widths, torch.relu, names=("l",))
        self.critic = self.learn("critic", critic, c.critic_learning_rate)
        self.vae = self.learn("vae", VariationalAutoencoder(self.sizes, c.vae_hidden_dim), c.vae_learning_rate)
        self.actor_target = self.average_of("actor_target", self.actor, 1 - c.tau)
        self.critic_target = self.average_of("critic_target", self.critic, 1 - c.tau)
        self.constant_critic = self.critic.frozen()

    def _draw(self, rng: Rng, batch_size: int, steps: int) -> dict[str, Tensor]:
        n, codes = self.num_seeds, self.vae.latent_dim
        return {
            "vae_noise": normals(rng, n, steps, (batch_size, codes)),
            "next_code_noise": normals(rng, n, steps, (batch_size * BACKUP_ACTIONS, codes)),
            "code_noise": normals(rng, n, steps, (batch_size, codes)),
        }

    # --- The update: Algorithm 1 ------------------------------------------------------------------------

    def gradient_step(self, batch: Batch, draws: Draws, step: int) -> dict[str, Tensor]:
        metrics = self.descend("vae", self.behaviour_loss(batch, draws))
        metrics |= self.descend("critic", self.critic_loss(batch, draws))
        metrics |= self.descend("actor", self.policy_loss(batch, draws))
        self.critic_target.follow(self.critic)
        self.actor_target.follow(self.actor)
        return metrics

    def behaviour_loss(self, batch: Batch, draws: Draws) -> Outcome:
        """The autoencoder's loss of the data's actions [S]."""
        loss = self.vae.loss(batch["states"], batch["actions"], draws["vae_noise"])
        return loss, {"vae_loss": loss.detach()}

    def critic_loss(self, batch: Batch, draws: Draws) -> Outcome:
        """Both critics' squared errors against r + gamma (best of 10 perturbed actions, soft clipped) [S]."""
        c, next_states = self.config, batch["next_states"]
        with torch.no_grad():
            likely = self.vae.squashed(self.vae.sample(next_states, draws["next_code_noise"]))
            values = self.critic_target(next_states, self.actor_target(next_states, likely))
            bootstrap = soft_clipped_backup(values, c.min_weight, BACKUP_ACTIONS)
            target = td_target(batch, c.discount, bootstrap)
        loss = twin_error(self.critic(batch["states"], batch["actions"]), target)
        return loss, {"critic_loss": loss.detach(), "q_mean": target.mean(dim=1)}

    def policy_loss(self, batch: Batch, draws: Draws) -> Outcome:
        """-Q1 of the perturbed actions; the gradient goes to the perturbation alone [S]."""
        states = batch["states"]
        with torch.no_grad():
            likely = self.vae.squashed(self.vae.sample(states, draws["code_noise"]))
        loss = -self.constant_critic.first(states, self.actor(states, likely)).mean(dim=1)
        return loss, {"q_loss": loss.detach()}

    # --- Acting -----------------------------------------------------------------------------------------

    def act_draws(self, rng: Rng, states: int) -> dict[str, Tensor]:
        shape = (states, self.config.action_candidates, self.vae.latent_dim)
        return {"code_noise": normals(rng, self.num_seeds, 1, shape)[0]}

    def actions_for(self, states: Tensor, noise: Mapping[str, Tensor]) -> Tensor:
        """The best of `action_candidates` perturbed actions per state by Q1."""
        likely = self.vae.squashed(self.vae.sample(states, noise["code_noise"].flatten(1, 2)))
        actions = self.actor(states, likely)
        shape = noise["code_noise"].shape[:3]
        values = self.critic.first(states, actions)
        return candidates_best(values.view(shape), actions.view(*shape, -1))
