"""Lagrange multipliers: learnt by dual ascent, or set by a controller."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from agents.parts.adam import Adam
from agents.parts.parameters import Network, Parameters, Sizes

LARGEST_ERROR = 1.0  # relative to the bound
ERROR_RATE = 0.05  # of the mean of the constraint's violation that a controller is proportional to


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

    def at_bound(self) -> Tensor:
        """Whether lambda as it is used is one of its bounds [S] bool."""
        value, (least, most) = self(), self.bounds
        return (value == least) | (value == most)

    def _unbounded(self) -> Tensor:
        return self.flat[:, 0].exp() if self.log else self.flat[:, 0]

    def step(self, optimizer: Adam, violation: Tensor, scale: Tensor | float) -> Tensor:
        """One step by the constraint's violation [S], which `scale` makes relative where that matters. Its size [S]."""
        norm = optimizer.step(self.gradient(violation))
        self.cut()
        return norm

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


class PIMultiplier(Multiplier):
    """A Lagrange multiplier lambda set by a controller, one number per seed (Stooke et al. 2020, arXiv 2007.03964).

        lambda = K_P e + I      I <- I + K_I v, within the bounds      e <- e + ERROR_RATE (v - e)

    v is the constraint's violation relative to `scale`, its bound, and at most LARGEST_ERROR, so that a fresh policy's
    large loss does not wind I up. Dual ascent is the integral I alone; the part in proportion to the error answers at
    once, and takes back what it gave as soon as the constraint is met. The paper's derivative is left out: in
    `benchmarks.multipliers` it changed nothing. No optimiser takes part.
    """

    def __init__(
        self, sizes: Sizes, start: float, bounds: tuple[float, float], proportional: float, integral: float
    ) -> None:
        super().__init__(sizes, start, bounds=bounds)
        shapes: dict[str, tuple[int, ...]] = {"value": (), "integral": (), "error": ()}
        self.parameters = Parameters(shapes, sizes.seeds, sizes.device, trainable=False)
        self.proportional, self.integral = proportional, integral

    def initialize(self, generators: Sequence[torch.Generator]) -> None:
        for seed in range(len(generators)):
            self.load_seed(seed, self.start)

    @torch.no_grad()
    def step(self, optimizer: Adam, violation: Tensor, scale: Tensor | float) -> Tensor:
        """One step by the constraint's violation [S]; |v| [S]."""
        value, integral, error = (self.parameters[name] for name in ("value", "integral", "error"))
        relative = (violation / scale).clamp(max=LARGEST_ERROR)
        error.lerp_(relative, ERROR_RATE)
        integral.add_(relative, alpha=self.integral).clamp_(*self.bounds)
        value.copy_(self.proportional * error + integral)
        return relative.abs()

    def load_seed(self, seed: int, state: Tensor | float) -> None:
        """Begin at this lambda, with no error yet."""
        self.flat[seed] = torch.tensor([float(state), float(state), 0.0])
