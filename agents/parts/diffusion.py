"""The denoising diffusion process over actions (Ho et al. 2020) with few steps, and the networks that it trains.

Published order of things: step i runs from T - 1 down to 0; the reverse chain uses the posterior's variance and clips
the predicted clean action to the action box at every step (D2: the paper writes the variance beta_i).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from agents.parts.layers import (
    FLAX_EPSILON,
    TIME_DIM,
    Activation,
    added,
    chain,
    head,
    layer,
    layer_norm,
    layer_shapes,
    linear,
    mish,
    named,
    sinusoidal_embedding,
)
from agents.parts.parameters import Network, Parameters, Sizes, xavier_init
from agents.parts.published import policy_weights

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


class NoiseNetwork(Network):
    """epsilon(a^i, s, i): the noise in a diffused action. One member per seed.

    Time embedding 16 -> 32 -> 16 with Mish, then three Mish layers of width H over [action | time | state]. The first
    of them is applied in parts: the state's part is the same for all steps of a chain and the time's part the same
    for all rows, so each is computed once (this saves a 14th of the arithmetic and all concatenations).
    """

    def __init__(self, sizes: Sizes, diffusion_steps: int, hidden_dim: int) -> None:
        self.action_dim = sizes.action_dim
        shapes = layer_shapes(["model.time_mlp.1", "model.time_mlp.3"], [TIME_DIM, 2 * TIME_DIM, TIME_DIM])
        mid = [f"model.mid_layer.{i}" for i in (0, 2, 4)]
        shapes |= layer_shapes(mid, [sizes.action_dim + TIME_DIM + sizes.state_dim, hidden_dim, hidden_dim, hidden_dim])
        shapes |= layer_shapes(["model.final_layer"], [hidden_dim, sizes.action_dim])
        self.parameters = Parameters(shapes, sizes.seeds, sizes.device)
        steps = torch.arange(diffusion_steps, device=sizes.device, dtype=torch.float32)
        self.embedding = sinusoidal_embedding(steps).expand(sizes.seeds, -1, -1)

    def _first_weight(self) -> tuple[Tensor, Tensor, Tensor]:
        weight, a = self.parameters["model.mid_layer.0.weight"], self.action_dim
        return weight[:, :, :a], weight[:, :, a : a + TIME_DIM], weight[:, :, a + TIME_DIM :]

    def state_part(self, states: Tensor) -> Tensor:
        """The first layer's share of the state, bias included: [S, B, state_dim] -> [S, B, H]."""
        return linear(states, self._first_weight()[2], self.parameters["model.mid_layer.0.bias"])

    def time_part(self) -> Tensor:
        """The first layer's share of every diffusion step: [S, T, H]."""
        p = self.parameters
        hidden = layer(self.embedding, p["model.time_mlp.1.weight"], p["model.time_mlp.1.bias"], mish)
        embedded = linear(hidden, p["model.time_mlp.3.weight"], p["model.time_mlp.3.bias"])
        return linear(embedded, self._first_weight()[1])

    def noise(self, actions: Tensor, condition: Tensor) -> Tensor:
        """actions [S, B, A], condition [S, B, H] = state part + time part -> predicted noise [S, B, A]."""
        after = named(self.parameters, ["model.mid_layer.2", "model.mid_layer.4", "model.final_layer"])
        return chain(actions, [(self._first_weight()[0], condition), *after], mish)


