"""Temporal convolutional networks over windows of a trajectory (Janner et al. 2022): a U-Net, and a value of a window.

A window is [H, C]: H steps of C numbers. The seeds stand side by side as channels, [B, S * C, H], and convolutions and
group normalisations keep to their own seed's group. Weights have the published names (jannerm/diffuser, diffuser/
models/temporal.py; anuragajay/decision-diffuser has the same blocks).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from agents.parts.layers import head, layer, layer_shapes, linear, mish, sinusoidal_embedding
from agents.parts.parameters import Network, Parameters, Sizes, default_init

KERNEL, GROUPS = 5, 8  # of a convolution block
HEADS, HEAD_DIM = 4, 32  # of the attention
NORM_EPSILON = 1e-5  # beside every variance

Shapes = dict[str, Sequence[int]]


def multipliers(text: str) -> tuple[int, ...]:
    """Multiples of the width, level by level, of a setting such as "1,2,4,8".

    Raises ValueError for anything but positive integers that begin with 1: the output layer has the width itself.
    """
    words = text.replace(" ", "").split(",")
    found = tuple(int(word) if word.isdecimal() else 0 for word in words)
    if found[0] != 1 or min(found) < 1:
        raise ValueError(f"dim_mults must be positive integers that begin with 1, such as 1,2,4,8, not {text!r}")
    return found


class _Temporal(Network):
    """What both networks share: layers over [B, S * C, L], and the embedding of the diffusion step."""

    def __init__(self, sizes: Sizes, dim: int, shapes: Shapes) -> None:
        if dim % GROUPS:
            raise ValueError(f"hidden_dim must be a multiple of {GROUPS}, the groups of a normalisation, not {dim}")
        self.dim, self.seeds = dim, sizes.seeds
        time = layer_shapes(["model.time_mlp.1", "model.time_mlp.3"], [dim, 4 * dim, dim])
        self.parameters = Parameters(time | shapes, sizes.seeds, sizes.device)

    def initialize(self, generators: Sequence[torch.Generator]) -> None:
        """PyTorch's default; the attention's normalisations begin with gain 1 and shift 0."""
        default_init(self.parameters, generators)
        with torch.no_grad():
            for name in self.parameters.shapes:
                if ".norm." in name:
                    self.parameters[name].fill_(1.0 if name.endswith(".g") else 0.0)

    def time_embedding(self, steps: Tensor) -> Tensor:
        """Diffusion steps [S, n], counted from 0 -> [S, n, dim]."""
        p, x = self.parameters, sinusoidal_embedding(steps.float(), self.dim)
        x = layer(x, p["model.time_mlp.1.weight"], p["model.time_mlp.1.bias"], mish)
        return linear(x, p["model.time_mlp.3.weight"], p["model.time_mlp.3.bias"])

    def _inside(self, windows: Tensor) -> Tensor:
        """[S, B, H, C] -> [B, S * C, H]."""
        return windows.permute(1, 0, 3, 2).flatten(1, 2)

    def _conv(self, x: Tensor, name: str, stride: int = 1, padding: int = 0) -> Tensor:
        weight, bias = self.parameters[f"{name}.weight"], self.parameters.tensors.get(f"{name}.bias")
        flat = None if bias is None else bias.flatten()
        return functional.conv1d(x, weight.flatten(0, 1), flat, stride, padding, groups=self.seeds)

    def _exact_conv(self, x: Tensor, name: str, stride: int = 1, padding: int = 0) -> Tensor:
        """`_conv` in float32 whatever the update's precision, as `layers.head`."""
        if x.dtype != torch.bfloat16:
            return self._conv(x, name, stride, padding)
        with torch.autocast(x.device.type, enabled=False):
            return self._conv(x.float(), name, stride, padding)

    def _halved(self, x: Tensor, name: str) -> Tensor:
        """A convolution with stride 2: length L -> ceil(L / 2).

        In float32: PyTorch 2.13's derivative by the weights is not finite in bfloat16, for windows of one step.
        """
        return self._exact_conv(x, f"{name}.conv", stride=2, padding=1).to(x.dtype)

    def _block(self, x: Tensor, name: str) -> Tensor:
        """Convolution, group normalisation, Mish."""
        weight, bias = (self.parameters[f"{name}.block.2.{kind}"].flatten() for kind in ("weight", "bias"))
        x = self._conv(x, f"{name}.block.0", padding=KERNEL // 2)
        return mish(functional.group_norm(x, self.seeds * GROUPS, weight, bias, NORM_EPSILON))

    def _residual(self, x: Tensor, embedding: Tensor, rows: int, name: str) -> Tensor:
        """Two blocks, the embedding's share between them, and the input itself.

        embedding: [S, K, b, E] after its Mish, b the `rows` of a condition or 1 where they share one. x has the rows
        once or once per condition, [rows, ...] or [K * rows, ...]; the result has them K times. So what does not depend
        on the condition, the first block, is computed once for all.
        """
        p, (seeds, copies, b, _) = self.parameters, embedding.shape
        share = linear(embedding.flatten(1, 2), p[f"{name}.time_mlp.1.weight"], p[f"{name}.time_mlp.1.bias"])
        share = share.view(seeds, copies, b, -1).permute(1, 2, 0, 3).flatten(2).unsqueeze(3)
        h = self._block(x, f"{name}.blocks.0").unflatten(0, (-1, rows)) + share
        h = self._block(h.flatten(0, 1), f"{name}.blocks.1").unflatten(0, (copies, rows))
        if f"{name}.residual_conv.weight" in p.shapes:
            x = self._conv(x, f"{name}.residual_conv")
        return (h + x.unflatten(0, (-1, rows))).flatten(0, 1)

    def _attention(self, x: Tensor, name: str) -> Tensor:
        """x + f(LN(x)), f linear attention over positions (Katharopoulos et al. 2020), for [B, S * C, L]."""
        p, each = self.parameters, x.unflatten(1, (self.seeds, -1))
        mean, variance = each.mean(dim=2, keepdim=True), each.var(dim=2, correction=0, keepdim=True)
        gain, shift = p[f"{name}.norm.g"], p[f"{name}.norm.b"]  # each [S, 1, C, 1]
        normed = (each - mean) / (variance + NORM_EPSILON).sqrt() * gain.squeeze(1) + shift.squeeze(1)
        qkv = self._conv(normed.flatten(1, 2), f"{name}.fn.to_qkv")
        q, k, v = qkv.unflatten(1, (self.seeds, 3, HEADS, HEAD_DIM)).unbind(2)  # each [B, S, heads, head_dim, L]
        context = k.softmax(dim=-1) @ v.mT  # [.., d, e]: the sum over positions of k[d] v[e]
        attended = context.mT @ (q * HEAD_DIM**-0.5)
        return x + self._conv(attended.flatten(1, 3), f"{name}.fn.to_out")


class TemporalUNet(_Temporal):
    """A prediction for every entry of a noised window at a diffusion step. One member per seed.

    Level i has `dim * mults[i]` channels and half the length of the one above; the skip of the full resolution is not
    used, as published. With `conditioned` the return that a window should have is embedded beside the step.
    """

    def __init__(
        self,
        sizes: Sizes,
        channels: int,
        horizon: int,
        dim: int,
        mults: Sequence[int],
        attention: bool = False,
        conditioned: bool = False,
    ) -> None:
        """Raises ValueError for a horizon that cannot be halved at every level but the last."""
        halvings = len(mults) - 1
        if horizon < 1 or horizon % 2**halvings:
            raise ValueError(
                f"horizon {horizon} cannot be halved {halvings} times, once per level of the U-Net after the first; "
                f"use a multiple of {2**halvings}, or fewer dim_mults"
            )
        self.levels, self.attention, self.conditioned = len(mults), attention, conditioned
        embedded = 2 * dim if conditioned else dim
        widths = [channels, *(dim * m for m in mults)]
        shapes: Shapes = {}
        if conditioned:
            shapes |= layer_shapes([f"model.returns_mlp.{i}" for i in (0, 2, 4)], [1, dim, 4 * dim, dim])
        # As published: without attention Diffuser leaves its place empty, Decision Diffuser has none.
        self.resample = 2 if conditioned else 3
        for i in range(self.levels):
            shapes |= self._level(f"model.downs.{i}", widths[i], widths[i + 1], embedded)
            if i < self.levels - 1:
                shapes |= _conv_shapes(f"model.downs.{i}.{self.resample}.conv", widths[i + 1], widths[i + 1], 3)
        for k, i in enumerate(reversed(range(1, self.levels))):
            shapes |= self._level(f"model.ups.{k}", 2 * widths[i + 1], widths[i], embedded)
            shapes |= _conv_shapes(f"model.ups.{k}.{self.resample}.conv", widths[i], widths[i], 4)
        shapes |= _residual_shapes("model.mid_block1", widths[-1], widths[-1], embedded)
        shapes |= _attention_shapes("model.mid_attn", widths[-1]) if attention else {}
        shapes |= _residual_shapes("model.mid_block2", widths[-1], widths[-1], embedded)
        shapes |= _block_shapes("model.final_conv.0", dim, dim) | _conv_shapes("model.final_conv.1", dim, channels, 1)
        super().__init__(sizes, dim, shapes)

    def _level(self, name: str, before: int, after: int, embedded: int) -> Shapes:
        shapes = _residual_shapes(f"{name}.0", before, after, embedded)
        shapes |= _residual_shapes(f"{name}.1", after, after, embedded)
        return shapes | (_attention_shapes(f"{name}.2", after) if self.attention else {})

    def returns_embedding(self, returns: Tensor) -> Tensor:
        """Scaled returns [S, n, 1] -> [S, n, dim]."""
        p, x = self.parameters, returns
        for i in (0, 2, 4):
            x = linear(x if i == 0 else mish(x), p[f"model.returns_mlp.{i}.weight"], p[f"model.returns_mlp.{i}.bias"])
        return x

    def __call__(self, windows: Tensor, embedding: Tensor) -> Tensor:
        """windows [S, B, H, C], embedding [S, B or 1, E] -> [S, B, H, C]."""
        return self.under(windows, embedding.unsqueeze(1)).squeeze(1)

    def under(self, windows: Tensor, embedding: Tensor) -> Tensor:
        """Under K conditions at once: windows [S, B, H, C], embedding [S, K, B or 1, E] -> [S, K, B, H, C]."""
        e, rows = mish(embedding), windows.shape[1]
        x = self._inside(windows)
        skips = []
        for i in range(self.levels):
            x = self._pair(x, e, rows, f"model.downs.{i}")
            skips.append(x)
            if i < self.levels - 1:
                x = self._halved(x, f"model.downs.{i}.{self.resample}")
        x = self._residual(x, e, rows, "model.mid_block1")
        if self.attention:
            x = self._attention(x, "model.mid_attn.fn")
        x = self._residual(x, e, rows, "model.mid_block2")
        for k in range(self.levels - 1):
            both = [part.unflatten(1, (self.seeds, -1)) for part in (x, skips.pop())]
            x = self._pair(torch.cat(both, dim=2).flatten(1, 2), e, rows, f"model.ups.{k}")
            x = self._doubled(x, f"model.ups.{k}.{self.resample}")
        x = self._exact_conv(self._block(x, "model.final_conv.0"), "model.final_conv.1")
        return x.view(-1, rows, self.seeds, windows.shape[3], windows.shape[2]).permute(2, 0, 1, 4, 3)

    def _pair(self, x: Tensor, embedding: Tensor, rows: int, name: str) -> Tensor:
        for i in (0, 1):
            x = self._residual(x, embedding, rows, f"{name}.{i}")
        return self._attention(x, f"{name}.2.fn") if self.attention else x

    def _doubled(self, x: Tensor, name: str) -> Tensor:
        """A transposed convolution with stride 2: length L -> 2 L."""
        weight, bias = self.parameters[f"{name}.conv.weight"], self.parameters[f"{name}.conv.bias"]
        return functional.conv_transpose1d(
            x, weight.flatten(0, 1), bias.flatten(), stride=2, padding=1, groups=self.seeds
        )


class TemporalValue(_Temporal):
    """One number for a noised window at a diffusion step: the return that goes with it. One member per seed.

    Every level halves the length, the last one too, and two more blocks halve both length and width.
    """

    def __init__(self, sizes: Sizes, channels: int, horizon: int, dim: int, mults: Sequence[int]) -> None:
        """Raises ValueError where the published last layer does not fit: it counts one halving too few."""
        self.levels, longest = len(mults), 2 ** (len(mults) + 1)
        if not 1 <= horizon <= longest:
            raise ValueError(
                f"the value network of {len(mults)} levels takes a horizon of at most {longest}, not {horizon}; "
                "use a shorter one, or more dim_mults"
            )
        widths = [channels, *(dim * m for m in mults)]
        half, quarter = widths[-1] // 2, widths[-1] // 4
        if quarter % GROUPS:
            raise ValueError(f"a quarter of the last level's width must be a multiple of {GROUPS}, not {quarter}")
        shapes: Shapes = {}
        for i in range(self.levels):
            shapes |= _residual_shapes(f"model.blocks.{i}.0", widths[i], widths[i + 1], dim)
            shapes |= _residual_shapes(f"model.blocks.{i}.1", widths[i + 1], widths[i + 1], dim)
            shapes |= _conv_shapes(f"model.blocks.{i}.2.conv", widths[i + 1], widths[i + 1], 3)
        for k, (before, after) in enumerate([(widths[-1], half), (half, quarter)], start=1):
            shapes |= _residual_shapes(f"model.mid_block{k}", before, after, dim)
            shapes |= _conv_shapes(f"model.mid_down{k}.conv", after, after, 3)
        last = ["model.final_block.0", "model.final_block.2"]
        super().__init__(sizes, dim, shapes | layer_shapes(last, [quarter + dim, quarter // 2, 1]))

    def __call__(self, windows: Tensor, embedding: Tensor) -> Tensor:
        """windows [S, B, H, C], embedding [S, B or 1, dim] -> [S, B]."""
        p, e, rows = self.parameters, mish(embedding).unsqueeze(1), windows.shape[1]
        x = self._inside(windows)
        for i in range(self.levels):
            for k in (0, 1):
                x = self._residual(x, e, rows, f"model.blocks.{i}.{k}")
            x = self._halved(x, f"model.blocks.{i}.2")
        for k in (1, 2):
            x = self._residual(x, e, rows, f"model.mid_block{k}")
            x = self._halved(x, f"model.mid_down{k}")
        flat = x.view(rows, self.seeds, -1).transpose(0, 1)
        x = torch.cat([flat, embedding.expand(-1, rows, -1)], dim=2)
        x = layer(x, p["model.final_block.0.weight"], p["model.final_block.0.bias"], mish)
        return head(x, p["model.final_block.2.weight"], p["model.final_block.2.bias"]).squeeze(2)


# --- Shapes, in the order in which the published modules list them ----------------------------------------------------


def _conv_shapes(name: str, before: int, after: int, kernel: int) -> Shapes:
    return {f"{name}.weight": (after, before, kernel), f"{name}.bias": (after,)}


def _block_shapes(name: str, before: int, after: int) -> Shapes:
    norm = {f"{name}.block.2.{kind}": (after,) for kind in ("weight", "bias")}
    return _conv_shapes(f"{name}.block.0", before, after, KERNEL) | norm


def _residual_shapes(name: str, before: int, after: int, embedded: int) -> Shapes:
    shapes = _block_shapes(f"{name}.blocks.0", before, after) | _block_shapes(f"{name}.blocks.1", after, after)
    shapes |= layer_shapes([f"{name}.time_mlp.1"], [embedded, after])
    return shapes if before == after else shapes | _conv_shapes(f"{name}.residual_conv", before, after, 1)


def _attention_shapes(name: str, width: int) -> Shapes:
    inner = HEADS * HEAD_DIM
    shapes: Shapes = {f"{name}.fn.fn.to_qkv.weight": (3 * inner, width, 1)}
    shapes |= _conv_shapes(f"{name}.fn.fn.to_out", inner, width, 1)
    return shapes | {f"{name}.fn.norm.{kind}": (1, width, 1) for kind in "gb"}
