"""Where an experiment's data are, said once for all of its runs: `--dataset d4rl|local|DIR`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from agents import AGENTS
from utils import options, sources, tasks
from utils.errors import UserError

__all__ = ["data_flags", "data_name", "find_file", "missing_data", "prepare_data"]


def data_flags(given: argparse.Namespace, env_name: str) -> list[str]:
    """How run.py is told where the data are."""
    if given.dataset == "d4rl":
        return []
    if given.dataset == "local":
        return ["--dataset", "local", "--local_size", str(given.local_size)]
    return ["--dataset", str(find_file(Path(given.dataset), env_name))]


def find_file(folder: Path, env_name: str) -> Path:
    """A task's file in a folder: as the task is called, with or without its version, or as D4RL calls it.

    Raises UserError where there is none.
    """
    names = [f"{env_name}.hdf5", f"{env_name.rpartition('-v')[0]}.hdf5", tasks.task(env_name).file_name]
    for name in names:
        if (folder / name).is_file():
            return (folder / name).resolve()
    raise UserError(f"no data for {env_name} in {folder}: no {' or '.join(names)}")


def data_name(given: argparse.Namespace) -> str:
    """The folder's name for runs on these data at this scale."""
    name = given.dataset if given.dataset in ("d4rl", "local") else Path(given.dataset).resolve().name
    return name + (f"-scale{given.scale:g}" if given.scale != 1 else "")


def missing_data(given: argparse.Namespace, tasks: Iterable[str]) -> dict[str, str]:
    """Tasks that cannot be run, and why; nothing is downloaded or collected to find out."""
    reasons = {}
    if given.dataset in ("d4rl", "local"):
        return {}
    if not Path(given.dataset).is_dir():
        raise UserError(f"--dataset takes d4rl, local or a folder of HDF5 files, not {given.dataset!r}")
    for env_name in dict.fromkeys(tasks):
        try:
            find_file(Path(given.dataset), env_name)
        except UserError as error:
            reasons[env_name] = str(error)
    return reasons


def prepare_data(given: argparse.Namespace, tasks: Iterable[str]) -> dict[str, str]:
    """Download or collect every task's set once, before several runs want it; tasks that failed, and why."""
    reasons = missing_data(given, tasks)
    if given.dataset not in ("d4rl", "local"):
        return reasons
    for env_name in dict.fromkeys(tasks):
        try:
            sources.load(options.parse(["--env_name", env_name, *data_flags(given, env_name)], AGENTS))
        except UserError as error:
            reasons[env_name] = str(error)
    return reasons
