"""Losses that several learning rules share."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def td_target(batch: Mapping[str, Tensor], discount: float, bootstrap: Tensor) -> Tensor:
    """r + discount V(s'), with V = 0 after a terminal: bootstrap [S, B] -> [S, B]."""
    return batch["rewards"][..., 0] + discount * batch["not_dones"][..., 0] * bootstrap


def twin_error(values: Tensor, target: Tensor) -> Tensor:
    """Both critics' mean squared errors, added: values [S, 2, B], target [S, B] -> [S]."""
    return (values - target.unsqueeze(1)).square().mean(dim=2).sum(dim=1)


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


# Name -> distance [...] of differences [..., A], whose kernel is exp(-distance / (2 sigma)).
KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "gaussian": lambda differences: differences.square().sum(dim=-1),
    "laplacian": lambda differences: differences.abs().sum(dim=-1),
}


def mmd(x: Tensor, y: Tensor, kernel: str, sigma: float) -> Tensor:
    """Maximum mean discrepancy of samples x [..., N, A] and y [..., M, A] -> [...], as BEAR's code has it.

        sqrt(mean k(x, x') + mean k(y, y') - 2 mean k(x, y) + 1e-6),    k(x, y) = exp(-distance / (2 sigma))

    each sample paired with itself too (Gretton et al. 2012, eq. 5); the distance is squared for "gaussian" and in
    the 1-norm for "laplacian". `sigma` stands where a Gaussian has its variance. Raises KeyError for another kernel.
    """

    def mean(a: Tensor, b: Tensor) -> Tensor:
        # k - 1, whose ones cancel: k itself would lose its digits where sigma is large.
        exponents = KERNELS[kernel](a.unsqueeze(-2) - b.unsqueeze(-3)) / (-2 * sigma)
        return torch.expm1(exponents).mean(dim=(-2, -1))

    return (mean(x, x) + mean(y, y) - 2 * mean(x, y) + 1e-6).sqrt()


def soft_clipped_backup(values: Tensor, weight: float, actions: int) -> Tensor:
    """BCQ's value of a next state: values [S, 2, B * R] of R = `actions` actions of each state -> [S, B].

    The greatest, over the actions, of `weight` times the critics' minimum + (1 - weight) times their maximum
    (Fujimoto et al. 2019, section 4).
    """
    mixed = weight * values.amin(dim=1) + (1 - weight) * values.amax(dim=1)
    return mixed.unflatten(1, (-1, actions)).amax(dim=2)


def conservative_gap(sampled: Tensor, log_density: Tensor, data: Tensor) -> Tensor:
    """log sum_k exp(Q_k - log density_k) - Q_data (Kumar et al. 2020, eq. 4 and app. F): [..., K], [..., K], [...].

    Over K actions drawn with these densities the sum is K times an unbiased estimate of the integral of exp Q; log K
    is kept, as published.
    """
    return (sampled - log_density).logsumexp(dim=-1) - data


def implicit_policy_weights(advantages: Tensor, expectile: float) -> Tensor:
    """|expectile - 1(A < 0)| for each advantage A = Q - V, any shape (Hansen-Estruch et al. 2023, section 4).

    Where V is the expectile of Q under mu, it is the mean of Q under the policy proportional to mu times these weights.
    """
    return torch.where(advantages > 0, expectile, 1 - expectile)
