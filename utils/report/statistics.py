"""Interquartile mean, stratified bootstrap and performance profiles (Agarwal et al. 2021, arXiv 2108.13264).

As that paper's library (rliable) defines them: scores are a list of arrays, an array of runs per task. The IQM is the
mean of the middle half of all runs of all tasks together (scipy's `trim_mean` with a quarter cut from each end, the
cut rounded down); a bootstrap draw resamples the runs of each task by themselves; the interval is the percentile one.

Of fewer than `FEW` runs of one task that interval is no more than the least and the largest of them: over 2.5 % of all
draws are the least run and nothing else. So few are shown one by one, with Student's interval of their mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import t, trim_mean

RESAMPLES = 5000
LEVEL = 0.95
FEW = 4


def interquartile_mean(scores: Sequence[np.ndarray], axis: int = -1) -> np.ndarray:
    """IQM over all tasks' runs, which lie on the last axis of each array: [..., n_i] -> [...]."""
    return trim_mean(np.concatenate(scores, axis=axis), 0.25, axis=axis)


def resample(scores: Sequence[np.ndarray], rng: np.random.Generator, draws: int) -> list[np.ndarray]:
    """Stratified draws with replacement: each task's [n_i] becomes [draws, n_i], drawn from that task alone."""
    return [task[rng.integers(len(task), size=(draws, len(task)))] for task in scores]


def bootstrap_interval(
    scores: Sequence[np.ndarray],
    statistic: Callable[[Sequence[np.ndarray]], np.ndarray],
    rng: np.random.Generator,
    level: float = LEVEL,
    draws: int = RESAMPLES,
) -> tuple[float, float] | None:
    """Percentile interval of `statistic` under the stratified bootstrap; None unless every task has two runs."""
    if not scores or any(len(task) < 2 for task in scores):
        return None
    values = statistic(resample(scores, rng, draws))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def t_interval(values: np.ndarray, level: float = LEVEL) -> tuple[float, float] | None:
    """Student's interval of the mean of `values` [n], which takes them for normal; None for fewer than two."""
    if len(values) < 2:
        return None
    half = float(t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return float(values.mean()) - half, float(values.mean()) + half


def performance_profile(scores: Sequence[np.ndarray], thresholds: np.ndarray) -> np.ndarray:
    """Share of runs above each threshold, each task weighing the same: [..., n_i] and [K] -> [..., K]."""
    shares = [(task[..., :, None] > thresholds).mean(axis=-2) for task in scores]
    return np.mean(shares, axis=0)
