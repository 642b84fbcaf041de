"""What every experiment shares: which runs it has, `plan`, `run` and `show`.

    python -m experiments.table1 plan --dataset local --scale 0.01
    python -m experiments.table1 run  --dataset local --scale 0.01
    python -m experiments.table1 show --dataset local --scale 0.01 --html report.html

The three take the same options, so that they speak of the same runs. Runs lie in
DIR/<experiment>/<data>/<variant>/<algo>/<env_name>/seed_<k>; run.py makes everything below <variant>.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

import hyperparameters
from agents import AGENTS
from experiments.study.data import data_name, missing_data, prepare_data
from experiments.study.planned_run import How, PlannedRun, continue_run, is_evaluated, scaled, share_done, shortened
from experiments.study.speed import Speeds, shown
from utils.errors import UserError
from utils.options import Parser, command_line, parse_seeds, resolve_device
from utils.report.build import SELECTIONS, Report, make_report, save
from utils.report.runs import Labels
from utils.report.tables import Choice, Table
from utils.runs.log import write_json
from utils.sweep import Function, Job, Outcome, Resources, available, run_jobs

DURATIONS = "seconds.json"


@dataclass(frozen=True)
class Experiment:
    """An artefact: a grid of runs, and what is shown of them beside the usual report.

    folder: where its runs lie; two artefacts with one folder share their runs. grid: values of the settings that are
    compared. variants: sets of settings that are compared of an algorithm, instead of the grid. job: the function that
    runs one command line, run.py's by default. extra: tables of its own, made of the report and the origin of its data.
    by: settings that tell its methods apart. evaluated: the folders with the evaluations that are shown, for a trained
    seed's folder: that folder by default. max_steps: gradient steps of each run, if fewer than its schedule has.
    evaluations: `eval_interval` and `eval_episodes` that are not the tasks' own. task_by_task: all algorithms on a task
    before the next task. dataset: None where the user has to name it. labels: names for its data, as `--label` takes
    them, where the user gives none; made of the folders that are shown. compared: `show` sets its methods side by side
    instead of printing all tables.
    """

    folder: str
    about: str
    tasks: Sequence[str]
    seeds: str
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    variants: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    algos: Sequence[str] = ("diffcps",)
    job: Function | None = None
    extra: Callable[[Report, str], Sequence[Table]] | None = None
    by: Sequence[str] = ()
    evaluated: Callable[[Path], Sequence[Path]] = lambda trained: [trained]
    max_steps: int | None = None
    evaluations: Mapping[str, int] = field(default_factory=dict)
    task_by_task: bool = False
    dataset: str | None = "d4rl"
    labels: Callable[[Sequence[Path]], Sequence[str]] = lambda folders: ()
    compared: bool = False

    def runs(self, options: argparse.Namespace) -> list[PlannedRun]:
        """All runs that the options ask for, but for tasks that an algorithm has no settings for. Raises ValueError for
        a variant that there is not."""
        names = list(self.grid)
        grid = [dict(zip(names, values, strict=True)) for values in itertools.product(*self.grid.values())]
        seeds = tuple(parse_seeds(options.seeds))
        groups = [(seed,) for seed in seeds] if options.split_seeds else [seeds]
        pairs = [(algo, task) for algo in options.algos for task in options.tasks]
        if self.task_by_task:
            pairs.sort(key=lambda pair: options.tasks.index(pair[1]))
        runs = [
            PlannedRun(algo, task, group, variant, *lengths_of(algo, task, options))
            for algo, task in pairs
            if hyperparameters.runs_on(algo, task)
            for variant in self.variants.get(algo, grid)
            for group in groups
        ]
        return named(runs, options.variants) if options.variants else runs


def named(runs: Sequence[PlannedRun], variants: Sequence[str]) -> list[PlannedRun]:
    """Those of these variants. Raises ValueError for one that none of them is."""
    known = list(dict.fromkeys(run.variant for run in runs))
    for variant in variants:
        if variant not in known:
            raise ValueError(f"--variants {variant}: there is no such variant here, only {' '.join(known)}")
    return [run for run in runs if run.variant in variants]


def lengths_of(algo: str, env_name: str, options: argparse.Namespace) -> tuple[dict[str, Any], int | None]:
    """A run's settings of length and evaluation, and where it ends before its schedule does, as the options say."""
    given = {name: getattr(options, name) for name in ("eval_interval", "eval_episodes")}
    evaluations = {name: value for name, value in given.items() if value is not None}
    if options.max_steps is None:
        return scaled(algo, env_name, options.scale) | evaluations, None
    return shortened(algo, env_name, options.scale, options.max_steps, evaluations)


