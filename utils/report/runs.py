"""Folders of runs, read: one `SeedRun` a seed, one `Cell` for the seeds of the same thing."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import hyperparameters
from utils.errors import UserError
from utils.runs.columns import RUNAWAY, STOPPED
from utils.runs.reading import read_config, read_evaluations, read_events, read_metrics, scores_by_step

__all__ = ["Cell", "Labels", "SeedRun", "find_runs", "group", "order_tasks", "plain", "read_run"]

# How long and how often, not what: these do not make another method.
LENGTH = ("pretrain_epochs", "num_epochs", "num_steps_per_epoch", "eval_interval", "eval_episodes")
# Run options beside the settings that change what a score means, with the value that needs no mention.
RUN_OPTIONS = {"eval_seeds": "published", "backend": "mujoco", "load_published": None}


@dataclass(frozen=True)
class Labels:
    """Names for data that came from files: (name, prefix of the file's path or of its SHA-256) pairs."""

    pairs: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, texts: Sequence[str]) -> Labels:
        """NAME=PREFIX each. Raises UserError for anything else, and for the names that other sources have."""
        pairs = []
        for text in texts:
            name, _, prefix = (part.strip() for part in text.partition("="))
            if not name or not prefix:
                raise UserError(f"--label takes NAME=PREFIX, such as rebuilt=/data/rebuilt, not {text!r}")
            if name.lower() in ("d4rl", "official", "official d4rl", "local", "minari", "bandit"):
                raise UserError(f"--label {text}: the name {name!r} is kept for data that the run itself found there")
            # A path that is there may be given as it is seen from here; runs keep whole ones.
            pairs.append((name, str(Path(prefix).resolve()) if Path(prefix).exists() else prefix))
        return cls(tuple(pairs))

    def of(self, dataset: Mapping[str, Any]) -> str:
        """Where a run's data came from, as the tables say it.

        D4RL's own download is "official D4RL"; data collected by this project "local"; a Minari set "Minari"; a
        bandit's "bandit". A file has the name that was written down when its run was exported, or that a `--label`
        gives it; else it is one of the "files in FOLDER": files of one folder are taken to be of one origin, of two
        folders never.
        """
        source = str(dataset.get("source", "unknown"))
        if source == "d4rl":
            return "official D4RL"
        if source.startswith("minari:"):
            return "Minari"
        if source in ("local", "bandit", "unknown"):
            return source
        if dataset.get("label"):
            return str(dataset["label"])
        path, digest = str(dataset.get("path", source)), str(dataset.get("sha256", ""))
        for name, prefix in self.pairs:
            if path.startswith(prefix) or (len(prefix) >= 8 and digest.startswith(prefix.lower())):
                return name
        return f"files in {Path(path).parent}"


@dataclass(frozen=True, eq=False)
class SeedRun:
    """What one seed left.

    steps [E] of the evaluations; episodes: normalised scores in percent, an array an evaluation; metrics: columns of
    `metrics.csv` (`step` among them), NaN where empty; events: what happened at which step (`faults`); changed:
    settings other than the task's own, without those of `LENGTH`; total_steps: what the run was asked for.
    """

    folder: Path
    algo: str
    env_name: str
    seed: int
    label: str
    changed: Mapping[str, Any]
    total_steps: int
    steps: np.ndarray
    episodes: Sequence[np.ndarray]
    unstable: int
    metrics: Mapping[str, np.ndarray]
    config: Mapping[str, Any]
    events: Sequence[tuple[int, str]] = ()

    @property
    def scores(self) -> np.ndarray:
        """Mean normalised score of each evaluation [E]."""
        return np.array([float(values.mean()) for values in self.episodes])

    @property
    def complete(self) -> bool:
        """Whether the run reached its last step."""
        return bool(len(self.steps)) and int(self.steps[-1]) >= self.total_steps

    @property
    def stopped(self) -> bool:
        """Whether its numbers were no longer finite: there is nothing to come."""
        return any(event.startswith(STOPPED) for _, event in self.events)

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.config["settings"]


@dataclass(frozen=True, eq=False)
class Cell:
    """Seeds of the same method on the same task and data: what one mean is made of."""

    label: str
    env_name: str
    algo: str
    method: str
    changed: Mapping[str, Any]
    total_steps: int
    runs: Sequence[SeedRun]
    remarks: Sequence[str] = field(default_factory=tuple)

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]

    @property
    def reached(self) -> int:
        """The step of the last evaluation that all seeds have."""
        return min(int(run.steps[-1]) for run in self.runs)


# --- Reading --------------------------------------------------------------------------------------------


def find_runs(places: Iterable[Path], labels: Labels) -> list[SeedRun]:
    """Every run at or below `places`, in path order. Raises UserError where there is none or one is damaged."""
    folders: dict[Path, None] = {}
    for place in places:
        if not place.is_dir():
            raise UserError(f"no folder {place}; name the folder that run.py was given as --dir")
        for config in sorted(place.rglob("config.json")):
            if (config.parent / "evaluations.csv").exists():
                folders[config.parent.resolve()] = None
    if not folders:
        raise UserError(f"no run below {', '.join(map(str, places))} (a run leaves config.json and evaluations.csv)")
    return [read_run(folder, labels) for folder in folders]


