"""DiffCPS: diffusion-model-based constrained policy search (He et al. 2023, arXiv 2310.05333), as published.

    max_theta  E[Q(s, a)] - lambda L_c(theta)      a ~ policy, L_c the denoising loss   (the policy's step)
    min_lambda lambda (kappa - L_c)                                                      (the multiplier's step)

Where the paper and the published code differ, this follows the code; (D1) to (D11) are rows of docs/deviations.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from agents.parts.agent import Agent, Batch, Draws, Outcome
from agents.parts.bound import Bound, CloneBound
from agents.parts.critics import TwinCritic
from agents.parts.diffusion import DiffusionPolicy
from agents.parts.draws import Rng, candidates_softmax, exponentials, integers, normals
from agents.parts.losses import td_target, twin_error
from agents.parts.multiplier import Multiplier, PIMultiplier

BACKUP_ACTIONS = 10  # actions per next state of the max-Q backup


class DiffCPS(Agent):
    """The agent of `--algo diffcps`; `config` is a `hyperparameters.DiffCPSConfig`."""

    METRICS = (
        "kl_loss", "q_loss", "actor_loss", "critic_loss", "lambda", "lambda_violated", "lambda_at_bound", "q_mean",
        "actor_grad_norm", "critic_grad_norm", "lambda_grad_norm",
    )  # fmt: skip
    SHOWN = ("lambda",)
    COMPILED = ("critic_loss", "policy_loss")

    def build(self) -> None:
        c = self.config
        policy = DiffusionPolicy(self.sizes, c.beta_schedule, c.diffusion_steps, c.hidden_dim)
        self.actor = self.learn("actor", policy, c.learning_rate)
        # The critics' rate does not follow the task's (D6).
        self.critic = self.learn("critic", TwinCritic(self.sizes, [c.hidden_dim] * 3), c.critic_learning_rate)
        self.ema = self.average_of("ema", self.actor, c.ema_decay, c.ema_start)  # (D1)
        self.critic_target = self.average_of("critic_target", self.critic, 1 - c.tau)
        # As published, what is stored winds up beyond the bounds (D4), unless `lambda_anti_windup`.
        bounds = (c.lambda_min, c.lambda_max)
        lambda_ = Multiplier(self.sizes, c.lambda_init, bounds=bounds, stored=bounds if c.lambda_anti_windup else None)
        if c.lambda_update == "pi":
            lambda_ = PIMultiplier(self.sizes, c.lambda_init, bounds, c.lambda_proportional, c.lambda_integral)
        self.lambda_ = self.learn("lambda", lambda_, c.lambda_learning_rate)
        clone = (self.actor, c.learning_rate, c.kappa_slack, c.kappa_opening / c.policy_interval)
        self.kappa = CloneBound(self, *clone) if c.kappa == "auto" else Bound(self, c.kappa)

    @property
    def period(self) -> int:
        return math.lcm(self.config.policy_interval, self.config.ema_interval)

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

    # --- The update: Algorithm 1 ------------------------------------------------------------------------

    def gradient_step(self, batch: Batch, draws: Draws, step: int) -> dict[str, Tensor]:
        metrics = self.descend("critic", self.critic_loss(batch, draws))
        if step % self.config.policy_interval == 0:
            metrics |= self.descend("actor", self.policy_loss(batch, draws))
            metrics |= self.kappa.follow(batch, draws)  # nothing to do where it is a number, as published
            metrics |= self.ascend("lambda", metrics["kl_loss"] - self.kappa(), self.kappa())
        if step % self.config.ema_interval == 0:
            self.ema.follow(self.actor)
        self.critic_target.follow(self.critic)
        return metrics

    def critic_loss(self, batch: Batch, draws: Draws) -> Outcome:
        """Both critics' squared errors against r + gamma min(Q1', Q2')(s', a'), a' ~ the policy's average [S]."""
        with torch.no_grad():
            next_actions = self.ema.sample(batch["next_states"], draws["next_action_noise"])
            values = self.critic_target(batch["next_states"], next_actions)
            if self.config.max_q_backup:
                values = values.unflatten(2, (-1, BACKUP_ACTIONS)).amax(dim=3)
            target = td_target(batch, self.config.discount, values.amin(dim=1))
        loss = twin_error(self.critic(batch["states"], batch["actions"]), target)
        return loss, {"critic_loss": loss.detach(), "q_mean": target.mean(dim=1)}

    def policy_loss(self, batch: Batch, draws: Draws) -> Outcome:
        """lambda L_c - Q_i / mean |Q_j|, i drawn by coin and j the other critic (D3) [S]."""
        states, coin = batch["states"], draws["critic_choice"]
        kl_loss = self.actor.loss(batch["actions"], states, draws["timesteps"], draws["noise"])
        actions = self.actor.sample(states, draws["policy_noise"])
        scale = self.critic.one(1 - coin, states, actions.detach()).abs().mean(dim=1)
        q_loss = -self.critic.one(coin, states, actions).mean(dim=1) / scale
        loss = self.lambda_() * kl_loss + q_loss
        return loss, {"kl_loss": kl_loss.detach(), "q_loss": q_loss.detach(), "actor_loss": loss.detach()}

    # --- Acting -----------------------------------------------------------------------------------------

    def act_draws(self, rng: Rng, states: int) -> dict[str, Tensor]:
        n, T, C = self.num_seeds, self.config.diffusion_steps, self.config.action_candidates
        noise = normals(rng, n, 1, (states, T, C, self.action_dim))[0]
        return {"noise": noise, "exponential": exponentials(rng, n, (states, C))}

    def actions_for(self, states: Tensor, noise: Mapping[str, Tensor]) -> Tensor:
        """One of `action_candidates` actions per state, by softmax of the target critics' minimum (D7)."""
        actions = self.actor.candidates(states, noise["noise"])
        values = self.critic_target(states, actions.flatten(1, 2)).amin(dim=1).view(actions.shape[:3])
        return candidates_softmax(values, actions, noise["exponential"])
