"""What runs left, read: one `SeedRun` per seed, one `Cell` for the seeds of the same thing, one frame of all episodes.

In a notebook:

    from utils.report.runs import read_runs
    frame = read_runs(["results"])  # a row per episode
    frame[frame.step == frame.steps].groupby(["data", "task", "method", "seed"]).score.mean()
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import hyperparameters
from utils.errors import UserError
from utils.report.kept import NUMBERS, RUNS, read_kept
from utils.runs.columns import RUNAWAY, STOPPED
from utils.runs.constraint import Constraint, constraint_lines
from utils.runs.played import played_rows
from utils.runs.reading import read_config, read_evaluations, read_events, read_metrics

# How long and how often, not what: these do not make another method.
LENGTH = ("pretrain_epochs", "num_epochs", "num_steps_per_epoch", "eval_interval", "eval_episodes")
# Run options beside the settings that change what a score means, with the value that needs no mention.
RUN_OPTIONS = {"eval_seeds": "published", "backend": "mujoco", "precision": "float32", "load_published": None}
# What is compared with the data alone: the denoising loss, or a Gaussian policy's negative log-likelihood of the data's
# actions, under the name that the algorithm's metrics give it.
LOSSES = ("bc_loss", "kl_loss")


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

    place: its folder, or the export and the run's number there. named: below which of the places that were named it
    was found, 0 the first. changed: settings other than the task's own, without
    those of `LENGTH`. total_steps: what the run was asked for. episodes: a row per episode with `step`, `episode`,
    `return`, `score` (normalised, in percent), `length`, `unstable` and `loss`, the mean loss on the data's actions
    since the evaluation before (NaN without one). metrics: columns of `metrics.csv` (`step` among them), NaN where
    empty; none in an export of earlier versions. events: what happened at which step (`faults`). kept: an export's
    rows of `played.csv`; None: they are in the run's folder.
    """

    place: str
    algo: str
    env_name: str
    seed: int
    label: str
    changed: Mapping[str, Any]
    total_steps: int
    episodes: pd.DataFrame
    config: Mapping[str, Any]
    metrics: Mapping[str, np.ndarray] = field(default_factory=dict)
    events: Sequence[tuple[int, str]] = ()
    named: int = 0
    kept: Sequence[Mapping[str, str]] | None = None

    @cached_property
    def played(self) -> Sequence[Mapping[str, str]]:
        """`PLAYED_COLUMNS` of the episodes that `play.py` added. Raises UserError for a file that it did not write."""
        return played_rows(Path(self.place)) if self.kept is None else self.kept

    @property
    def steps(self) -> np.ndarray:
        """Steps of the evaluations [E], rising."""
        return np.unique(self.episodes["step"])

    @property
    def last_scores(self) -> np.ndarray:
        """Score of each episode of the last evaluation."""
        return self.episodes.loc[self.episodes["step"] == self.steps[-1], "score"].to_numpy()

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
    """Seeds of the same method on the same task and data: what one mean is made of.

    told: settings that the method's name tells: what was changed, and those that a report is made `by`. copy: "(2)"
    where a seed of the same method lies below a place that was named before.
    """

    label: str
    env_name: str
    algo: str
    method: str
    changed: Mapping[str, Any]
    total_steps: int
    runs: Sequence[SeedRun]
    remarks: Sequence[str] = ()
    told: Mapping[str, Any] = field(default_factory=dict)
    copy: str = ""

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]

    @property
    def published(self) -> bool:
        """Whether the settings are the task's own, in whatever precision: what the papers' figures stand beside."""
        return not set(self.changed) - {"precision"}

    @property
    def reached(self) -> int:
        """The step of the last evaluation that all seeds have."""
        return min(int(run.steps[-1]) for run in self.runs)

    @property
    def whole(self) -> bool:
        """Whether that is the length of the task's own settings."""
        return self.own_steps is not None and self.reached >= self.own_steps

    @property
    def own_steps(self) -> int | None:
        """Gradient steps of the task's own settings; None for a task or an algorithm that has none."""
        try:
            config = hyperparameters.get(self.algo, self.env_name)
        except ValueError:
            return None
        return config.num_epochs * config.num_steps_per_epoch

    def frame(self) -> pd.DataFrame:
        """All episodes of all seeds, with `run` the seed and `top_k` its own rank for the offline selection."""
        return pd.concat(
            [run.episodes.assign(run=run.seed, top_k=run.settings.get("top_k", 0)) for run in self.runs],
            ignore_index=True,
        )


# --- Reading --------------------------------------------------------------------------------------------


