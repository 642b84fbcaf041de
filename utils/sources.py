"""Where a command line's transitions, evaluation environments and scores come from."""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import numpy as np

import hyperparameters
from utils import tasks
from utils.data import bandit, d4rl
from utils.data.dataset import Dataset
from utils.errors import UserError

__all__ = ["load", "make_environments", "normalized_score"]

MINARI = "minari:"


def load(given: argparse.Namespace) -> Dataset:
    """The dataset of `--dataset`; D4RL's own of the task where none is named. Raises UserError as its source does."""
    if _is_bandit(given):
        return bandit.load(given.env_name)
    if given.dataset == "local":
        from utils.behaviour import local

        return local.load(given.env_name, size=given.local_size, progress=not given.quiet)
    if _is_minari(given):
        from utils.data import minari

        return minari.load(given.dataset)
    return d4rl.load(given.env_name, path=given.dataset)


def make_environments(given: argparse.Namespace, number: int) -> Any | None:
    """So many lockstep environments of `--backend`; None, with a warning, where only the original stack has the task.

    A Minari set brings its own environment, a bandit too.
    """
    if _is_bandit(given):
        return bandit.make_lockstep(given.env_name, number)
    if _is_minari(given):
        from utils.data import minari

        return minari.make_lockstep(given.dataset, number)
    if given.backend == "d4rl":
        from utils import classic

        return classic.make_lockstep(given.env_name, number)
    if hyperparameters.domain(given.env_name) in ("adroit", "kitchen"):
        warnings.warn(
            f"{given.env_name} trains without evaluation: that takes the original stack (--backend d4rl, README) with "
            "d4rl's hand or kitchen environments installed in it",
            stacklevel=2,
        )
        return None
    from utils import environments

    return environments.make_lockstep(given.env_name, number)


def normalized_score(given: argparse.Namespace, returns: np.ndarray) -> np.ndarray:
    """Returns in D4RL's percent of the task, in the Minari set's own where it has reference scores (else NaN), or in
    percent of a bandit's best reward."""
    if _is_bandit(given):
        return bandit.normalized_score(given.env_name, returns)
    if _is_minari(given):
        from utils.data import minari

        return np.asarray(minari.normalized_score(given.dataset, returns))
    return np.asarray(tasks.normalized_score(given.env_name, returns))


def _is_minari(given: argparse.Namespace) -> bool:
    return (given.dataset or "").startswith(MINARI)


def _is_bandit(given: argparse.Namespace) -> bool:
    """Raises UserError where a bandit was asked for with data or environments of another kind."""
    if given.env_name not in bandit.ids():
        return False
    if given.dataset is not None:
        raise UserError(f"{given.env_name} makes its own data: leave --dataset {given.dataset} out")
    if given.backend == "d4rl":
        raise UserError(f"{given.env_name} is no task of the original stack: leave --backend d4rl out")
    return True
