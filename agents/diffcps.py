"""DiffCPS: diffusion-model-based constrained policy search (He et al. 2023, arXiv 2310.05333), as published.

    max_theta  E[Q(s, a)] - lambda L_c(theta)      a ~ policy, L_c the denoising loss   (the policy's step)
    min_lambda lambda (kappa - L_c)                                                      (the multiplier's step)

Where the paper and the published code differ, this follows the code; each place names its row of the list of
deviations in the README.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from agents.agent import (
    Adam,
    Agent,
    Batch,
    Draws,
    Rng,
    average,
    candidates_softmax,
    exponentials,
    integers,
    normals,
)
from agents.diffusion import Diffusion
from agents.networks import NoiseNetwork, Parameters, TwinCritic, default_init
from agents.published import policy_weights, required

__all__ = ["DiffCPS"]

BACKUP_ACTIONS = 10  # actions a next state of the max-Q backup


class DiffCPS(Agent):
    """The agent of `--algo diffcps`; `config` is a `hyperparameters.DiffCPSConfig`."""

    METRICS = (
        "kl_loss", "q_loss", "actor_loss", "critic_loss", "lambda", "q_mean",
        "actor_grad_norm", "critic_grad_norm", "lambda_grad_norm",
    )  # fmt: skip
    SHOWN = ("lambda",)
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
        c, n = config, self.num_seeds
        self.diffusion = Diffusion(c.beta_schedule, c.diffusion_steps, self.max_action, self.device)
        self.actor = NoiseNetwork(state_dim, action_dim, c.diffusion_steps, n, self.device, c.hidden_dim)
        self.critic = TwinCritic(state_dim, action_dim, n, self.device, c.hidden_dim)
        generators = self.init_generators()
        default_init(self.actor.parameters, generators)
        default_init(self.critic.parameters, generators)
        self.ema, self.critic_target = self.actor.averaged(), self.critic.averaged()
        self.multiplier = Parameters({"lambda": ()}, n, self.device, trainable=False)
        self.multiplier.flat.fill_(c.lambda_init)
        self.ema_weight = torch.zeros((), device=self.device)
        self.networks = {
            "actor": self.actor.parameters,
            "critic": self.critic.parameters,
            "ema": self.ema.parameters,
            "critic_target": self.critic_target.parameters,
            "lambda": self.multiplier,
        }
        self.optimizers = {
            "actor": Adam(self.actor.parameters, n, c.learning_rate, c.grad_norm),
            # The critics' rate does not follow the task's (DEVIATIONS 6).
            "critic": Adam(self.critic.parameters, n, c.critic_learning_rate, c.grad_norm),
            "lambda": Adam(self.multiplier, n, c.lambda_learning_rate, c.grad_norm),
        }

    @property
    def period(self) -> int:
        return math.lcm(self.config.policy_interval, self.config.ema_interval)

    def schedule(self, step: int) -> tuple[float, ...]:
        """Rate factor, and the weight of the policy's average: 0 until `ema_start` (DEVIATIONS 1)."""
        weight = 1 - self.config.ema_decay if step >= self.config.ema_start else 0.0
        return (*super().schedule(step), weight)

    def apply_schedule(self, values: tuple[float, ...]) -> None:
        super().apply_schedule(values)
        self.ema_weight.fill_(values[1])

    def _draw(self, rng: Rng, batch_size: int, steps: int) -> dict[str, Tensor]:
        n, T, A = self.num_seeds, self.config.diffusion_steps, self.action_dim
        backup = batch_size * (BACKUP_ACTIONS if self.config.max_q_backup else 1)
        return {
            "next_action_noise": normals(rng, n, steps, (T, backup, A)),
            "timesteps": integers(rng, n, steps, T, (batch_size,)),
            "noise": normals(rng, n, steps, (batch_size, A)),
            "policy_noise": normals(rng, n, steps, (T, batch_size, A)),
            "critic_choice": integers(rng, n, steps, 2, ()),
        }

    # --- The update: Algorithm 1 ----------------------------------------------------------------------

    def gradient_step(self, batch: Batch, draws: Draws, step: int) -> dict[str, Tensor]:
        c = self.config
        loss, metrics = self.critic_loss(batch, draws)
        metrics["critic_grad_norm"] = self.optimizers["critic"].step(self.critic.parameters.gradient(loss))
        if step % c.policy_interval == 0:
            loss, policy_metrics = self.policy_loss(batch, draws)
            metrics["actor_grad_norm"] = self.optimizers["actor"].step(self.actor.parameters.gradient(loss))
            metrics |= policy_metrics
            metrics["lambda_grad_norm"] = self._step_multiplier(metrics["kl_loss"])
            metrics["lambda"] = self.lambda_()
        if step % c.ema_interval == 0:
            average(self.ema.parameters, self.actor.parameters, self.ema_weight)
        average(self.critic_target.parameters, self.critic.parameters, c.tau)
        return metrics

    def critic_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Both critics' squared errors against r + gamma min(Q1', Q2')(s', a'), a' ~ the policy's average [S]."""
        with torch.no_grad():
            next_actions = self.diffusion.sample(self.ema, batch["next_states"], draws["next_action_noise"])
            values = self.critic_target(batch["next_states"], next_actions)
            if self.config.max_q_backup:
                values = values.unflatten(2, (-1, BACKUP_ACTIONS)).amax(dim=3)
            bootstrap = values.amin(dim=1)
            target = batch["rewards"][..., 0] + self.config.discount * batch["not_dones"][..., 0] * bootstrap
        errors = self.critic(batch["states"], batch["actions"]) - target.unsqueeze(1)
        loss = errors.square().mean(dim=2).sum(dim=1)
        return loss, {"critic_loss": loss.detach(), "q_mean": target.mean(dim=1)}

    def policy_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """lambda L_c - Q_i / mean |Q_j|, i drawn by coin and j the other critic (DEVIATIONS 3) [S]."""
        states, choice = batch["states"], draws["critic_choice"]
        kl_loss = self.diffusion.loss(self.actor, batch["actions"], states, draws["timesteps"], draws["noise"])
        actions = self.diffusion.sample(self.actor, states, draws["policy_noise"])
        scale = self.critic.one(1 - choice, states, actions.detach()).abs().mean(dim=1)
        q_loss = -self.critic.one(choice, states, actions).mean(dim=1) / scale
        loss = self.lambda_() * kl_loss + q_loss
        return loss, {"kl_loss": kl_loss.detach(), "q_loss": q_loss.detach(), "actor_loss": loss.detach()}

    def lambda_(self) -> Tensor:
        """The multiplier as it is used: clamped to [lambda_min, lambda_max] [S]."""
        return self.multiplier.flat[:, 0].clamp(self.config.lambda_min, self.config.lambda_max)

    def _step_multiplier(self, kl_loss: Tensor) -> Tensor:
        """Adam on lambda (kappa - L_c), whose derivative is kappa - L_c. Returns its size [S].

        The published code keeps the raw value unclamped, so it winds up beyond the bounds (DEVIATIONS 4);
        `lambda_anti_windup` clamps what is stored.
        """
        size = self.optimizers["lambda"].step((self.config.kappa - kl_loss).unsqueeze(1))
        if self.config.lambda_anti_windup:
            self.multiplier.flat.clamp_(self.config.lambda_min, self.config.lambda_max)
        return size

    # --- Acting ---------------------------------------------------------------------------------------

    def act_draws(self, rng: Rng, states: int) -> dict[str, Tensor]:
        n, candidates = self.num_seeds, self.config.action_candidates
        noise = normals(rng, n, 1, (states, self.config.diffusion_steps, candidates, self.action_dim))[0]
        return {"noise": noise, "exponential": exponentials(rng, n, (states, candidates))}

    def actions_for(self, states: Tensor, noise: Mapping[str, Tensor]) -> Tensor:
        """One of `action_candidates` actions a state, by softmax of the target critics' minimum (DEVIATIONS 7)."""
        chain = noise["noise"].transpose(1, 2).flatten(2, 3)  # [S, T, N C, A]
        actions = self.diffusion.sample(self.actor, states, chain)
        values = self.critic_target(states, actions).amin(dim=1)
        shape = noise["exponential"].shape
        return candidates_softmax(values.view(shape), actions.view(*shape, -1), noise["exponential"])

    # --- Published names ------------------------------------------------------------------------------

    def load_published(self, networks: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Weights as the published code saves them (`actor`, `critic`, and perhaps `ema`, `critic_target`).

        Missing averages are copied from the online networks; a `lambda` as `published_state` gives it is taken, which
        the published code does not save. Raises ValueError for missing or misshapen weights, or
        a policy of another schedule.
        """
        actor = policy_weights(required(networks, "actor"), self.diffusion.betas)
        ema = policy_weights(networks.get("ema", actor), self.diffusion.betas)
        for seed in range(self.num_seeds):
            self.actor.parameters.load_member(seed, actor)
            self.ema.parameters.load_member(seed, ema)
            self.critic.load_seed(seed, required(networks, "critic"))
            self.critic_target.load_seed(seed, networks.get("critic_target", required(networks, "critic")))
        if "lambda" in networks:
            self.multiplier.flat.fill_(float(networks["lambda"]))

    def published_state(self) -> list[dict[str, Any]]:
        """One dict a seed: `actor`, `critic`, `ema`, `critic_target` by published names, and the raw `lambda`."""
        return [
            {
                "actor": self.actor.parameters.member_state(seed),
                "critic": self.critic.seed_state(seed),
                "ema": self.ema.parameters.member_state(seed),
                "critic_target": self.critic_target.seed_state(seed),
                "lambda": self.multiplier.flat[seed, 0].clone(),
            }
            for seed in range(self.num_seeds)
        ]
