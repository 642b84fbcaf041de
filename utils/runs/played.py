"""Episodes of a trained seed played again: `played.csv` beside its run, and what is said of them."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

from utils.errors import UserError
from utils.files import atomic_write
from utils.runs.columns import PLAYED_COLUMNS, PLAYED_FILE, PLAYED_HOW

LEVEL = 0.95


def way_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's `config.json` says of `PLAYED_HOW`: the candidates ("" without a choice) and the backend."""
    candidates = config["settings"].get("action_candidates", "")
    return {"action_candidates": candidates, "backend": config["run"].get("backend", "mujoco")}


def save_played(folder: Path, how: Mapping[str, Any], episodes: Sequence[Mapping[str, Any]]) -> Path:
    """Write a row per episode; those of the same step, played in the same way before, are replaced.

    how: `PLAYED_HOW`; episodes: the columns of an evaluation. Raises UserError where the file has other columns, or
    the disk refuses.
    """
    path = folder / PLAYED_FILE
    new = [{name: str(value) for name, value in {**how, **episode}.items()} for episode in episodes]
    key = ("step", *PLAYED_HOW)
    replaced = {tuple(row[name] for name in key) for row in new}
    text = io.StringIO(newline="")
    try:
        kept = [row for row in _rows(path) if tuple(row[name] for name in key) not in replaced]
        writer = csv.DictWriter(text, PLAYED_COLUMNS)
        writer.writeheader()
        writer.writerows([*kept, *new])
        atomic_write(path, text.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return path


def played_scores(rows: Sequence[Mapping[str, str]], step: int, how: Mapping[str, Any]) -> np.ndarray | None:
    """Scores [E] of the episodes that a seed's weights of `step` were played again for, as `how` has it.

    how: some of `PLAYED_HOW`. Of several ways the one with the most episodes, None where there is none.
    """
    wanted = {name: str(value) for name, value in {**how, "step": step}.items()}
    ways: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        if wanted.items() <= row.items():
            ways.setdefault(tuple(row[name] for name in PLAYED_HOW), []).append(float(row["normalized_score"]))
    return np.array(max(ways.values(), key=len)) if ways else None


def played_rows(folder: Path) -> list[dict[str, str]]:
    """`PLAYED_COLUMNS` of every episode of a seed's folder that was played again, as text.

    Raises UserError where the file is not what `save_played` writes.
    """
    path = folder / PLAYED_FILE
    try:
        rows = _rows(path)
        for row in rows:
            if set(row) != set(PLAYED_COLUMNS) or None in row.values():
                raise ValueError("a line has too many or too few fields")
            float(row["normalized_score"])
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not what play.py writes ({error}); move it away") from error
    return rows


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != PLAYED_COLUMNS:
            raise UserError(f"{path} has other columns than this version writes; move it away")
        return list(reader)


def estimate(values: np.ndarray) -> tuple[float, float, float, float, float]:
    """Mean, deviation (n - 1), standard error, and the ends of the mean's 95 % interval by Student's t, of values [n].

    NaN where one value says nothing of how they spread.
    """
    n, mean = len(values), float(values.mean())
    if n < 2:
        return mean, np.nan, np.nan, np.nan, np.nan
    deviation = float(values.std(ddof=1))
    error = deviation / np.sqrt(n)
    reach = float(stdtrit(n - 1, (1 + LEVEL) / 2)) * error
    return mean, deviation, error, mean - reach, mean + reach


def played_table(seeds: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> str:
    """Scores and returns of each seed's episodes, each [E], by seed; with several seeds also of the seeds' means."""
    lines = [f"{'seed':>8} {'':>6} {'mean':>10} {'deviation':>10} {'std. error':>10}  95 % interval"]
    groups = {f"{seed:>8}": values for seed, values in seeds.items()}
    if len(seeds) > 1:
        scores, returns = (np.array([values[i].mean() for values in seeds.values()]) for i in (0, 1))
        groups[f"{f'{len(seeds)} seeds':>8}"] = (scores, returns)
    for name, values in groups.items():
        for label, measured in zip((f"{name} {'score':>6}", f"{'':>8} {'return':>6}"), values, strict=True):
            mean, deviation, error, low, high = (f"{x:.1f}" if np.isfinite(x) else "-" for x in estimate(measured))
            lines.append(f"{label} {mean:>10} {deviation:>10} {error:>10}  {f'{low} to {high}' if low != '-' else '-'}")
    over = "over episodes" + ("; of the seeds, over their means" if len(seeds) > 1 else "")
    return "\n".join([*lines, f"score: normalised, in percent; deviation and Student's t interval {over}"])