def read_runs(places: Iterable[Path | str], labels: Labels | None = None, by: Sequence[str] = ()) -> pd.DataFrame:
    """Every run at or below `places` as one frame, a row per episode.

    Columns: data, task, algorithm, method (the algorithm and what was changed), steps (that the run was asked for),
    seed, run (its number), step, episode, return, score (normalised, in percent), length, unstable, loss (mean loss on
    the data's actions since the evaluation before), top_k (the run's rank for the offline selection). A run that cannot
    be read costs a warning. Raises UserError where there is none.
    """
    runs, notes = find_runs([Path(place) for place in places], labels or Labels())
    for note in notes:
        warnings.warn(note, stacklevel=2)
    frames = [
        run.episodes.assign(data=run.label, task=run.env_name, algorithm=run.algo, method=method_name(run, by),
                            steps=run.total_steps, seed=run.seed, run=number, top_k=run.settings.get("top_k", 0))
        for number, run in enumerate(runs)
    ]  # fmt: skip
    names = ["data", "task", "algorithm", "method", "steps", "seed", "run"]
    return pd.concat(frames, ignore_index=True)[[*names, *list(NUMBERS)[1:], "top_k"]]


def find_runs(places: Iterable[Path], labels: Labels) -> tuple[list[SeedRun], list[str]]:
    """Every run at or below `places`, in path order, and a line for each that cannot be read.

    A folder that holds an export is that export and nothing else. Raises UserError where no run can be read.
    """
    found: dict[Path, int] = {}
    for number, place in enumerate(places):
        if not place.is_dir():
            raise UserError(f"no folder {place}; name the folder that run.py was given as --dir, or an export")
        if (place / RUNS).exists():
            found.setdefault(place.resolve(), number)
            continue
        for path in sorted([*place.rglob("config.json"), *place.rglob(RUNS)]):
            if path.name == RUNS or (path.parent / "evaluations.csv").exists():
                found.setdefault(path.parent.resolve(), number)
    runs: list[SeedRun] = []
    notes: list[str] = []
    for folder, number in found.items():
        try:
            if (folder / RUNS).exists():
                read, faults = read_export(folder, labels)
                notes += faults
            else:
                read = [read_run(folder, labels)]
            runs += [dataclasses.replace(run, named=number) for run in read]
        except UserError as error:
            notes.append(f"left out: {error}")
    if not runs:
        where = ", ".join(map(str, places))
        raise UserError("; ".join(notes) or f"no run below {where} (a run leaves config.json and evaluations.csv)")
    return runs, notes


def read_run(folder: Path, labels: Labels) -> SeedRun:
    """Read one seed's folder. Raises UserError naming the damaged file."""
    evaluations, metrics = folder / "evaluations.csv", folder / "metrics.csv"
    for path in (folder / "config.json", evaluations, metrics):
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise UserError(f"{path} is not a file; move it away")
    config = read_config(folder)
    try:
        columns, metric = read_evaluations(evaluations), read_metrics(metrics)
    except OverflowError as error:
        raise UserError(f"{evaluations} or {metrics.name} holds a number without end ({error})") from error
    frame = pd.DataFrame({"score" if name == "normalized_score" else name: x for name, x in columns.items()})
    for name in NUMBERS:
        if name not in ("run", *frame):
            frame[name] = np.nan if name == "return" else 0
    frame = frame.assign(loss=_losses(frame["step"], metric)).sort_values("step", kind="stable", ignore_index=True)
    return _seed_run(str(folder), config, frame, labels, metric, read_events(metrics))


