"""Losses that several learning rules share."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["advantage_weights", "expectile_loss"]


def expectile_loss(differences: Tensor, expectile: float) -> Tensor:
    """|expectile - 1(u < 0)| u^2 for each difference u, any shape (Kostrikov et al. 2022, eq. 5).

    Its minimiser over v of the mean at u = x - v is the expectile of x: 0.5 gives the mean, 1 the maximum.
    """
    return torch.where(differences > 0, expectile, 1 - expectile) * differences.square()


def advantage_weights(advantages: Tensor, beta: float, limit: float = 100.0) -> Tensor:
    """min(exp(beta A), limit) for each advantage A, any shape: the weights of advantage-weighted regression.

    Without the limit they turn the data's policy mu into the one proportional to mu(a | s) exp(beta A(s, a))
    (Peng et al. 2019); implicit Q-learning's code cuts them at 100.
    """
    return (beta * advantages).exp().clamp(max=limit)
