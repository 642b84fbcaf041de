"""Networks with a leading axis of independent members: weights [M, out, in], inputs [M, B, in].

A member is one network of one seed: a noise network has M = S members, a twin critic M = 2 S. All parameters of a
kind stand in one buffer [M, P] whose slices are the layers, so that clipping, Adam and averaging are a few kernels
however many layers and seeds there are. Weights keep the names that the published code gives them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "MLP",
    "DeterministicActor",
    "EDMNetwork",
    "GaussianActor",
    "GaussianPolicy",
    "Network",
    "NoiseNetwork",
    "NormalizedTwinCritic",
    "Parameters",
    "Perturbation",
    "ResidualNoiseNetwork",
    "TD3Critic",
    "TanhGaussian",
    "TwinCritic",
    "ValueNetwork",
    "VariationalAutoencoder",
    "default_init",
    "first_layer",
    "gradients",
    "layer_norm",
    "linear",
    "mish",
    "orthogonal_init",
    "shrink_layer",
    "sinusoidal_embedding",
    "xavier_init",
]

HIDDEN = 256  # width of every hidden layer in the published networks, and the default of all
LOG_STD = (-5.0, 2.0)  # bounds of a Gaussian policy's log deviation
TIME_DIM = 16  # width of the time embedding
FOURIER_DIM = 64  # of IDQL's
KINDS = ("weight", "bias")  # what a linear layer has

Shapes = Mapping[str, Sequence[int]]
Activation = Callable[[Tensor], Tensor]
Self = TypeVar("Self", bound="Network")  # typing.Self needs Python 3.11


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
    if torch.is_grad_enabled():
        return _Mish.apply(x)
    s = torch.sigmoid(x)
    n = (2 - s).mul_(s)
    return n.div_(2 - n).mul_(x)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Each member's affine map: x [M, B, in], weight [M, out, in], bias [M, out] -> [M, B, out]."""
    if bias is None:
        return torch.bmm(x, weight.mT)
    return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Each member's layer normalisation over the last axis: x [M, B, H], weight, bias [M, H]."""
    return torch.addcmul(bias.unsqueeze(1), functional.layer_norm(x, x.shape[-1:]), weight.unsqueeze(1))


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
        return gradients(loss, [self])[0]

    def averaged(self) -> Parameters:
        """A copy that takes no gradients: the start of a target or an average."""
        twin = Parameters(self.shapes, self.members, self.flat.device, trainable=False)
        twin.flat.copy_(self.flat)
        return twin

    def frozen(self) -> Parameters:
        """The same numbers, shared and not copied, without gradients: for a loss of what passes through a network."""
        twin = copy.copy(self)
        twin.trainable, twin.tensors = False, {name: t.detach() for name, t in self.tensors.items()}
        return twin

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


def gradients(loss: Tensor, kinds: Sequence[Parameters]) -> list[Tensor]:
    """d sum(loss) / d parameters of several kinds in one backward pass, each one new tensor [M, P]."""
    flat = iter(torch.autograd.grad(loss.sum(), [t for p in kinds for t in p.tensors.values()]))
    return [torch.cat([next(flat).reshape(p.members, -1) for _ in p.tensors], dim=1) for p in kinds]


