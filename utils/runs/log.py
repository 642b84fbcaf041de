"""What a run writes while it goes: CSV files that every table is made from, and TensorBoard."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from utils.errors import UserError
from utils.files import atomic_write, first_line
from utils.runs.columns import (
    EVALUATION_COLUMNS,
    EVALUATIONS_FILE,
    METRICS_BEGIN,
    METRICS_END,
    METRICS_FILE,
    OLD_METRICS_END,
    SCORE_TAG,
)
from utils.runs.costs import Costs
from utils.runs.reading import read_header
from utils.runs.tracking import Tracker


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON file, whole or as it was. Raises OSError where the disk refuses."""
    atomic_write(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


class CsvFile:
    """A CSV file that grows by whole rows, or where the disk refuses, stays as it was. Nothing is kept in memory.

    A file of an earlier version that lacks some of the columns goes on with those it has. Raises UserError where a file
    is there with others.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path = path
        try:
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115  open as long as the run
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        self._columns = list(columns)
        header = read_header(path)
        if not header:
            self.rows([dict(zip(columns, columns, strict=True))])
        elif set(header) <= set(columns):
            self._columns = header
        else:
            self.close()
            raise UserError(f"{path} has other columns ({', '.join(header)}) than this version writes "
                            f"({', '.join(columns)}); use --overwrite to start anew")  # fmt: skip

    def rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows, all or none. Raises UserError where the disk refuses."""
        text = io.StringIO(newline="")
        csv.DictWriter(text, self._columns, extrasaction="ignore").writerows(rows)
        piece = text.getvalue().encode("utf-8", "backslashreplace")
        end, done = self._file.tell(), 0
        try:
            while done < len(piece):
                done += self._file.write(piece[done:])
        except OSError as error:
            self._file.truncate(end)
            raise UserError(f"cannot write {self.path}: {error.strerror}; free some space and run again") from error

    def sync(self) -> int:
        """Bring everything to the disk; the length in bytes."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


class Board:
    """What TensorBoard reads of one seed: scalars by step, and the settings with the score for its HPARAMS tab.

    The CSV files are the record: where the disk refuses events, that is one warning, and the run goes on without.
    first_step: what a killed process wrote after it is hidden.
    """

    def __init__(self, folder: Path, first_step: int, settings: Mapping[str, Any]) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = None
        _quiet_event_threads()
        with self._softly():
            self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)
            plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in settings.items()}
            # `SummaryWriter.add_hparams` would put these into a second folder.
            for summary in hparams(plain, {SCORE_TAG: 0.0})[:2]:
                self._writer._get_file_writer().add_summary(summary)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Numbers by name at a step."""
        with self._softly():
            for name, value in values.items():
                if self._writer is not None:
                    self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Bring everything into the file."""
        with self._softly():
            if self._writer is not None:
                self._writer.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            if self._writer is not None:
                self._writer.close()

    @contextlib.contextmanager
    def _softly(self) -> Iterator[None]:
        try:
            yield
        except (OSError, UnicodeError) as error:  # TensorBoard takes no path that is no UTF-8
            self._writer = None
            warnings.warn(f"no more TensorBoard events of {self._folder}: {first_line(error)}", stacklevel=4)


def _quiet_event_threads() -> None:
    """`SummaryWriter`'s thread prints a traceback of the disk's error, and hands it to the caller as well."""
    if getattr(threading.excepthook, "quiet", False):
        return
    usual = threading.excepthook

    def hook(raised: threading.ExceptHookArgs) -> None:
        if not (type(raised.thread).__module__.startswith("tensorboard.") and isinstance(raised.exc_value, OSError)):
            usual(raised)

    hook.quiet = True  # type: ignore[attr-defined]
    threading.excepthook = hook


class SeedLog:
    """The files of one seed's folder: `metrics.csv`, `evaluations.csv`, TensorBoard events.

    step: the step at which the process begins or continues. settings: what HPARAMS shows of the run. wandb: the project
    at Weights & Biases that gets the same numbers; None for none.
    """

    def __init__(
        self, folder: Path, metrics: Sequence[str], step: int, settings: Mapping[str, Any], wandb: str | None = None
    ) -> None:
        old, path = [*METRICS_BEGIN, *metrics, *OLD_METRICS_END], folder / METRICS_FILE
        # A run that was begun with the old columns keeps them to its end.
        self._columns = old if path.exists() and read_header(path) == old else [*METRICS_BEGIN, *metrics, *METRICS_END]
        self.metrics_file = CsvFile(path, self._columns)
        self.evaluations_file = CsvFile(folder / EVALUATIONS_FILE, EVALUATION_COLUMNS)
        self.board = Board(folder, step, settings)
        self.tracker = Tracker(wandb, folder, settings) if wandb else None
        self._costs = Costs()

    def metrics(self, step: int, values: Mapping[str, float], steps_per_s: float, event: str = "") -> None:
        """One row of training metrics; a metric that was never due in the interval stays empty.

        `event`: what happened to the seed (`utils.training.faults`), mostly nothing.
        """
        took = {"steps_per_s": f"{steps_per_s:.2f}", **self._costs.read()}
        row = {"step": step, **{name: f"{value:.9g}" for name, value in values.items()}, **took, "event": event}
        self.metrics_file.rows([{name: row.get(name, "") for name in self._columns}])
        shown = {f"{_group(name)}/{name}": value for name, value in values.items()}
        self._scalars(shown | {f"speed/{name}": float(value) for name, value in took.items() if value}, step)

    def evaluation(
        self,
        step: int,
        returns: Sequence[float],
        scores: Sequence[float],
        lengths: Sequence[int],
        unstable: Sequence[bool],
    ) -> None:
        """One row per episode; all arguments but the step have one entry per episode."""
        episodes = zip(returns, scores, lengths, unstable, strict=True)
        self.evaluations_file.rows(
            dict(zip(EVALUATION_COLUMNS, (step, e, float(r), float(s), int(n), int(u)), strict=True))
            for e, (r, s, n, u) in enumerate(episodes)
        )
        means = {SCORE_TAG: sum(scores) / len(scores), "evaluation/return": sum(returns) / len(returns)}
        self._scalars(means, step)

    def _scalars(self, values: Mapping[str, float], step: int) -> None:
        self.board.scalars(values, step)
        if self.tracker:
            self.tracker.scalars(values, step)

    def sync(self) -> dict[str, int]:
        """Bring everything to the disk; the CSV files' lengths in bytes, for the checkpoint."""
        self.board.flush()
        return {file.path.name: file.sync() for file in (self.metrics_file, self.evaluations_file)}

    def close(self) -> None:
        for file in (self.metrics_file, self.evaluations_file, self.board):
            file.close()
        if self.tracker:
            self.tracker.close()


def _group(name: str) -> str:
    """TensorBoard's section for a metric."""
    if name.endswith("_grad_norm"):
        return "gradients"
    return "losses" if name.endswith("_loss") else "training"
