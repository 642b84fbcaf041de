"""Random numbers, drawn seed by seed so that a seed sees the same alone and in company; and choices by them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Rng = torch.Generator | Sequence[torch.Generator | None]


def _generators(rng: Rng, seeds: int) -> Sequence[torch.Generator | None]:
    """One generator per seed; a single one serves all seeds, in order. None is PyTorch's own, of the CPU."""
    if isinstance(rng, torch.Generator):
        return [rng] * seeds
    if len(rng) != seeds:
        raise ValueError(f"{seeds} seeds need {seeds} generators, not {len(rng)}")
    return rng


def _place(generator: torch.Generator | None) -> torch.device | None:
    return None if generator is None else generator.device


def normals(rng: Rng, seeds: int, steps: int, shape: Sequence[int]) -> Tensor:
    """Standard normals [steps, S, *shape], drawn seed by seed so that a seed sees the same alone and in company."""
    return torch.stack([_normal(g, (steps, *shape)) for g in _generators(rng, seeds)], dim=1)


def _normal(generator: torch.Generator | None, shape: Sequence[int]) -> Tensor:
    if generator is None:  # `torch.export` knows no `randn` with a generator for a number of rows that it leaves open
        return torch.randn(*shape)
    return torch.randn(*shape, generator=generator, device=generator.device)


def uniforms(rng: Rng, seeds: int, steps: int, shape: Sequence[int]) -> Tensor:
    """Uniform numbers in [0, 1), [steps, S, *shape]."""
    drawn = [torch.rand(steps, *shape, generator=g, device=_place(g)) for g in _generators(rng, seeds)]
    return torch.stack(drawn, dim=1)


def exponentials(rng: Rng, seeds: int, shape: Sequence[int]) -> Tensor:
    """Standard exponentials [S, *shape]."""
    drawn = [torch.empty(*shape, device=_place(g)).exponential_(generator=g) for g in _generators(rng, seeds)]
    return torch.stack(drawn)


def integers(rng: Rng, seeds: int, steps: int, high: int, shape: Sequence[int]) -> Tensor:
    """Integers [steps, S, *shape] in 0 .. high - 1."""
    drawn = [torch.randint(high, (steps, *shape), generator=g, device=_place(g)) for g in _generators(rng, seeds)]
    return torch.stack(drawn, dim=1)


def keep_masks(rng: Rng, seeds: int, steps: int, dropout: float, shape: Sequence[int]) -> Tensor:
    """What a dropout of this rate keeps, bool [steps, S, *shape]."""
    kept = [
        torch.empty(steps, *shape, dtype=torch.bool, device=_place(g)).bernoulli_(1 - dropout, generator=g)
        for g in _generators(rng, seeds)
    ]
    return torch.stack(kept, dim=1)


def candidates_softmax(values: Tensor, actions: Tensor, exponential: Tensor) -> Tensor:
    """One of C actions per state with probability softmax(values): values, exponential [S, N, C], actions [S, N, C, A].

    value - log(exponential) is value + a Gumbel variable, whose argmax has that distribution: no host round trip.
    """
    return candidates_best(values - exponential.log(), actions)


def candidates_best(values: Tensor, actions: Tensor) -> Tensor:
    """The action of the greatest value: values [S, N, C], actions [S, N, C, A] -> [S, N, A]."""
    index = values.argmax(dim=2)[:, :, None, None].expand(-1, -1, 1, actions.shape[3])
    return actions.gather(2, index).squeeze(2)
