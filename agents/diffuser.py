"""Diffuser (Janner et al. 2022, arXiv 2205.09991): plans are windows of a trajectory, denoised and bent by their value.

    tau = (a_0, s_0, a_1, s_1, ..., a_{H-1}, s_{H-1})        a window, its first state pinned
    min_theta  E || tau - tau_theta(tau^i, i) ||^2           the denoiser; the first action weighs 10
    min_phi    E (J_phi(tau^i, i) - R(tau))^2                the value of a noised window, R its return
    tau^{i-1} ~ N(mu_theta(tau^i + rho Sigma_i grad J_phi(tau^i, i), i), Sigma_i)

Of 64 plans the one with the largest value is followed, for one step. The published code (jannerm/diffuser, 7ea4228) is
followed where it departs from the paper: it predicts tau instead of the noise, has 20 steps instead of 100, and adds
the gradient before the reverse step instead of to its mean. Values are learnt beside the denoiser, in the first
`value_steps` steps, where the published code trains them in a run of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from agents.parts.agent import Batch, Draws, Outcome
from agents.parts.draws import Rng, candidates_best, integers, normals
from agents.parts.parameters import Sizes
from agents.parts.planner import Planner, flops
from agents.parts.unet import TemporalUNet, TemporalValue, multipliers
from agents.parts.windows import (
    GaussianNormalizer,
    Guide,
    WindowRows,
    clean_loss,
    guided_plans,
    loss_weights,
    window_values,
)

BOTH, DENOISER_ALONE = 0, 1  # phases


class Diffuser(Planner):
    """The agent of `--algo diffuser`; `config` is a `hyperparameters.DiffuserConfig`."""

    METRICS = (
        "bc_loss", "first_action_loss", "critic_loss", "value_mean", "diffusion_grad_norm", "value_grad_norm"
    )  # fmt: skip
    SHOWN = ("bc_loss",)
    COMPILED = ("denoising_loss", "value_loss")
    PUBLISHED_COST = "the published code at its size: 156 on hopper and walker2d, 38 on halfcheetah"

    def build(self) -> None:
        super().build()
        c, self.channels = self.config, self.action_dim + self.state_dim
        diffusion, value = _networks(c, self.sizes)
        self.diffusion = self.learn("diffusion", diffusion, c.learning_rate)
        self.value = self.learn("value", value, c.learning_rate)
        self.diffusion_ema = self.average("diffusion", self.diffusion)
        self.value_ema = self.average("value", self.value)
        self.weights = loss_weights(c.horizon, self.channels, self.action_dim, c.action_weight).to(self.device)
        self.guide = Guide(c.guide_scale, c.guide_steps, c.guide_stop, c.guide_by_variance)
        self.state_normalizer = GaussianNormalizer(self.state_dim, self.num_seeds, self.device)
        self.action_normalizer = GaussianNormalizer(self.action_dim, self.num_seeds, self.device)
        self.networks["normalizer"] = self.state_normalizer.parameters  # saved, but not learnt and not published
        self.networks["action_normalizer"] = self.action_normalizer.parameters

    def phase(self, step: int) -> int:
        return BOTH if step < self.config.value_steps else DENOISER_ALONE

    def _draw(self, rng: Rng, batch_size: int, steps: int) -> dict[str, Tensor]:
        n, T, window = self.num_seeds, self.config.diffusion_steps, (batch_size, self.config.horizon, self.channels)
        return {
            "timesteps": integers(rng, n, steps, T, (batch_size,)),
            "noise": normals(rng, n, steps, window),
            "value_timesteps": integers(rng, n, steps, T, (batch_size,)),
            "value_noise": normals(rng, n, steps, window),
        }

    def observe(self, transitions: WindowRows) -> None:
        """Mean and deviation of the states and actions; from now on the windows come normalised."""
        self.state_normalizer.fit(transitions.observations)
        self.action_normalizer.fit(transitions.actions)
        transitions.normalize(self.state_normalizer, self.action_normalizer)

    # --- The update -------------------------------------------------------------------------------------

    def gradient_step(self, batch: Batch, draws: Draws, step: int) -> dict[str, Tensor]:
        averaged = step % self.config.ema_interval == 0
        metrics = self.descend("diffusion", self.denoising_loss(batch, draws))
        if averaged:
            self.diffusion_ema.follow(self.diffusion)
        if self.phase(step) == BOTH:
            metrics |= self.descend("value", self.value_loss(batch, draws))
            if averaged:
                self.value_ema.follow(self.value)
        return metrics

    def denoising_loss(self, batch: Batch, draws: Draws) -> Outcome:
        """The weighted squared error of the predicted windows [S]."""
        x = torch.cat([batch["actions"], batch["observations"]], dim=3)
        arguments = (x, draws["timesteps"], draws["noise"], self.weights, self.action_dim)
        loss, first_action = clean_loss(self.diffusion, self.process, *arguments)
        return loss, {"bc_loss": loss.detach(), "first_action_loss": first_action}

    def value_loss(self, batch: Batch, draws: Draws) -> Outcome:
        """The squared error of a noised window's value against the return from its first step on [S]."""
        x = torch.cat([batch["actions"], batch["observations"]], dim=3)
        arguments = (x, draws["value_timesteps"], draws["value_noise"], self.action_dim)
        values = window_values(self.value, self.process, *arguments)
        loss = (values - batch["returns"][..., 0]).square().mean(dim=1)
        return loss, {"critic_loss": loss.detach(), "value_mean": values.detach().mean(dim=1)}

    # --- Acting -----------------------------------------------------------------------------------------

    def actions_for(self, states: Tensor, noise: Mapping[str, Tensor]) -> Tensor:
        """The first action of the best of `action_candidates` plans, cut to the action box as the environments do."""
        observation = self.state_normalizer(states).repeat_interleave(self.plans, dim=1)
        networks = (self.diffusion_ema, self.value_ema, self.process, self.guide)
        x, values = guided_plans(*networks, observation, noise["noise"].flatten(1, 2))
        shape = (*states.shape[:2], self.plans)
        best = candidates_best(values.view(shape), x[:, :, 0, : self.action_dim].reshape(*shape, -1))
        return self.action_normalizer.inverse(best).clamp(-self.max_action, self.max_action)

    @classmethod
    def acting_flops(cls, config: Any, sizes: Sizes) -> float:
        c, P = config, config.action_candidates
        x = torch.zeros(1, P, c.horizon, sizes.state_dim + sizes.action_dim, device="meta")
        embedding = torch.zeros(1, 1, c.hidden_dim, device="meta")
        diffusion, value = (network.averaged() for network in _networks(c, sizes))
        bent = max(0, c.diffusion_steps - c.guide_stop)
        guided = bent * c.guide_steps * flops(value, x, embedding, gradient=True)
        last = flops(value, x, embedding) if bent < c.diffusion_steps else 0.0
        return guided + last + c.diffusion_steps * flops(diffusion, x, embedding)


def _networks(config: Any, sizes: Sizes) -> tuple[TemporalUNet, TemporalValue]:
    channels, mults = sizes.action_dim + sizes.state_dim, multipliers(config.dim_mults)
    unet = TemporalUNet(sizes, channels, config.horizon, config.hidden_dim, mults, config.attention)
    return unet, TemporalValue(sizes, channels, config.horizon, config.hidden_dim, mults)
