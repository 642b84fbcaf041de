"""Denoising with the preconditioning of Karras et al. 2022 (arXiv 2206.00364), as DTQL uses it for actions.

    D(x; sigma) = c_skip x + c_out F(c_in x, s, ln sigma / 4),    x = a + sigma eps
    c_skip = sd^2 / (sigma^2 + sd^2)   c_out = sigma sd / sqrt(sigma^2 + sd^2)   c_in = 1 / sqrt(sigma^2 + sd^2)

with sd = sigma_data. The published loss clips D to the action box before comparing it with the action.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from agents.agent import Rng, integers
from agents.networks import EDMNetwork

__all__ = ["EDM"]

LEVEL_SCALE = 0.5  # scale of the logistic distribution of ln sigma
RESOLUTION = 2**53  # uniform numbers are multiples of its inverse


class EDM:
    """Noise levels, denoiser and loss. `clip` bounds the denoised action (the published code has 1, DTQL's box)."""

    def __init__(self, sigma_min: float, sigma_max: float, sigma_data: float, clip: float) -> None:
        self.sigma_data, self.clip = sigma_data, clip
        self.location = math.log(sigma_data)
        self.bounds = tuple(self._cumulative(sigma) for sigma in (sigma_min, sigma_max))

    def _cumulative(self, sigma: float) -> float:
        """Logistic distribution function of ln sigma."""
        return 1 / (1 + math.exp((self.location - math.log(sigma)) / LEVEL_SCALE))

    def noise_levels(self, rng: Rng, seeds: int, steps: int, shape: Sequence[int]) -> Tensor:
        """Log-logistic sigma around sigma_data, truncated to [sigma_min, sigma_max]: [steps, S, *shape]."""
        uniform = integers(rng, seeds, steps, RESOLUTION, shape).double() / RESOLUTION
        low, high = self.bounds
        return (torch.logit(low + (high - low) * uniform) * LEVEL_SCALE + self.location).exp().float()

    def loss(self, network: EDMNetwork, actions: Tensor, states: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        """E || (D(a + sigma eps; sigma) - a) / c_out ||^2, mean over rows and dimensions, one value a seed [S].

        actions, noise [S, B, A]; states [S, B, state_dim]; sigma [S, B]. Differentiable in the network and in the
        actions: the behaviour policy's loss and the trust-region loss are this one function.
        """
        level, data = sigma.unsqueeze(-1), self.sigma_data
        scale = (level.square() + data**2).rsqrt()
        c_out = level * data * scale
        diffused = actions + level * noise
        raw = network(diffused * scale, states, sigma.log() / 4)
        denoised = (c_out * raw + (data * scale).square() * diffused).clamp(-self.clip, self.clip)
        return ((denoised - actions) / c_out).square().mean(dim=(1, 2))
