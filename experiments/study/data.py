"""Where an experiment's data are, said once for all of its runs: `--dataset d4rl|local|DIR`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from utils import sources
from utils.data.d4rl import find_file
from utils.errors import UserError


@dataclass(frozen=True)
class Data:
    """Where the data of one task are, as run.py is told: None for D4RL's own set, "local", or a file."""

    dataset: str | None = None
    local_size: int = 100_000

    @property
    def flags(self) -> list[str]:
        """For run.py's command line."""
        size = ["--local_size", str(self.local_size)] if self.dataset == "local" else []
        return [] if self.dataset is None else ["--dataset", self.dataset, *size]


def data_of(dataset: str, local_size: int, env_name: str) -> Data:
    """A task's data of an experiment's `--dataset`. Raises UserError where a folder has none."""
    if dataset == "d4rl":
        return Data()
    if dataset == "local":
        return Data("local", local_size)
    return Data(str(find_file(Path(dataset), env_name)))


def data_name(dataset: str, scale: float) -> str:
    """The folder's name for runs on these data at this scale."""
    name = dataset if dataset in ("d4rl", "local") else Path(dataset).resolve().name
    return name + (f"-scale{scale:g}" if scale != 1 else "")


def missing_data(dataset: str, env_names: Iterable[str]) -> dict[str, str]:
    """Tasks that cannot be run, and why; nothing is downloaded or collected to find out."""
    reasons = {}
    if dataset in ("d4rl", "local"):
        return {}
    if not Path(dataset).is_dir():
        raise UserError(f"--dataset takes d4rl, local or a folder of HDF5 files, not {dataset!r}")
    for env_name in dict.fromkeys(env_names):
        try:
            find_file(Path(dataset), env_name)
        except UserError as error:
            reasons[env_name] = str(error)
    return reasons


def prepare_data(dataset: str, local_size: int, env_names: Iterable[str]) -> dict[str, str]:
    """Download or collect every task's set once, before several runs want it; tasks that failed, and why."""
    reasons = missing_data(dataset, env_names)
    if dataset not in ("d4rl", "local"):
        return reasons
    for env_name in dict.fromkeys(env_names):
        data = data_of(dataset, local_size, env_name)
        try:
            sources.choose(env_name, data.dataset, local_size=data.local_size).load()
        except UserError as error:
            reasons[env_name] = str(error)
    return reasons
