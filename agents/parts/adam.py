"""The optimiser, and how its learning rate falls."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from agents.parts.parameters import Parameters

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


class Adam:
    """Adam (Kingma & Ba 2015) over one buffer of parameters [M, P], each seed's gradient clipped by its own norm.

    weight_decay: AdamW's, of every parameter (Loshchilov & Hutter 2019). The published code clips every network's
    gradient at `grad_norm` (D5; the paper names no clipping).
    """

    def __init__(
        self, parameters: Parameters, seeds: int, learning_rate: float, grad_norm: float, weight_decay: float = 0.0
    ) -> None:
        self.flat, self.seeds, self.grad_norm = parameters.flat, seeds, grad_norm
        self.base_rate, self.weight_decay = learning_rate, weight_decay
        device = self.flat.device
        self.rate = torch.tensor(float(learning_rate), device=device)
        # All in place from before the first step on, so that a captured graph finds them.
        self.mean, self.square = torch.zeros_like(self.flat), torch.zeros_like(self.flat)
        self.steps = torch.zeros((), device=device)

    def step(self, gradient: Tensor) -> Tensor:
        """Clip `gradient` [M, P] per seed, apply it, and return each seed's norm before clipping [S]."""
        per_seed = gradient.view(self.seeds, -1)
        norms = per_seed.norm(dim=1)
        if self.grad_norm > 0:
            per_seed.mul_((self.grad_norm / (norms + 1e-6)).clamp(max=1.0).unsqueeze(1))
        self.steps.add_(1)
        # What torch.optim.Adam and AdamW call after a fifth of a millisecond of Python, for each of an update's nets.
        kernel = torch._fused_adamw_ if self.weight_decay > 0 else torch._fused_adam_
        kernel(
            [self.flat], [gradient], [self.mean], [self.square], [], [self.steps],
            lr=self.rate, beta1=BETA1, beta2=BETA2, weight_decay=self.weight_decay, eps=EPSILON,
            amsgrad=False, maximize=False,
        )  # fmt: skip
        return norms

    def reset(self) -> None:
        """Forget all steps taken: the optimiser as it was at first."""
        for value in (self.mean, self.square, self.steps):
            value.zero_()

    def set_rate(self, factor: float) -> None:
        """Use `factor` times the learning rate from the next step on."""
        self.rate.fill_(self.base_rate * factor)

    def state_dict(self) -> dict[str, Any]:
        """Moments with the seeds axis first, and the number of steps taken."""
        moments = {"exp_avg": self.mean, "exp_avg_sq": self.square}
        return {**{k: v.view(self.seeds, -1).clone() for k, v in moments.items()}, "steps": int(self.steps)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Write a saved state in place."""
        self.mean.copy_(saved["exp_avg"].view_as(self.mean))
        self.square.copy_(saved["exp_avg_sq"].view_as(self.square))
        self.steps.fill_(saved["steps"])


def cosine_decay(optimizers: Iterable[Adam], clock: Tensor, last: int) -> None:
    """Set each rate to half a cosine of its start, which ends at zero at step `last`, and move `clock` [] on by one.

    For a rate that changes at every update: a captured graph holds the clock, not a number.
    """
    factor = 0.5 + 0.5 * torch.cos(clock.clamp(0, last) * (math.pi / last))
    for optimizer in optimizers:
        torch.mul(factor, optimizer.base_rate, out=optimizer.rate)
    clock.add_(1)


def learning_rate_factor(config: Any, step: int) -> float:
    """Cosine decay of every learning rate at a gradient step.

    `lr_decay` is the published form (D9): stepped once an evaluation interval, over a horizon counted in
    epochs, so that 2000 epochs end at 0.999 of the start. `lr_decay_full` is stepped every epoch and ends at zero.
    """
    if config.lr_decay and config.lr_decay_full:
        raise ValueError("lr_decay and lr_decay_full exclude each other; choose one")
    if not (config.lr_decay or config.lr_decay_full):
        return 1.0
    epochs = step // config.num_steps_per_epoch
    done = epochs // config.eval_interval if config.lr_decay else min(epochs, config.num_epochs)
    return 0.5 * (1 + math.cos(math.pi * done / config.num_epochs))
