"""A chain of layers, act(x W^T + c), as one operation in bfloat16 on a CPU; fused.cpp and vectors.h compute it.

PyTorch's own products of 256 x 256 run at the processor's full rate, too, but each costs a call, and casts, offsets,
activations and their derivatives pass through memory between them. The library is compiled when it is first wanted,
which takes half a minute, and kept in ~/.cache/diffcps.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".cpp")
VECTORS = SOURCE.with_name("vectors.h")
MOST_LAST = 64  # outputs of a float32 last layer
KINDS = ("identity", "relu", "mish", "swish")  # the activations
# What a processor needs for layers made here, as Linux names it: for products of pairs of bfloat16, or of floats.
PAIRS = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "fma"})
FLOATS = frozenset({"avx2", "fma"})
_SHARED = [f"-DMOST_LAST={MOST_LAST}", f"-DKINDS={','.join(KINDS).upper()}"]  # what fused.cpp takes from here
OPTIONS = ["-std=c++17", "-O3", *_SHARED, "-fopenmp", "-shared", "-fPIC"]

# Whether layers in bfloat16 are made here and not by PyTorch, see `prepare`.
ready = False


@functools.cache
def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """What this machine's processor says that it has; nothing where it does not say it as Linux does."""
    try:
        return frozenset(cpuinfo.read_text().split())
    except OSError:
        return frozenset()


def prepare() -> None:
    """Compile the library where the processor has what it needs and nothing faster (`extensions`).

    One line says where it cannot be compiled; PyTorch multiplies then.
    """
    global ready
    if not ready and extensions():
        ready = _loaded()


def extensions() -> frozenset[str]:
    """The processor's extensions that the library is compiled for; none where layers are PyTorch's: AMX is faster, and
    AVX-512 without bfloat16 has registers that AVX2 does not use."""
    has = processor()
    if "amx_bf16" in has:
        return frozenset()
    if has >= PAIRS:
        return PAIRS
    return FLOATS if has >= FLOATS and "avx512f" not in has else frozenset()


def in_floats() -> bool:
    """Whether products are quicker in float32, which every bfloat16 is: AMD's processors multiply pairs of bfloat16, if
    they can, at twice the rate of float32, Intel's, but for their AMX, at half of it. The last bits of a sum differ."""
    return "GenuineIntel" in processor() or extensions() != PAIRS


def applies(x: Tensor) -> bool:
    """Whether a layer over x is to be made here: in bfloat16, on a CPU, after `prepare`."""
    return ready and x.device.type == "cpu" and torch.is_autocast_enabled("cpu")


# --- The library ------------------------------------------------------------------------------------------------------


@functools.cache
def _loaded() -> bool:
    """Compile fused.cpp and give PyTorch its operations; False, after one line, where that fails."""
    try:
        torch.ops.load_library(_compiled())
        torch.ops.diffcps.in_floats(in_floats())
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        line = said.strip().splitlines()[0] if said.strip() else "the compiler failed"
        pairs = "compiled steps take a quarter longer, others twice as long"
        cost = pairs if extensions() == PAIRS else "a step takes seven times as long as in float32"
        warnings.warn(f"no compiled layers in bfloat16 ({line}): {cost}", stacklevel=4)
        return False
    torch.library.register_fake("diffcps::chain", _outputs)
    torch.library.register_fake("diffcps::chain_gradient", _gradients)
    return True


def _compiled() -> Path:
    """The library's file, compiled unless this source has been before."""
    root = Path(torch.__file__).parent
    flags = [f"-m{name.replace('_', '')}" for name in sorted(extensions())]
    options = [*OPTIONS, *flags, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
    options += [
        f"-I{root}/include",
        f"-I{root}/include/torch/csrc/api/include",
        f"-L{root}/lib",
        "-lc10",
        "-ltorch_cpu",
    ]
    compiler = os.environ.get("CXX", "g++")
    source = SOURCE.read_bytes() + VECTORS.read_bytes()
    key = hashlib.sha256(source + repr((torch.__version__, compiler, options)).encode()).hexdigest()[:16]
    folder = Path.home() / ".cache" / "diffcps" / "compiled"
    if not os.access(_existing(folder), os.W_OK):
        folder = Path(tempfile.mkdtemp(prefix="diffcps-"))
    path = folder / f"fused-{key}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Another process may be at it too: each writes a file of its own, and the last one stays.
        with tempfile.TemporaryDirectory(dir=folder) as own:
            command = [compiler, str(SOURCE), "-o", f"{own}/fused.so", *options]
            subprocess.run(command, check=True, capture_output=True, text=True)
            os.replace(f"{own}/fused.so", path)
    return path


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


# --- For PyTorch ------------------------------------------------------------------------------------------------------


def _outputs(
    x: Tensor, parameters: list[Tensor], count: int, kind: int, head: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    """Tensors like those that `chain` of fused.cpp gives."""
    normalised = len(parameters) > 2 * count
    kept = (1 + normalised) * x.shape[0] * x.shape[1] * sum(weight.shape[1] for weight in parameters[: count - head])
    out = x.new_empty(*x.shape[:2], parameters[count - 1].shape[1], dtype=torch.float32 if head else torch.bfloat16)
    return out, x.new_empty(kept if keep and (kind or count > 1 or normalised) else 0, dtype=torch.bfloat16)


def _gradients(
    g: Tensor, z: Tensor, x: Tensor, parameters: list[Tensor], count: int, kind: int, head: bool, wanted: list[int]
) -> list[Tensor]:
    """Tensors like those that `chain_gradient` of fused.cpp gives."""
    return [t.new_empty(t.shape if asked else (0,)) for t, asked in zip((x, *parameters), wanted, strict=True)]


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, kind: int, head: bool, x: Tensor, *parameters: Tensor) -> Tensor:
        out, z = torch.ops.diffcps.chain(x, list(parameters), count, kind, head, True)
        ctx.save_for_backward(z, x, *parameters)
        ctx.plain = count, kind, head
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, x, *parameters = ctx.saved_tensors
        wanted = [int(asked) for asked in ctx.needs_input_grad[3:]]
        found = torch.ops.diffcps.chain_gradient(grad, z, x, parameters, *ctx.plain, wanted)
        return (None, None, None, *(slope if asked else None for slope, asked in zip(found, wanted, strict=True)))


def chain(
    x: Tensor,
    layers: Sequence[tuple[Tensor, Tensor]],
    kind: str,
    head: bool = False,
    norms: Sequence[tuple[Tensor, Tensor]] = (),
) -> Tensor:
    """act(... act(x W^T + c) ...) in bfloat16: x [M, B, in], each layer W [M, out, in] and c [M, B or 1, out].

    kind: the activation, of `KINDS`. head: the last layer has no activation, and is float32 like what it gives, else
    bfloat16 [M, B, out]. norms: scale and shift [M, out] of a layer normalisation before each activation. Sums are
    float32; the gradients of the float32 parameters, too.
    """
    pairs = [t for norm in norms for t in norm]
    parameters = [weight for weight, _ in layers] + [offset for _, offset in layers] + pairs
    plain = len(layers), KINDS.index(kind), head
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters)):
        return _Differentiable.apply(*plain, x, *parameters)
    return torch.ops.diffcps.chain(x, parameters, *plain, False)[0]