def read_export(folder: Path, labels: Labels) -> tuple[list[SeedRun], list[str]]:
    """The runs of an export, and a line for each that cannot be read. Raises UserError for damaged tables."""
    runs, notes = [], []
    kept = read_kept(folder)
    for number, line in enumerate(kept.lines):
        place = f"{folder / RUNS}, line {number + 1}"
        try:
            config = json.loads(line)
            events, metrics = config.pop("events", []), kept.metrics_of(number)
            run = _seed_run(place, config, kept.episodes_of(number), labels, metrics, events)
            runs.append(dataclasses.replace(run, kept=kept.played_of(number)))
        except (UserError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            notes.append(f"left out: {place}: {error}")
    return runs, notes


def _seed_run(
    place: str,
    config: dict[str, Any],
    episodes: pd.DataFrame,
    labels: Labels,
    metrics: Mapping[str, np.ndarray],
    events: Sequence[tuple[int, str]],
) -> SeedRun:
    """A run of what its files hold. Raises UserError where run.py has not written that."""
    try:
        _check(config, episodes)
        settings, run, dataset = config["settings"], config["run"], config["dataset"]
        source, schedule = str(dataset.get("source", "")), settings["num_epochs"] * settings["num_steps_per_epoch"]
        return SeedRun(
            place=place,
            algo=run["algo"],
            # For a Minari set its id, whatever --env_name says.
            env_name=source.removeprefix("minari:") if source.startswith("minari:") else run["env_name"],
            seed=config["seed"],
            label=labels.of(dataset),
            changed=_changed(run["algo"], run["env_name"], config),
            total_steps=min(schedule, run.get("max_steps") or schedule),
            episodes=episodes,
            config=config,
            metrics=metrics,
            events=[(int(step), str(text)) for step, text in events],
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{place} is not what run.py writes ({type(error).__name__}: {error}); move it away") from error


LARGEST, FURTHEST = 1e6, 10**12  # a normalised score in percent, and a step: no run goes beyond


def _check(config: Mapping[str, Any], episodes: pd.DataFrame) -> None:
    """Raises ValueError, KeyError or TypeError for what no run has written: all that passes can be shown."""
    for name, part in config.items():
        for key, value in part.items() if isinstance(part, dict) else [("", part)]:
            values = value if isinstance(value, list) else [value]
            text, longest = f"{key}{values}" if len(values) < 100 else "", 300 if name == "settings" else 4096
            if not all(isinstance(x, str | int | float | None) for x in values) or not 0 < len(text) <= longest:
                raise ValueError(f"{name} {str(key)[:40]} is no plain value")
            if any(min(str(x).encode(), default=32) < 32 for x in (key, *values)):  # encode: no half characters either
                raise ValueError(f"{name} {str(key)[:40]!r} has control characters")
    settings, run = config["settings"], config["run"]
    counts = [config["seed"], settings["num_epochs"], settings["num_steps_per_epoch"], settings.get("top_k", 0)]
    counts += [run["max_steps"]] if run.get("max_steps") is not None else []
    if any(type(count) is not int or not 0 <= count <= FURTHEST for count in counts):
        raise ValueError(f"seed, num_epochs, num_steps_per_epoch, top_k or max_steps is no count: {counts}")
    if not isinstance(config.get("origins", {}), dict):
        raise TypeError("origins is no object")
    if not all(isinstance(run[name], str) for name in ("algo", "env_name")):
        raise TypeError("algo and env_name are no names")
    if not all(len(str(name)) <= 300 for name in (run["algo"], run["env_name"], config["dataset"].get("label"))):
        raise ValueError("a name has more than 300 letters")
    if not all(isinstance(text, str) for text in run.get("load_published") or ()):
        raise TypeError("load_published is no list of names")
    if not isinstance(settings.get("kappa", 0.0), int | float) and settings["kappa"] != hyperparameters.AUTO:
        raise TypeError("kappa is neither a number nor auto")
    if not episodes["step"].between(0, FURTHEST).all() or (episodes["score"].abs() > LARGEST).any():
        raise ValueError("a step or a score is beyond all bounds")


def _losses(steps: pd.Series, metrics: Mapping[str, np.ndarray]) -> np.ndarray:
    """For each row's step, the mean loss on the data's actions since the evaluation before; NaN without one."""
    name = next((name for name in LOSSES if name in metrics), None)
    found = dict.fromkeys(steps, np.nan)
    for start, stop in itertools.pairwise([0, *sorted(found)]):
        if name is not None:
            between = (metrics["step"] > start) & (metrics["step"] <= stop) & np.isfinite(metrics[name])
            found[stop] = float(metrics[name][between].mean()) if between.any() else np.nan
    return steps.map(found).to_numpy(np.float64)


def _changed(algo: str, env_name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that differ from the task's own, and run options that change what a score means.

    Those that follow from a preset (`--kappa auto`) are not named beside it.
    """
    try:
        own = {name: value for name, (value, _) in hyperparameters.explain(algo, env_name).items()}
        chosen = {k: v for k, v in config["settings"].items() if k in hyperparameters.PRESETS.get(algo, {})}
        chosen = {name: value for name, value in chosen.items() if value != own[name]}
        own |= {name: value for name, (value, _) in hyperparameters.explain(algo, env_name, chosen).items()
                if name not in chosen}  # fmt: skip
    except ValueError:  # an algorithm or task that these tables do not know: what the command line gave
        given = config.get("origins", {})
        own = {name: value for name, value in config["settings"].items() if given.get(name) != "command line"}
    settings = {k: v for k, v in config["settings"].items() if k not in LENGTH and v != own.get(k)}
    run = config["run"]
    options = {k: run[k] for k, usual in RUN_OPTIONS.items() if run.get(k, usual) != usual}
    return settings | options


# --- Grouping -------------------------------------------------------------------------------------------


def group(runs: Sequence[SeedRun], by: Sequence[str] = ()) -> list[Cell]:
    """Seeds of the same data, task, method and number of steps together, in the paper's order of tasks.

    `by`: settings whose value is part of the method's name, where the method has them, also where it is the task's
    own. The same seeds below two places that were named apart are two methods, `diffcps` and `diffcps (2)`. Raises
    UserError where a seed occurs twice below one place, or no run has such a setting.
    """
    for name in by:
        if not any(name in run.settings for run in runs):
            raise UserError(f"none of the runs has a setting {name!r} to tell methods apart by")
    found: dict[tuple[str, str, str, int], list[SeedRun]] = {}
    for run in runs:
        found.setdefault((run.label, run.env_name, method_name(run, by), run.total_steps), []).append(run)
    cells = []
    for (label, env_name, method, total_steps), together in found.items():
        for copy, members in _apart(together):
            for one, other in itertools.pairwise(members):
                if one.seed == other.seed:
                    raise UserError(f"seed {one.seed} of {method} on {env_name} is in {one.place} and {other.place}; "
                                    "name one of them")  # fmt: skip
            first, *_ = members = _cut(members)
            told = {name: first.settings[name] for name in by if name in first.settings} | dict(first.changed)
            name = f"{method} {copy}" if copy else method
            cells.append(Cell(label, env_name, first.algo, name, first.changed, total_steps, members,
                              _remarks(members), told, copy))  # fmt: skip
    tasks = order_tasks({cell.env_name for cell in cells})
    return sorted(cells, key=lambda c: (c.label, tasks.index(c.env_name), c.algo, _natural(c.method), c.total_steps))


def _apart(runs: Sequence[SeedRun]) -> list[tuple[str, list[SeedRun]]]:
    """The runs by rising seed, under ""; where a seed occurs twice, those of each named place under "", "(2)", ..."""
    runs = sorted(runs, key=lambda run: run.seed)
    if len({run.seed for run in runs}) == len(runs):
        return [("", runs)]
    places = sorted({run.named for run in runs})
    return [(f"({k})" if k > 1 else "", [run for run in runs if run.named == place])
            for k, place in enumerate(places, 1)]  # fmt: skip


def _cut(runs: list[SeedRun]) -> list[SeedRun]:
    """The seeds up to the last step that all of them reached: a no-op for complete runs."""
    reached = min(int(run.steps[-1]) for run in runs)
    cut = []
    for run in runs:
        kept = run.episodes[run.episodes["step"] <= reached]
        if not len(kept):
            raise UserError(f"{run.place} has no evaluation up to step {reached:,}, which another seed stopped at")
        cut.append(dataclasses.replace(run, episodes=kept))
    return cut


def method_name(run: SeedRun, by: Sequence[str] = ()) -> str:
    """The algorithm and what sets this run apart: `diffcps diffusion_steps=15`."""
    parts = [f"{name}={plain(run.settings[name])}" for name in by if name in run.settings]
    parts += [f"{name}={plain(value)}" for name, value in sorted(run.changed.items()) if name not in by]
    return " ".join([run.algo, *parts])


def plain(value: Any) -> str:
    """A setting's value as names and tables show it: 1.0 as 1, files of weights without their folders."""
    if isinstance(value, list | tuple):
        return ",".join(str(text).rsplit("/", 1)[-1] for text in value)
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
    if unstable := sum(int(run.episodes["unstable"].sum()) for run in runs):
        remarks.append(f"{unstable} episodes ended in an unstable simulation")
    for event, what in ((STOPPED, "stopped, its numbers not finite"), (RUNAWAY, "had Q values that ran away")):
        met = [run for run in runs if any(text.startswith(event) for _, text in run.events)]
        if met:
            remarks.append(f"{len(met)} of {len(runs)} seeds {what} (seed {', '.join(str(r.seed) for r in met)})")
    constraints = {str(run.seed): Constraint.of(run.metrics, run.settings) for run in runs}
    idle = {seed: one for seed, one in constraints.items() if one is not None and one.kind != "binding"}
    remarks += constraint_lines(idle) if len(idle) == len(runs) else [
        f"seed {seed}: {line}" for seed, one in idle.items() for line in constraint_lines({seed: one})
    ]  # fmt: skip
    return tuple(remarks)


def order_tasks(names: Iterable[str]) -> list[str]:
    """The paper's tasks in its order, then the others by name."""
    names = set(names)
    paper = [name for name in hyperparameters.PAPER_TASKS if name in names]
    return paper + sorted(names - set(paper))
