"""A second device that every machine has: tensors that say they lie on "meta" while CPU tensors hold their numbers.

What is asked of them is computed on the CPU. Operations on tensors of two devices are refused, as by a GPU, also those
for which PyTorch would copy and make the host wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

ELSEWHERE = torch.device("meta")


class There(Tensor):
    """A tensor on ELSEWHERE, with its numbers in `here`."""

    here: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype,
            device=ELSEWHERE, requires_grad=here.requires_grad,
        )  # fmt: skip
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})

    def __reduce_ex__(self, protocol: Any) -> Any:  # a file is read with map_location "cpu" anyway
        return self.here.__reduce_ex__(protocol)

    def tolist(self) -> Any:  # PyTorch refuses it for every tensor of a class of its own
        return self.here.tolist()


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    name, device = func.overloadpacket.__name__, kwargs.get("device")
    there = any(isinstance(t, There) for t in given)
    if name == "copy_":
        there = isinstance(args[0], There)
    elif device is not None:
        there = torch.device(device) == ELSEWHERE
    elif there and not all(isinstance(t, There) or _a_number(t, args) for t in given):
        shapes = [(tuple(t.shape), "elsewhere" if isinstance(t, There) else "cpu") for t in given]
        raise RuntimeError(f"{func} takes tensors of two devices: {shapes}")
    own_args, own = tree_map_only(There, lambda t: t.here, (args, kwargs))
    outcome = func(*own_args, **(own if device is None else {**own, "device": torch.device("cpu")}))
    if not there:
        return outcome
    return return_and_correct_aliasing(func, args, kwargs, tree_map_only(Tensor, There, outcome))


def _a_number(tensor: Tensor, args: Any) -> bool:
    """Whether it is a number [] that stands for itself, not in a list or to be written: any device takes such a one."""
    return tensor.dim() == 0 and any(tensor is arg for arg in args[1:])


class _Made(TorchDispatchMode):
    """Makes what is made on ELSEWHERE a `There`; counts the copies between it and the CPU."""

    copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outcome = _computed(func, args, kwargs or {})
        if func.overloadpacket.__name__ in ("copy_", "_to_copy"):
            source = args[1] if func.overloadpacket.__name__ == "copy_" else args[0]
            self.copies += isinstance(outcome, There) != isinstance(source, There)
        return outcome


class _Generator(torch.Generator):
    """A generator on any device that draws as one of the CPU does."""

    place: torch.device

    def __new__(cls, device: Any = "cpu") -> _Generator:
        made = super().__new__(cls, device="cpu")
        made.place = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:
        return self.place


@contextmanager
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Made]:
    """Where this is open, ELSEWHERE is a device to train on. `torch.tensor` and the like are made here and copied."""

    def copied(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
            value = make(*args, **kwargs)
            return value if device is None else value.to(device)

        return made

    with monkeypatch.context() as patch, _Made() as mode:
        patch.setattr(torch, "tensor", copied(torch.tensor))
        patch.setattr(torch, "as_tensor", copied(torch.as_tensor))
        patch.setattr(torch, "Generator", _Generator)
        yield mode
