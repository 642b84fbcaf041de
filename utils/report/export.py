"""Runs to the few files worth keeping beside a published number: settings, metrics and every episode's return."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.report.runs import SeedRun
from utils.runs.log import write_json

__all__ = ["export"]

KEPT = ("evaluations.csv", "metrics.csv")
OFFICIAL = ("d4rl", "local", "bandit")


def export(runs: Sequence[SeedRun], target: Path) -> list[Path]:
    """Copy each run to TARGET/<data>/<variant>/<algo>/<env_name>/seed_<k>, without checkpoint and TensorBoard's events.

    `config.json` keeps no path of the machine: of the data's file its name, size, SHA-256 and origin (`label`), so
    that a report made of the copy says "rebuilt" where the original did. Raises UserError where a folder exists
    with another run.
    """
    folders = []
    for run in runs:
        changed = " ".join(f"{name}={value}" for name, value in sorted(run.changed.items()))
        variant = f"{changed or 'own'} {run.total_steps} steps"
        folder = target / _file_name(run.label) / _file_name(variant) / _path(run.algo) / _path(run.env_name)
        folder /= f"seed_{run.seed}"
        if (folder / "config.json").exists():
            raise UserError(f"{folder} exists already; delete it, or export into another folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", portable(run.config, run.label))
        for name in KEPT:
            if (run.folder / name).exists():
                shutil.copyfile(run.folder / name, folder / name)
        folders.append(folder)
    return folders


def portable(config: Mapping[str, Any], label: str) -> dict[str, Any]:
    """`config` with file names in place of paths, and the origin of the data spelt out."""
    config = copy.deepcopy(dict(config))
    dataset, run = config["dataset"], config["run"]
    for part, names in ((dataset, ("path",)), (run, ("dir",))):
        for name in names:
            if part.get(name):
                part[name] = Path(part[name]).name
    source = str(dataset.get("source"))
    if source not in OFFICIAL and not source.startswith("minari:"):
        dataset["source"] = run["dataset"] = Path(source).name
        dataset["label"] = label
    if run.get("load_published"):
        run["load_published"] = [f"{k}={Path(f).name}" for k, _, f in (t.partition("=") for t in run["load_published"])]
    return config


def _file_name(text: str) -> str:
    """A folder's name for a label or a variant: no separators or blanks; never empty, nor one that leads upwards."""
    kept = "".join(letter if letter.isalnum() or letter in "=.-_" else "-" for letter in text)
    return kept.strip("-.") or "unnamed"


def _path(text: str) -> Path:
    """Folders below the target for a name that a file gave, whatever stands in it; a Minari id has several parts."""
    return Path(*(_file_name(part) for part in text.split("/")))
