"""What a run writes while it goes: CSV files that every table is made from, TensorBoard, and the progress bar."""

from __future__ import annotations

import csv
import io
import json
import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import hparams, scalar
from tqdm import tqdm

from utils.errors import UserError
from utils.runs.columns import EVALUATION_COLUMNS, SCORE_TAG

__all__ = ["Bar", "CsvFile", "EventFile", "SeedLog", "write_json"]


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write through a temporary file, so that a reader never sees half of it, nor a crash leaves it."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w") as file:
        file.write(json.dumps(value, indent=1, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class _GrowingFile:
    """A file that grows by whole pieces, or where the disk refuses, stays as it was. Nothing is kept back in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115  open as long as the run
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error

    def write(self, piece: bytes) -> None:
        """Append it. Raises UserError where the disk refuses."""
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


class CsvFile(_GrowingFile):
    """A CSV file that grows by whole rows.

    A file that is there keeps its header, and values that this has no column for are left out: a run that an earlier
    version began can go on.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        super().__init__(path)
        with open(path, newline="", errors="replace") as file:
            header = next(csv.reader(file), None)
        self._columns = header or list(columns)
        if header is None:
            self.rows([dict(zip(columns, columns, strict=True))])

    def rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows, all or none. Raises UserError where the disk refuses."""
        text = io.StringIO(newline="")
        csv.DictWriter(text, self._columns, extrasaction="ignore").writerows(rows)
        self.write(text.getvalue().encode())


class EventFile(_GrowingFile):
    """What TensorBoard reads of one seed: scalars by step, and the settings with the score for its HPARAMS tab.

    `torch.utils.tensorboard.SummaryWriter` would write from a thread of its own, which prints a traceback when the
    disk is full, and would put the settings into a second folder.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        super().__init__(folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}")
        self._records = RecordWriter(self)
        self._event(Event(file_version="brain.Event:2"))
        # TensorBoard drops what a killed process wrote from this step on.
        self._event(Event(step=first_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def settings(self, values: Mapping[str, Any], metric: str) -> None:
        """The run's settings; `metric` is the scalar whose last value HPARAMS shows beside them."""
        plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in values.items()}
        experiment, session, _ = hparams(plain, {metric: 0.0})
        self._event(Event(summary=experiment))
        self._event(Event(summary=session))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Numbers by name at a step."""
        for name, value in values.items():
            self._event(Event(step=step, summary=scalar(name, value)))

    def _event(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())


class SeedLog:
    """The files of one seed's folder: `metrics.csv`, `evaluations.csv`, TensorBoard events.

    step: the step at which the process begins or continues. settings: what HPARAMS shows of the run.
    """

    def __init__(self, folder: Path, metrics: Sequence[str], step: int, settings: Mapping[str, Any]) -> None:
        self.metrics_file = CsvFile(folder / "metrics.csv", ("step", *metrics, "steps_per_s", "event"))
        self.evaluations_file = CsvFile(folder / "evaluations.csv", EVALUATION_COLUMNS)
        self.board = EventFile(folder, step)
        self.board.settings(settings, SCORE_TAG)

    def metrics(self, step: int, values: Mapping[str, float], steps_per_s: float, event: str = "") -> None:
        """One row of training metrics; a metric that was never due in the interval stays empty.

        `event`: what happened to the seed (`utils.training.faults`), mostly nothing.
        """
        row = {name: f"{value:.9g}" for name, value in values.items()}
        self.metrics_file.rows([{"step": step, **row, "steps_per_s": f"{steps_per_s:.2f}", "event": event}])
        shown = {f"{_group(name)}/{name}": value for name, value in values.items()}
        self.board.scalars({**shown, "speed/steps_per_s": steps_per_s}, step)

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
        self.evaluations_file.rows(
            dict(zip(EVALUATION_COLUMNS, (step, e, float(r), float(s), int(n), int(u)), strict=True))
            for e, (r, s, n, u) in enumerate(episodes)
        )
        means = {SCORE_TAG: sum(scores) / len(scores), "evaluation/return": sum(returns) / len(returns)}
        self.board.scalars(means, step)

    def sync(self) -> dict[str, int]:
        """Bring the CSV files to the disk; their lengths in bytes, for the checkpoint."""
        return {file.path.name: file.sync() for file in (self.metrics_file, self.evaluations_file)}

    def close(self) -> None:
        for file in (self.metrics_file, self.evaluations_file, self.board):
            file.close()


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
