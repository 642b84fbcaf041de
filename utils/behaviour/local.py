"""`--dataset local`: sets in D4RL's format, collected on this machine by the behaviour policies of `utils/behaviour`.

For a reader without D4RL's files. A local set is called so everywhere: in its file's name and attributes and in
`Dataset.source`. Scores on it are not comparable with scores on D4RL's own files.

- *medium*: one policy of a third to a half of the expert's normalised score; *medium-expert*: half of the rows by it,
  half by the best policy; *medium-replay*: equal parts by uniformly random actions, the snapshots of the search on the
  way to medium, and medium.
- AntMaze: see `utils.behaviour.navigation`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from utils import tasks
from utils.behaviour.collect import (
    DATA_LICENCE_NOTE,
    Recording,
    describe,
    read_attributes,
    record,
    streams_for,
    versions,
    write_hdf5,
)
from utils.behaviour.navigation import Navigator, maze_envs
from utils.behaviour.policies import LinearPolicy, NoisyPolicy, Policy, UniformPolicy, load_policy
from utils.data import d4rl
from utils.data.dataset import Dataset
from utils.environments import make_lockstep
from utils.errors import UserError

DEFAULT_SIZE = 100_000
MIN_SIZE = 100
REPLAY_SNAPSHOTS = 4
LINEAR_ACTION_NOISE = 0.1
"""σ added to a linear policy's action. D4RL's behaviours sample a Gaussian; a linear one has none of its own."""
FORMAT = 1
"""Raised when the same policies and seed come to give other rows, so that older caches are collected again."""

_MIXTURES: dict[str, tuple[str, ...]] = {
    "medium": ("medium",),
    "medium-replay": ("random", *(f"replay_{k + 1}" for k in range(REPLAY_SNAPSHOTS)), "medium"),
    "medium-expert": ("medium", "expert"),
}


def ids() -> tuple[str, ...]:
    """The ids that can be collected: the paper's tasks, AntMaze in both versions."""
    return tuple(name for name, task in tasks.TASKS.items() if task.collectable)


def behaviour_folder() -> Path:
    """Where the policies that ship with the project lie."""
    return Path(__file__).parent


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """`cache_dir`, else $DIFFCPS_LOCAL_DIR, else ~/.cache/diffcps/local."""
    folder = cache_dir or os.environ.get("DIFFCPS_LOCAL_DIR") or Path.home() / ".cache" / "diffcps" / "local"
    return Path(folder).expanduser()


def local_file(
    env_name: str, size: int = DEFAULT_SIZE, seed: int = 0, cache_dir: str | os.PathLike[str] | None = None
) -> Path:
    """Where the set lies or would lie."""
    return cache_folder(cache_dir) / f"{env_name}-local-{size}-seed{seed}.hdf5"


