"""A run's folders: what is written once at the start and read back to resume."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from utils.errors import UserError
from utils.runs import checkpoint
from utils.runs.log import write_json

PACKAGES = ("torch", "numpy", "h5py", "gymnasium", "mujoco", "gym", "d4rl", "tensorboard")
# Any of these says that a folder holds a run.
LEFT = ("config.json", "metrics.csv", "evaluations.csv", checkpoint.CURRENT, checkpoint.PREVIOUS)
# What may differ between a run and its continuation.
CHANGEABLE = ("num_epochs",)


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


def recorded_execution(folders: Sequence[Path]) -> str | None:
    """How the runs in these folders are executed; None where none is there, or none that can be read.

    A resumed run keeps it: another one gives the same numbers only within rounding.
    """
    for folder in folders:
        try:
            execution = json.loads((folder / "config.json").read_text())["execution"]
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            continue  # `prepare_folders` says what is wrong with it
        if isinstance(execution, str):
            return execution
    return None


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
    pairs += [(dataset, "dataset", "sha256"), (run, "run", "eval_seeds"), (run, "run", "backend")]
    differences = [
        f"{name} was {there.get(name)!r}, now {config[part].get(name)!r}"
        for there, part, name in pairs
        if name not in changeable and there.get(name) != config[part].get(name)
    ]
    if old.get("execution") != config.get("execution"):
        differences.append(f"execution was {old.get('execution')!r}, now {config.get('execution')!r}")
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
