"""The words that a run's files and their readers share."""

from __future__ import annotations

SCORE_TAG = "evaluation/normalized_score"
METRICS_FILE, EVALUATIONS_FILE = "metrics.csv", "evaluations.csv"
EVALUATION_COLUMNS = ("step", "episode", "return", "normalized_score", "length", "unstable")
TRACKED_FILE = "wandb.txt"  # the run's name at Weights & Biases, under which a resumed run goes on
# What play.py adds beside a run: how the episodes were played, before the columns of an evaluation.
PLAYED_FILE = "played.csv"
PLAYED_HOW = ("episodes", "eval_seeds", "action_candidates", "backend", "execution")
PLAYED_COLUMNS = (*PLAYED_HOW, *EVALUATION_COLUMNS)
# Around an algorithm's own columns. What a run took (`costs.py`) is what equal runs differ in.
TOOK = ("steps_per_s", "wall_s", "cpu_s", "gpu_memory_mib")
METRICS_BEGIN, METRICS_END = ("step",), (*TOOK, "event")
OLD_METRICS_END = ("steps_per_s", "event")  # of runs that were begun before the other costs were kept

STOPPED, RUNAWAY = "stopped", "runaway"  # how an event in metrics.csv begins
