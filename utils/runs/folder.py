"""A run's folders: what is written once at the start and read back to resume."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

from utils.errors import UserError
from utils.files import first_line
from utils.runs import checkpoint
from utils.runs.columns import (
    EVALUATION_COLUMNS,
    EVALUATIONS_FILE,
    METRICS_BEGIN,
    METRICS_END,
    METRICS_FILE,
    OLD_METRICS_END,
    PLAYED_FILE,
    TRACKED_FILE,
)
from utils.runs.locks import RunLock, lock_of
from utils.runs.log import write_json
from utils.runs.reading import read_config, read_evaluations, read_header, read_metrics

T = TypeVar("T")

PACKAGES = ("torch", "numpy", "h5py", "gymnasium", "mujoco", "gym", "d4rl", "tensorboard")
# Any of these says that a folder holds a run.
LEFT = (checkpoint.CURRENT, checkpoint.PREVIOUS, METRICS_FILE, EVALUATIONS_FILE, "config.json")
# What else a run leaves there, and experiments and play.py beside it.
BESIDE = (checkpoint.TEMPORARY, "events.out.tfevents.*", "actions.csv", PLAYED_FILE, TRACKED_FILE, ".*.part")
# What may differ between a run and its continuation.
CHANGEABLE = ("num_epochs",)
# What runs had that were made before they said so.
ALWAYS_WAS = {
    "precision": "float32",
    **{"kappa_slack": 0.2, "kappa_opening": 0},
    **{"lambda_update": "ascent", "lambda_proportional": 3.0, "lambda_integral": 0.02},
}


def describe_run(
    settings: Mapping[str, tuple[Any, str]], run: Mapping[str, Any], device: torch.device, dataset: Mapping[str, Any]
) -> dict[str, Any]:
    """What `config.json` holds: every setting and its origin, versions, device, dataset and commit."""
    return {
        "settings": {name: value for name, (value, _) in settings.items()},
        "origins": {name: origin for name, (_, origin) in settings.items()},
        "run": dict(run),
        "dataset": dict(dataset),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({processor()})",
        "python": platform.python_version(),
        "versions": _versions(),
        "git_commit": git_commit(),
    }


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """This machine's processor by name; its architecture where the system does not say (`x86_64`)."""
    try:
        text = cpuinfo.read_text(errors="replace")
    except OSError:  # no Linux
        text = ""
    model = re.search(r"^model name[ \t]*:[ \t]*(\S.*)$", text, re.MULTILINE)  # a virtual machine may leave it empty
    return model.group(1).strip() if model else platform.processor() or platform.machine() or "unknown"


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
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


def recorded(folders: Sequence[Path], name: str, kind: type[T]) -> T | None:
    """What `config.json` in these folders says under `name`; None where none says so, or none can be read.

    A resumed run keeps its execution and its threads: others give the same numbers only within rounding.
    """
    for folder in folders:
        with contextlib.suppress(UserError):  # `prepare_folders` says what is wrong with it
            if isinstance(value := read_config(folder).get(name), kind):
                return value
    return None


def check_held(folders: Sequence[Path], resume: bool, overwrite: bool) -> list[Path]:
    """The folders that hold a run. Raises UserError where that cannot be, or is not what was asked for."""
    held = [folder for folder in folders if any((folder / name).exists() for name in LEFT)]
    new = [folder for folder in folders if folder not in held]
    apart = f"--seeds {','.join(folder.name.removeprefix('seed_') for folder in new)}"
    names = ", ".join(folder.name for folder in held)
    if held and new and not (resume or overwrite):
        raise UserError(f"{held[0].parent} holds a run of {names} already; add the other seeds with {apart}, or use "
                        "--name LABEL for a run beside it")  # fmt: skip
    if held and not (resume or overwrite):
        raise UserError(f"{held[0]} holds a run already; use --resume to go on with it, --name LABEL for a run beside "
                        "it, or --overwrite to delete it")  # fmt: skip
    saved = any((folder / name).exists() for folder in held for name in (checkpoint.CURRENT, checkpoint.PREVIOUS))
    if saved and new and resume:
        raise UserError(f"{held[0].parent} holds a run of {names} alone: begin the other seeds apart, with {apart} and "
                        "without --resume")  # fmt: skip
    return held


def check_folders(folders: Sequence[Path], resume: bool, overwrite: bool) -> None:
    """Whether a run can be written there, before anything is: nothing is made or changed.

    Raises UserError as `check_held`, for a folder that cannot be made or written, and one that is in use.
    """
    try:
        for folder in folders:
            with contextlib.suppress(FileNotFoundError):
                os.lstat(folder / checkpoint.TEMPORARY)
            there = next(place for place in (folder, *folder.parents) if place.exists())
            if not os.access(there, os.W_OK | os.X_OK):
                raise UserError(f"cannot write {folder}: {there} may not be written")
        check_held(folders, resume, overwrite)
        RunLock([folder for folder in folders if lock_of(folder).exists()]).close()
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot write {folder}: {first_line(error)}") from error


