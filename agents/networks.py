"""Networks with a leading axis of independent members: weights [M, out, in], inputs [M, B, in].

A member is one network of one seed: a noise network has M = S members, a twin critic M = 2 S. All parameters of a
kind stand in one buffer [M, P] whose slices are the layers, so that clipping, Adam and averaging are a few kernels
however many layers and seeds there are. Weights keep the names that the published code gives them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = [
    "NoiseNetwork",
    "Parameters",
    "TwinCritic",
    "default_init",
    "linear",
    "mish",
    "sinusoidal_embedding",
]

HIDDEN = 256  # width of every hidden layer in the published networks
TIME_DIM = 16  # width of the time embedding

Shapes = Mapping[str, Sequence[int]]


class _Mish(torch.autograd.Function):
    """x * tanh(softplus(x)) with one sigmoid s: tanh(softplus(x)) = n / (2 - n), n = s (2 - s).

    The library's form takes an exponential, a logarithm and a hyperbolic tangent for each value and another set for
    its derivative; this one never overflows, loses no digits for very negative x, and keeps s for the derivative.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        s = torch.sigmoid(x)
        n = (2 - s).mul_(s)
        ctx.save_for_backward(x, s, n)
        return n.div(2 - n).mul_(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        x, s, n = ctx.saved_tensors
        inverse = (2 - n).reciprocal_()
        # d/dx = w + x w', w = n / (2 - n), w' = 4 s (1 - s)^2 / (2 - n)^2
        slope = (1 - s).mul_(inverse).square_().mul_(s).mul_(x).mul_(4)
        return slope.addcmul_(n, inverse).mul_(grad)


def mish(x: Tensor) -> Tensor:
    """Mish activation (Misra 2019), any shape."""
    return _Mish.apply(x)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Each member's affine map: x [M, B, in], weight [M, out, in], bias [M, out] -> [M, B, out]."""
    if bias is None:
        return torch.bmm(x, weight.mT)
    return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)


def sinusoidal_embedding(steps: Tensor, dim: int = TIME_DIM) -> Tensor:
    """Sines then cosines at dim/2 geometric frequencies from 1 down to 1e-4: [...] -> [..., dim]."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=steps.device) * (-math.log(10000) / (half - 1)))
    angles = steps.unsqueeze(-1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Parameters:
    """All parameters of one kind of network in one buffer.

    `flat` is [M, P]; `self[name]` is a slice of it, [M, *shape], and a leaf that autograd can differentiate by. Write
    to `flat` (or a slice) in place only: the slices, and graphs captured over them, stay valid.
    """

    def __init__(self, shapes: Shapes, members: int, device: torch.device | str, trainable: bool = True) -> None:
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.members = members
        self.trainable = trainable
        self.flat = torch.zeros(members, sum(math.prod(s) for s in self.shapes.values()), device=device)
        self.tensors: dict[str, Tensor] = {}
        offset = 0
        for name, shape in self.shapes.items():
            size = math.prod(shape)
            leaf = self.flat[:, offset : offset + size].unflatten(1, shape) if shape else self.flat[:, offset]
            self.tensors[name] = leaf.detach().requires_grad_(trainable)
            offset += size

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def gradient(self, loss: Tensor) -> Tensor:
        """d sum(loss) / d parameters as one new tensor [M, P]; members are independent, so the sum mixes nothing."""
        gradients = torch.autograd.grad(loss.sum(), list(self.tensors.values()))
        return torch.cat([g.reshape(self.members, -1) for g in gradients], dim=1)

    def averaged(self) -> Parameters:
        """A copy that takes no gradients: the start of a target or an average."""
        copy = Parameters(self.shapes, self.members, self.flat.device, trainable=False)
        copy.flat.copy_(self.flat)
        return copy

    def member_state(self, member: int) -> dict[str, Tensor]:
        """One member's parameters by name, detached copies without the members axis."""
        return {name: t[member].detach().clone() for name, t in self.tensors.items()}

    def load_member(self, member: int, state: Mapping[str, Tensor]) -> None:
        """Write one member's parameters. Raises ValueError for a missing name or a wrong shape."""
        with torch.no_grad():
            for name, shape in self.shapes.items():
                if name not in state:
                    raise ValueError(f"the weights lack {name!r}; they have {', '.join(state)}")
                value = torch.as_tensor(state[name])
                if tuple(value.shape) != shape:
                    raise ValueError(f"{name!r} has shape {tuple(value.shape)}, this network needs {shape}")
                self.tensors[name][member].copy_(value)


