"""A diffusion of actions in continuous time (Song et al. 2021), its network, and DPM-Solver (Lu et al. 2022).

    q(a_t | a) = N(alpha_t a, sigma_t^2 I),    log alpha_t = -(beta_1 - beta_0) t^2 / 4 - beta_0 t / 2,
    sigma_t^2 = 1 - alpha_t^2,    t in [0, 1],    beta_0 = 0.1,  beta_1 = 20

The behaviour model of SfBC and QGPO: one network for all t, trained on the noise that it is to predict. Actions come
from the probability-flow equation, which `Solver` follows from t = 1 to t = 0.001 in so many evaluations of the
network. All randomness of a sample is in its start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import silu

from agents.parts.layers import added, head, layer, layer_shapes, linear
from agents.parts.parameters import Network, Parameters, Sizes, default_init

BETA_0, BETA_1 = 0.1, 20.0
END = 1e-3  # where the solver stops
FOURIER_SCALE = 30.0  # deviation of the frequencies of the time embedding
EMBED_DIM = 32  # width of the time's and the state's embedding, as published


def _log_signal(times: Tensor) -> Tensor:
    return -0.25 * (BETA_1 - BETA_0) * times.square() - 0.5 * BETA_0 * times


def signal_and_spread(times: Tensor) -> tuple[Tensor, Tensor]:
    """alpha_t and sigma_t at `times`, any shape."""
    log_signal = _log_signal(times)
    return log_signal.exp(), (-torch.expm1(2 * log_signal)).sqrt()


# --- The network ------------------------------------------------------------------------------------------------------


def constant(weight: Tensor) -> Tensor:
    """The same numbers, by which the derivative is zero: for what stands among the weights but does not learn."""
    return weight.detach() + (weight - weight)


def fourier_features(times: Tensor, frequencies: Tensor) -> Tensor:
    """Sines then cosines of 2 pi t W: times [S, B], frequencies W [S, F] -> [S, B, 2 F]. W does not learn."""
    angles = times.unsqueeze(-1) * (2 * math.pi) * constant(frequencies).unsqueeze(1)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def score_init(parameters: Parameters, generators: Sequence[torch.Generator]) -> None:
    """`default_init`, and frequencies ~ N(0, 30^2), from each seed's own generator; one member per seed."""
    default_init(parameters, generators)
    with torch.no_grad():
        for name, shape in parameters.shapes.items():
            if name.endswith(".W"):
                for member, generator in enumerate(generators):
                    drawn = torch.randn(shape, generator=generator, device=generator.device)
                    parameters[name][member].copy_(drawn * FOURIER_SCALE)


