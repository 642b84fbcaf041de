"""Figures 1, 6, 7, 8 and 9: what each method makes of a noisy circle of equally good actions.

    python -m experiments.figure1_toy [--quick] [--bandit gaussians] [--steps 20000] [--help]

Every method is one run of run.py on the bandit (utils/data/bandit.py), five seeds in one process; then each seed's
policy, as it acts at evaluation, is asked for 1,000 actions. Scores, tables and figures are made of those actions'
files. What is complete is not run again: the same command continues after Ctrl-C, and redraws when all is there.

The paper names no steps T for its figures but SfBC's 15; here 5, 10, 15 and 20, its tables' values.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import hyperparameters
from agents import AGENTS
from experiments.study.planned_run import How, PlannedRun, continue_run, is_complete, share_done
from experiments.toy import drawing
from experiments.toy.exact import chain_actions, solver_actions
from experiments.toy.scores import COVERED, KERNEL_WIDTH, NEAR, Scorer
from utils.data import bandit
from utils.errors import UserError
from utils.files import atomic_write
from utils.options import Parser, command_line, parse_seeds, resolve_device, resolve_settings
from utils.options import parse as parse_run
from utils.report.figures import save as save_figure
from utils.report.tables import Table
from utils.runs import checkpoint
from utils.seeding import torch_generators
from utils.sweep import Job, Resources, run_jobs

TASKS = {"circle": "bandit-circle-v0", "gaussians": "bandit-gaussians-v0"}
ALGOS = ("awr", "td3_bc", "bcq", "bear", "sfbc", "diffusion_ql", "diffcps", "diffusion_bc")  # those of the figures
STEPS_T = (5, 10, 15, 20)
STEPS = 20_000
EPOCHS = 20
NUMBER = 1000  # actions per seed; `coverage` depends on it
ACTIONS = "actions.csv"


# --- Runs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """An algorithm, with its number of diffusion steps where the comparison sets one."""

    algo: str
    T: int | None

    @property
    def overrides(self) -> dict[str, Any]:
        return {} if self.T is None else {"diffusion_steps": self.T}


def methods(options: argparse.Namespace) -> list[Method]:
    """What is compared: chains at each T, the others as they are."""
    found = []
    for algo in dict.fromkeys(options.algos):
        has_T = hasattr(hyperparameters.CONFIGS[algo](), "diffusion_steps")
        found += [Method(algo, T) for T in options.T] if has_T else [Method(algo, None)]
    return found


def length(steps: int) -> dict[str, Any]:
    """Settings of a run of so many steps; {} for the tasks' own 20,000. Raises UserError unless a multiple of 20."""
    if steps < EPOCHS or steps % EPOCHS:
        raise UserError(f"--steps must be a multiple of {EPOCHS}, not {steps}")
    return {} if steps == STEPS else {"num_steps_per_epoch": steps // EPOCHS}


class Toy:
    """The runs of one command line."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.task = options, TASKS[options.bandit]
        self.base = Path(options.dir).resolve() / "toy" / f"{options.bandit}-{options.steps}-steps"
        seeds = tuple(parse_seeds(options.seeds))
        self.runs = {
            method: PlannedRun(method.algo, self.task, seeds, method.overrides, length(options.steps))
            for method in methods(options)
        }
        try:
            for training in self.runs.values():
                _ = training.config
        except ValueError as error:
            raise UserError(str(error)) from error

    def done(self, training: PlannedRun) -> float:
        """Share of a run that is done: 1 when all seeds are trained and their actions written."""
        folders = training.folders(self.base)
        share = statistics.mean(share_done(folder, training.steps) for folder in folders)
        return 0.99 if share == 1 and not all((folder / ACTIONS).exists() for folder in folders) else share

    def run(self) -> int:
        """Train what is not complete, the longest first; the exit code."""
        dear = sorted(self.runs, key=lambda method: -(method.T or 0))
        named = {self.runs[method].name: self.runs[method] for method in dear}
        logs, how = self.base / "logs", how_to_run(self.options)
        jobs = [
            Job(name, (*training.command(self.base, how), "--checkpoint_interval", "1"),
                logs / f"{name.replace('/', '.')}.txt")
            for name, training in named.items()
        ]  # fmt: skip
        resources = Resources(workers=self.options.workers)
        outcomes = run_jobs(jobs, train_and_sample, lambda job: self.done(named[job.name]), resources=resources)
        states = [outcome.state for outcome in outcomes.values()]
        print(f"{states.count('done')} of {len(states)} runs done, {states.count('failed')} failed, "
              f"{states.count('stopped')} to be continued; runs in {self.base}")  # fmt: skip
        return 130 if "stopped" in states else int("failed" in states)

    def samples(self) -> dict[Method, dict[int, np.ndarray]]:
        """Actions [1000, 2] by method and seed, of the runs that are complete."""
        return {
            method: {seed: read_actions(folder / ACTIONS)
                     for seed, folder in zip(training.seeds, training.folders(self.base), strict=True)}
            for method, training in self.runs.items()
            if self.done(training) == 1
        }  # fmt: skip


def train_and_sample(command: Sequence[str]) -> int:
    """Train as run.py would, then write each seed's actions; run.py's exit code."""
    if code := continue_run(command):
        return code
    options = parse_run(command, AGENTS)
    config, _ = resolve_settings(options)
    for seed in parse_seeds(options.seeds, options.seed):
        folder = Path(options.dir) / options.algo / options.env_name / f"seed_{seed}"
        if not is_complete(folder, config.num_epochs * config.num_steps_per_epoch):
            raise RuntimeError(f"{folder} was trained and is not complete")
        write_actions(folder / ACTIONS, sample(options, config, seed, folder))
    return 0


def sample(options: argparse.Namespace, config: Any, seed: int, folder: Path) -> np.ndarray:
    """1,000 actions [1000, 2] of a trained seed's policy, as it acts at evaluation."""
    device = resolve_device(options.device)
    task = bandit.find(options.env_name)
    agent = AGENTS[options.algo](1, 2, task.max_action, config, [seed], device)
    agent.load_state_dict(checkpoint.load(folder / "checkpoint.pt")["agent"])
    actions = agent.act(torch.zeros(1, NUMBER, 1, device=device), torch_generators([seed], "toy", device))
    return actions[0].cpu().numpy()


def write_actions(path: Path, actions: np.ndarray) -> None:
    """Columns x, y; whole or not at all."""
    text = io.StringIO()
    np.savetxt(text, actions, fmt="%.9g", delimiter=",", header="x,y", comments="")
    atomic_write(path, text.getvalue())


def read_actions(path: Path) -> np.ndarray:
    """What `write_actions` wrote."""
    return np.loadtxt(path, delimiter=",", skiprows=1)


# --- Scores ---------------------------------------------------------------------------------------------


DATA = Method(drawing.DATA, None)


def fresh_data(task: str, seeds: Sequence[int]) -> dict[int, np.ndarray]:
    """As many actions per seed of the data's distribution, from other random numbers: no method can do better."""
    drawn = {}
    for seed in seeds:
        rng = np.random.default_rng([bandit.DATA_SEED, 1, seed])
        actions, _ = bandit.find(task).make(rng)
        drawn[seed] = rng.permutation(actions)[:NUMBER]
    return drawn


def references(toy: Toy) -> dict[Method, dict[int, np.ndarray]]:
    """What methods are compared with: the data themselves, and for each T the samplers whose network has no error."""
    seeds = parse_seeds(toy.options.seeds)
    exact = {
        Method(name, T): {seed: draw(toy.task, T, NUMBER, seed) for seed in seeds}
        for name, draw in ((drawing.CHAIN, chain_actions), (drawing.SOLVER, solver_actions))
        for T in toy.options.T
    }
    return {DATA: fresh_data(toy.task, seeds), **exact}


def all_scores(task: str, samples: dict[Method, dict[int, np.ndarray]]) -> dict[Method, dict[str, list[float]]]:
    """Each score of each method, a value per seed."""
    scorer, found = Scorer(task), {}
    for method, by_seed in samples.items():
        each = [scorer(actions) for actions in by_seed.values()]
        found[method] = {name: [one[name] for one in each] for name in each[0]}
    return found


def write_scores(path: Path, scores: dict[Method, dict[str, list[float]]], seeds: Sequence[int]) -> None:
    """a row per method and seed; shares from 0 to 1, `reward` in percent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(next(iter(scores.values())))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["method", "T", "seed", *names])
        for method, values in scores.items():
            for k, seed in enumerate(seeds):
                writer.writerow([method.algo, method.T or "", seed, *(f"{values[name][k]:.6g}" for name in names)])


HEADINGS = {
    "reward": "reward, % of best",
    "jaccard": "Jaccard as stated (1e-8), %",
    "precision": f"within {NEAR:g} of the data, %",
    "coverage": f"data covered ({COVERED:g}), %",
    "mmd": "MMD",
    "radius": "mean radius",
    "radius_deviation": "its deviation",
}
PERCENT = ("jaccard", "precision", "coverage")


def table(toy: Toy, scores: dict[Method, dict[str, list[float]]]) -> Table:
    """Mean and deviation over seeds, a row per method."""
    names = [name for name in HEADINGS if name in next(iter(scores.values()))]
    names += [name for name in next(iter(scores.values())) if name not in names]
    rows = [
        [drawing.name(method.algo), str(method.T or "–"), *(_cell(name, values[name]) for name in names)]
        for method, values in scores.items()
    ]
    columns = ["method", "T", *(HEADINGS.get(name, f"{name}, %") for name in names)]
    seeds = len(parse_seeds(toy.options.seeds))
    notes = [
        f"{toy.options.steps:,} gradient steps, {seeds} seeds in one process, {NUMBER:,} actions per seed; ± is the "
        "standard deviation over seeds (of the population, as NumPy's default).",
        "First row: as many actions of the data's own distribution from other random numbers, what no method can do "
        "better than but by chance.",
        "Exact chain: the chain of T steps, as DQL, DiffCPS and diffusion BC draw it, with the best of all noise "
        "networks, which is known in closed form for these data; exact solver: the same for SfBC's. What these lack, "
        "the sampler causes and not the training.",
        "Jaccard as stated: the paper's share of actions at less than 1e-8 from a data point. Samples of a continuous "
        "policy never are, so it says nothing, and the other columns stand in for it.",
        f"MMD: maximum mean discrepancy to the data, Gaussian kernel of width {KERNEL_WIDTH:g}; smaller is nearer.",
    ]
    return Table(f"The toy problem {toy.task}", columns, rows, notes)


def _cell(name: str, values: Sequence[float]) -> str:
    percent = name in PERCENT or name not in HEADINGS
    digits = 1 if percent or name == "reward" else 3
    scaled = np.array(values) * (100 if percent else 1)
    return f"{scaled.mean():.{digits}f} ± {scaled.std():.{digits}f}"


# --- What is left ---------------------------------------------------------------------------------------


def show(toy: Toy) -> Iterator[Path]:
    """Table, scores, points and figures of what is complete; the files written."""
    trained = toy.samples()
    if not trained:
        raise UserError(f"no run is complete in {toy.base}; run without --show first")
    seeds = parse_seeds(toy.options.seeds)
    samples = references(toy) | trained
    scores = all_scores(toy.task, samples)
    out = Path(toy.options.out) if toy.options.out else Path("results") if toy.options.steps == STEPS else toy.base
    name = "toy" if toy.options.bandit == "circle" else f"toy-{toy.options.bandit}"
    write_scores(out / "tables" / f"{name}.csv", scores, seeds)
    yield out / "tables" / f"{name}.csv"
    drawn = drawing.draw(toy.task, {(m.algo, m.T): s[seeds[0]] for m, s in samples.items()},
                             {(m.algo, m.T): values for m, values in scores.items()})  # fmt: skip
    captions = []
    for file, caption, figure in drawn:
        save_figure(figure, out / "figures" / "toy" / file)
        captions.append(f"**{file}** {caption}")
        yield out / "figures" / "toy" / f"{file}.png"
    del samples[DATA]  # scored, not drawn
    yield write_points(out / "figures" / "toy" / f"{toy.options.bandit}-points.csv", samples, seeds[0])
    shown = table(toy, scores).markdown()
    text = shown + f"\nFigures, drawn from seed {seeds[0]}, in `figures/toy/`:\n\n" + "\n\n".join(captions) + "\n"
    (out / "tables" / f"{name}.md").write_text(text, encoding="utf-8")
    print(shown)
    yield out / "tables" / f"{name}.md"


def write_points(path: Path, samples: dict[Method, dict[int, np.ndarray]], seed: int) -> Path:
    """The drawn actions: a row per point."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["method", "T", "seed", "x", "y"])
        for method, by_seed in samples.items():
            writer.writerows([method.algo, method.T or "", seed, f"{x:.3f}", f"{y:.3f}"] for x, y in by_seed[seed])
    return path


# --- Command line ---------------------------------------------------------------------------------------


def how_to_run(options: argparse.Namespace) -> How:
    """What the runs are told beside their settings."""
    return How(device=options.device, execution=options.execution, threads=options.threads)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def build_parser() -> Parser:
    """The options."""
    parser = Parser(prog="python -m experiments.figure1_toy", description="The paper's toy problem.",
                            allow_abbrev=False)  # fmt: skip
    add = parser.add_argument
    add("--bandit", choices=TASKS, default="circle", help="the paper's circle, or Diffusion-QL's four Gaussians")
    add("--quick", action="store_true", help="400 steps, 2 seeds, T = 5 and 20: a rehearsal of everything")
    add("--steps", type=int, help=f"gradient steps, a multiple of {EPOCHS} (default: {STEPS}; --quick: 400)")
    add("--seeds", help="0-4 or 0,3,7 (default: 0-4; --quick: 0-1)")
    add("--T", type=int, nargs="+", help="diffusion steps (default: 5 10 15 20; gaussians: 15; --quick: 5 20)")
    add("--algos", nargs="+", choices=list(AGENTS), metavar="ALGO", default=ALGOS,
        help=f"of {', '.join(AGENTS)} (default: {' '.join(ALGOS)})")  # fmt: skip
    add("--show", action="store_true", help="run nothing: tables and figures of what is complete")
    add("--dir", default="results/runs", help="folder for the runs (default: %(default)s)")
    add("--out", help="folder for tables and figures (default: results; the runs' own for other than 20,000 steps)")
    add("--workers", type=int, default=0, help="runs at once (default: one a core)")
    add("--threads", type=int, default=1, help="CPU threads of a run (default: %(default)s)")
    add("--device", default="cpu", help="as for run.py (default: %(default)s: the networks are small)")
    add("--execution", default="eager", help="as for run.py (default: %(default)s, compiling takes longer)")
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line, with what `--quick` and `--bandit` leave open filled in."""
    options = build_parser().parse_args(argv)
    options.steps = options.steps or (400 if options.quick else STEPS)
    options.seeds = options.seeds or ("0-1" if options.quick else "0-4")
    options.T = tuple(options.T or ((5, 20) if options.quick else STEPS_T if options.bandit == "circle" else (15,)))
    options.workers = options.workers or cores()
    return options


def main(argv: Sequence[str]) -> int:
    """Run a command line; 2 for what the user can fix."""

    def act() -> int:
        toy = Toy(parse(argv))
        if not toy.options.show and (code := toy.run()):
            return code
        print("\n".join(f"wrote {path}" for path in show(toy)))
        return 0

    return command_line("experiments.figure1_toy", act)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
