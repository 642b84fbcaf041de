"""Layers with a leading axis of members: weights [M, out, in], inputs [M, B, in]; and the plain chain of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from agents.parts import fused
from agents.parts.parameters import Network, Parameters, Shapes, Sizes

TIME_DIM = 16  # width of the time embedding
FLAX_EPSILON = 1e-6  # beside the variance in flax's layer normalisation; PyTorch's has 1e-5

Activation = Callable[[Tensor], Tensor]
Layers = Sequence[tuple[Tensor, Tensor]]  # weights [M, out, in] and offsets [M, B or 1, out]; a bias is one row of them


class _Mish(torch.autograd.Function):
    """x * tanh(softplus(x)) with one sigmoid s: tanh(softplus(x)) = n / (2 - n), n = s (2 - s).

    The library's form takes an exponential, a logarithm and a hyperbolic tangent for each value and another set for
    its derivative; this one never overflows, loses no digits for very negative x, and keeps s for the derivative.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        s = torch.sigmoid(x)
        n = (2 - s).mul_(s)
        ctx.save_for_backward(x, s, n)
        return n.div(2 - n).mul_(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
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


ACTIVATIONS: dict[str, Activation] = {"mish": mish, "swish": functional.silu}  # that a setting can name
FUSED = {torch.relu: "relu", mish: "mish", functional.silu: "swish"}  # the kinds of layer that `fused` has


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Each member's affine map: x [M, B, in], weight [M, out, in], bias [M, out] -> [M, B, out]."""
    if bias is None and not fused.applies(x):
        return torch.bmm(x, weight.mT)
    bias = weight.new_zeros(weight.shape[:2]) if bias is None else bias
    return added(bias.unsqueeze(1), x, weight)


def added(offset: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """x W^T + c: x [M, B, in], weight [M, out, in], offset [M, B or 1, out] -> [M, B, out]."""
    if fused.applies(x):
        return fused.chain(x, [(weight, offset)], "identity")
    return torch.baddbmm(offset, x, weight.mT)


def layer(x: Tensor, weight: Tensor, bias: Tensor, activation: Activation) -> Tensor:
    """`linear` and the activation."""
    return hidden(x, [(weight, bias.unsqueeze(1))], activation)


def hidden(x: Tensor, layers: Layers, activation: Activation, norms: Layers = ()) -> Tensor:
    """Layers with the activation after each: x [M, B, in] -> [M, B, out].

    norms: scale and shift [M, out] of a layer normalisation before each activation.
    """
    if fused.applies(x) and activation in FUSED:
        return fused.chain(x, layers, FUSED[activation], norms=norms)
    for i, (weight, offset) in enumerate(layers):
        x = added(offset, x, weight)
        x = activation(layer_norm(x, *norms[i]) if norms else x)
    return x


def chain(x: Tensor, layers: Layers, activation: Activation, norms: Layers = ()) -> Tensor:
    """`hidden` layers and, at the end, a `head`: x [M, B, in] -> [M, B, out]."""
    if fused.applies(x) and activation in FUSED and layers[-1][0].shape[1] <= fused.MOST_LAST:
        return fused.chain(x, layers, FUSED[activation], head=True, norms=norms)
    weight, offset = layers[-1]
    return head(hidden(x, layers[:-1], activation, norms), weight, offset.squeeze(1))


def head(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`linear` as a network's last layer: float32 whatever the update's precision, for what is made of its output."""
    if x.dtype != torch.bfloat16:
        return linear(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        return linear(x.to(weight.dtype), weight, bias)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float = 1e-5) -> Tensor:
    """Each member's layer normalisation over the last axis: x [M, B, H], weight, bias [M, H]."""
    normal = functional.layer_norm(x, x.shape[-1:], eps=epsilon)
    return torch.addcmul(bias.unsqueeze(1), normal, weight.unsqueeze(1)).to(x.dtype)


def sinusoidal_embedding(steps: Tensor, dim: int = TIME_DIM) -> Tensor:
    """Sines then cosines at dim/2 geometric frequencies from 1 down to 1e-4: [...] -> [..., dim]."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=steps.device) * (-math.log(10000) / (half - 1)))
    angles = steps.unsqueeze(-1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def entering(states: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """A layer over [state | x] as one over fewer columns: what it takes, and its weight and offset.

    states [M, B, d], x [M, B * R, e], weight [M, out, d + e]. R rows of x stand side by side for each state, its share
    being an offset, computed once for them.
    """
    dim, repeats = states.shape[2], x.shape[1] // states.shape[1]
    if repeats == 1 and fused.applies(x):
        return torch.cat([states, x], dim=2), (weight, bias.unsqueeze(1))
    part = linear(states, weight[:, :, :dim], bias)
    return x, (weight[:, :, dim:], part.repeat_interleave(repeats, dim=1) if repeats > 1 else part)


def named(parameters: Mapping[str, Tensor] | Parameters, names: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
    """The weights and offsets of layers by their names."""
    return [(parameters[f"{name}.weight"], parameters[f"{name}.bias"].unsqueeze(1)) for name in names]


def layer_shapes(names: Sequence[str], sizes: Sequence[int]) -> dict[str, Sequence[int]]:
    """Shapes of a chain of linear layers, in the order in which the published modules list them."""
    shapes: dict[str, Sequence[int]] = {}
    for name, fan_in, fan_out in zip(names, sizes[:-1], sizes[1:], strict=True):
        shapes[f"{name}.weight"] = (fan_out, fan_in)
        shapes[f"{name}.bias"] = (fan_out,)
    return shapes


class Chain(Network):
    """A chain of linear layers of these widths, from in to out, with an activation between them. One member per seed.

    Weights are named `<prefix>.0`, `<prefix>.2`, ...: the places of the linear layers in an `nn.Sequential`; or `names`
    has a name for each layer. `extra` are parameters that a subclass needs besides.
    """

    def __init__(
        self,
        widths: Sequence[int],
        sizes: Sizes,
        activation: Activation = torch.relu,
        prefix: str = "net",
        names: Sequence[str] | None = None,
        extra: Shapes | None = None,
    ) -> None:
        self.activation = activation
        self.names = list(names) if names else [f"{prefix}.{2 * i}" for i in range(len(widths) - 1)]
        shapes = layer_shapes(self.names, widths) | dict(extra or {})
        self.parameters = Parameters(shapes, sizes.seeds, sizes.device)

    def through(self, x: Tensor) -> Tensor:
        """x [S, B, widths[0]] -> [S, B, widths[-1]], no activation at the end."""
        return chain(x, named(self.parameters, self.names), self.activation)


class MLP(Chain):
    """The chain as it is."""

    def __call__(self, x: Tensor) -> Tensor:
        """x [S, B, widths[0]] -> [S, B, widths[-1]]."""
        return self.through(x)
