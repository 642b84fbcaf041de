"""One run of an experiment: its command line, how far it is, and how it is begun or continued."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import hyperparameters
import run
from agents import AGENTS
from experiments.study.data import Data, data_of
from utils import tasks
from utils.errors import UserError
from utils.options import parse, parse_seeds, resolve_settings, steps_to_train
from utils.report.runs import Labels, SeedRun, read_run
from utils.runs import checkpoint


@dataclass(frozen=True)
class How:
    """What all runs of an experiment are told beside their settings; None where run.py's default is meant."""

    device: str = "auto"
    execution: str = "auto"
    eval_seeds: str = "published"
    threads: int | None = None
    data: Callable[[str], Data] = lambda env_name: Data()
    precision: str = "float32"

    @classmethod
    def of(cls, options: argparse.Namespace) -> How:
        """As an experiment's command line says."""
        data = partial(data_of, options.dataset, options.local_size)
        return cls(options.device, options.execution, options.eval_seeds, options.threads, data, options.precision)


@dataclass(frozen=True)
class PlannedRun:
    """One call of run.py: all seeds of an algorithm on a task under the same settings."""

    algo: str
    env_name: str
    seeds: tuple[int, ...]
    overrides: Mapping[str, Any]  # what sets the variant apart
    length: Mapping[str, Any]  # a rehearsal's shorter run, a protocol's evaluations; empty for the task's own
    max_steps: int | None = None  # where to end, if that is before the end of the schedule

    @property
    def variant(self) -> str:
        """The folder's name: what was changed, or "own" for the task's own settings."""
        return ",".join(f"{name}={value}" for name, value in self.overrides.items()) or "own"

    @property
    def name(self) -> str:
        return f"{self.variant}/{self.algo}/{self.env_name}/seeds_{','.join(map(str, self.seeds))}"

    @property
    def config(self) -> Any:
        return hyperparameters.get(self.algo, self.env_name, **self.overrides, **self.length)

    def acting_cost(self) -> str:
        """What acting costs, in a line, where the algorithm says so; else ""."""
        wanted = tasks.task(self.env_name)
        return AGENTS[self.algo].cost(self.config, wanted.state_dim, wanted.action_dim)

    @property
    def steps(self) -> int:
        """Gradient steps at which it ends."""
        schedule = self.config.num_epochs * self.config.num_steps_per_epoch
        return schedule if self.max_steps is None else min(schedule, self.max_steps)

    @property
    def updates(self) -> int:
        """The same and the steps of a pretraining before step 0."""
        return self.steps + getattr(self.config, "pretrain_epochs", 0) * self.config.num_steps_per_epoch

    @property
    def evaluations(self) -> int:
        """How often it is evaluated; the last time at its end."""
        return math.ceil(self.steps / (self.config.num_steps_per_epoch * self.config.eval_interval))

    def folders(self, base: Path) -> list[Path]:
        """The seeds' folders."""
        return [base / self.variant / self.algo / self.env_name / f"seed_{seed}" for seed in self.seeds]

    def command(self, base: Path, how: How) -> tuple[str, ...]:
        """The arguments of run.py."""
        words = ["--algo", self.algo, "--env_name", self.env_name, "--dir", str(base / self.variant), "--quiet"]
        words += ["--seeds", ",".join(map(str, self.seeds)), "--device", how.device, "--execution", how.execution]
        words += ["--eval_seeds", how.eval_seeds, "--precision", how.precision, *how.data(self.env_name).flags]
        if self.max_steps is not None:
            words += ["--max_steps", str(self.max_steps)]
        if how.threads:
            words += ["--threads", str(how.threads)]
        for name, value in {**self.overrides, **self.length}.items():
            words += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
        return tuple(words)


def scaled(algo: str, env_name: str, scale: float) -> dict[str, Any]:
    """Settings of a run of `scale` times the gradient steps: ten evaluations of `scale` times the episodes (at least
    two), so that a rehearsal goes through everything. {} for scale 1. Raises UserError outside (0, 1]."""
    if not 0 < scale <= 1:
        raise UserError(f"--scale must lie above 0 and at most at 1, not {scale}")
    if scale == 1:
        return {}
    own = hyperparameters.get(algo, env_name)
    steps = own.num_epochs * own.num_steps_per_epoch * scale
    epochs = 10 * max(1, round(steps / own.num_steps_per_epoch / 10))
    shorter = {
        "num_epochs": epochs,
        "num_steps_per_epoch": max(1, min(own.num_steps_per_epoch, round(steps / epochs))),
        "eval_interval": epochs // 10,
        "eval_episodes": max(2, round(own.eval_episodes * scale)),
    }
    phases = {n: getattr(own, n) for n, about in hyperparameters.settings(algo).items() if about.scales}
    phases = {name: whole for name, whole in phases.items() if whole}
    # At least 1 of each phase that there is.
    return shorter | {name: min(whole, max(1, round(whole * scale))) for name, whole in phases.items()}