class ResidualNoiseNetwork(Network):
    """epsilon(a^i, s, i) as a residual network with layer normalisation, IDQL's `LN_Resnet`. One member per seed.

    Learnt Fourier features of the step, a cosine and a sine per frequency -> two layers of twice that width; a layer of
    width H over [action | state | time]; `blocks` times x + W2 act(W1 norm(dropout(x))) with 4 H units inside; act, and
    a layer to the noise.
    """

    def __init__(
        self,
        sizes: Sizes,
        diffusion_steps: int,
        hidden_dim: int,
        blocks: int,
        dropout: float,
        frequencies: int,
        activation: Activation,
    ) -> None:
        self.action_dim, self.state_dim, self.hidden_dim = sizes.action_dim, sizes.state_dim, hidden_dim
        self.dropout, self.activation, self.time_dim = dropout, activation, 4 * frequencies
        self.kept: Tensor | None = None
        self.blocks = [f"blocks.{i}" for i in range(blocks)]
        shapes: dict[str, Sequence[int]] = {"time.frequencies": (frequencies,)}
        shapes |= layer_shapes(["time.1", "time.3"], [2 * frequencies, self.time_dim, self.time_dim])
        shapes |= layer_shapes(["first"], [sizes.action_dim + sizes.state_dim + self.time_dim, hidden_dim])
        for block in self.blocks:
            shapes |= {f"{block}.norm.{kind}": (hidden_dim,) for kind in ("weight", "bias")}
            shapes |= layer_shapes([f"{block}.1", f"{block}.3"], [hidden_dim, 4 * hidden_dim, hidden_dim])
        shapes |= layer_shapes(["last"], [hidden_dim, sizes.action_dim])
        self.parameters = Parameters(shapes, sizes.seeds, sizes.device)
        self.steps = torch.arange(diffusion_steps, device=sizes.device, dtype=torch.float32)

    def initialize(self, generators: Sequence[torch.Generator]) -> None:
        """Flax's start: Xavier, LeCun's truncated normals inside the blocks, N(0, 0.2^2) frequencies."""
        xavier_init(self.parameters, generators)
        with torch.no_grad():
            for member, generator in enumerate(generators):
                frequencies = self.parameters["time.frequencies"][member]
                frequencies.copy_(0.2 * torch.randn(frequencies.shape, generator=generator))
                for name in (f"{block}.{layer}.weight" for block in self.blocks for layer in (1, 3)):
                    drawn = torch.empty(self.parameters.shapes[name])
                    torch.nn.init.trunc_normal_(drawn, generator=generator)
                    # 0.87962566 is the deviation of a standard normal that is cut at 2.
                    self.parameters[name][member].copy_(drawn / (0.87962566 * math.sqrt(drawn.shape[1])))

    def dropping(self, kept: Tensor) -> ResidualNoiseNetwork:
        """The same network with dropout at the blocks' inputs: kept [S, B, blocks * H] bool says what stays."""
        twin = self._over(self.parameters)
        twin.kept = kept
        return twin

    def _first_weight(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.parameters["first.weight"].split([self.action_dim, self.state_dim, self.time_dim], dim=2)

    def state_part(self, states: Tensor) -> Tensor:
        """The first layer's share of the state, bias included: [S, B, state_dim] -> [S, B, H]."""
        return linear(states, self._first_weight()[1], self.parameters["first.bias"])

    def time_part(self) -> Tensor:
        """The first layer's share of every diffusion step: [S, T, H]."""
        p = self.parameters
        angles = 2 * math.pi * self.steps.unsqueeze(1) * p["time.frequencies"].unsqueeze(1)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        hidden = layer(features, p["time.1.weight"], p["time.1.bias"], self.activation)
        return linear(linear(hidden, p["time.3.weight"], p["time.3.bias"]), self._first_weight()[2])

    def noise(self, actions: Tensor, condition: Tensor) -> Tensor:
        """actions [S, B, A], condition [S, B, H] = state part + time part -> predicted noise [S, B, A]."""
        p = self.parameters
        x = added(condition, actions, self._first_weight()[0])
        kept = self.kept.split(self.hidden_dim, dim=-1) if self.kept is not None else ()
        for i, block in enumerate(self.blocks):
            inside = x * kept[i] / (1 - self.dropout) if kept else x
            inside = layer_norm(inside, p[f"{block}.norm.weight"], p[f"{block}.norm.bias"], FLAX_EPSILON)
            inside = layer(inside, p[f"{block}.1.weight"], p[f"{block}.1.bias"], self.activation)
            x = x + linear(inside, p[f"{block}.3.weight"], p[f"{block}.3.bias"])
        return head(self.activation(x), p["last.weight"], p["last.bias"])


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
        """Denoising loss, mean over rows and dimensions, one value per seed [S].

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


# --- Policies: a network together with the process that it reverses ---------------------------------------------------


class DiffusionPolicy(NoiseNetwork):
    """What DiffCPS and Diffusion-QL call the actor: actions by the reverse chain. One member per seed."""

    def __init__(self, sizes: Sizes, schedule: str, diffusion_steps: int, hidden_dim: int) -> None:
        super().__init__(sizes, diffusion_steps, hidden_dim)
        self.process = Diffusion(schedule, diffusion_steps, sizes.max_action, sizes.device)

    def loss(self, actions: Tensor, states: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """The denoising loss of these actions [S], see `Diffusion.loss`."""
        return self.process.loss(self, actions, states, timesteps, noise)

    def sample(self, states: Tensor, noise: Tensor) -> Tensor:
        """Actions from noise [S, T, B * R, A], see `Diffusion.sample`."""
        return self.process.sample(self, states, noise)

    def candidates(self, states: Tensor, noise: Tensor) -> Tensor:
        """C actions of each of N states: noise [S, N, T, C, A] -> [S, N, C, A]."""
        return self.sample(states, noise.transpose(1, 2).flatten(2, 3)).unflatten(1, noise.shape[1:4:2])

    def load_seed(self, seed: int, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError for a policy of another schedule too."""
        super().load_seed(seed, policy_weights(state, self.process.betas))


class ResidualDiffusionPolicy(ResidualNoiseNetwork):
    """IDQL's model of the data's actions: a residual network, sampled by Ho et al.'s chain. One member per seed."""

    def __init__(
        self,
        sizes: Sizes,
        schedule: str,
        diffusion_steps: int,
        hidden_dim: int,
        blocks: int,
        dropout: float,
        frequencies: int,
        activation: Activation,
    ) -> None:
        super().__init__(sizes, diffusion_steps, hidden_dim, blocks, dropout, frequencies, activation)
        self.process = Diffusion(schedule, diffusion_steps, sizes.max_action, sizes.device)

    def loss(
        self, actions: Tensor, states: Tensor, timesteps: Tensor, noise: Tensor, kept: Tensor | None = None
    ) -> Tensor:
        """The denoising loss of these actions [S], see `Diffusion.loss`; `kept`: see `dropping`."""
        return self.process.loss(self if kept is None else self.dropping(kept), actions, states, timesteps, noise)

    def sample(self, states: Tensor, noise: Tensor) -> Tensor:
        """Actions from noise [S, T, B * R, A], see `Diffusion.ancestral`."""
        return self.process.ancestral(self, states, noise)

    def candidates(self, states: Tensor, noise: Tensor) -> Tensor:
        """C actions of each of N states: noise [S, N, T, C, A] -> [S, N, C, A]."""
        return self.sample(states, noise.transpose(1, 2).flatten(2, 3)).unflatten(1, noise.shape[1:4:2])
