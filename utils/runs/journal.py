"""The logs of all seeds of a process and its progress bar, written together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np

from utils.runs.log import Bar, SeedLog


class Journal:
    """One log per folder, in the order of the seeds axis, and one bar.

    metrics: the columns of `metrics.csv`. shown: those of them that the bar shows. steps: the first, the one at which
    the process begins or continues, and the last. settings: what TensorBoard's HPARAMS shows of the run.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        metrics: Sequence[str],
        shown: Sequence[str],
        steps: tuple[int, int, int],
        settings: Mapping[str, Any],
        quiet: bool,
        title: str,
    ) -> None:
        first, now, last = steps
        self.shown = shown
        self.logs: list[SeedLog] = []
        with ExitStack() as stack:
            for folder in folders:
                self.logs.append(stack.enter_context(closing(SeedLog(folder, metrics, now, settings))))
            self.bar = stack.enter_context(closing(Bar(last - first, now - first, quiet, title)))
            self._open = stack.pop_all()

    def close(self) -> None:
        """Close the files and the bar."""
        self._open.close()

    def metrics(
        self,
        step: int,
        steps: int,
        means: Mapping[str, np.ndarray],
        steps_per_s: float,
        running: np.ndarray,
        events: Sequence[str],
    ) -> None:
        """A row per seed in `running` [S]: each metric's means [S] over the last `steps`, and what happened to each
        seed, mostly ""."""
        for k, log in enumerate(self.logs):
            if running[k]:
                log.metrics(step, {name: float(value[k]) for name, value in means.items()}, steps_per_s, events[k])
        self.bar.advance(steps, **{name: float(means[name].mean()) for name in self.shown if name in means})

    def evaluation(
        self, step: int, scores: np.ndarray, returns: np.ndarray, lengths: np.ndarray, unstable: np.ndarray
    ) -> None:
        """A row per episode of each seed that played, all arrays [S, E]; and a line with the mean score."""
        played = [k for k, steps in enumerate(lengths) if steps.any()]  # seeds that have stopped do not
        for k in played:
            self.logs[k].evaluation(step, returns[k], scores[k], lengths[k], unstable[k])
        if not played:
            return
        means = scores[played].mean(axis=1)
        self.bar.advance(0, score=float(means.mean()))
        each = f"  (seeds {', '.join(f'{score:.1f}' for score in means)})" if len(means) > 1 else ""
        self.bar.note(f"step {step:>9,}  normalised score {means.mean():6.1f}{each}")

    def sync(self) -> list[dict[str, int]]:
        """Bring every seed's CSV files to the disk; their lengths in bytes, for its checkpoint."""
        return [log.sync() for log in self.logs]