# --- plan, run, show ------------------------------------------------------------------------------------


@contextmanager
def cores_shared(workers: int) -> Iterator[None]:
    """Let each of so many runs at once take its share of this machine's cores at most, where nobody said how many.

    A run with `--threads` has what it says; `auto` times numbers up to this one, and a resumed run keeps its own.
    """
    name, before = "OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS")
    if workers < 2 or before:
        yield
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ[name] = str(max(1, cores // workers))
    try:
        yield
    finally:
        del os.environ[name]


class Study:
    """An experiment with the options of one command line; `command` is that line, for the page."""

    def __init__(self, experiment: Experiment, options: argparse.Namespace, command: str = "") -> None:
        self.experiment, self.options, self.command = experiment, options, command
        self.base = Path(options.dir).resolve() / experiment.folder / data_name(options.dataset or "", options.scale)
        try:
            self.runs = experiment.runs(options)
            for run in self.runs:
                # An unknown task or setting, or nothing to evaluate, is said before anything starts.
                _ = run.config, [experiment.evaluated(folder) for folder in run.folders(self.base)]
        except ValueError as error:
            raise UserError(str(error)) from error

    def done(self, run: PlannedRun) -> float:
        """Share of a training's gradient steps that is done; below 1 while an evaluation is missing."""
        trained = run.folders(self.base)
        share = statistics.mean(share_done(folder, run.steps) for folder in trained)
        if share < 1 or all(is_evaluated(f, run.steps) for t in trained for f in self.experiment.evaluated(t)):
            return share
        return 0.99

    def plan(self) -> None:
        """List the runs, what is done, and the time that is left at measured speeds."""
        missing = missing_data(self.options.dataset, [run.env_name for run in self.runs])
        speeds = Speeds(Path(self.options.dir), self.options.device, self.options.measure)
        took, rows = self.durations(), []
        left, unknown, trained, spent = 0.0, 0, 0.0, 0.0  # hours; the last two of the runs that are done
        for run in tqdm(self.runs, desc="timing", unit="run", leave=False, disable=None if speeds.measure else True):
            share, hours = self.done(run), None
            rate, source = speeds.get(run.algo, run.env_name, run.config, len(run.seeds))
            if rate is not None:
                each = speeds.evaluation(run.algo, run.env_name, run.config, len(run.seeds)) or 0.0
                hours = (run.updates / rate + run.evaluations * each) / 3600
            if share == 1 and hours is not None and run.name in took:
                trained, spent = trained + hours, spent + took[run.name] / 3600
            state = "no data" if run.env_name in missing else "done" if share == 1 else f"{100 * share:.0f} %"
            is_open = state not in ("no data", "done")
            unknown += is_open and hours is None
            left += (1 - share) * hours if is_open and hours is not None else 0.0
            rows.append([run.name, f"{run.steps:,}", state, shown(rate) if rate else "?",
                         f"{hours:.2f}" if hours is not None else "?", source])  # fmt: skip
        print(_text_table(["run", "gradient steps", "state", "steps/s", "training hours", "speed from"], rows))
        for reason in missing.values():
            print(f"left out: {reason}")
        for algo, run in {run.algo: run for run in reversed(self.runs)}.items():
            if cost := run.acting_cost():
                print(f"{algo}, {run.env_name}: {cost}")
        known = " for the runs of known speed" if unknown else ""
        what = "training and evaluating" if speeds.measure else "training"
        print(f"{len(rows)} runs, {left:.2f} hours of {what} left{known}, one run after the other")
        if unknown:
            print(f"{unknown} runs of unknown speed: --measure times some steps of each kind")
        if trained and not speeds.measure:
            factor = spent / trained
            print(f"with start and evaluations the runs that are done took {factor:.1f} times their training: about "
                  f"{factor * left:.2f} hours left")  # fmt: skip
        print(f"results in {self.base}")

    def durations(self) -> dict[str, float]:
        """Seconds that each run has taken so far, all sweeps together."""
        path = self.base / "logs" / DURATIONS
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def run(self) -> int:
        """Train what is not complete; 0 if all of it is then."""
        ray = available(self.options.ray)  # said before any set is collected
        open_runs = [run for run in self.runs if self.done(run) < 1]
        options = self.options
        missing = prepare_data(options.dataset, options.local_size, [run.env_name for run in open_runs])
        for reason in missing.values():
            print(f"left out: {reason}", file=sys.stderr)
        runs = {run.name: run for run in self.runs if run.env_name not in missing}
        logs, how = self.base / "logs", How.of(options)
        jobs = [
            Job(name, run.command(self.base, how), logs / f"{name.replace('/', '.')}.txt") for name, run in runs.items()
        ]
        resources = Resources(options.cpus_per_run, gpus_per_run(options), options.workers)
        with cores_shared(options.workers):
            outcomes = run_jobs(jobs, self.experiment.job or continue_run, lambda job: self.done(runs[job.name]),
                                ray, resources, options.retries)  # fmt: skip
        took = self.durations()
        took |= {name: took.get(name, 0.0) + outcome.seconds for name, outcome in outcomes.items() if outcome.attempts}
        logs.mkdir(parents=True, exist_ok=True)
        write_json(logs / DURATIONS, took)
        return self.summarise(outcomes)

    def summarise(self, outcomes: Mapping[str, Outcome]) -> int:
        """A line for the whole, and the exit code: 130 when stopped, 1 when something failed."""
        states = [outcome.state for outcome in outcomes.values()]
        print(f"{states.count('done')} of {len(states)} runs done, {states.count('failed')} failed, "
              f"{states.count('stopped')} to be continued; results in {self.base}")  # fmt: skip
        return 130 if "stopped" in states else int("failed" in states)

    def show(self) -> None:
        """Tables on the screen, files where asked for."""
        options = self.options
        choice = Choice(SELECTIONS[options.model_selection])
        folders = options.kept or self._evaluations()
        by = settings_of(self.experiment.by, options.algos)
        labels = Labels.parse(options.label or self.experiment.labels(folders))
        asked = {"task": options.tasks, "algorithm": options.algos, "seed": map(str, parse_seeds(options.seeds))}
        only = [f"{name}={','.join(values)}" for name, values in asked.items()] if options.kept else []
        report = make_report(folders, labels, choice, by, options.partial, self.experiment.extra, only,
                             self.experiment.compared)  # fmt: skip
        for line in report.warnings:
            print(f"note: {line}", file=sys.stderr)
        done = save(report, options.out, options.html, title=self.experiment.about, command=self.command)
        print("\n".join(report.shown()))
        print("\n".join(done))

    def _evaluations(self) -> list[Path]:
        """Folders of evaluations of the planned runs, as far as they are there. Raises UserError where none is."""
        trained = [folder for run in self.runs for folder in run.folders(self.base)]
        folders = [folder for one in trained for folder in self.experiment.evaluated(one) if folder.is_dir()]
        if not folders:
            raise UserError(f"nothing was run yet in {self.base}; begin with: run")
        return folders


def settings_of(names: Sequence[str], algos: Iterable[str]) -> list[str]:
    """Those of the settings that some of the algorithms have."""
    configs = [hyperparameters.CONFIGS[algo] for algo in algos]
    return [name for name in names if any(name in {f.name for f in fields(config)} for config in configs)]


def gpus_per_run(options: argparse.Namespace) -> float:
    """The share of a GPU that one run takes on Ray: what was asked for, else one where runs use CUDA."""
    if options.gpus_per_run is not None:
        return options.gpus_per_run
    return float(options.device != "cpu" and resolve_device("auto").type == "cuda")


def _text_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in (columns, *rows))


# --- Command line ---------------------------------------------------------------------------------------


def build_parser(experiment: Experiment, name: str) -> Parser:
    """The options of an experiment."""
    parser = Parser(prog=f"python -m experiments.{name}", description=experiment.about, allow_abbrev=False)
    parser.add_argument("action", choices=("plan", "run", "show"), help="list the runs, train them, or show them")
    which = parser.add_argument_group("which runs").add_argument
    default = f" (default: {experiment.dataset})" if experiment.dataset else ""
    which("--dataset", default=experiment.dataset, help=f"d4rl, local, or a folder of HDF5 files{default}")
    which("--local_size", type=int, default=100_000, help="transitions of --dataset local (%(default)s)")
    which("--scale", type=float, default=1.0, help="share of the gradient steps: 0.01 is a rehearsal of everything")
    which("--max_steps", type=int, default=experiment.max_steps, metavar="N",
          help="gradient steps of each run, its schedule as long as ever; more let finished runs go on "
               f"(default: {experiment.max_steps or 'the whole schedule'})")  # fmt: skip
    for setting, text in (("eval_interval", "epochs between evaluations"), ("eval_episodes", "episodes each")):
        default = experiment.evaluations.get(setting)
        which(
            f"--{setting}", type=int, default=default, metavar="N", help=f"{text} (default: {default or 'published'})"
        )
    which("--seeds", default=experiment.seeds, help="0-4 or 0,3,7 (default: %(default)s)")
    which("--algos", nargs="+", default=list(experiment.algos), choices=list(AGENTS), metavar="ALGO",
          help=f"of {', '.join(AGENTS)} (default: {' '.join(experiment.algos)})")  # fmt: skip
    which("--tasks", nargs="+", default=list(experiment.tasks), metavar="TASK", help="(default: the artefact's)")
    which("--variants", nargs="+", metavar="NAME",
          help="of the settings that are compared those alone, named as in plan: the first part of a run's name "
               "(default: all)")  # fmt: skip
    which("--dir", default="results/runs", help="folder for the results (default: %(default)s)")
    how = parser.add_argument_group("how to run them").add_argument
    how("--device", default="auto", help="as for run.py (default: %(default)s)")
    how("--execution", default="auto", help="as for run.py (default: %(default)s)")
    how("--eval_seeds", default="published", choices=("published", "fresh"), help="as for run.py")
    how("--precision", default="float32", choices=("float32", "tf32", "bfloat16"), help="as for run.py (%(default)s)")
    how("--threads", type=int, help="CPU threads of a run")
    how("--split_seeds", action="store_true", help="a run per seed, instead of all seeds in one process")
    how("--ray", metavar="ADDRESS", help="run on Ray: local, or the address of a cluster (default: without Ray)")
    how("--workers", type=int, default=0,
        help="runs at once on this machine (default: one; with --ray local as many as the CPUs hold)")  # fmt: skip
    how("--cpus_per_run", type=float, default=1.0, help="with --ray (default: %(default)s)")
    how(
        "--gpus_per_run", type=float, help="with --ray: 0.25 lets four runs share a GPU (default: 1 where runs use one)"
    )
    how("--retries", type=int, default=2, help="new attempts for a run that died (default: %(default)s)")
    how("--measure", action="store_true", help="plan: time runs whose speed is unknown, on this machine")
    shown = parser.add_argument_group("how to show them").add_argument
    shown("--kept", nargs="+", type=Path, metavar="DIR",
          help="show the runs of these tasks, algorithms and seeds in exports or folders, such as results/rebuilt, "
               "and none of --dir")  # fmt: skip
    shown("--label", action="append", default=[], metavar="NAME=PREFIX", help="as for python -m utils.report")
    shown("--model_selection", choices=SELECTIONS, default="none", help="as for python -m utils.report")
    shown("--partial", action="store_true", help="include unfinished runs")
    shown("--out", type=Path, metavar="DIR", help="write DIR/tables and DIR/figures")
    shown("--html", type=Path, metavar="FILE", help="write one self-contained page")
    return parser


def main(experiment: Experiment, name: str, argv: Sequence[str]) -> int:
    """Run a command line; 2 for what the user can fix."""

    def act() -> int | None:
        command = shlex.join(["python", "-m", f"experiments.{name}", *argv])
        parser = build_parser(experiment, name)
        options = parser.parse_args(argv)
        if options.kept and options.action != "show":
            parser.error("--kept goes with show")
        if options.kept and options.variants:
            parser.error("--variants goes with planned runs, not with --kept")
        if options.dataset is None and not options.kept:
            parser.error("the following arguments are required: --dataset")
        return getattr(Study(experiment, options, command), options.action)()

    return command_line(f"experiments.{name}", act)


def main_of(protocols: Mapping[str, Experiment], name: str, argv: Sequence[str]) -> int:
    """Run a command line: that of every experiment, of the one that `--protocol` names, the first by default."""
    first = Parser(prog=f"python -m experiments.{name}", add_help=False, allow_abbrev=False)
    first.add_argument("--protocol", default=next(iter(protocols)), choices=protocols)
    options, rest = first.parse_known_args(argv)
    return main(protocols[options.protocol], f"{name} --protocol {options.protocol}", rest)
