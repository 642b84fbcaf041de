"""Which of a run's evaluations is its score.

| name | the score of a run | chosen by |
|---|---|---|
| last | its last evaluation | nothing |
| last5, last10 | mean of its last 5 or 10 evaluations | nothing |
| best | its highest evaluation ("online" selection) | the test episodes themselves |
| offline | the evaluation with rank k in the behaviour-cloning loss ("offline" selection) | the training loss |

`best` is what the DiffCPS paper's code reports (DEVIATIONS 8). It is the maximum over tens of noisy numbers, so it
lies above what the chosen policy will do. `offline` is the idea of Diffusion-QL (Wang et al. 2023, section 5).
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from utils.report.runs import SeedRun

__all__ = ["PROTOCOLS", "TITLES", "evaluation_losses", "offline_index", "score"]

PROTOCOLS = ("last", "last5", "last10", "best", "offline")
TITLES = {
    "last": "last",
    "last5": "mean of last 5",
    "last10": "mean of last 10",
    "best": "best †",
    "offline": "offline-selected",
}
Index = Literal["right", "published"]
# What is compared with the data alone: the denoising loss, or a Gaussian policy's negative log-likelihood of the data's
# actions, under the name that the algorithm's metrics give it.
LOSSES = ("bc_loss", "kl_loss")


def score(run: SeedRun, protocol: str, top_k: int | None = None, index: Index = "right") -> float | None:
    """A run's normalised score in percent, or None where it has too few evaluations or no loss to choose by.

    top_k: rank for the offline selection, 0 the smallest loss; by default the run's own setting, else 0.
    Raises ValueError for an unknown protocol.
    """
    scores = run.scores
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}; known: {', '.join(PROTOCOLS)}")
    if not len(scores):
        return None
    if protocol == "last":
        return float(scores[-1])
    if protocol == "best":
        return float(scores.max())
    if protocol == "offline":
        losses = evaluation_losses(run)
        rank = int(run.settings.get("top_k", 0)) if top_k is None else top_k
        return None if losses is None else float(scores[offline_index(losses, rank, index)])
    count = int(protocol.removeprefix("last"))
    return float(scores[-count:].mean()) if len(scores) >= count else None


def evaluation_losses(run: SeedRun) -> np.ndarray | None:
    """Mean loss on the data's actions since the evaluation before, at each one [E]; None without one."""
    name = next((name for name in LOSSES if name in run.metrics), None)
    if name is None:
        return None
    steps, values = run.metrics["step"], run.metrics[name]
    starts = np.concatenate([[0], run.steps[:-1]])
    losses = [
        values[(steps > start) & (steps <= stop) & np.isfinite(values)]
        for start, stop in zip(starts, run.steps, strict=True)
    ]
    if any(len(part) == 0 for part in losses):
        return None
    return np.array([part.mean() for part in losses])


def offline_index(losses: np.ndarray, top_k: int, index: Index = "right") -> int:
    """Position of the evaluation that the training loss chooses among `losses` [E].

    "right": the one whose loss has rank `top_k` (0 the smallest). "published": Diffusion-QL's code looks where the
    sorting permutation equals k, which is the position that evaluation k takes among the sorted losses: an
    unrelated evaluation in general. Both cut k to E - 1, as published.
    """
    order = np.argsort(losses, kind="stable")
    rank = min(len(losses) - 1, top_k)
    return int(order[rank]) if index == "right" else int(np.flatnonzero(order == rank)[0])
