"""How near generated actions come to a bandit's data: the paper's score as stated, and scores that can be met.

All take points of the plane, [N, 2] generated and [M, 2] of the data. Distances are Euclidean.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

from utils.data import bandit

Array = np.ndarray

STATED = 1e-8  # the paper's distance to a data point
NEAR = 0.15
"""Radius of `precision`: three deviations of the data's noise. The circle's middle is 0.8 from any data point."""
COVERED = 0.05
"""Radius of `coverage`: one deviation, so that a circle without its noise leaves the data's outer third uncovered."""
KERNEL_WIDTH = 0.1
"""Of `mmd`: two deviations, so that the ring's width counts as well as its place."""
KERNEL_POINTS = 2500
"""Of the data, evenly spaced in the set, that `mmd` compares with: all pairs of them are formed."""


def share_near(points: Array, others: Array, radius: float) -> float:
    """Share of `points` with one of `others` at less than `radius`."""
    return float((cKDTree(others).query(points)[0] < radius).mean())


def jaccard(actions: Array, data: Array) -> float:
    """The paper's modified Jaccard index: share of actions that are a data point, to 1e-8. Samples never are."""
    return share_near(actions, data, STATED)


def precision(actions: Array, data: Array) -> float:
    """Share of actions within 0.15 of a data point."""
    return share_near(actions, data, NEAR)


def coverage(actions: Array, data: Array) -> float:
    """Share of the data within 0.05 of an action. More actions cover more: compare like numbers only."""
    return share_near(data, actions, COVERED)


def mmd(actions: Array, data: Array, within_data: float | None = None) -> float:
    """Maximum mean discrepancy (Gretton et al. 2012, eq. 3), kernel exp(-d^2 / (2 * 0.1^2)); 0 for equals.

    The root of the unbiased estimate of its square, which may fall below 0 and then counts as 0. within_data: the
    data's own term, `mean_kernel(data)`, where it is known already.
    """
    within_data = mean_kernel(data) if within_data is None else within_data
    square = mean_kernel(actions) + within_data - 2 * float(_kernel(actions, data).mean())
    return float(np.sqrt(max(0.0, square)))


def mean_kernel(points: Array) -> float:
    """The kernel's mean over pairs of different points."""
    n = len(points)
    return (float(_kernel(points, points).sum()) - n) / (n * (n - 1))


def _kernel(left: Array, right: Array) -> Array:
    return np.exp(-cdist(left, right, "sqeuclidean") / (2 * KERNEL_WIDTH**2))


def mode_shares(actions: Array) -> dict[str, float]:
    """Share of actions within three deviations of each mode of bandit-gaussians-v0, and elsewhere."""
    distances = cdist(actions, bandit.CORNERS)
    near = distances.min(axis=1) <= bandit.REACH
    shares = {
        f"mode of reward {reward:g}": float((near & (distances.argmin(axis=1) == k)).mean())
        for k, reward in enumerate(bandit.CORNER_REWARDS)
    }
    return shares | {"elsewhere": float(1 - near.mean())}


class Scorer:
    """All scores of actions on one bandit."""

    def __init__(self, task: str) -> None:
        self.task, self.data = task, bandit.load(task).actions.astype(np.float64)
        self._some = self.data[:: max(1, len(self.data) // KERNEL_POINTS)]
        self._within = mean_kernel(self._some)

    def __call__(self, actions: Array) -> dict[str, float]:
        """Scores by name; `reward` in percent of the best; then what describes the actions on this bandit."""
        actions = np.asarray(actions, dtype=np.float64)
        found = {
            "jaccard": jaccard(actions, self.data),
            "precision": precision(actions, self.data),
            "coverage": coverage(actions, self.data),
            "mmd": mmd(actions, self._some, self._within),
            "reward": float(bandit.normalized_score(self.task, bandit.find(self.task).reward(actions)).mean()),
        }
        if self.task == "bandit-circle-v0":
            radius = np.linalg.norm(actions, axis=1)
            return found | {"radius": float(radius.mean()), "radius_deviation": float(radius.std())}
        return found | mode_shares(actions)
