"""Layers with a leading axis of members: weights [M, out, in], inputs [M, B, in]; and the plain chain of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from agents.parts.parameters import Network, Parameters, Shapes, Sizes

TIME_DIM = 16  # width of the time embedding
FLAX_EPSILON = 1e-6  # beside the variance in flax's layer normalisation; PyTorch's has 1e-5

Activation = Callable[[Tensor], Tensor]


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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Each member's affine map: x [M, B, in], weight [M, out, in], bias [M, out] -> [M, B, out]."""
    if bias is None:
        return torch.bmm(x, weight.mT)
    return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)


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


def first_layer(states: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A layer over [state | x]: states [M, B, d], x [M, B * R, e], weight [M, out, d + e] -> [M, B * R, out].

    R rows of x stand side by side for each state; the state's share is computed once for them.
    """
    dim, repeats = states.shape[2], x.shape[1] // states.shape[1]
    part = linear(states, weight[:, :, :dim], bias)
    if repeats > 1:
        part = part.repeat_interleave(repeats, dim=1)
    return torch.baddbmm(part, x, weight[:, :, dim:].mT)


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
        p, last = self.parameters, self.names[-1]
        for layer in self.names[:-1]:
            x = self.activation(linear(x, p[f"{layer}.weight"], p[f"{layer}.bias"]))
        return head(x, p[f"{last}.weight"], p[f"{last}.bias"])


class MLP(Chain):
    """The chain as it is."""

    def __call__(self, x: Tensor) -> Tensor:
        """x [S, B, widths[0]] -> [S, B, widths[-1]]."""
        return self.through(x)