def read_run(folder: Path, labels: Labels) -> SeedRun:
    """Read one seed's folder. Raises UserError naming the damaged file."""
    config = read_config(folder)
    evaluations = folder / "evaluations.csv"
    try:
        settings, run = config["settings"], config["run"]
        scores = scores_by_step(evaluations)
        return SeedRun(
            folder=folder,
            algo=run["algo"],
            env_name=_task(run["env_name"], config["dataset"]),
            seed=int(config["seed"]),
            label=labels.of(config["dataset"]),
            changed=_changed(run["algo"], run["env_name"], config),
            total_steps=settings["num_epochs"] * settings["num_steps_per_epoch"],
            steps=np.array(list(scores), np.int64),
            episodes=list(scores.values()),
            unstable=int(read_evaluations(evaluations)["unstable"].sum()),
            metrics=read_metrics(folder / "metrics.csv"),
            config=config,
            events=read_events(folder / "metrics.csv"),
        )
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        path = folder / "config.json"
        raise UserError(f"{path} is not what run.py writes ({type(error).__name__}: {error}); move it away") from error


def _task(env_name: str, dataset: Mapping[str, Any]) -> str:
    """The task's name; for a Minari set its id, whatever `--env_name` says."""
    source = str(dataset.get("source", ""))
    return source.removeprefix("minari:") if source.startswith("minari:") else env_name


def _changed(algo: str, env_name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that differ from the task's own, and run options that change what a score means."""
    try:
        own = {name: value for name, (value, _) in hyperparameters.explain(algo, env_name).items()}
    except ValueError:  # an algorithm or task that these tables do not know: what the command line gave
        own = {name: config["settings"][name] for name, o in config["origins"].items() if o != "command line"}
    settings = {k: v for k, v in config["settings"].items() if k not in LENGTH and v != own.get(k)}
    run = config["run"]
    options = {k: run[k] for k, usual in RUN_OPTIONS.items() if run.get(k, usual) != usual}
    return settings | options


# --- Grouping -------------------------------------------------------------------------------------------


def group(runs: Sequence[SeedRun], by: Sequence[str] = ()) -> list[Cell]:
    """Seeds of the same data, task, method and number of steps together, in the paper's order of tasks.

    `by`: settings whose value is part of the method's name, where the method has them, also where it is the task's
    own. Raises UserError where a seed occurs twice, or no run has such a setting.
    """
    for name in by:
        if not any(name in run.settings for run in runs):
            raise UserError(f"none of the runs has a setting {name!r} to tell methods apart by")
    found: dict[tuple[Any, ...], list[SeedRun]] = {}
    for run in runs:
        found.setdefault((run.label, run.env_name, _method(run, by), run.total_steps), []).append(run)
    cells = []
    for (label, env_name, method, total_steps), members in found.items():
        members.sort(key=lambda run: run.seed)
        for one, other in itertools.pairwise(members):
            if one.seed == other.seed:
                raise UserError(f"seed {one.seed} of {method} on {env_name} is in {one.folder} and {other.folder}; "
                                "name one of them")  # fmt: skip
        members = _cut(members)
        first = members[0]
        cells.append(Cell(label, env_name, first.algo, method, first.changed, total_steps, members, _remarks(members)))
    tasks = order_tasks({cell.env_name for cell in cells})
    return sorted(cells, key=lambda c: (c.label, tasks.index(c.env_name), c.algo, _natural(c.method), c.total_steps))


def _cut(runs: list[SeedRun]) -> list[SeedRun]:
    """The seeds up to the last step that all of them reached: a no-op for complete runs."""
    reached = min(int(run.steps[-1]) for run in runs)
    cut = []
    for run in runs:
        kept = int((run.steps <= reached).sum())
        if not kept:
            raise UserError(f"{run.folder} has no evaluation up to step {reached:,}, which another seed stopped at")
        cut.append(dataclasses.replace(run, steps=run.steps[:kept], episodes=run.episodes[:kept]))
    return cut


def _method(run: SeedRun, by: Sequence[str]) -> str:
    """The algorithm and what sets this run apart: `diffcps diffusion_steps=15`."""
    parts = [f"{name}={plain(run.settings[name])}" for name in by if name in run.settings]
    parts += [f"{name}={plain(value)}" for name, value in sorted(run.changed.items()) if name not in by]
    return " ".join([run.algo, *parts])


def plain(value: Any) -> str:
    """A setting's value as names and tables show it: 1.0 as 1."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _natural(text: str) -> tuple[tuple[int, float, str], ...]:
    """A key that puts T=5 before T=15."""
    parts = []
    for word in text.replace("=", " ").split():
        try:
            parts.append((0, float(word), ""))
        except ValueError:
            parts.append((1, 0.0, word))
    return tuple(parts)


def _remarks(runs: Sequence[SeedRun]) -> tuple[str, ...]:
    """In what else the seeds of one cell differ, and what a reader should know of them."""
    checked = {name: [run.settings.get(name) for run in runs] for name in LENGTH}
    checked["data (SHA-256)"] = [str(run.config["dataset"].get("sha256", "none"))[:12] for run in runs]
    checked["commit"] = [str(run.config.get("git_commit"))[:12] for run in runs]
    remarks = [
        f"seeds differ in {name}: {', '.join(dict.fromkeys(map(str, values)))}"
        for name, values in checked.items()
        if len(set(map(str, values))) > 1
    ]
    if unstable := sum(run.unstable for run in runs):
        remarks.append(f"{unstable} episodes ended in an unstable simulation")
    for event, what in ((STOPPED, "stopped, its numbers not finite"), (RUNAWAY, "had Q values that ran away")):
        met = [run for run in runs if any(text.startswith(event) for _, text in run.events)]
        if met:
            remarks.append(f"{len(met)} of {len(runs)} seeds {what} (seed {', '.join(str(r.seed) for r in met)})")
    return tuple(remarks)


def order_tasks(names: Iterable[str]) -> list[str]:
    """The paper's tasks in its order, then the others by name."""
    names = set(names)
    paper = [name for name in hyperparameters.PAPER_TASKS if name in names]
    return paper + sorted(names - set(paper))
