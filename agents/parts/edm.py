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

from agents.parts.draws import Rng, integers
from agents.parts.layers import TIME_DIM, chain, layer, layer_shapes, linear, mish, named, sinusoidal_embedding
from agents.parts.parameters import Network, Parameters, Sizes

LEVEL_SCALE = 0.5  # scale of the logistic distribution of ln sigma
RESOLUTION = 2**53  # uniform numbers are multiples of its inverse


class EDMNetwork(Network):
    """DTQL's raw network F(c_in x, s, ln sigma / 4). One member per seed.

    Time embedding 16 -> 32 -> 16 with Mish, then four layers of width H over [action | state | time], with Mish after
    all but the first (as published).
    """

    def __init__(self, sizes: Sizes, hidden_dim: int) -> None:
        state_dim, action_dim = sizes.state_dim, sizes.action_dim
        shapes = layer_shapes(["embed.1", "embed.3"], [TIME_DIM, 2 * TIME_DIM, TIME_DIM])
        names = [f"layers.layers.{i}" for i in (0, 1, 3, 5, 7)]
        shapes |= layer_shapes(names, [action_dim + state_dim + TIME_DIM, *[hidden_dim] * 4, action_dim])
        self.parameters = Parameters(shapes, sizes.seeds, sizes.device)

    def __call__(self, actions: Tensor, states: Tensor, times: Tensor) -> Tensor:
        """actions [S, B, A], states [S, B, state_dim], times [S, B] -> [S, B, A]."""
        p = self.parameters
        time = layer(sinusoidal_embedding(times), p["embed.1.weight"], p["embed.1.bias"], mish)
        time = linear(time, p["embed.3.weight"], p["embed.3.bias"])
        hidden = torch.cat([actions, states, time], dim=-1)
        hidden = linear(hidden, p["layers.layers.0.weight"], p["layers.layers.0.bias"])
        return chain(hidden, named(p, [f"layers.layers.{i}" for i in (1, 3, 5, 7)]), mish)


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
        """E || (D(a + sigma eps; sigma) - a) / c_out ||^2, mean over rows and dimensions, one value per seed [S].

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


class EDMPolicy(EDMNetwork):
    """A denoiser together with its process: DTQL's model of the data's actions. One member per seed."""

    def __init__(self, sizes: Sizes, process: EDM, hidden_dim: int) -> None:
        super().__init__(sizes, hidden_dim)
        self.process = process

    def loss(self, actions: Tensor, states: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        """The denoising loss of these actions [S], see `EDM.loss`."""
        return self.process.loss(self, actions, states, sigma, noise)
