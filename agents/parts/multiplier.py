"""Lagrange multipliers, learnt by dual ascent."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from agents.parts.parameters import Network, Parameters, Sizes


class Multiplier(Network):
    """A Lagrange multiplier lambda, one number per seed, which grows while its constraint is violated.

        max_lambda  lambda * violation        by `Agent.ascend(name, violation)`

    log: the number stored is log lambda. of_log: what climbs is log lambda * violation instead, as SAC's code has it
    for its temperature. bounds: of lambda as the losses see it. stored: what the stored number is cut to after every
    step; without it a multiplier itself goes on beyond its bounds (it winds up), while a logarithm stands still there,
    as the derivative of the cut has it.
    """

    required = False  # published weights seldom have it

    def __init__(
        self,
        sizes: Sizes,
        start: float = 0.0,
        log: bool = False,
        of_log: bool = False,
        bounds: tuple[float, float] = (-math.inf, math.inf),
        stored: tuple[float, float] | None = None,
    ) -> None:
        self.parameters = Parameters({"value": ()}, sizes.seeds, sizes.device, trainable=False)
        self.start, self.log, self.of_log, self.bounds, self.stored = start, log, of_log, bounds, stored

    @property
    def flat(self) -> Tensor:
        """The stored numbers [S, 1]."""
        return self.parameters.flat

    def initialize(self, generators: Sequence[torch.Generator]) -> None:
        """No random numbers: every seed starts at `start`."""
        self.flat.fill_(self.start)

    def __call__(self) -> Tensor:
        """lambda as it is used [S]."""
        return self._unbounded().clamp(*self.bounds)

    def _unbounded(self) -> Tensor:
        return self.flat[:, 0].exp() if self.log else self.flat[:, 0]

    def gradient(self, violation: Tensor) -> Tensor:
        """d (-lambda * violation) / d stored number, violation [S] -> [S, 1]."""
        if not self.log or self.of_log:
            return -violation.unsqueeze(1)
        value = self._unbounded()
        slope = self() * ((value >= self.bounds[0]) & (value < self.bounds[1]))
        return -(slope * violation).unsqueeze(1)

    def cut(self) -> None:
        """Bring the stored number within `stored`."""
        if self.stored is not None:
            self.flat.clamp_(*self.stored)

    def seed_state(self, seed: int) -> Tensor:
        """The stored number []."""
        return self.flat[seed, 0].clone()

    def load_seed(self, seed: int, state: Tensor | float) -> None:
        """Write the stored number."""
        self.flat[seed] = float(state)