def prepare_folders(
    folders: Sequence[Path], configs: Sequence[Mapping[str, Any]], resume: bool, overwrite: bool
) -> list[dict[str, Any]] | None:
    """Make the seeds' folders and write their `config.json`; the states to continue from, with the logs cut back to
    their moment, or None where the run begins.

    A run that was stopped before its first evaluation and checkpoint starts anew when it is resumed. Raises UserError,
    with nothing changed, where a folder holds a run and neither `resume` nor `overwrite` was asked for, where there
    are evaluations and no checkpoint to continue from, where the resumed run's settings differ in what would change
    its numbers, where its logs are not those that the checkpoint was written with, or as
    `checkpoint.load_newest_common`.
    """
    held, states = check_held(folders, resume, overwrite), None
    if resume:
        for folder, config in zip(folders, configs, strict=True):
            if folder in held:
                _check_same(folder, config)
        owners = [owner(config) for config in configs]
        states = checkpoint.load_newest_common(folders, owners, check_logs)
        for folder in held if states is None else ():
            if _has_rows(folder / EVALUATIONS_FILE):
                raise UserError(f"{folder} has evaluations and no checkpoint to continue from; use --overwrite to "
                                "start anew, or another --dir")  # fmt: skip
    try:
        for folder, config in zip(folders, configs, strict=True):
            folder.mkdir(parents=True, exist_ok=True)
            if states is None:
                _discard(folder)
            write_json(folder / "config.json", config)
        for folder, state in zip(folders, states or (), strict=states is not None):
            for name, size in state["logs"].items():
                os.truncate(folder / name, size)
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}") from error
    return states


def note_execution(folders: Sequence[Path], execution: str) -> None:
    """Have each `config.json` name another execution. Raises UserError where one cannot be read or written."""
    for folder in folders:
        try:
            write_json(folder / "config.json", {**read_config(folder), "execution": execution})
        except OSError as error:
            raise UserError(f"cannot write into {folder}: {error.strerror}") from error


def owner(config: Mapping[str, Any]) -> checkpoint.Owner:
    """Whose checkpoints a seed's folder with this `config.json` holds."""
    return checkpoint.Owner(config["run"]["algo"], config["run"]["env_name"], config["seed"])


def _discard(folder: Path) -> None:
    """Delete what a run left in its folder, and nothing else; the checkpoints first, which the rest is worth."""
    for pattern in (*LEFT, *BESIDE):
        for path in folder.glob(pattern):
            path.unlink()
    for path in folder.glob("*.pth"):  # weights under the published names, which may also be somebody's own
        if checkpoint.is_ours(path):
            path.unlink()


def _check_same(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises UserError listing the settings in which the run in `folder` differs."""
    old = read_config(folder)
    settings, dataset, run = (old[part] for part in ("settings", "dataset", "run"))
    # A decaying learning rate depends on the length of the run.
    decays = config["settings"]["lr_decay"] or config["settings"]["lr_decay_full"]
    changeable = () if decays else CHANGEABLE
    pairs = [(settings, "settings", name) for name in config["settings"]]
    pairs += [(dataset, "dataset", "sha256")]
    pairs += [(run, "run", name) for name in ("eval_seeds", "backend", "precision")]
    differences = [
        f"{name} was {there.get(name, ALWAYS_WAS.get(name))!r}, now {config[part].get(name)!r}"
        for there, part, name in pairs
        if name not in changeable and there.get(name, ALWAYS_WAS.get(name)) != config[part].get(name)
    ]
    if old.get("execution") != config.get("execution"):
        differences.append(f"execution was {old.get('execution')!r}, now {config.get('execution')!r}")
    if differences:
        raise UserError(f"{folder} cannot be resumed with other settings: {'; '.join(differences)}")


def check_logs(folder: Path, state: Mapping[str, Any]) -> None:
    """Raises UserError where a folder's logs do not begin with what they held when the checkpoint was written."""
    sizes = state.get("logs")
    if not isinstance(sizes, dict) or set(sizes) != {METRICS_FILE, EVALUATIONS_FILE}:
        raise UserError(f"the checkpoint in {folder} does not say how long {METRICS_FILE} and {EVALUATIONS_FILE} were")
    for name, size in sizes.items():
        path = folder / name
        if not isinstance(size, int) or not path.is_file() or not 0 <= size <= path.stat().st_size:
            raise UserError(f"{path} is shorter than when its checkpoint was written; use --overwrite to start anew")
        header = tuple(read_header(path))
        ours = header == EVALUATION_COLUMNS
        if name == METRICS_FILE:
            ends = (METRICS_END, OLD_METRICS_END)
            ours = header[: len(METRICS_BEGIN)] == METRICS_BEGIN and any(header[-len(end) :] == end for end in ends)
        if not ours:
            raise UserError(f"{path} begins with other columns than a run's; use --overwrite to start anew")
        with open(path, "rb") as file:
            if not file.read(size).endswith(b"\n"):
                raise UserError(f"{path} has no row that ends where its checkpoint was written; use --overwrite to "
                                "start anew")  # fmt: skip
    read_metrics(folder / METRICS_FILE, sizes[METRICS_FILE])
    read_evaluations(folder / EVALUATIONS_FILE, sizes[EVALUATIONS_FILE])


def _has_rows(path: Path) -> bool:
    """Whether a CSV file has more than its header."""
    try:
        return len(path.read_bytes().splitlines()) > 1
    except OSError:
        return False
