"""Train, kill, resume, evaluate, in a loop."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hyperparameters

TASK = "hopper-medium-v2"
SHORT = {
    "num_epochs": 3, "num_steps_per_epoch": 4, "pretrain_epochs": 1, "eval_interval": 1, "eval_episodes": 1,
    "batch_size": 8, "hidden_dim": 16, "action_candidates": 4, "plan_interval": 6, "plan_actions": 2,
}  # fmt: skip


def tiny(algo: str, seeds: str, data: str, folder: Path, *more: str) -> list[str]:
    """The command line of a run that takes a moment and goes through everything."""
    command = ["--algo", algo, "--env_name", TASK, "--dataset", data, "--dir", str(folder), "--seeds", seeds]
    known = hyperparameters.explain(algo, TASK)
    for name, value in SHORT.items():
        if name in known:
            command += [f"--{name}", str(value)]
    return [*command, "--device", "cpu", "--execution", "eager", "--threads", "1", "--quiet", *more]


def difference(one: Path, other: Path) -> str | None:
    """What differs between two folders of runs: a CSV file, its time column aside, or a tensor; None if nothing."""
    seeds = sorted(path.relative_to(one) for path in one.rglob("seed_*") if path.is_dir())
    if seeds != sorted(path.relative_to(other) for path in other.rglob("seed_*") if path.is_dir()) or not seeds:
        return f"the seeds' folders: {seeds}"
    for seed in seeds:
        if (one / seed / "evaluations.csv").read_bytes() != (other / seed / "evaluations.csv").read_bytes():
            return f"{seed}/evaluations.csv"
        if _without_time(one / seed / "metrics.csv") != _without_time(other / seed / "metrics.csv"):
            return f"{seed}/metrics.csv"
        states = [torch.load(base / seed / "checkpoint.pt", weights_only=True) for base in (one, other)]
        for state in states:
            state.pop("logs")  # lengths: the time column's digits vary
        if found := _unequal(*states):
            return f"{seed}/checkpoint.pt: {found}"
    return None


def _without_time(path: Path) -> list[list[str]]:
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    time = rows[0].index("steps_per_s")
    return [row[:time] + row[time + 1 :] for row in rows]


def _unequal(one: Any, other: Any, name: str = "") -> str | None:
    """The dotted name of what is not equal, bit for bit."""
    if isinstance(one, Mapping):
        if one.keys() != other.keys():
            return f"{name}: {sorted(one)} and {sorted(other)}"
        parts = (_unequal(one[key], other[key], f"{name}.{key}".strip(".")) for key in one)
        return next((part for part in parts if part), None)
    equal = torch.equal(one, other) if isinstance(one, Tensor) else one == other
    return None if equal else name