def default_init(parameters: Parameters, generators: Sequence[torch.Generator]) -> None:
    """PyTorch's default for linear layers: weight and bias ~ U(-1/sqrt(in), 1/sqrt(in)).

    Each seed's members draw from that seed's own generator, so seed k starts alike alone and in company.
    """
    per_seed = parameters.members // len(generators)
    bounds = {n.rsplit(".", 1)[0]: 1 / math.sqrt(s[-1]) for n, s in parameters.shapes.items() if len(s) == 2}
    with torch.no_grad():
        for member in range(parameters.members):
            generator = generators[member // per_seed]
            for name, shape in parameters.shapes.items():
                bound = bounds[name.rsplit(".", 1)[0]]
                drawn = torch.rand(shape, generator=generator, device=generator.device)
                parameters[name][member].copy_((2 * drawn - 1) * bound)


def _layers(names: Sequence[str], sizes: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Shapes of a chain of linear layers, in the order in which the published modules list them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, fan_in, fan_out in zip(names, sizes[:-1], sizes[1:], strict=True):
        shapes[f"{name}.weight"] = (fan_out, fan_in)
        shapes[f"{name}.bias"] = (fan_out,)
    return shapes


class NoiseNetwork:
    """epsilon(a^i, s, i): the noise in a diffused action. One member a seed.

    Time embedding 16 -> 32 -> 16 with Mish, then three Mish layers of 256 over [action | time | state]. The first of
    them is applied in parts: the state's part is the same for all steps of a chain and the time's part the same for
    all rows, so each is computed once (this saves a 14th of the arithmetic and all concatenations).
    """

    def __init__(
        self, state_dim: int, action_dim: int, diffusion_steps: int, seeds: int, device: torch.device | str
    ) -> None:
        self.action_dim = action_dim
        shapes = _layers(["model.time_mlp.1", "model.time_mlp.3"], [TIME_DIM, 2 * TIME_DIM, TIME_DIM])
        mid = [f"model.mid_layer.{i}" for i in (0, 2, 4)]
        shapes |= _layers(mid, [action_dim + TIME_DIM + state_dim, HIDDEN, HIDDEN, HIDDEN])
        shapes |= _layers(["model.final_layer"], [HIDDEN, action_dim])
        self.parameters = Parameters(shapes, seeds, device)
        steps = torch.arange(diffusion_steps, device=device, dtype=torch.float32)
        self.embedding = sinusoidal_embedding(steps).expand(seeds, -1, -1)

    def averaged(self) -> NoiseNetwork:
        """The same network over a copy of the parameters that takes no gradients."""
        twin = object.__new__(NoiseNetwork)
        twin.action_dim, twin.embedding = self.action_dim, self.embedding
        twin.parameters = self.parameters.averaged()
        return twin

    def _first_weight(self) -> tuple[Tensor, Tensor, Tensor]:
        weight, a = self.parameters["model.mid_layer.0.weight"], self.action_dim
        return weight[:, :, :a], weight[:, :, a : a + TIME_DIM], weight[:, :, a + TIME_DIM :]

    def state_part(self, states: Tensor) -> Tensor:
        """The first layer's share of the state, bias included: [S, B, state_dim] -> [S, B, 256]."""
        return linear(states, self._first_weight()[2], self.parameters["model.mid_layer.0.bias"])

    def time_part(self) -> Tensor:
        """The first layer's share of every diffusion step: [S, T, 256]."""
        p = self.parameters
        hidden = mish(linear(self.embedding, p["model.time_mlp.1.weight"], p["model.time_mlp.1.bias"]))
        embedded = linear(hidden, p["model.time_mlp.3.weight"], p["model.time_mlp.3.bias"])
        return linear(embedded, self._first_weight()[1])

    def noise(self, actions: Tensor, condition: Tensor) -> Tensor:
        """actions [S, B, A], condition [S, B, 256] = state part + time part -> predicted noise [S, B, A]."""
        p = self.parameters
        hidden = mish(torch.baddbmm(condition, actions, self._first_weight()[0].mT))
        for layer in ("model.mid_layer.2", "model.mid_layer.4"):
            hidden = mish(linear(hidden, p[f"{layer}.weight"], p[f"{layer}.bias"]))
        return linear(hidden, p["model.final_layer.weight"], p["model.final_layer.bias"])


class TwinCritic:
    """Q1 and Q2: each three Mish layers of 256 over [state | action]. Members 2 k and 2 k + 1 are seed k's pair."""

    NAMES = ("q1_model", "q2_model")

    def __init__(self, state_dim: int, action_dim: int, seeds: int, device: torch.device | str) -> None:
        self.state_dim = state_dim
        sizes = [state_dim + action_dim, HIDDEN, HIDDEN, HIDDEN, 1]
        self.parameters = Parameters(_layers(["0", "2", "4", "6"], sizes), 2 * seeds, device)

    def averaged(self) -> TwinCritic:
        """The same critics over a copy of the parameters that takes no gradients."""
        twin = object.__new__(TwinCritic)
        twin.state_dim, twin.parameters = self.state_dim, self.parameters.averaged()
        return twin

    def __call__(self, states: Tensor, actions: Tensor) -> Tensor:
        """states [S, B, state_dim], actions [S, B * R, action_dim] -> values [S, 2, B * R].

        R actions of a state stand side by side; the state's share of the first layer is computed once for them.
        """
        seeds = states.shape[0]
        values = self._value(self.parameters.tensors, _pair(states), _pair(actions))
        return values.unflatten(0, (seeds, 2))

    def one(self, choice: Tensor, states: Tensor, actions: Tensor) -> Tensor:
        """The critic that `choice` [S] (0 or 1) names, as a function of the actions alone: -> [S, B].

        Its weights are gathered and detached, so a gradient goes to the actions only and through one critic only.
        """
        seeds = states.shape[0]
        rows = 2 * torch.arange(seeds, device=choice.device) + choice
        chosen = {name: t.detach()[rows] for name, t in self.parameters.tensors.items()}
        return self._value(chosen, states, actions)

    def _value(self, p: Mapping[str, Tensor], states: Tensor, actions: Tensor) -> Tensor:
        weight, repeats = p["0.weight"], actions.shape[1] // states.shape[1]
        part = linear(states, weight[:, :, : self.state_dim], p["0.bias"])
        if repeats > 1:
            part = part.repeat_interleave(repeats, dim=1)
        hidden = mish(torch.baddbmm(part, actions, weight[:, :, self.state_dim :].mT))
        for layer in ("2", "4"):
            hidden = mish(linear(hidden, p[f"{layer}.weight"], p[f"{layer}.bias"]))
        return linear(hidden, p["6.weight"], p["6.bias"]).squeeze(-1)

    def seed_state(self, seed: int) -> dict[str, Tensor]:
        """Seed number `seed`'s pair under the published names."""
        return {
            f"{prefix}.{name}": value
            for i, prefix in enumerate(self.NAMES)
            for name, value in self.parameters.member_state(2 * seed + i).items()
        }

    def load_seed(self, seed: int, state: Mapping[str, Tensor]) -> None:
        """Write seed number `seed`'s pair from published names. Raises ValueError as `Parameters.load_member`."""
        for i, prefix in enumerate(self.NAMES):
            own = {n.removeprefix(f"{prefix}."): v for n, v in state.items() if n.startswith(f"{prefix}.")}
            self.parameters.load_member(2 * seed + i, own)


def _pair(x: Tensor) -> Tensor:
    """[S, B, d] -> [2 S, B, d]: the same rows for both critics of a seed."""
    return x.unsqueeze(1).expand(-1, 2, -1, -1).flatten(0, 1)
