"""Keeps the normal random numbers that d3rlpy draws, in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributions import normal


class Noise:
    """A source of normals that remembers them. `same_first`: see `record_d3rlpy/bear.py`."""

    def __init__(self, seed: int, same_first: bool = False) -> None:
        self.generator, self.same_first = torch.Generator().manual_seed(seed), same_first
        self.drawn: list[torch.Tensor] = []

    def draw(self, shape: Sequence[int]) -> torch.Tensor:
        """Normals of this shape, kept."""
        value = torch.empty(*shape).normal_(generator=self.generator)  # not randn, which is replaced
        if self.same_first and value.ndim == 3:
            value = torch.cat([self._last_of(value.shape[1:], value), value[1:]])
        self.drawn.append(value)
        return value.clone()

    def _last_of(self, shape: torch.Size, value: torch.Tensor) -> torch.Tensor:
        """The last draw of a shape, with an axis more; where there was none, what `value` begins with."""
        found = [one for one in self.drawn if one.shape == shape]
        return found[-1].unsqueeze(0) if found else value[:1]

    @contextmanager
    def used(self) -> Iterator[list[torch.Tensor]]:
        """Within, d3rlpy's normals come from here; yields the list of those drawn within."""
        kept = torch.randn, normal._standard_normal
        self.drawn = []

        def randn(*shape: Any, **_: Any) -> torch.Tensor:
            return self.draw(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)

        torch.randn, normal._standard_normal = randn, lambda shape, dtype, device: self.draw(shape)
        try:
            yield self.drawn
        finally:
            torch.randn, normal._standard_normal = kept