def shortened(
    algo: str, env_name: str, scale: float, max_steps: int, evaluations: Mapping[str, Any]
) -> tuple[dict[str, Any], int]:
    """Settings and last step of a run that ends after `max_steps` of its schedule, which keeps its length in epochs.

    evaluations: `eval_interval` and `eval_episodes`, where they are not the task's own. A `scale` below 1 is a
    rehearsal with the same epochs and evaluations: every epoch is that share as long, and an evaluation has that share
    of the episodes (at least two). Raises UserError for a part of an epoch, and for a scale outside (0, 1].
    """
    if not 0 < scale <= 1:
        raise UserError(f"--scale must lie above 0 and at most at 1, not {scale}")
    own = hyperparameters.get(algo, env_name, **evaluations)
    if max_steps < 1 or max_steps % own.num_steps_per_epoch:
        raise UserError(f"--max_steps must be a multiple of num_steps_per_epoch, {own.num_steps_per_epoch}, "
                        f"not {max_steps}")  # fmt: skip
    if scale == 1:
        return dict(evaluations), max_steps
    steps = max(1, round(own.num_steps_per_epoch * scale))
    shorter = {**evaluations, "num_steps_per_epoch": steps, "eval_episodes": max(2, round(own.eval_episodes * scale))}
    for name, about in hyperparameters.settings(algo).items():
        # Epochs are shorter by themselves.
        if about.scales and not name.endswith("_epochs") and (whole := getattr(own, name)):
            shorter[name] = min(whole, max(1, round(whole * scale)))
    return shorter, max_steps // own.num_steps_per_epoch * steps


def continue_run(command: Sequence[str]) -> int:
    """run.py with these arguments, from wherever earlier attempts left each seed; its exit code.

    Seeds that have a step in common go on together. Where earlier attempts had other seeds together, each group of
    seeds at one step goes on by itself, and those without a checkpoint start anew.
    """
    options = parse(command, AGENTS)
    config, _ = resolve_settings(options)
    total = steps_to_train(options, config)
    base = Path(options.dir) / options.algo / options.env_name
    folders = {seed: base / f"seed_{seed}" for seed in parse_seeds(options.seeds, options.seed)}
    unfinished = [seed for seed, folder in folders.items() if not is_complete(folder, total)]
    if not unfinished:
        return 0
    saved = {seed: checkpoint.saved_moments(folder) for seed, folder in folders.items()}
    if set.intersection(*saved.values()):
        return run.main([*command, "--resume"])
    groups: dict[checkpoint.Moment | None, list[int]] = {}
    for seed in unfinished:
        groups.setdefault(max(saved[seed], default=None), []).append(seed)
    for moment, seeds in groups.items():
        how = "--overwrite" if moment is None else "--resume"
        if code := run.main([*command, "--seeds", ",".join(map(str, seeds)), how]):
            return code
    return 0


def is_evaluated(folder: Path, total: int) -> bool:
    """Whether the last evaluation was made, or none is to come because the seed's numbers were no longer finite.

    A run that was begun to go further is evaluated as soon as it was at `total` or after.
    """
    found = _read(folder)
    return found is not None and (found.stopped or (len(found.steps) > 0 and int(found.steps[-1]) >= total))


def is_complete(folder: Path, total: int) -> bool:
    """Whether a seed is trained to the end: evaluated there, and the weights of that step saved."""
    found = _read(folder)
    if found is None or not is_evaluated(folder, total):
        return False
    return found.stopped or max(checkpoint.saved_moments(folder), default=(0, 0))[0] >= total


def share_done(folder: Path, total: int) -> float:
    """Share of a seed's steps that its metrics show, 1 only with the last evaluation and the last checkpoint."""
    if is_complete(folder, total):
        return 1.0
    found = _read(folder)
    steps = found.metrics.get("step", ()) if found is not None else ()
    return min(0.99, max(0.0, float(steps[-1])) / total) if len(steps) else 0.0


def _read(folder: Path) -> SeedRun | None:
    """A seed's run; None where there is none, or none that can be read at this moment."""
    if not (folder / "config.json").exists() or not (folder / "evaluations.csv").exists():
        return None
    try:
        return read_run(folder, Labels())
    except UserError:  # a row is being written, or was when the run was killed: run.py cuts it off when it continues
        return None