def default_init(parameters: Parameters, generators: Sequence[torch.Generator]) -> None:
    """PyTorch's default: linear layers' weight and bias ~ U(-1/sqrt(in), 1/sqrt(in)), normalisations 1 and 0.

    Each seed's members draw from that seed's own generator, so seed k starts alike alone and in company.
    """
    per_seed = parameters.members // len(generators)
    bounds = {n.rsplit(".", 1)[0]: 1 / math.sqrt(s[-1]) for n, s in parameters.shapes.items() if len(s) == 2}
    with torch.no_grad():
        for member in range(parameters.members):
            generator = generators[member // per_seed]
            for name, shape in parameters.shapes.items():
                bound = bounds.get(name.rsplit(".", 1)[0])
                if bound is None:  # a layer without a matrix is a normalisation
                    parameters[name][member].fill_(1.0 if name.endswith("weight") else 0.0)
                    continue
                drawn = torch.rand(shape, generator=generator, device=generator.device)
                parameters[name][member].copy_((2 * drawn - 1) * bound)


def orthogonal_init(parameters: Parameters, generators: Sequence[torch.Generator], gain: float = 1.0) -> None:
    """`gain` times orthogonal weights (Saxe et al. 2014), all else zero; each seed draws from its own generator."""
    per_seed = parameters.members // len(generators)
    with torch.no_grad():
        for member in range(parameters.members):
            generator = generators[member // per_seed]
            for name, shape in parameters.shapes.items():
                value = torch.zeros(shape, device=generator.device)
                if len(shape) == 2:
                    torch.nn.init.orthogonal_(value, gain, generator=generator)
                parameters[name][member].copy_(value)


def first_layer(states: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A layer over [state | x]: states [M, B, d], x [M, B * R, e], weight [M, out, d + e] -> [M, B * R, out].

    R rows of x stand side by side for each state; the state's share is computed once for them.
    """
    dim, repeats = states.shape[2], x.shape[1] // states.shape[1]
    part = linear(states, weight[:, :, :dim], bias)
    if repeats > 1:
        part = part.repeat_interleave(repeats, dim=1)
    return torch.baddbmm(part, x, weight[:, :, dim:].mT)


def xavier_init(parameters: Parameters, generators: Sequence[torch.Generator]) -> None:
    """Matrices ~ U(+-sqrt(6 / (in + out))) (Glorot & Bengio 2010), biases 0, normalisations 1; a seed's own draws."""
    per_seed = parameters.members // len(generators)
    with torch.no_grad():
        for member in range(parameters.members):
            generator = generators[member // per_seed]
            for name, shape in parameters.shapes.items():
                value = torch.full(shape, 1.0 if name.endswith("weight") else 0.0)
                if len(shape) == 2:
                    torch.nn.init.xavier_uniform_(value, generator=generator)
                parameters[name][member].copy_(value)


@torch.no_grad()
def shrink_layer(parameters: Parameters, layer: str, bound: float) -> None:
    """Bring a layer that `default_init` filled down to U(-bound, bound)."""
    scale = bound * math.sqrt(parameters.shapes[f"{layer}.weight"][1])
    for kind in ("weight", "bias"):
        parameters[f"{layer}.{kind}"].mul_(scale)


def _layers(names: Sequence[str], sizes: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Shapes of a chain of linear layers, in the order in which the published modules list them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, fan_in, fan_out in zip(names, sizes[:-1], sizes[1:], strict=True):
        shapes[f"{name}.weight"] = (fan_out, fan_in)
        shapes[f"{name}.bias"] = (fan_out,)
    return shapes


class Network:
    """A function over `parameters`; copies of it differ in those alone."""

    parameters: Parameters

    def averaged(self: Self) -> Self:
        """The same network over a copy of the parameters that takes no gradients."""
        return self._over(self.parameters.averaged())

    def frozen(self: Self) -> Self:
        """The same network over the same parameters, taken as constants."""
        return self._over(self.parameters.frozen())

    def _over(self: Self, parameters: Parameters) -> Self:
        twin = copy.copy(self)
        twin.parameters = parameters
        return twin


class NoiseNetwork(Network):
    """epsilon(a^i, s, i): the noise in a diffused action. One member a seed.

    Time embedding 16 -> 32 -> 16 with Mish, then three Mish layers of width H over [action | time | state]. The first
    of them is applied in parts: the state's part is the same for all steps of a chain and the time's part the same
    for all rows, so each is computed once (this saves a 14th of the arithmetic and all concatenations).
    """

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        diffusion_steps: int,
        seeds: int,
        device: torch.device | str,
        hidden_dim: int = HIDDEN,
    ) -> None:
        self.action_dim = action_dim
        shapes = _layers(["model.time_mlp.1", "model.time_mlp.3"], [TIME_DIM, 2 * TIME_DIM, TIME_DIM])
        mid = [f"model.mid_layer.{i}" for i in (0, 2, 4)]
        shapes |= _layers(mid, [action_dim + TIME_DIM + state_dim, hidden_dim, hidden_dim, hidden_dim])
        shapes |= _layers(["model.final_layer"], [hidden_dim, action_dim])
        self.parameters = Parameters(shapes, seeds, device)
        steps = torch.arange(diffusion_steps, device=device, dtype=torch.float32)
        self.embedding = sinusoidal_embedding(steps).expand(seeds, -1, -1)

    def _first_weight(self) -> tuple[Tensor, Tensor, Tensor]:
        weight, a = self.parameters["model.mid_layer.0.weight"], self.action_dim
        return weight[:, :, :a], weight[:, :, a : a + TIME_DIM], weight[:, :, a + TIME_DIM :]

    def state_part(self, states: Tensor) -> Tensor:
        """The first layer's share of the state, bias included: [S, B, state_dim] -> [S, B, H]."""
        return linear(states, self._first_weight()[2], self.parameters["model.mid_layer.0.bias"])

    def time_part(self) -> Tensor:
        """The first layer's share of every diffusion step: [S, T, H]."""
        p = self.parameters
        hidden = mish(linear(self.embedding, p["model.time_mlp.1.weight"], p["model.time_mlp.1.bias"]))
        embedded = linear(hidden, p["model.time_mlp.3.weight"], p["model.time_mlp.3.bias"])
        return linear(embedded, self._first_weight()[1])

    def noise(self, actions: Tensor, condition: Tensor) -> Tensor:
        """actions [S, B, A], condition [S, B, H] = state part + time part -> predicted noise [S, B, A]."""
        p = self.parameters
        hidden = mish(torch.baddbmm(condition, actions, self._first_weight()[0].mT))
        for layer in ("model.mid_layer.2", "model.mid_layer.4"):
            hidden = mish(linear(hidden, p[f"{layer}.weight"], p[f"{layer}.bias"]))
        return linear(hidden, p["model.final_layer.weight"], p["model.final_layer.bias"])


class ResidualNoiseNetwork(Network):
    """epsilon(a^i, s, i) as a residual network with layer normalisation, IDQL's `LN_Resnet`. One member a seed.

    Learnt Fourier features of the step -> 128 -> 128 with Mish; a layer of width H over [action | state | time];
    `blocks` times x + W2 mish(W1 norm(dropout(x))) with 4 H units inside; mish, and a layer to the noise.
    """

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        diffusion_steps: int,
        seeds: int,
        device: torch.device | str,
        hidden_dim: int = HIDDEN,
        blocks: int = 3,
        dropout: float = 0.0,
    ) -> None:
        self.action_dim, self.state_dim, self.hidden_dim = action_dim, state_dim, hidden_dim
        self.dropout, self.kept = dropout, None
        self.blocks = [f"blocks.{i}" for i in range(blocks)]
        shapes = {"time.frequencies": (FOURIER_DIM // 2,)}
        shapes |= _layers(["time.1", "time.3"], [FOURIER_DIM, 2 * FOURIER_DIM, 2 * FOURIER_DIM])
        shapes |= _layers(["first"], [action_dim + state_dim + 2 * FOURIER_DIM, hidden_dim])
        for block in self.blocks:
            shapes |= {f"{block}.norm.{kind}": (hidden_dim,) for kind in ("weight", "bias")}
            shapes |= _layers([f"{block}.1", f"{block}.3"], [hidden_dim, 4 * hidden_dim, hidden_dim])
        shapes |= _layers(["last"], [hidden_dim, action_dim])
        self.parameters = Parameters(shapes, seeds, device)
        self.steps = torch.arange(diffusion_steps, device=device, dtype=torch.float32)

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
        return self.parameters["first.weight"].split([self.action_dim, self.state_dim, 2 * FOURIER_DIM], dim=2)

    def state_part(self, states: Tensor) -> Tensor:
        """The first layer's share of the state, bias included: [S, B, state_dim] -> [S, B, H]."""
        return linear(states, self._first_weight()[1], self.parameters["first.bias"])

    def time_part(self) -> Tensor:
        """The first layer's share of every diffusion step: [S, T, H]."""
        p = self.parameters
        angles = 2 * math.pi * self.steps.unsqueeze(1) * p["time.frequencies"].unsqueeze(1)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        hidden = mish(linear(features, p["time.1.weight"], p["time.1.bias"]))
        return linear(linear(hidden, p["time.3.weight"], p["time.3.bias"]), self._first_weight()[2])

    def noise(self, actions: Tensor, condition: Tensor) -> Tensor:
        """actions [S, B, A], condition [S, B, H] = state part + time part -> predicted noise [S, B, A]."""
        p = self.parameters
        x = torch.baddbmm(condition, actions, self._first_weight()[0].mT)
        kept = self.kept.split(self.hidden_dim, dim=-1) if self.kept is not None else ()
        for i, block in enumerate(self.blocks):
            inside = x * kept[i] / (1 - self.dropout) if kept else x
            inside = layer_norm(inside, p[f"{block}.norm.weight"], p[f"{block}.norm.bias"])
            inside = mish(linear(inside, p[f"{block}.1.weight"], p[f"{block}.1.bias"]))
            x = x + linear(inside, p[f"{block}.3.weight"], p[f"{block}.3.bias"])
        return linear(mish(x), p["last.weight"], p["last.bias"])


class TwinCritic(Network):
    """Q1 and Q2: each `layers` hidden layers over [state | action]. Members 2 k and 2 k + 1 are seed k's pair."""

    NAMES = ("q1_model", "q2_model")

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        seeds: int,
        device: torch.device | str,
        hidden_dim: int = HIDDEN,
        layers: int = 3,
        activation: Activation = mish,
    ) -> None:
        self.activation = activation
        names = [str(2 * i) for i in range(layers + 1)]
        sizes = [state_dim + action_dim, *[hidden_dim] * layers, 1]
        self.parameters, self._later = Parameters(_layers(names, sizes), 2 * seeds, device), names[1:]

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
        hidden = first_layer(states, actions, p["0.weight"], p["0.bias"])
        for layer in self._later:
            hidden = linear(self.activation(hidden), p[f"{layer}.weight"], p[f"{layer}.bias"])
        return hidden.squeeze(-1)

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


class NormalizedTwinCritic(TwinCritic):
    """Q1 and Q2 with a layer normalisation before each Mish, as DTQL has them."""

    def __init__(
        self, state_dim: int, action_dim: int, seeds: int, device: torch.device | str, hidden_dim: int = HIDDEN
    ) -> None:
        shapes = _layers(["0", "3", "6", "9"], [state_dim + action_dim, hidden_dim, hidden_dim, hidden_dim, 1])
        shapes |= {f"{norm}.{kind}": (hidden_dim,) for norm in (1, 4, 7) for kind in ("weight", "bias")}
        self.parameters = Parameters(shapes, 2 * seeds, device)

    def _value(self, p: Mapping[str, Tensor], states: Tensor, actions: Tensor) -> Tensor:
        hidden = first_layer(states, actions, p["0.weight"], p["0.bias"])
        for norm, layer in (("1", "3"), ("4", "6"), ("7", "9")):
            hidden = mish(layer_norm(hidden, p[f"{norm}.weight"], p[f"{norm}.bias"]))
            hidden = linear(hidden, p[f"{layer}.weight"], p[f"{layer}.bias"])
        return hidden.squeeze(-1)


class TD3Critic(TwinCritic):
    """Q1 and Q2 of TD3 and its heirs: ReLU layers of these widths, named l1, l2 ... on through both critics."""

    def __init__(
        self, state_dim: int, action_dim: int, seeds: int, device: torch.device | str, widths: Sequence[int]
    ) -> None:
        self.activation = torch.relu
        names = [str(2 * i) for i in range(len(widths) + 1)]
        shapes = _layers(names, [state_dim + action_dim, *widths, 1])
        self.parameters, self._later = Parameters(shapes, 2 * seeds, device), names[1:]
        # Layer k of critic i (from 0) is l(k + 1 + i layers) as published.
        self._published = [{f"l{k + 1 + i * len(names)}": name for k, name in enumerate(names)} for i in (0, 1)]

    def seed_state(self, seed: int) -> dict[str, Tensor]:
        """Seed number `seed`'s pair under the published names."""
        state = {}
        for i, layers in enumerate(self._published):
            own = self.parameters.member_state(2 * seed + i)
            state |= {f"{layer}.{kind}": own[f"{name}.{kind}"] for layer, name in layers.items() for kind in KINDS}
        return state

    def load_seed(self, seed: int, state: Mapping[str, Tensor]) -> None:
        """Write seed number `seed`'s pair from published names. Raises ValueError as `Parameters.load_member`."""
        for i, layers in enumerate(self._published):
            names = {f"{layer}.{kind}": f"{name}.{kind}" for layer, name in layers.items() for kind in KINDS}
            missing = [name for name in names if name not in state]
            if missing:
                raise ValueError(f"the weights lack {missing[0]!r}; they have {', '.join(state)}")
            self.parameters.load_member(2 * seed + i, {own: state[name] for name, own in names.items()})


class MLP(Network):
    """A chain of linear layers with an activation between them. One member a seed, or `members`.

    Weights are named `<prefix>.0`, `<prefix>.2`, ...: the places of the linear layers in an `nn.Sequential`; or `names`
    has a name for each layer.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        members: int,
        device: torch.device | str,
        activation: Activation = torch.relu,
        prefix: str = "net",
        names: Sequence[str] | None = None,
    ) -> None:
        self.activation = activation
        self._names = list(names) if names else [f"{prefix}.{2 * i}" for i in range(len(sizes) - 1)]
        self.parameters = Parameters(_layers(self._names, sizes), members, device)

    def __call__(self, x: Tensor) -> Tensor:
        """x [M, B, sizes[0]] -> [M, B, sizes[-1]], no activation at the end."""
        p = self.parameters
        for i, layer in enumerate(self._names):
            x = linear(x if i == 0 else self.activation(x), p[f"{layer}.weight"], p[f"{layer}.bias"])
        return x


class ValueNetwork(MLP):
    """V(s): `layers` hidden layers. One member a seed."""

    def __init__(
        self,
        state_dim: int,
        seeds: int,
        device: torch.device | str,
        hidden_dim: int = HIDDEN,
        layers: int = 3,
        activation: Activation = mish,
    ) -> None:
        super().__init__([state_dim, *[hidden_dim] * layers, 1], seeds, device, activation, "v_model")

    def __call__(self, states: Tensor) -> Tensor:
        """states [S, B, state_dim] -> values [S, B]."""
        return super().__call__(states).squeeze(-1)


def normal_log_density(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log density of x [..., A] under a diagonal normal [...]."""
    deviations = (x - mean) / log_std.exp()
    return (-0.5 * deviations.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(dim=-1)


class GaussianPolicy(MLP):
    """A normal distribution over a / max_action: mean tanh(f(s)), one deviation a dimension whatever the state.

    ReLU layers, one member a seed; the policy of implicit Q-learning (Kostrikov et al. 2022).
    """

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        max_action: float,
        seeds: int,
        device: torch.device | str,
        hidden_dim: int = HIDDEN,
        layers: int = 2,
        dropout: float = 0.0,
    ) -> None:
        self.max_action, self.dropout, self.hidden = max_action, dropout, [hidden_dim] * layers
        super().__init__([state_dim, *self.hidden, action_dim], seeds, device)
        self.parameters = Parameters({**self.parameters.shapes, "log_std": (action_dim,)}, seeds, device)

    def actions(self, states: Tensor) -> Tensor:
        """The mean of the distribution, in the action box: states [S, B, state_dim] -> [S, B, A]."""
        return torch.tanh(super().__call__(states)) * self.max_action

    def log_likelihood(self, states: Tensor, actions: Tensor, kept: Tensor | None = None) -> Tensor:
        """Log density of a / max_action [S, B]; actions [S, B, A].

        kept: what dropout keeps of the hidden layers, bool [S, B, layers * H]; None: everything.
        """
        p, x = self.parameters, states
        parts = kept.split(self.hidden, dim=-1) if kept is not None else ()
        for i, layer in enumerate(self._names[:-1]):
            x = self.activation(linear(x, p[f"{layer}.weight"], p[f"{layer}.bias"]))
            if kept is not None:
                x = x * parts[i] / (1 - self.dropout)
        mean = torch.tanh(linear(x, p[f"{self._names[-1]}.weight"], p[f"{self._names[-1]}.bias"]))
        return normal_log_density(actions / self.max_action, mean, p["log_std"].clamp(*LOG_STD).unsqueeze(1))


class _StateDependentGaussian(MLP):
    """Mean and log deviation side by side, over `layers` ReLU layers. One member a seed."""

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        max_action: float,
        seeds: int,
        device: torch.device | str,
        hidden_dim: int = HIDDEN,
        layers: int = 2,
    ) -> None:
        self.max_action = max_action
        super().__init__([state_dim, *[hidden_dim] * layers, 2 * action_dim], seeds, device)

    def __call__(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """states [S, B, state_dim] -> mean and bounded log deviation, each [S, B, A]."""
        mean, log_std = super().__call__(states).chunk(2, dim=-1)
        return mean, log_std.clamp(*LOG_STD)


class TanhGaussian(_StateDependentGaussian):
    """max_action * tanh(mean + deviation * noise)."""

    MARGIN = 1e-3  # beyond the box, so that an action on its edge has a finite likelihood

    def actions(self, mean: Tensor, log_std: Tensor, noise: Tensor) -> Tensor:
        """The action that standard normal `noise` gives; the shapes broadcast."""
        return torch.tanh(mean + log_std.exp() * noise) * self.max_action

    def sample(self, mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The actions that standard normal `noise` [..., A] gives, and their log densities [...] over the unit box."""
        raw = mean + log_std.exp() * noise
        return torch.tanh(raw) * self.max_action, self._squashed(mean, log_std, raw)

    def log_density(self, mean: Tensor, log_std: Tensor, actions: Tensor) -> Tensor:
        """Log density of a / max_action [S, B]; beyond 1 - 1e-6 of the box an action counts as there."""
        inside = (actions / self.max_action).clamp(-1 + 1e-6, 1 - 1e-6)
        return self._squashed(mean, log_std, torch.atanh(inside))

    def _squashed(self, mean: Tensor, log_std: Tensor, raw: Tensor) -> Tensor:
        """Log density of tanh(raw): the normal's, less log tanh'(raw) = 2 (log 2 - raw - softplus(-2 raw))."""
        squash = 2 * (math.log(2) - raw - functional.softplus(-2 * raw))
        return normal_log_density(raw, mean, log_std) - squash.sum(dim=-1)

    def log_likelihood(self, mean: Tensor, log_std: Tensor, actions: Tensor) -> Tensor:
        """Log density of atanh(a / (max_action + margin)) [S, B]; as published, without the tanh's own density."""
        return normal_log_density(torch.atanh(actions / (self.max_action + self.MARGIN)), mean, log_std)


class DeterministicActor(MLP):
    """max_action * tanh(f(s)) over ReLU layers named l1, l2 ... One member a seed."""

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        max_action: float,
        seeds: int,
        device: torch.device | str,
        widths: Sequence[int],
    ) -> None:
        self.max_action = max_action
        names = [f"l{k + 1}" for k in range(len(widths) + 1)]
        super().__init__([state_dim, *widths, action_dim], seeds, device, names=names)

    def __call__(self, states: Tensor) -> Tensor:
        """states [S, B, state_dim] -> actions [S, B, A]."""
        return torch.tanh(super().__call__(states)) * self.max_action


class GaussianActor(_StateDependentGaussian):
    """A normal distribution over a / max_action: mean tanh(f(s)), deviation exp(g(s)).

    The mean lies in the action box; a sample is cut to it.
    """

    def __call__(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """states [S, B, state_dim] -> mean and log deviation of a / max_action, each [S, B, A]."""
        mean, log_std = super().__call__(states)
        return torch.tanh(mean), log_std

    def actions(self, mean: Tensor, log_std: Tensor, noise: Tensor | None = None) -> Tensor:
        """The action that standard normal `noise` gives, cut to the box; without noise the mean."""
        scaled = mean if noise is None else (mean + log_std.exp() * noise).clamp(-1, 1)
        return scaled * self.max_action

    def log_likelihood(self, mean: Tensor, log_std: Tensor, actions: Tensor) -> Tensor:
        """Log density of a / max_action [S, B]; actions [S, B, A]."""
        return normal_log_density(actions / self.max_action, mean, log_std)


class EDMNetwork(Network):
    """DTQL's raw network F(c_in x, s, ln sigma / 4). One member a seed.

    Time embedding 16 -> 32 -> 16 with Mish, then four layers of width H over [action | state | time], with Mish after
    all but the first (as published; DEVIATIONS, last paragraph).
    """

    def __init__(
        self, state_dim: int, action_dim: int, seeds: int, device: torch.device | str, hidden_dim: int = HIDDEN
    ) -> None:
        shapes = _layers(["embed.1", "embed.3"], [TIME_DIM, 2 * TIME_DIM, TIME_DIM])
        names = [f"layers.layers.{i}" for i in (0, 1, 3, 5, 7)]
        shapes |= _layers(names, [action_dim + state_dim + TIME_DIM, *[hidden_dim] * 4, action_dim])
        self.parameters = Parameters(shapes, seeds, device)

    def __call__(self, actions: Tensor, states: Tensor, times: Tensor) -> Tensor:
        """actions [S, B, A], states [S, B, state_dim], times [S, B] -> [S, B, A]."""
        p = self.parameters
        time = mish(linear(sinusoidal_embedding(times), p["embed.1.weight"], p["embed.1.bias"]))
        time = linear(time, p["embed.3.weight"], p["embed.3.bias"])
        hidden = torch.cat([actions, states, time], dim=-1)
        hidden = linear(hidden, p["layers.layers.0.weight"], p["layers.layers.0.bias"])
        for layer in ("layers.layers.1", "layers.layers.3", "layers.layers.5"):
            hidden = mish(linear(hidden, p[f"{layer}.weight"], p[f"{layer}.bias"]))
        return linear(hidden, p["layers.layers.7.weight"], p["layers.layers.7.bias"])


class Perturbation(Network):
    """a + phi max_action tanh(f(s, a)), cut to the action box (BCQ; Fujimoto et al. 2019). One member a seed."""

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        max_action: float,
        phi: float,
        seeds: int,
        device: torch.device | str,
        widths: Sequence[int],
    ) -> None:
        self.max_action, self.phi = max_action, phi
        self._names = [f"l{k + 1}" for k in range(len(widths) + 1)]
        self.parameters = Parameters(_layers(self._names, [state_dim + action_dim, *widths, action_dim]), seeds, device)

    def __call__(self, states: Tensor, actions: Tensor) -> Tensor:
        """states [S, B, state_dim], actions [S, B * R, A], R for each state side by side -> [S, B * R, A]."""
        p = self.parameters
        hidden = first_layer(states, actions, p["l1.weight"], p["l1.bias"])
        for layer in self._names[1:]:
            hidden = linear(torch.relu(hidden), p[f"{layer}.weight"], p[f"{layer}.bias"])
        shift = self.phi * self.max_action * torch.tanh(hidden)
        return (actions + shift).clamp(-self.max_action, self.max_action)


class VariationalAutoencoder(Network):
    """The behaviour model of BCQ and BEAR: an action's latent code given the state, and back. One member a seed.

    Both ways two ReLU layers of width H. The code has twice the action's dimensions.
    """

    LOG_STD = (-4.0, 15.0)  # bounds of the code's log deviation
    CODES = 0.5  # codes drawn for sampling are cut at this: actions that the data make likely
    KL_WEIGHT = 0.5

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        max_action: float,
        seeds: int,
        device: torch.device | str,
        hidden_dim: int,
    ) -> None:
        self.max_action, self.latent_dim = max_action, 2 * action_dim
        shapes = _layers(["e1", "e2", "mean"], [state_dim + action_dim, hidden_dim, hidden_dim, self.latent_dim])
        shapes |= _layers(["log_std"], [hidden_dim, self.latent_dim])
        shapes |= _layers(["d1", "d2", "d3"], [state_dim + self.latent_dim, hidden_dim, hidden_dim, action_dim])
        self.parameters = Parameters(shapes, seeds, device)

    def encode(self, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """states [S, B, state_dim], actions [S, B, A] -> mean and log deviation of the code, each [S, B, 2 A]."""
        p = self.parameters
        hidden = torch.relu(first_layer(states, actions, p["e1.weight"], p["e1.bias"]))
        hidden = torch.relu(linear(hidden, p["e2.weight"], p["e2.bias"]))
        mean = linear(hidden, p["mean.weight"], p["mean.bias"])
        return mean, linear(hidden, p["log_std.weight"], p["log_std.bias"]).clamp(*self.LOG_STD)

    def decode(self, states: Tensor, codes: Tensor) -> Tensor:
        """states [S, B, state_dim], codes [S, B * R, 2 A] -> actions before the tanh [S, B * R, A]."""
        p = self.parameters
        hidden = torch.relu(first_layer(states, codes, p["d1.weight"], p["d1.bias"]))
        hidden = torch.relu(linear(hidden, p["d2.weight"], p["d2.bias"]))
        return linear(hidden, p["d3.weight"], p["d3.bias"])

    def actions(self, raw: Tensor) -> Tensor:
        """The actions in the box that `decode`'s numbers stand for."""
        return torch.tanh(raw) * self.max_action

    def sample(self, states: Tensor, noise: Tensor) -> Tensor:
        """Actions before the tanh from standard normal `noise` [S, B * R, 2 A], which is cut at `CODES`."""
        return self.decode(states, noise.clamp(-self.CODES, self.CODES))

    def loss(self, states: Tensor, actions: Tensor, noise: Tensor) -> Tensor:
        """Squared error of the decoded action + KL_WEIGHT KL(code || standard normal), means over dimensions [S]."""
        mean, log_std = self.encode(states, actions)
        decoded = self.actions(self.decode(states, mean + log_std.exp() * noise))
        kl = -0.5 * (1 + 2 * log_std - mean.square() - (2 * log_std).exp())
        return ((decoded - actions).square().mean(dim=(1, 2))) + self.KL_WEIGHT * kl.mean(dim=(1, 2))


def _pair(x: Tensor) -> Tensor:
    """[S, B, d] -> [2 S, B, d]: the same rows for both critics of a seed."""
    return x.unsqueeze(1).expand(-1, 2, -1, -1).flatten(0, 1)
