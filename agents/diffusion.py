"""The denoising diffusion process over actions (Ho et al. 2020) with few steps.

Published order of things: step i runs from T - 1 down to 0; the reverse chain uses the posterior's variance and clips
the predicted clean action to the action box at every step (DEVIATIONS 2: the paper writes the variance beta_i).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from agents.networks import NoiseNetwork, ResidualNoiseNetwork

__all__ = ["SCHEDULES", "Diffusion", "beta_schedule"]

SCHEDULES = ("vp", "linear", "cosine")
BETA_MIN, BETA_MAX = 0.1, 10.0  # of the continuous variance-preserving process


def beta_schedule(name: str, steps: int) -> Tensor:
    """Noise variances beta_1 ... beta_T as float64 [T].

    vp      beta_i = 1 - exp(-beta_min / T - (beta_max - beta_min)(2 i - 1) / (2 T^2))   (Xiao et al. 2022)
    linear  from 1e-4 to 2e-2   (Ho et al. 2020)
    cosine  from the squared-cosine signal level with offset 0.008, at most 0.999   (Nichol & Dhariwal 2021; the
            published code spreads T + 1 points over [0, T + 1] where the paper has [0, T], kept here)
    Raises ValueError for another name or steps < 1.
    """
    if steps < 1:
        raise ValueError(f"diffusion_steps must be at least 1, not {steps}")
    i = torch.arange(1, steps + 1, dtype=torch.float64)
    if name == "vp":
        return 1 - torch.exp(-BETA_MIN / steps - 0.5 * (BETA_MAX - BETA_MIN) * (2 * i - 1) / steps**2)
    if name == "linear":
        return torch.linspace(1e-4, 2e-2, steps, dtype=torch.float64)
    if name == "cosine":
        level = torch.linspace(0, steps + 1, steps + 1, dtype=torch.float64) / (steps + 1)
        signal = torch.cos((level + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - signal[1:] / signal[:-1]).clamp(0, 0.999)
    raise ValueError(f"unknown beta_schedule {name!r}; known: {', '.join(SCHEDULES)}")


class Diffusion:
    """Forward process, denoising loss and reverse chain for actions in [-max_action, max_action]."""

    def __init__(self, schedule: str, steps: int, max_action: float, device: torch.device | str) -> None:
        self.steps = steps
        self.max_action = max_action
        # float32 throughout, as published: alpha-bar is a float32 product of float32 factors.
        betas = beta_schedule(schedule, steps).float()
        alpha_bar = torch.cumprod(1 - betas, dim=0)
        previous = torch.cat([torch.ones(1), alpha_bar[:-1]])
        variance = betas * (1 - previous) / (1 - alpha_bar)
        self.betas = betas
        self.signal = alpha_bar.sqrt().to(device)
        self.spread = (1 - alpha_bar).sqrt().to(device)
        # The chain visits known steps, so its coefficients are plain numbers.
        self._recover_x = (1 / alpha_bar).sqrt().tolist()
        self._recover_noise = (1 / alpha_bar - 1).sqrt().tolist()
        self._mean_clean = (betas * previous.sqrt() / (1 - alpha_bar)).tolist()
        self._mean_x = ((1 - previous) * (1 - betas).sqrt() / (1 - alpha_bar)).tolist()
        self._deviation = variance.clamp(min=1e-20).log().mul(0.5).exp().tolist()
        self._stride = (betas / (1 - alpha_bar).sqrt()).tolist()
        self._shrink = (1 - betas).sqrt().tolist()
        self._spread_added = betas.sqrt().tolist()
        self._step_numbers = torch.arange(steps, device=device)

    def loss(
        self,
        network: NoiseNetwork | ResidualNoiseNetwork,
        actions: Tensor,
        states: Tensor,
        timesteps: Tensor,
        noise: Tensor,
    ) -> Tensor:
        """Denoising loss, mean over rows and dimensions, one value a seed [S].

        E || eps - eps_theta(sqrt(alpha-bar_i) a + sqrt(1 - alpha-bar_i) eps, s, i) ||^2, the term L_c of the paper.
        actions, noise [S, B, A]; states [S, B, state_dim]; timesteps [S, B] in 0 .. T - 1.
        """
        diffused = self.signal[timesteps].unsqueeze(-1) * actions + self.spread[timesteps].unsqueeze(-1) * noise
        # Picking rows by a product keeps the backward pass free of atomic adds, hence deterministic on a GPU.
        chosen = (timesteps.unsqueeze(-1) == self._step_numbers).to(actions.dtype)
        condition = torch.baddbmm(network.state_part(states), chosen, network.time_part())
        return (network.noise(diffused, condition) - noise).square().mean(dim=(1, 2))

    def sample(self, network: NoiseNetwork, states: Tensor, noise: Tensor) -> Tensor:
        """Reverse chain, differentiable in the network's parameters: -> actions [S, B * R, A] in the action box.

        states [S, B, state_dim]; noise [S, T, B * R, A]: entry 0 is a^T, entry k is added after the k-th denoising
        step, and the last step adds none. R actions of a state stand side by side.
        """
        m, times, x = self.max_action, network.time_part(), noise[:, 0]
        part = self._state_part(network, states, noise)
        for k, i in enumerate(reversed(range(self.steps)), start=1):
            predicted = network.noise(x, part + times[:, i : i + 1])
            clean = (self._recover_x[i] * x - self._recover_noise[i] * predicted).clamp(-m, m)
            x = self._mean_clean[i] * clean + self._mean_x[i] * x
            if i > 0:
                x = x + self._deviation[i] * noise[:, k]
        return x.clamp(-m, m)

    def ancestral(self, network: ResidualNoiseNetwork, states: Tensor, noise: Tensor) -> Tensor:
        """As `sample`, but with variance beta_i, and with the action itself cut to the box after every step.

        x <- (x - beta_i / sqrt(1 - alpha-bar_i) eps_theta) / sqrt(1 - beta_i) + sqrt(beta_i) z: algorithm 2 of Ho et
        al. 2020, as IDQL's code has it (jaxrl5/networks/diffusion.py, `clip_sampler`).
        """
        m, times, x = self.max_action, network.time_part(), noise[:, 0]
        part = self._state_part(network, states, noise)
        for k, i in enumerate(reversed(range(self.steps)), start=1):
            x = (x - self._stride[i] * network.noise(x, part + times[:, i : i + 1])) / self._shrink[i]
            if i > 0:
                x = x + self._spread_added[i] * noise[:, k]
            x = x.clamp(-m, m)
        return x

    def _state_part(self, network: NoiseNetwork | ResidualNoiseNetwork, states: Tensor, noise: Tensor) -> Tensor:
        """The first layer's share of the state, repeated for every action of it."""
        part, repeats = network.state_part(states), noise.shape[2] // states.shape[1]
        return part.repeat_interleave(repeats, dim=1) if repeats > 1 else part