class ScoreNetwork(Network):
    """The noise in a diffused action: eps(a_t, s, t). One member per seed.

    Six residual blocks over the action, of widths 2 H, H, H/2, H/2, H, 2 H (512, 256, 128 ... as published), the
    second three fed with the outputs of the first three; state and time enter every block through an embedding of
    width H/2. What depends on the state alone is computed once for all times and all actions of a state.
    """

    BLOCKS = ("down_block1", "down_block2", "down_block3", "middle1", "up_block3", "up_block2")

    def __init__(self, sizes: Sizes, hidden_dim: int) -> None:
        if hidden_dim % 2:
            raise ValueError(f"hidden_dim must be even for this network, not {hidden_dim}")
        H, E, state_dim, action_dim = hidden_dim, hidden_dim // 2, sizes.state_dim, sizes.action_dim
        shapes: dict[str, Sequence[int]] = {"embed.0.W": (EMBED_DIM // 2,)}

        def affine(name: str, fan_in: int, fan_out: int) -> None:
            shapes.update(layer_shapes([name], [fan_in, fan_out]))

        affine("embed.1", EMBED_DIM, EMBED_DIM)
        affine("pre_sort_condition.0.dense", state_dim, EMBED_DIM)
        affine("sort_t.0", 2 * EMBED_DIM, E)
        affine("sort_t.2", E, E)
        widths = [(action_dim, 2 * H), (2 * H, H), (H, E), (E, E), (2 * E, H), (2 * H, 2 * H)]
        for name, (fan_in, fan_out) in zip(self.BLOCKS, widths, strict=True):
            affine(f"{name}.time_mlp.1", E, fan_out)
            affine(f"{name}.dense1.0", fan_in, fan_out)
            affine(f"{name}.dense2.0", fan_out, fan_out)
            if fan_in != fan_out:
                affine(f"{name}.modify_x", fan_in, fan_out)
        affine("last", 4 * H, action_dim)
        self.parameters = Parameters(shapes, sizes.seeds, sizes.device)

    def initialize(self, generators: Sequence[torch.Generator]) -> None:
        """`score_init`."""
        score_init(self.parameters, generators)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return linear(x, self.parameters[f"{name}.weight"], self.parameters[f"{name}.bias"])

    def _silu(self, name: str, x: Tensor) -> Tensor:
        return layer(x, self.parameters[f"{name}.weight"], self.parameters[f"{name}.bias"], silu)

    def state_part(self, states: Tensor) -> Tensor:
        """The embedding's share of the state: [S, B, state_dim] -> [S, B, H/2]."""
        weight = self.parameters["sort_t.0.weight"][:, :, :EMBED_DIM]
        return linear(self._silu("pre_sort_condition.0.dense", states), weight)

    def time_part(self, times: Tensor) -> Tensor:
        """The embedding's share of the time: [S, B] -> [S, B, H/2]."""
        p = self.parameters
        embedded = self._linear("embed.1", fourier_features(times, p["embed.0.W"]))
        return linear(embedded, p["sort_t.0.weight"][:, :, EMBED_DIM:], p["sort_t.0.bias"])

    def noise(self, actions: Tensor, part: Tensor) -> Tensor:
        """actions [S, B * R, A], part [S, B, H/2] = state part + time part -> predicted noise [S, B * R, A].

        R actions of a state stand side by side.
        """
        embedding = self._silu("sort_t.2", silu(part))
        d1 = self._block("down_block1", actions, embedding)
        d2 = self._block("down_block2", d1, embedding)
        d3 = self._block("down_block3", d2, embedding)
        u3 = self._block("middle1", d3, embedding)
        u2 = self._block("up_block3", torch.cat([d3, u3], dim=-1), embedding)
        u1 = self._block("up_block2", torch.cat([d2, u2], dim=-1), embedding)
        p = self.parameters
        noise = head(torch.cat([d1, u1], dim=-1), p["last.weight"], p["last.bias"])
        return -noise  # the published network predicts sigma_t * score

    def _block(self, name: str, x: Tensor, embedding: Tensor) -> Tensor:
        shift = self._linear(f"{name}.time_mlp.1", embedding)
        hidden = self._silu(f"{name}.dense1.0", x).unflatten(1, (shift.shape[1], -1))
        hidden = self._silu(f"{name}.dense2.0", (hidden + shift.unsqueeze(2)).flatten(1, 2))
        through = self._linear(f"{name}.modify_x", x) if f"{name}.modify_x.weight" in self.parameters.shapes else x
        return hidden + through


class EnergyNetwork(Network):
    """QGPO's f(a_t, s, t), four SiLU layers of width H over [action | time | state]. One member per seed.

    Its loss does not depend on the last bias, whose derivative would be rounding alone, which Adam takes for steps.
    """

    LAYERS = ("qt.2", "qt.4", "qt.6", "qt.8")

    def __init__(self, sizes: Sizes, hidden_dim: int) -> None:
        self.action_dim = sizes.action_dim
        widths = [sizes.action_dim + EMBED_DIM + sizes.state_dim, *[hidden_dim] * 4, 1]
        shapes: dict[str, Sequence[int]] = {"embed.0.W": (EMBED_DIM // 2,)}
        shapes |= layer_shapes(["embed.1"], [EMBED_DIM, EMBED_DIM]) | layer_shapes(["qt.0", *self.LAYERS], widths)
        self.parameters = Parameters(shapes, sizes.seeds, sizes.device)

    def initialize(self, generators: Sequence[torch.Generator]) -> None:
        """`score_init`."""
        score_init(self.parameters, generators)

    def state_part(self, states: Tensor) -> Tensor:
        """The first layer's share of the state, bias included: [S, B, state_dim] -> [S, B, H]."""
        weight = self.parameters["qt.0.weight"][:, :, self.action_dim + EMBED_DIM :]
        return linear(states, weight, self.parameters["qt.0.bias"])

    def time_part(self, times: Tensor) -> Tensor:
        """The first layer's share of the time: [S, B] -> [S, B, H]."""
        p, a = self.parameters, self.action_dim
        embedded = linear(fourier_features(times, p["embed.0.W"]), p["embed.1.weight"], p["embed.1.bias"])
        return linear(embedded, p["qt.0.weight"][:, :, a : a + EMBED_DIM])

    def _layers(self, actions: Tensor, part: Tensor) -> list[Tensor]:
        """What enters each activation, and at the end the value [S, B * R, 1]."""
        p, repeats = self.parameters, actions.shape[1] // part.shape[1]
        part = part.repeat_interleave(repeats, dim=1) if repeats > 1 else part
        entering = [added(part, actions, p["qt.0.weight"][:, :, : self.action_dim])]
        for name in self.LAYERS:
            last = name == self.LAYERS[-1]
            bias = constant(p[f"{name}.bias"]) if last else p[f"{name}.bias"]
            entering.append((head if last else linear)(silu(entering[-1]), p[f"{name}.weight"], bias))
        return entering

    def __call__(self, actions: Tensor, part: Tensor) -> Tensor:
        """actions [S, B * R, A], part [S, B, H] = state part + time part -> f [S, B * R]; R actions side by side."""
        return self._layers(actions, part)[-1].squeeze(-1)

    def gradient(self, actions: Tensor, part: Tensor) -> Tensor:
        """d f / d action [S, B * R, A], by the chain rule: acting keeps no record to differentiate."""
        p = self.parameters
        upstream: Tensor | None = None
        for name, x in zip(reversed(self.LAYERS), reversed(self._layers(actions, part)[:-1]), strict=True):
            weight, s = p[f"{name}.weight"], torch.sigmoid(x)
            inner = weight if upstream is None else torch.bmm(upstream, weight)
            upstream = inner * (s + x * s * (1 - s))  # the derivative of x sigmoid(x)
        assert upstream is not None  # there are layers
        return torch.bmm(upstream, p["qt.0.weight"][:, :, : self.action_dim])


def denoising_loss(network: ScoreNetwork, actions: Tensor, states: Tensor, times: Tensor, noise: Tensor) -> Tensor:
    """E || eps(alpha_t a + sigma_t eps, s, t) - eps ||^2, summed over dimensions as published, one value per seed [S].

    actions, noise [S, B, A]; states [S, B, state_dim]; times [S, B].
    """
    signal, spread = signal_and_spread(times.unsqueeze(-1))
    diffused = signal * actions + spread * noise
    part = network.state_part(states) + network.time_part(times)
    return (network.noise(diffused, part) - noise).square().sum(dim=2).mean(dim=1)


# --- Sampling ---------------------------------------------------------------------------------------------------------


def solver_orders(steps: int, order: int) -> list[int]:
    """Orders of the solver's strides, which together evaluate the network `steps` times ("DPM-Solver-fast").

    Order 3 strides, with a 2 and a 1, a 1, or a 2 at the end; for order 2 strides of 2 and, as the published version
    has it, one or two of 1 at the end.
    """
    if order == 3:
        whole = steps // 3
        return {0: [3] * (whole - 1) + [2, 1], 1: [3] * whole + [1], 2: [3] * whole + [2]}[steps % 3]
    return [2] * (steps // 2) + [1] if steps % 2 else [2] * (steps // 2 - 1) + [1, 1]


class Solver:
    """DPM-Solver of order 2 or 3 from t = 1 to `END`, `steps` evaluations of the network at evenly spaced times.

    `data`: the exponential integrator is that of the predicted clean action (DPM-Solver++, Lu et al. 2022b), which
    stands strong guidance; else that of the predicted noise. The network is evaluated at `times` [steps].
    All coefficients are plain numbers, so a sample can be captured in a graph. Raises ValueError for steps < 1.
    """

    def __init__(self, steps: int, order: int, data: bool, device: torch.device | str = "cpu") -> None:
        if steps < 1:
            raise ValueError(f"diffusion_steps must be at least 1, not {steps}")
        grid = torch.linspace(1.0, END, steps + 1, dtype=torch.float64)
        signal, spread = signal_and_spread(grid)
        self.times = grid[:-1].float().to(device)
        self._orders, self._data = solver_orders(steps, order), data
        self._signal, self._spread = signal.tolist(), spread.tolist()
        self._ratio = (signal.log() - spread.log()).tolist()  # lambda_t, half the logarithm of signal to noise

    def sample(self, noise: Callable[[Tensor, int], Tensor], x: Tensor) -> Tensor:
        """From x ~ N(0, I) at t = 1, any shape, to an action; noise(x, i) is the noise in x at `times[i]`."""

        def model(x: Tensor, i: int) -> Tensor:
            predicted = noise(x, i)
            return (x - self._spread[i] * predicted) / self._signal[i] if self._data else predicted

        i = 0
        for order in self._orders:
            x = self._stride(model, x, i, order)
            i += order
        return x

    def _stride(self, model: Callable[[Tensor, int], Tensor], x: Tensor, s: int, order: int) -> Tensor:
        """From grid time s to s + order: x_t = (c_t / c_s) x - w_t [expm1(k) m_s + corrections], k = +-(l_t - l_s).

        c = signal, w = spread, k > 0 where the model predicts noise; the two change places where it predicts data.
        """
        kept, other = (self._spread, self._signal) if self._data else (self._signal, self._spread)
        sign = -1 if self._data else 1
        t, step = s + order, sign * (self._ratio[s + order] - self._ratio[s])
        k = lambda i: sign * (self._ratio[i] - self._ratio[s])  # noqa: E731
        first = model(x, s)
        start = lambda i: kept[i] / kept[s] * x - other[i] * math.expm1(k(i)) * first  # noqa: E731
        if order == 1:
            return start(t)
        slope = model(start(s + 1), s + 1) - first
        r1 = k(s + 1) / step
        if order == 2:
            return start(t) - 0.5 / r1 * other[t] * math.expm1(step) * slope
        r2, k2 = k(s + 2) / step, k(s + 2)
        middle = start(s + 2) - r2 / r1 * other[s + 2] * (math.expm1(k2) / k2 - 1) * slope
        slope = model(middle, s + 2) - first
        return start(t) - 1 / r2 * other[t] * (math.expm1(step) / step - 1) * slope

    def actions(self, network: ScoreNetwork, states: Tensor, start: Tensor) -> Tensor:
        """Samples of the network: states [S, B, state_dim], start [S, B * R, A] standard normal -> [S, B * R, A]."""
        part = network.state_part(states)
        times = network.time_part(self.times.expand(states.shape[0], -1))
        return self.sample(lambda x, i: network.noise(x, part + times[:, i : i + 1]), start)


class ScorePolicy(ScoreNetwork):
    """A model of the data's actions: the network together with the solver that draws from it. One member per seed."""

    def __init__(self, sizes: Sizes, solver: Solver, hidden_dim: int) -> None:
        super().__init__(sizes, hidden_dim)
        self.solver = solver

    def loss(self, actions: Tensor, states: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        """The denoising loss of these actions [S], see `denoising_loss`."""
        return denoising_loss(self, actions, states, times, noise)

    def sample(self, states: Tensor, start: Tensor) -> Tensor:
        """Actions from standard normals `start` [S, B * R, A], see `Solver.actions`."""
        return self.solver.actions(self, states, start)
