"""The files of an export, read: a line of settings per run, and tables of all runs' episodes, epochs and replays."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from utils.errors import UserError
from utils.runs.columns import PLAYED_COLUMNS

RUNS = "runs.jsonl"
EPISODES = "episodes.csv.gz"
METRICS = "metrics.csv.gz"  # a row per epoch; only where runs had some, and not in exports of earlier versions
PLAYED = "played.csv.gz"  # what play.py left, likewise
# Columns of an export's episodes that are read; those that name the run for a reader stand before them.
NUMBERS = {"run": "int64", "step": "int64", "episode": "int64", "return": "float64", "score": "float64",
           "length": "int64", "unstable": "int64", "loss": "float64"}  # fmt: skip
COUNTS = [name for name, kind in NUMBERS.items() if kind == "int64"]


@dataclass(frozen=True)
class Kept:
    """lines: of `runs.jsonl`. The tables by the run's number, which is its line's, without the column `run`."""

    lines: Sequence[str]
    episodes: Mapping[int, pd.DataFrame]
    metrics: Mapping[int, pd.DataFrame]
    played: Mapping[int, pd.DataFrame]

    def episodes_of(self, number: int) -> pd.DataFrame:
        """`NUMBERS` but `run`, a row per episode; none for a run without an evaluation."""
        none = pd.DataFrame({name: np.zeros(0, kind) for name, kind in NUMBERS.items() if name != "run"})
        return self.episodes.get(number, none)

    def metrics_of(self, number: int) -> dict[str, np.ndarray]:
        """The columns of the run's `metrics.csv` that hold a number, float64, NaN where empty."""
        own = self.metrics.get(number, pd.DataFrame()).dropna(axis="columns", how="all")
        return {str(name): own[name].to_numpy(np.float64) for name in own}

    def played_of(self, number: int) -> list[dict[str, str]]:
        """The rows of the run's `played.csv`, as text."""
        own = self.played.get(number, pd.DataFrame())
        return [dict(zip(own.columns, row, strict=True)) for row in own.itertuples(index=False)]


def read_kept(folder: Path) -> Kept:
    """Read an export. Raises UserError for a damaged file."""
    try:
        lines = (folder / RUNS).read_text(encoding="utf-8").splitlines()
        episodes = _numbers(_text(folder / EPISODES)[list(NUMBERS)])
        metrics = _numbers(_text(folder / METRICS)) if (folder / METRICS).exists() else None
        played = _text(folder / PLAYED) if (folder / PLAYED).exists() else None
        if played is not None:
            played = played.assign(run=played["run"].astype("int64"))[["run", *PLAYED_COLUMNS]]
            for score in played["normalized_score"]:
                float(score)
    except (OSError, EOFError, LookupError, ValueError, OverflowError, zlib.error) as error:
        raise UserError(f"{folder} is not what --export writes ({type(error).__name__}: {error})") from error
    return Kept(lines, _by_run(episodes), _by_run(metrics), _by_run(played))


def _text(path: Path) -> pd.DataFrame:
    """All as text at first: what pandas' own parser reads of a number may differ in the last bit."""
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return pd.read_csv(file, dtype=str, keep_default_na=False)


def _numbers(frame: pd.DataFrame) -> pd.DataFrame:
    columns = {name: frame[name].astype("int64") if name in COUNTS else [float(value or "nan") for value in frame[name]]
               for name in frame}  # fmt: skip
    return pd.DataFrame(columns)


def _by_run(frame: pd.DataFrame | None) -> dict[int, pd.DataFrame]:
    if frame is None:
        return {}
    numbers = frame["run"].unique().tolist()
    return {number: frame[frame["run"] == number].drop(columns="run").reset_index(drop=True) for number in numbers}
