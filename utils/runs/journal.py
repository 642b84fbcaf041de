"""The logs of all seeds of a process and its progress bar, written together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np

from utils.runs.log import SeedLog
from utils.runs.progress import Bar


class Journal:
    """One log per folder, in the order of the seeds axis, and one bar.

    metrics: the columns of `metrics.csv`. shown: those of them that the bar shows. step: at which the process begins
    or continues. settings: what TensorBoard's HPARAMS shows of each seed. wandb: the project of `--wandb`.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        metrics: Sequence[str],
        shown: Sequence[str],
        step: int,
        settings: Sequence[Mapping[str, Any]],
        bar: Bar,
        wandb: str | None = None,
    ) -> None:
        self.shown, self.bar = shown, bar
        self.logs: list[SeedLog] = []
        with ExitStack() as stack:
            for folder, own in zip(folders, settings, strict=True):
                self.logs.append(stack.enter_context(closing(SeedLog(folder, metrics, step, own, wandb))))
            self._open = stack.pop_all()

    def close(self) -> None:
        """Close the files."""
        self._open.close()

    def metrics(
        self,
        step: int,
        means: Mapping[str, np.ndarray],
        steps_per_s: float,
        running: np.ndarray,
        events: Sequence[str],
    ) -> None:
        """A row per seed in `running` [S]: each metric's means [S] since the last row, and what happened to each seed,
        mostly ""."""
        for k, log in enumerate(self.logs):
            if running[k]:
                log.metrics(step, {name: float(value[k]) for name, value in means.items()}, steps_per_s, events[k])
        if running.any():
            self.bar.show(**{name: float(means[name][running].mean()) for name in self.shown if name in means})

    def evaluation(
        self, step: int, scores: np.ndarray, returns: np.ndarray, lengths: np.ndarray, unstable: np.ndarray
    ) -> None:
        """A row per episode of each seed that played, all arrays [S, E]; and a line with the mean score."""
        played = [k for k, steps in enumerate(lengths) if steps.any()]  # seeds that have stopped do not
        for k in played:
            self.logs[k].evaluation(step, returns[k], scores[k], lengths[k], unstable[k])
        if not played:
            return
        means, what = scores[played].mean(axis=1), "normalised score"
        self.bar.show(score=float(means.mean()))
        if not np.isfinite(means).all():  # nobody says what a score of 0 or 100 is
            means, what = returns[played].mean(axis=1), "return"
        each = f"  (seeds {', '.join(f'{score:.1f}' for score in means)})" if len(means) > 1 else ""
        self.bar.note(f"step {step:>9,}  {what} {means.mean():6.1f}{each}")

    def sync(self) -> list[dict[str, int]]:
        """Bring every seed's CSV files to the disk; their lengths in bytes, for its checkpoint."""
        return [log.sync() for log in self.logs]
