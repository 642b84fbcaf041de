"""BEAR: bootstrapping error accumulation reduction (Kumar et al. 2019, arXiv 1906.00949), as published for D4RL.

    max_pi  E[min Q(s, a)]   subject to   E[MMD(pi(.|s), data's policy)] <= epsilon      a ~ pi
    min_alpha  -E[alpha (MMD - epsilon)]                                                 the constraint's multiplier

The data's policy is modelled by a variational autoencoder. The discrepancy is taken between actions before the tanh,
whose gradient does not vanish at the edge of the action box. It follows the authors' code in D4RL-Evaluations, bear/:
two critics rather than a larger ensemble, and the policy's gradient taken before the critics' step. The multiplier's
logarithm is what is learnt.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from agents.parts.agent import Agent, Batch, Draws, Outcome
from agents.parts.critics import TwinCritic
from agents.parts.draws import Rng, candidates_best, normals
from agents.parts.losses import mmd, soft_clipped_backup, td_target, twin_error
from agents.parts.multiplier import Multiplier
from agents.parts.parameters import rlkit_init
from agents.parts.policies import TanhGaussian
from agents.parts.vae import VariationalAutoencoder

BACKUP_ACTIONS = 10  # actions per next state in the critics' target
LOG_ALPHA = (-5.0, 10.0)  # bounds of the multiplier's logarithm


class BEAR(Agent):
    """The agent of `--algo bear`; `config` is a `hyperparameters.BEARConfig`."""

    METRICS = (
        "vae_loss", "mmd", "alpha", "q_loss", "actor_loss", "critic_loss", "q_mean",
        "vae_grad_norm", "actor_grad_norm", "critic_grad_norm",
    )  # fmt: skip
    COMPILED = ("behaviour_loss", "critic_loss", "policy_loss")

    def build(self) -> None:
        c, widths = self.config, [self.config.hidden_dim] * 2
        actor_init, critic_init = partial(rlkit_init, bound=1e-3), partial(rlkit_init, bound=3e-3)  # their `init_w`
        self.actor = self.learn("actor", TanhGaussian(self.sizes, widths), c.learning_rate, actor_init)
        critic = TwinCritic(self.sizes, widths, torch.relu, names=("l",))
        self.critic = self.learn("critic", critic, c.critic_learning_rate, critic_init)
        self.vae = self.learn("vae", VariationalAutoencoder(self.sizes, c.vae_hidden_dim), c.vae_learning_rate)
        self.critic_target = self.average_of("critic_target", self.critic, 1 - c.tau)
        self.constant_critic = self.critic.frozen()
        alpha = Multiplier(self.sizes, log=True, stored=LOG_ALPHA)
        self.alpha = self.learn("alpha", alpha, c.alpha_learning_rate, published="log_alpha")
        self.q_weight = self.from_step(c.warmup_steps, 1.0)  # of the value term: 0 while warming up

    def _draw(self, rng: Rng, batch_size: int, steps: int) -> dict[str, Tensor]:
        n, A, codes, samples = self.num_seeds, self.action_dim, self.vae.latent_dim, self.config.mmd_samples
        return {
            "vae_noise": normals(rng, n, steps, (batch_size, codes)),
            "next_action_noise": normals(rng, n, steps, (batch_size, BACKUP_ACTIONS, A)),
            "code_noise": normals(rng, n, steps, (batch_size * samples, codes)),
            "policy_noise": normals(rng, n, steps, (batch_size, samples, A)),
        }

    # --- The update: Algorithm 1 ------------------------------------------------------------------------

    def gradient_step(self, batch: Batch, draws: Draws, step: int) -> dict[str, Tensor]:
        metrics = self.descend("vae", self.behaviour_loss(batch, draws))
        metrics |= self.descend_together(
            {"critic": self.critic_loss(batch, draws), "actor": self.policy_loss(batch, draws)}
        )
        metrics |= self.ascend("alpha", metrics["mmd"] - self.config.mmd_threshold)
        self.critic_target.follow(self.critic)
        return metrics

    def behaviour_loss(self, batch: Batch, draws: Draws) -> Outcome:
        """The autoencoder's loss of the data's actions [S]."""
        loss = self.vae.loss(batch["states"], batch["actions"], draws["vae_noise"])
        return loss, {"vae_loss": loss.detach()}

    def critic_loss(self, batch: Batch, draws: Draws) -> Outcome:
        """Both critics' squared errors against r + gamma (best of 10 actions of the policy, soft clipped) [S]."""
        c, next_states = self.config, batch["next_states"]
        with torch.no_grad():
            actions = self.actor.actions(*self.actor(next_states), draws["next_action_noise"])
            values = self.critic_target(next_states, actions.flatten(1, 2))
            bootstrap = soft_clipped_backup(values, c.min_weight, BACKUP_ACTIONS)
            target = td_target(batch, c.discount, bootstrap)
        loss = twin_error(self.critic(batch["states"], batch["actions"]), target)
        return loss, {"critic_loss": loss.detach(), "q_mean": target.mean(dim=1)}

    def policy_loss(self, batch: Batch, draws: Draws) -> Outcome:
        """alpha (MMD - epsilon) - min Q of the first action compared; without the Q term while warming up [S]."""
        c, states = self.config, batch["states"]
        with torch.no_grad():
            likely = self.vae.sample(states, draws["code_noise"]).unflatten(1, (-1, c.mmd_samples))
        raw = self.actor.raw_actions(*self.actor(states), draws["policy_noise"])
        distance = mmd(likely, raw, c.mmd_kernel, c.mmd_sigma).mean(dim=1)
        q_loss = -self.constant_critic(states, self.actor.squashed(raw[:, :, 0])).amin(dim=1).mean(dim=1)
        loss = self.alpha() * (distance - c.mmd_threshold) + self.q_weight * q_loss
        parts = {"mmd": distance, "q_loss": q_loss, "actor_loss": loss}
        return loss, {name: part.detach() for name, part in parts.items()}

    # --- Acting -----------------------------------------------------------------------------------------

    def act_draws(self, rng: Rng, states: int) -> dict[str, Tensor]:
        shape = (states, self.config.action_candidates, self.action_dim)
        return {"noise": normals(rng, self.num_seeds, 1, shape)[0]}

    def actions_for(self, states: Tensor, noise: Mapping[str, Tensor]) -> Tensor:
        """The best of `action_candidates` actions per state by Q1."""
        actions = self.actor.actions(*self.actor(states), noise["noise"])
        values = self.critic.first(states, actions.flatten(1, 2))
        return candidates_best(values.view(actions.shape[:3]), actions)
