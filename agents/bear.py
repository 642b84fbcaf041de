"""BEAR: bootstrapping error accumulation reduction (Kumar et al. 2019, arXiv 1906.00949), as published for D4RL.

    max_pi  E[min Q(s, a)]   subject to   E[MMD(pi(.|s), data's policy)] <= epsilon      a ~ pi
    min_alpha  -E[alpha (MMD - epsilon)]                                                 the constraint's multiplier

The data's policy is modelled by a variational autoencoder. The discrepancy is taken between actions before the tanh,
whose gradient does not vanish at the edge of the action box. It follows the authors' code in D4RL-Evaluations, bear/:
two critics rather than a larger ensemble. The multiplier's logarithm is what is learnt.
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
from agents.parts.losses import mmd, soft_clipped_backup
from agents.parts.parameters import Parameters, average, default_init
from agents.parts.policies import TanhGaussian
from agents.parts.published import required
from agents.parts.vae import VariationalAutoencoder

BACKUP_ACTIONS = 10  # actions a next state in the critics' target
LOG_ALPHA = (-5.0, 10.0)  # bounds of the multiplier's logarithm


class BEAR(Agent):
    """The agent of `--algo bear`; `config` is a `hyperparameters.BEARConfig`."""

    METRICS = (
        "vae_loss", "mmd", "alpha", "q_loss", "actor_loss", "critic_loss", "q_mean",
        "vae_grad_norm", "actor_grad_norm", "critic_grad_norm",
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
        self.actor = TanhGaussian(self.sizes, [c.hidden_dim] * 2)
        self.critic = TwinCritic(self.sizes, [c.hidden_dim] * 2, torch.relu, names=("l",))
        self.vae = VariationalAutoencoder(self.sizes, c.vae_hidden_dim)
        generators = self.init_generators()
        for network in (self.actor, self.critic, self.vae):
            default_init(network.parameters, generators)
        self.critic_target, self.constant_critic = self.critic.averaged(), self.critic.frozen()
        self.log_alpha = Parameters({"log_alpha": ()}, n, self.device, trainable=False)
        self.q_weight = torch.zeros((), device=self.device)
        self.networks = {
            "actor": self.actor.parameters,
            "critic": self.critic.parameters,
            "vae": self.vae.parameters,
            "critic_target": self.critic_target.parameters,
            "log_alpha": self.log_alpha,
        }
        self.optimizers = {
            "actor": Adam(self.actor.parameters, n, c.learning_rate, c.grad_norm),
            "critic": Adam(self.critic.parameters, n, c.critic_learning_rate, c.grad_norm),
            "vae": Adam(self.vae.parameters, n, c.vae_learning_rate, c.grad_norm),
            "log_alpha": Adam(self.log_alpha, n, c.alpha_learning_rate, c.grad_norm),
        }

    def schedule(self, step: int) -> tuple[float, ...]:
        """Rate factor, and the weight of the value term: 0 while warming up, then 1."""
        return (*super().schedule(step), float(step >= self.config.warmup_steps))

    def apply_schedule(self, values: tuple[float, ...]) -> None:
        super().apply_schedule(values)
        self.q_weight.fill_(values[1])

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
        metrics: dict[str, Tensor] = {}
        parts = (("vae", self.behaviour_loss), ("critic", self.critic_loss), ("actor", self.policy_loss))
        for name, compute in parts:
            loss, found = compute(batch, draws)
            metrics |= found
            metrics[f"{name}_grad_norm"] = self.optimizers[name].step(self.networks[name].gradient(loss))
        self._step_multiplier(metrics["mmd"])
        metrics["alpha"] = self.alpha()
        average(self.critic_target.parameters, self.critic.parameters, self.config.tau)
        return metrics

    def behaviour_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """The autoencoder's loss of the data's actions [S]."""
        loss = self.vae.loss(batch["states"], batch["actions"], draws["vae_noise"])
        return loss, {"vae_loss": loss.detach()}

    def critic_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Both critics' squared errors against r + gamma (best of 10 actions of the policy, soft clipped) [S]."""
        c, next_states = self.config, batch["next_states"]
        with torch.no_grad():
            actions = self.vae.actions(self.raw_actions(next_states, draws["next_action_noise"]))
            values = self.critic_target(next_states, actions.flatten(1, 2))
            bootstrap = soft_clipped_backup(values, c.min_weight, BACKUP_ACTIONS)
            target = batch["rewards"][..., 0] + c.discount * batch["not_dones"][..., 0] * bootstrap
        errors = self.critic(batch["states"], batch["actions"]) - target.unsqueeze(1)
        loss = errors.square().mean(dim=2).sum(dim=1)
        return loss, {"critic_loss": loss.detach(), "q_mean": target.mean(dim=1)}

    def policy_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """alpha (MMD - epsilon) - min Q of the first action compared; without the Q term while warming up [S]."""
        c, states = self.config, batch["states"]
        with torch.no_grad():
            likely = self.vae.sample(states, draws["code_noise"]).unflatten(1, (-1, c.mmd_samples))
        raw = self.raw_actions(states, draws["policy_noise"])
        distance = mmd(likely, raw, c.mmd_kernel, c.mmd_sigma).mean(dim=1)
        q_loss = -self.constant_critic(states, self.vae.actions(raw[:, :, 0])).amin(dim=1).mean(dim=1)
        loss = self.alpha() * (distance - c.mmd_threshold) + self.q_weight * q_loss
        parts = {"mmd": distance, "q_loss": q_loss, "actor_loss": loss}
        return loss, {name: part.detach() for name, part in parts.items()}

    def raw_actions(self, states: Tensor, noise: Tensor) -> Tensor:
        """The policy's actions before the tanh: states [S, B, state_dim], noise [S, B, R, A] -> [S, B, R, A]."""
        mean, log_std = self.actor(states)
        return mean.unsqueeze(2) + log_std.exp().unsqueeze(2) * noise

    def alpha(self) -> Tensor:
        """The constraint's multiplier [S]."""
        return self.log_alpha.flat[:, 0].exp()

    def _step_multiplier(self, distance: Tensor) -> None:
        """Adam on -alpha (MMD - epsilon) by log alpha, whose derivative is the same expression; then its bounds."""
        self.optimizers["log_alpha"].step(-(self.alpha() * (distance - self.config.mmd_threshold)).unsqueeze(1))
        self.log_alpha.flat.clamp_(*LOG_ALPHA)

    # --- Acting -----------------------------------------------------------------------------------------

    def act_draws(self, rng: Rng, states: int) -> dict[str, Tensor]:
        shape = (states, self.config.action_candidates, self.action_dim)
        return {"noise": normals(rng, self.num_seeds, 1, shape)[0]}

    def actions_for(self, states: Tensor, noise: Mapping[str, Tensor]) -> Tensor:
        """The best of `action_candidates` actions a state by Q1."""
        actions = self.vae.actions(self.raw_actions(states, noise["noise"]))
        values = self.critic(states, actions.flatten(1, 2))[:, 0]
        return candidates_best(values.view(actions.shape[:3]), actions)

    # --- Published names --------------------------------------------------------------------------------

    def load_published(self, networks: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Weights as `published_state` gives them; a missing target is copied, a `log_alpha` taken if there is one.

        Critics and autoencoder have the names of the authors' modules; no published file has such weights alone.
        Raises ValueError for missing or misshapen weights.
        """
        critic = required(networks, "critic")
        for seed in range(self.num_seeds):
            self.actor.parameters.load_member(seed, required(networks, "actor"))
            self.critic.load_seed(seed, critic)
            self.vae.parameters.load_member(seed, required(networks, "vae"))
            self.critic_target.load_seed(seed, networks.get("critic_target", critic))
        if "log_alpha" in networks:
            self.log_alpha.flat.fill_(float(networks["log_alpha"]))

    def published_state(self) -> list[dict[str, Any]]:
        """One dict a seed: `actor`, `critic`, `vae`, `critic_target` by name, and the multiplier's `log_alpha`."""
        return [
            {
                "actor": self.actor.parameters.member_state(seed),
                "critic": self.critic.seed_state(seed),
                "vae": self.vae.parameters.member_state(seed),
                "critic_target": self.critic_target.seed_state(seed),
                "log_alpha": self.log_alpha.flat[seed, 0].clone(),
            }
            for seed in range(self.num_seeds)
        ]
