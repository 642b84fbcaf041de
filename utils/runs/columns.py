"""The words that a run's files and their readers share."""

from __future__ import annotations

SCORE_TAG = "evaluation/normalized_score"
EVALUATION_COLUMNS = ("step", "episode", "return", "normalized_score", "length", "unstable")

STOPPED, RUNAWAY = "stopped", "runaway"  # how an event in metrics.csv begins
