"""Where a run's transitions, evaluation environments and scores come from: one object, chosen once."""

from __future__ import annotations

import contextlib
import os
import warnings
from dataclasses import dataclass
from typing import Protocol

import numpy as np

import hyperparameters
from utils import tasks
from utils.data import bandit, d4rl
from utils.data.dataset import Dataset
from utils.errors import UserError
from utils.training.interfaces import Environments, Watched

MINARI = "minari:"
FRAME = 480  # pixels in width and height of what is looked at


class Source(Protocol):
    """A task's data, where its policies are evaluated, and how their returns are scored."""

    def load(self) -> Dataset:
        """All transitions. Raises UserError where they cannot be had."""
        ...

    def environments(self, number: int) -> Environments | None:
        """So many lockstep environments; None, with a warning, where the task has none here."""
        ...

    def watched(self) -> Watched:
        """One environment that can be looked at. Raises UserError where there is none, or nothing to see."""
        ...

    def normalized_score(self, returns: np.ndarray) -> np.ndarray:
        """Returns of any shape in percent, of what depends on the source; NaN where there is no reference."""
        ...


def choose(
    env_name: str,
    dataset: str | None = None,
    backend: str = "mujoco",
    local_size: int = 100_000,
    progress: bool = True,
) -> Source:
    """The source that `--dataset` names: `local`, `minari:ID` or a D4RL-format file; D4RL's own set where it is None.

    backend: `mujoco` or `d4rl`, the original stack. local_size: transitions of a local set, which is collected with a
    progress bar where `progress`. Raises UserError where a bandit was asked for with other data or environments.
    """
    if env_name in bandit.ids():
        if dataset is not None:
            raise UserError(f"{env_name} makes its own data: leave --dataset {dataset} out")
        if backend == "d4rl":
            raise UserError(f"{env_name} is no task of the original stack: leave --backend d4rl out")
        return Bandit(env_name)
    if dataset == "local":
        return Local(env_name, backend, local_size, progress)
    if dataset is not None and dataset.startswith(MINARI):
        return Minari(dataset)
    return D4RL(env_name, backend, dataset)


@dataclass(frozen=True)
class Bandit:
    """A toy problem, which makes its own data; scores are percent of its best mean reward."""

    env_name: str

    def load(self) -> Dataset:
        return bandit.load(self.env_name)

    def environments(self, number: int) -> Environments:
        return bandit.make_lockstep(self.env_name, number)

    def watched(self) -> Watched:
        raise UserError(f"{self.env_name} has nothing to look at: its episodes are one action long")

    def normalized_score(self, returns: np.ndarray) -> np.ndarray:
        return bandit.normalized_score(self.env_name, returns)


@dataclass(frozen=True)
class Minari:
    """A Minari set with its own environment and, where it has them, reference scores."""

    name: str  # minari:ID

    def load(self) -> Dataset:
        from utils.data import minari

        return minari.load(self.name)

    def environments(self, number: int) -> Environments:
        from utils.data import minari

        return minari.make_lockstep(self.name, number)

    def watched(self) -> Watched:
        from utils.data import minari
        from utils.environments.physics import find_opengl

        with contextlib.suppress(UserError):  # an environment may draw without it
            find_opengl()
        return minari.make_lockstep(self.name, 1, render_mode="rgb_array")

    def normalized_score(self, returns: np.ndarray) -> np.ndarray:
        from utils.data import minari

        return np.asarray(minari.normalized_score(self.name, returns))


@dataclass(frozen=True)
class Task:
    """A task of D4RL, whatever its data: environments of `backend`, D4RL's percent."""

    env_name: str
    backend: str

    def environments(self, number: int) -> Environments | None:
        if self.backend == "d4rl":
            from utils import classic

            return classic.make_lockstep(self.env_name, number)
        if hyperparameters.domain(self.env_name) in ("adroit", "kitchen"):
            warnings.warn(
                f"{self.env_name} trains without evaluation: that takes the original stack (--backend d4rl, README) "
                "with d4rl's hand or kitchen environments installed in it",
                stacklevel=2,
            )
            return None
        from utils import environments

        return environments.make_lockstep(self.env_name, number)

    def watched(self) -> Watched:
        if self.backend == "d4rl":
            from utils import classic

            return classic.make_lockstep(self.env_name, 1)
        if hyperparameters.domain(self.env_name) in ("adroit", "kitchen"):
            raise UserError(f"{self.env_name} has no environment here: that takes the original stack (--backend d4rl)")
        from utils import environments

        return environments.make_lockstep(self.env_name, 1, render_mode="rgb_array", width=FRAME, height=FRAME)

    def normalized_score(self, returns: np.ndarray) -> np.ndarray:
        return np.asarray(tasks.normalized_score(self.env_name, returns))


@dataclass(frozen=True)
class D4RL(Task):
    """D4RL's own set, or with `path` a file in its format."""

    path: str | os.PathLike[str] | None = None

    def load(self) -> Dataset:
        return d4rl.load(self.env_name, path=self.path)


@dataclass(frozen=True)
class Local(Task):
    """A set collected on this machine by the policies that come with the project."""

    size: int
    progress: bool

    def load(self) -> Dataset:
        from utils.behaviour import local

        return local.load(self.env_name, size=self.size, progress=self.progress)
