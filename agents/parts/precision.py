"""How exactly an update multiplies: in float32 as published, or in a form that hardware multiplies faster.

bfloat16: the matrix products and activations of the losses named in `Agent.COMPILED`, and of their gradients.
Parameters, averages, optimiser, targets, the losses' sums and means and lambda stay float32, for every network gives
float32 out (`layers.head`). tf32: all of the update's float32 products, by the GPU's tensor cores. Acting is float32.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import ParamSpec, TypeVar

import torch

from agents.parts import fused

P = ParamSpec("P")
R = TypeVar("R")

PRECISIONS = ("float32", "tf32", "bfloat16")
CPU_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # any of them, of x86 or ARM, stands for products in bfloat16
AMPERE = (8, 0)  # the first GPUs that have either

# PyTorch's switch for TF32 is the process': a policy that acts in another thread must not see it.
_SWITCH = threading.RLock()


def check(precision: str, device: torch.device) -> None:
    """Raises ValueError for a precision that does not exist on `device`; warns where it is slower than float32."""
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; known: {', '.join(PRECISIONS)}")
    if device.type == "cuda":
        if precision != "float32" and torch.cuda.get_device_capability(device) < AMPERE:
            raise ValueError(f"{torch.cuda.get_device_name(device)} does not multiply in {precision}; use float32")
    elif precision == "tf32":
        raise ValueError("precision 'tf32' needs a CUDA device, a CPU has none; use float32 or bfloat16")
    elif precision == "bfloat16" and not (CPU_FLAGS & fused.processor() or fused.extensions()):
        cost = "a step takes twice as long as in float32 with AVX-512, longer without"
        warnings.warn(f"this CPU has no bfloat16 products: {cost}", stacklevel=3)
    elif precision == "bfloat16":
        fused.prepare()


def bfloat16(loss: Callable[P, R], device: torch.device) -> Callable[P, R]:
    """`loss` with bfloat16 products and activations; its gradient's are then, too."""

    def mixed(*args: P.args, **kwargs: P.kwargs) -> R:
        # No cache: within a captured graph, weights that were cast once would never be cast again.
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            return loss(*args, **kwargs)

    # torch.compile looks up by the code object what it compiled: each loss has one of its own.
    mixed.__code__ = mixed.__code__.replace()
    return functools.wraps(loss)(mixed)


def updating(precision: str) -> AbstractContextManager[object]:
    """What surrounds an update."""
    return _tf32() if precision == "tf32" else nullcontext()


def acting(precision: str) -> AbstractContextManager[object]:
    """What surrounds the policy: it waits until no other thread multiplies in TF32."""
    return _SWITCH if precision == "tf32" else nullcontext()


@contextmanager
def _tf32() -> Iterator[None]:
    with _SWITCH:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
