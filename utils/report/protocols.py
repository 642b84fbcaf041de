"""Which of a run's evaluations is its score.

| name | the score of a run | chosen by |
|---|---|---|
| last | its last evaluation | nothing |
| last5, last10 | mean of its last 5 or 10 evaluations | nothing |
| best | its highest evaluation ("online" selection) | the test episodes themselves |
| offline | the evaluation with rank k in the behaviour-cloning loss ("offline" selection) | the training loss |

`best` is what the DiffCPS paper's code reports (D8). It is the maximum over tens of noisy numbers, so it
lies above what the chosen policy will do. `offline` is the idea of Diffusion-QL (Wang et al. 2023, section 5).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import pandas as pd

PROTOCOLS = ("last", "last5", "last10", "best", "offline")
TITLES = {
    "last": "last",
    "last5": "mean of last 5",
    "last10": "mean of last 10",
    "best": "best †",
    "offline": "offline-selected",
}
Index = Literal["right", "published"]


def evaluations(episodes: pd.DataFrame) -> pd.DataFrame:
    """The mean score, the loss and the run's `top_k` of each evaluation, indexed by run and step in rising order."""
    rows = episodes.groupby(["run", "step"])
    mean = rows["score"].agg(lambda scores: scores.to_numpy().mean())  # NumPy's sum, to the last bit
    return pd.DataFrame({"score": mean, "loss": rows["loss"].first(), "top_k": rows["top_k"].first()})


def scores(episodes: pd.DataFrame, protocol: str, top_k: int | None = None, index: Index = "right") -> pd.Series:
    """Each run's normalised score in percent, NaN where it has too few evaluations or no loss to choose by.

    episodes: a row per episode, as `read_runs` gives them. top_k: rank for the offline selection, 0 the smallest loss;
    by default the run's own setting, else 0. Raises ValueError for an unknown protocol.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}; known: {', '.join(PROTOCOLS)}")

    def offline(run: pd.DataFrame) -> float:
        rank = int(run["top_k"].iloc[0]) if top_k is None else top_k
        losses = run["loss"].to_numpy()
        return np.nan if np.isnan(losses).any() else run["score"].iloc[offline_index(losses, rank, index)]

    def mean_of_last(run: pd.DataFrame) -> float:
        count = int(protocol.removeprefix("last") or 1)
        return run["score"].to_numpy()[-count:].mean() if len(run) >= count else np.nan

    choose: dict[str, Callable[[pd.DataFrame], float]] = {"best": lambda run: run["score"].max(), "offline": offline}
    by_run = evaluations(episodes).groupby("run")
    return by_run[["score", "loss", "top_k"]].apply(choose.get(protocol, mean_of_last))


def offline_index(losses: np.ndarray, top_k: int, index: Index = "right") -> int:
    """Position of the evaluation that the training loss chooses among `losses` [E].

    "right": the one whose loss has rank `top_k` (0 the smallest). "published": Diffusion-QL's code looks where the
    sorting permutation equals k, which is the position that evaluation k takes among the sorted losses: an
    unrelated evaluation in general. Both cut k to E - 1, as published.
    """
    order = np.argsort(losses, kind="stable")
    rank = min(len(losses) - 1, top_k)
    return int(order[rank]) if index == "right" else int(np.flatnonzero(order == rank)[0])
