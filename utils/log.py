"""What a run writes while it goes: CSV files that every table is made from, TensorBoard, and the progress bar."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from utils.errors import UserError

__all__ = ["Bar", "CsvFile", "SeedLog", "write_json"]

EVALUATION_COLUMNS = ("step", "episode", "return", "normalized_score", "length", "unstable")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write through a temporary file, so that a reader never sees half of it."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
    os.replace(temporary, path)


class CsvFile:
    """A CSV file that grows by whole rows, flushed as they come."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path = path
        self._file = open(path, "a", newline="")  # noqa: SIM115  open as long as the run
        self._writer = csv.DictWriter(self._file, columns)
        if self._file.tell() == 0:
            self._writer.writeheader()
            self._file.flush()

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows. Raises UserError where the disk refuses; what stood in the file before stays whole."""
        end = self._file.tell()
        try:
            self._writer.writerows(rows)
            self._file.flush()
        except OSError as error:
            self._file.truncate(end)
            raise UserError(f"cannot write {self.path}: {error.strerror}; free some space and run again") from error

    @property
    def position(self) -> int:
        """Length in bytes: what a resumed run cuts the file back to."""
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


class SeedLog:
    """The files of one seed's folder: `metrics.csv`, `evaluations.csv`, TensorBoard events."""

    def __init__(self, folder: Path, metrics: Sequence[str], tensorboard: bool = True) -> None:
        self.metrics_file = CsvFile(folder / "metrics.csv", ("step", *metrics, "steps_per_s"))
        self.evaluations_file = CsvFile(folder / "evaluations.csv", EVALUATION_COLUMNS)
        self.board = SummaryWriter(str(folder)) if tensorboard else None

    def metrics(self, step: int, values: Mapping[str, float], steps_per_s: float) -> None:
        """One row of training metrics; a metric that was never due in the interval stays empty."""
        row = {name: f"{value:.9g}" for name, value in values.items()}
        self.metrics_file.write([{"step": step, **row, "steps_per_s": f"{steps_per_s:.2f}"}])
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(f"{_group(name)}/{name}", value, step)
            self.board.add_scalar("speed/steps_per_s", steps_per_s, step)

    def evaluation(
        self,
        step: int,
        returns: Sequence[float],
        scores: Sequence[float],
        lengths: Sequence[int],
        unstable: Sequence[bool],
    ) -> None:
        """One row an episode; all arguments but the step have one entry an episode."""
        episodes = zip(returns, scores, lengths, unstable, strict=True)
        self.evaluations_file.write(
            dict(zip(EVALUATION_COLUMNS, (step, e, float(r), float(s), int(n), int(u)), strict=True))
            for e, (r, s, n, u) in enumerate(episodes)
        )
        if self.board is not None:
            self.board.add_scalar("evaluation/normalized_score", sum(scores) / len(scores), step)
            self.board.add_scalar("evaluation/return", sum(returns) / len(returns), step)
            self.board.flush()

    @property
    def positions(self) -> dict[str, int]:
        """Lengths of the CSV files in bytes, for the checkpoint."""
        return {file.path.name: file.position for file in (self.metrics_file, self.evaluations_file)}

    def close(self) -> None:
        self.metrics_file.close()
        self.evaluations_file.close()
        if self.board is not None:
            self.board.close()


def _group(name: str) -> str:
    """TensorBoard's section for a metric."""
    if name.endswith("_grad_norm"):
        return "gradients"
    return "losses" if name.endswith("_loss") else "training"


class Bar:
    """The progress bar, or with `quiet` a line an evaluation, for logs."""

    def __init__(self, total: int, start: int, quiet: bool, title: str) -> None:
        self._quiet = quiet
        self._bar = tqdm(
            total=total, initial=start, unit="step", desc=title, disable=quiet, dynamic_ncols=True, smoothing=0.1
        )
        self._shown: dict[str, str] = {}

    def advance(self, steps: int, **shown: float) -> None:
        """Move on and show these numbers, the latest of each name."""
        self._shown |= {name: f"{value:.3g}" for name, value in shown.items()}
        self._bar.set_postfix(self._shown, refresh=False)
        self._bar.update(steps)

    def note(self, line: str) -> None:
        """Print a line above the bar."""
        if self._quiet:
            print(line, flush=True)
        else:
            self._bar.write(line)

    def close(self) -> None:
        self._bar.close()
