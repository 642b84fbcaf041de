"""A run's folders: what is written once at the start, read back to resume, and shown at the end."""

from __future__ import annotations

import csv
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from utils import checkpoint
from utils.errors import UserError
from utils.faults import STOPPED
from utils.log import write_json

__all__ = [
    "describe_run",
    "prepare_folders",
    "read_evaluations",
    "read_events",
    "save_curve",
    "summary_table",
    "truncate_logs",
]

PACKAGES = ("torch", "numpy", "h5py", "gymnasium", "mujoco", "gym", "d4rl", "tensorboard")
# Any of these says that a folder holds a run.
LEFT = ("config.json", "metrics.csv", "evaluations.csv", checkpoint.CURRENT, checkpoint.PREVIOUS)
# What may differ between a run and its continuation.
CHANGEABLE = ("num_epochs",)
LAST = 5  # evaluations in the "mean of the last" column


def describe_run(
    settings: Mapping[str, tuple[Any, str]], run: Mapping[str, Any], device: torch.device, dataset: Mapping[str, Any]
) -> dict[str, Any]:
    """What `config.json` holds: every setting and its origin, versions, device, dataset and commit."""
    return {
        "settings": {name: value for name, (value, _) in settings.items()},
        "origins": {name: origin for name, (_, origin) in settings.items()},
        "run": dict(run),
        "dataset": dict(dataset),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.processor()})",
        "python": platform.python_version(),
        "versions": _versions(),
        "git_commit": _git_commit(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _git_commit() -> str | None:
    """The checkout's commit, marked where files differ from it; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        commit = _git(here, "rev-parse", "HEAD")
        return commit + ("-dirty" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def prepare_folders(
    folders: Sequence[Path], configs: Sequence[Mapping[str, Any]], resume: bool, overwrite: bool
) -> list[dict[str, Any]] | None:
    """Make the seeds' folders and write their `config.json`; the states to continue from, with the logs cut back to
    their moment, or None where the run begins.

    A run that was stopped before its first checkpoint starts anew when it is resumed. Raises UserError where a folder
    holds a run and neither `resume` nor `overwrite` was asked for, where the resumed run's settings differ in what
    would change its numbers, or as `checkpoint.load_newest_common`.
    """
    held = [folder for folder in folders if any((folder / name).exists() for name in LEFT)]
    if held and not (resume or overwrite):
        raise UserError(f"{held[0]} holds a run already; use --resume, --overwrite or another --dir")
    states = None
    if resume:
        for folder, config in zip(folders, configs, strict=True):
            if folder in held:
                _check_same(folder, config)
        states = checkpoint.load_newest_common(folders)
    try:
        for folder, config in zip(folders, configs, strict=True):
            if states is None:
                _discard(folder)
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "config.json", config)
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}") from error
    for folder, state in zip(folders, states or (), strict=states is not None):
        truncate_logs(folder, state["logs"])
    return states


def _discard(folder: Path) -> None:
    """Delete a folder, under another name: a kill meanwhile leaves no half of it where a run belongs."""
    doomed = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _check_same(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises UserError listing the settings in which the run in `folder` differs."""
    path = folder / "config.json"
    try:
        old = json.loads(path.read_text())
        settings, dataset, run = ({**old[part]} for part in ("settings", "dataset", "run"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"{path} is damaged ({reason}); use --overwrite or another --dir") from error
    # A decaying learning rate depends on the length of the run.
    decays = config["settings"]["lr_decay"] or config["settings"]["lr_decay_full"]
    changeable = () if decays else CHANGEABLE
    pairs = [(settings, "settings", name) for name in config["settings"]]
    pairs += [(dataset, "dataset", "sha256"), (run, "run", "eval_seeds")]
    differences = [
        f"{name} was {there.get(name)!r}, now {config[part].get(name)!r}"
        for there, part, name in pairs
        if name not in changeable and there.get(name) != config[part].get(name)
    ]
    if differences:
        raise UserError(f"{folder} cannot be resumed with other settings: {'; '.join(differences)}")


def truncate_logs(folder: Path, positions: Mapping[str, int]) -> None:
    """Cut each CSV file back to the length it had when the checkpoint was written."""
    for name, size in positions.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size < size:
            raise UserError(f"{path} is shorter than when its checkpoint was written; use --overwrite to start anew")
        with open(path, "r+b") as file:
            file.truncate(size)


def read_events(path: Path) -> list[tuple[int, str]]:
    """What happened to a seed, by step, from its `metrics.csv` (`utils.faults`); files of earlier versions have none.

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


def summary_table(folders: Sequence[Path], behaviour_score: float | None = None) -> str:
    """Last, mean of the last five and best evaluation of each seed, then their mean and deviation over seeds.

    `behaviour_score`: the data's own mean normalised return, shown beside them.
    """
    rows, lines = [], [f"{'seed':>10} {'last':>8} {f'mean of last {LAST}':>15} {'best':>8}  at step"]
    for folder in folders:
        means, name = _means(folder), folder.name.removeprefix("seed_")
        stopped = next((step for step, event in read_events(folder / "metrics.csv") if event.startswith(STOPPED)), None)
        if not means and stopped is None:
            return "no evaluation was made"
        numbers = f"{'-':>8} {'-':>15} {'-':>8}"
        if means:
            values = list(means.values())
            best = max(means, key=lambda step: means[step])
            row = (values[-1], float(np.mean(values[-LAST:])), means[best])
            numbers = f"{row[0]:8.1f} {row[1]:15.1f} {row[2]:8.1f}  {best}"
        if stopped is not None:
            numbers += f"  stopped at {stopped:,}: numbers not finite; in no mean"
        else:
            rows.append(row)
        lines.append(f"{name:>10} {numbers}")
    if len(rows) > 1:
        mean, deviation = np.mean(rows, axis=0), np.std(rows, axis=0)
        for label, x in (("mean", mean), ("deviation", deviation)):
            lines.append(f"{label:>10} {x[0]:8.1f} {x[1]:15.1f} {x[2]:8.1f}")
    if behaviour_score is not None:
        lines.append(f"{'data':>10} {behaviour_score:8.1f}  mean of the episodes in the dataset")
    lines.append("Normalised scores. Best is chosen on test episodes: it is no estimate of what the policy will do.")
    return "\n".join(lines)


def _means(folder: Path) -> dict[int, float]:
    """Mean normalised score of each evaluation of a seed, by step."""
    return {step: float(x.mean()) for step, x in read_evaluations(folder / "evaluations.csv").items()}


def save_curve(folders: Sequence[Path], title: str, behaviour_score: float | None = None) -> Path | None:
    """Draw every seed's evaluations, their mean, and the data's own mean return; the picture's path.

    The mean is that of the seeds that went to the end. None where nothing was evaluated. Raises UserError where the
    disk refuses.
    """
    curves = [curve for folder in folders if (curve := _means(folder))]
    last = max((step for curve in curves for step in curve), default=None)
    whole = [curve for curve in curves if last in curve]
    if not whole:
        return None
    steps = sorted(set.intersection(*(set(curve) for curve in whole)))
    figure = Figure(figsize=(5.5, 3.5), layout="constrained")
    axes = figure.add_subplot()
    for curve in curves:
        axes.plot(list(curve), list(curve.values()), color="0.6", linewidth=1)
    axes.plot(steps, [np.mean([curve[s] for curve in whole]) for s in steps], "ko-", markersize=3, label="evaluation")
    if behaviour_score is not None:
        axes.axhline(behaviour_score, color="black", linestyle="--", linewidth=1, label="the data's mean")
    axes.set(xlabel="gradient step", ylabel="normalised score", title=title)
    axes.legend(frameon=False)
    path = folders[0].parent / "curve.png"
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; the run is complete all the same") from error
    return path
