"""What a run left, read back: settings, evaluations, metrics and events of one seed. The only parser of these files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError

# Columns of evaluations.csv that count something; files of earlier versions have no "unstable".
COUNTS = ("step", "episode", "length", "unstable")
MEASURES = ("return", "normalized_score")


def read_config(folder: Path) -> dict[str, Any]:
    """A seed's `config.json`. Raises UserError where it is missing, or not what `run.py` writes."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(config[part], dict) for part in ("settings", "run", "dataset")):
            raise ValueError("its settings, run and dataset are not objects")
        return config
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not what run.py writes ({type(error).__name__}: {error}); move it away, or use "
                        "--overwrite or another --dir") from error  # fmt: skip


def read_evaluations(path: Path, size: int | None = None) -> dict[str, np.ndarray]:
    """The columns of `evaluations.csv`, an entry per episode: counts int64, measures float64 (scores in percent).

    `step`, `normalized_score` and `unstable` (0 where the file has none) are always there, and the other columns
    where the file has them. size: of the first so many bytes. Raises UserError naming the damaged line.
    """
    columns: dict[str, list[float]] = {"step": [], "normalized_score": [], "unstable": []}

    def parse(row: Mapping[str, str]) -> None:
        values: dict[str, float] = {"step": int(row["step"]), "normalized_score": float(row["normalized_score"])}
        values |= {"unstable": 0, **{name: int(row[name] or 0) for name in COUNTS[1:] if name in row}}
        values |= {name: float(row[name]) for name in MEASURES if name in row}
        for name, value in values.items():
            columns.setdefault(name, []).append(value)

    _each_row(path, parse, size)
    return {name: np.array(values, np.int64 if name in COUNTS else np.float64) for name, values in columns.items()}


def scores_by_step(path: Path) -> dict[int, np.ndarray]:
    """Normalised scores of the episodes of each evaluation, by step in rising order; as `read_evaluations`."""
    columns = read_evaluations(path)
    steps, scores = columns["step"], columns["normalized_score"]
    return {int(step): scores[steps == step] for step in np.unique(steps)}


def read_metrics(path: Path, size: int | None = None) -> dict[str, np.ndarray]:
    """The columns of numbers in `metrics.csv`, a row per epoch, NaN where empty; none where the run kept none.

    size: of the first so many bytes. Raises UserError naming the damaged line.
    """
    columns: dict[str, list[float]] = {}

    def parse(row: Mapping[str, str]) -> None:
        int(row["step"])
        for name, value in row.items():
            if name != "event":
                columns.setdefault(name, []).append(float(value or "nan"))

    if path.exists():
        _each_row(path, parse, size)
    return {name: np.array(values) for name, values in columns.items()}


def read_events(path: Path) -> list[tuple[int, str]]:
    """What happened to a seed, by step, from its `metrics.csv` (`utils.training.faults`).

    None in files of earlier versions. Raises UserError naming the damaged line.
    """
    events: list[tuple[int, str]] = []

    def parse(row: Mapping[str, str]) -> None:
        step = int(row["step"])
        if row.get("event"):
            events.append((step, row["event"]))

    if path.exists():
        _each_row(path, parse)
    return events


def read_header(path: Path) -> list[str]:
    """The names of a CSV file's columns; none where it is empty. Raises UserError where it cannot be read."""
    try:
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            return next(csv.reader(file), [])
    except (OSError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _each_row(path: Path, parse: Callable[[Mapping[str, str]], None], size: int | None = None) -> None:
    """Call `parse` with each row. Raises UserError for a row that it cannot parse, or with too many or few fields."""
    remedy = "run again with --resume, or move it away" if size is None else "use --overwrite to start anew"
    try:
        with open(path, "rb") as file:
            reader = csv.reader(io.StringIO(file.read(size).decode("utf-8", "replace"), newline=""))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    try:
        header = next(reader, [])
        for values in reader:
            if len(values) != len(header):
                raise ValueError(f"{len(values)} fields instead of {len(header)}")
            if any("\0" in value for value in values):  # what a power cut leaves
                raise ValueError("it holds NULs")
            parse(dict(zip(header, values, strict=True)))
    except (LookupError, ValueError, csv.Error) as error:
        raise UserError(
            f"{path}, line {reader.line_num}, is damaged ({type(error).__name__}: {error}); {remedy}"
        ) from error
