"""What a run left, read back: evaluations and events of one seed."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from utils.errors import UserError


def read_events(path: Path) -> list[tuple[int, str]]:
    """What happened to a seed, by step, from its `metrics.csv` (`faults`); files of earlier versions have none.

    Raises UserError naming a damaged file.
    """
    if not path.exists():
        return []
    with open(path, newline="", errors="replace") as file:
        try:
            return [(int(row["step"]), row["event"]) for row in csv.DictReader(file) if row.get("event")]
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise UserError(f"{path} is damaged ({error}); run again with --resume, or delete it") from error


def read_evaluations(path: Path) -> dict[int, np.ndarray]:
    """Normalised scores of the episodes of each evaluation, by step. Raises UserError for a damaged file."""
    scores: dict[int, list[float]] = {}
    with open(path, newline="", errors="replace") as file:
        try:
            for row in csv.DictReader(file):
                scores.setdefault(int(row["step"]), []).append(float(row["normalized_score"]))
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise UserError(f"{path} is damaged ({error}); use --overwrite to start anew") from error
    return {step: np.array(values) for step, values in scores.items()}