def load(
    env_name: str,
    size: int = DEFAULT_SIZE,
    seed: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Dataset:
    """The local set of a task: collected on first use, then read from the cache.

    env_name is one of `ids()`; size counts the rows of the file, which give slightly fewer transitions, as D4RL's do: a
    row that ends by a time limit has no successor; seed is of everything random in the collection, and gives the same
    file every time on one installation; cache_dir: see `cache_folder`; progress: whether to show a bar.
    UserError for a task that cannot be collected, a size below 100, a negative seed, a cache that cannot be written.
    """
    path = local_file(env_name, size, seed, cache_dir)
    plan = _plan(env_name)
    if size < MIN_SIZE:
        raise UserError(f"a local set of {size} rows is too small; ask for at least {MIN_SIZE}")
    if seed < 0:
        raise UserError(f"the seed of a local set is {seed}; it must be at least 0")
    recipe = {"env_name": env_name, "rows": size, "seed": seed, "format": FORMAT, "policies": plan.digests()}
    if not _is_current(path, recipe):
        _collect(path, plan, recipe, progress)
    return replace(d4rl.load(env_name, path=path, verify=False), source="local")


def as_behaviour(policy: Policy) -> Policy:
    """The policy as it acts while data are collected: a linear one with Gaussian noise, others sampling themselves."""
    return NoisyPolicy(policy, LINEAR_ACTION_NOISE) if isinstance(policy, LinearPolicy) else policy


# ---------------------------------------------------------------------------------------------------------------
# Which behaviours make a set
# ---------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Plan:
    """What makes a set: the policy files by behaviour name (None: uniformly random), the way to record with one."""

    env_name: str
    files: dict[str, Path | None]
    record: Callable[[Path | None, int, np.random.SeedSequence, tqdm], tuple[Policy, Recording]]

    def digests(self) -> dict[str, str]:
        """SHA-256 of each policy file, so that a cache made by other policies is seen."""
        return {
            name: "uniform" if file is None else hashlib.sha256(_shipped(file).read_bytes()).hexdigest()
            for name, file in self.files.items()
        }


def _shipped(file: Path) -> Path:
    if not file.is_file():
        raise UserError(f"no behaviour policy {file}; restore it, or find it with python -m utils.behaviour.search")
    return file


def _plan(env_name: str) -> _Plan:
    """Raises UserError for a task that cannot be collected."""
    if env_name not in ids():
        raise UserError(f"no local data for {env_name!r}; --dataset local knows {', '.join(ids())}")
    task = tasks.task(env_name)
    if task.domain == "antmaze":
        return _antmaze_plan(task)
    folder = behaviour_folder() / task.world
    files = {name: None if name == "random" else folder / f"{name}.npz" for name in _MIXTURES[task.behaviour]}

    def locomotion(file: Path | None, rows: int, seed: np.random.SeedSequence, bar: tqdm) -> tuple[Policy, Recording]:
        envs = make_lockstep(env_name, streams_for(rows))
        policy: Policy = UniformPolicy(envs.action_dim) if file is None else as_behaviour(load_policy(file))
        part = record(envs, policy, seed, rows=rows, progress=bar)
        envs.close()
        return policy, part

    return _Plan(env_name, files, locomotion)


def _antmaze_plan(task: tasks.Task) -> _Plan:
    gait = behaviour_folder() / "ant" / "gait.npz"

    def antmaze(_: Path | None, rows: int, seed: np.random.SeedSequence, bar: tqdm) -> tuple[Policy, Recording]:
        envs = maze_envs(task.world, task.behaviour, streams_for(rows))
        navigator = Navigator(task.world, task.behaviour, load_policy(gait), envs.num_envs)
        part = record(envs, navigator, seed, rows=rows, begin=navigator.begin, progress=bar)
        envs.close()
        return navigator, part

    return _Plan(task.env_name, {"navigator": gait}, antmaze)


# ---------------------------------------------------------------------------------------------------------------
# Collecting and the cache
# ---------------------------------------------------------------------------------------------------------------
def _is_current(path: Path, recipe: dict[str, Any]) -> bool:
    """Whether the cache has a readable file that these policies made."""
    if not path.is_file():
        return False
    try:
        return read_attributes(path).get("recipe") == recipe
    except (OSError, ValueError):
        return False  # damaged: collected again


def _collect(path: Path, plan: _Plan, recipe: dict[str, Any], progress: bool) -> None:
    size, names = recipe["rows"], list(plan.files)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot keep local data in {path.parent}: {error.strerror}; set $DIFFCPS_LOCAL_DIR") from error
    shares = size // len(names) + (np.arange(len(names)) < size % len(names))
    seeds = np.random.SeedSequence(recipe["seed"]).spawn(len(names))
    parts, behaviours = [], []
    hidden = None if progress else True  # None: where there is no terminal
    with tqdm(total=size, desc=f"collect {plan.env_name} (local)", unit=" rows", disable=hidden) as bar:
        for name, rows, seed in zip(names, shares, seeds, strict=True):
            policy, part = plan.record(plan.files[name], int(rows), seed, bar)
            parts.append(part)
            behaviours.append(describe(plan.env_name, name, policy, part))
    attributes = {
        "source": "local",
        "description": DATA_LICENCE_NOTE,
        "recipe": recipe,
        "behaviours": behaviours,
        "versions": versions(),
    }
    try:
        write_hdf5(path, parts, attributes)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}; set $DIFFCPS_LOCAL_DIR to a folder with room") from error
