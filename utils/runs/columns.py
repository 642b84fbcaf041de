"""The words that a run's files and their readers share."""

from __future__ import annotations

SCORE_TAG = "evaluation/normalized_score"
METRICS_FILE, EVALUATIONS_FILE = "metrics.csv", "evaluations.csv"
EVALUATION_COLUMNS = ("step", "episode", "return", "normalized_score", "length", "unstable")
# What play.py adds beside a run: how the episodes were played, before the columns of an evaluation.
PLAYED_FILE = "played.csv"
PLAYED_HOW = ("episodes", "eval_seeds", "action_candidates", "backend", "execution")
PLAYED_COLUMNS = (*PLAYED_HOW, *EVALUATION_COLUMNS)
METRICS_BEGIN, METRICS_END = ("step",), ("steps_per_s", "event")  # around an algorithm's own columns

STOPPED, RUNAWAY = "stopped", "runaway"  # how an event in metrics.csv begins
