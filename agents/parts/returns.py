"""Recursions backward along trajectories, for all transitions of a table at once."""

from __future__ import annotations

import torch
from torch import Tensor


def backward(increments: Tensor, factors: Tensor, floors: Tensor | None = None) -> Tensor:
    """y_i = increment_i + factor_i y_{i+1}, or max(floor_i, that), for every i: three [S, N] -> [S, N].

    factors are at least 0, and 0 where a trajectory ends, the last i included. Each step is a function of y_{i+1};
    composed with the one 1, 2, 4, ... places on it keeps its form, so a trajectory of L steps takes log2(L) passes
    over the table and no loop over its rows. Waits for the device, to see when no trajectory goes on.
    """
    y, gain = increments.clone(), factors.clone()
    floor = None if floors is None else floors.clone()
    shift = 1
    while bool(gain.any()):
        here, there = slice(0, -shift), slice(shift, None)
        if floor is not None:
            floor[:, here] = torch.maximum(floor[:, here], y[:, here] + gain[:, here] * floor[:, there])
        y[:, here] = y[:, here] + gain[:, here] * y[:, there]
        gain[:, here] = gain[:, here] * gain[:, there]
        gain[:, -shift:] = 0
        shift *= 2
    return y if floor is None else torch.maximum(floor, y)
