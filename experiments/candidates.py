"""Not in the paper: what the settings that rule acting alone are worth.

The published code draws 50 actions per state and takes one by softmax of the critics (D7); the paper does not
say so. IDQL-A chooses its number of candidates N a task, QGPO its guidance scale, both on test episodes. Training does
not depend on any of these, so every run is trained once and its last policy evaluated with each value, on the same
start states.

    python -m experiments.candidates plan|run|show [--algos idql qgpo] [--help]
    python -m experiments.candidates score RUNS --to DIR [--help]       runs of run.py that are there already
    python -m experiments.candidates compare DIR [--help]               what `score` left, once more
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import hyperparameters
from agents import AGENTS
from experiments.study.planned_run import continue_run
from experiments.study.study import Experiment, main, settings_of
from utils.errors import UserError
from utils.options import Parser, command_line, parse, parse_seeds, resolve_device
from utils.report.build import Report, save, summarise
from utils.report.runs import Cell, Labels, find_runs, plain
from utils.report.tables import DEVIATION_NOTE, Choice, Table, mean_and_deviation
from utils.runs import checkpoint
from utils.runs.columns import EVALUATION_COLUMNS
from utils.runs.log import CsvFile, write_json
from utils.runs.reading import read_config, read_evaluations
from utils.trained import load, play

CANDIDATES = (1, 10, 50, 200)
# The values that philippe-eecs/IDQL's launcher tries, and one: the diffusion model itself.
IDQL_CANDIDATES = (1, 16, 32, 64, 128, 256)
# train_critic.py of ChenDRAG/CEP-energy-guided-diffusion.
GUIDANCE = {"antmaze": (1.0, 1.5, 2.0, 2.5, 3.0, 4.0), "others": (0.0, 1.0, 2.0, 3.0, 5.0, 8.0, 10.0)}
BY = ("action_candidates", "guidance_scale")
ACTING = (*BY, "greedy_action")  # all that acting depends on and training does not


def variants(algo: str, env_name: str) -> list[dict[str, Any]]:
    """The settings of acting to compare. Raises UserError for an algorithm that has none."""
    if algo == "qgpo":
        domain = hyperparameters.domain(env_name)
        return [{"guidance_scale": scale} for scale in GUIDANCE.get(domain, GUIDANCE["others"])]
    if algo == "idql":
        return [*({"action_candidates": n} for n in IDQL_CANDIDATES), {"greedy_action": False}]
    if hasattr(hyperparameters.CONFIGS[algo](), "action_candidates"):
        return [{"action_candidates": n} for n in CANDIDATES]
    raise UserError(f"{algo} has one way of acting: there is nothing to compare")


def _variants_of(trained: Path) -> list[dict[str, Any]]:
    """Those of a seed's folder .../<algo>/<env_name>/seed_<k>."""
    return variants(trained.parents[1].name, trained.parents[0].name)


# --- Evaluating a trained seed ------------------------------------------------------------------------------


def train_and_evaluate(command: Sequence[str]) -> int:
    """Train as run.py would, then evaluate with every setting; run.py's exit code."""
    if code := continue_run(command):
        return code
    options = parse(command, AGENTS)
    device = resolve_device(options.device)
    for seed in parse_seeds(options.seeds, options.seed):
        trained = Path(options.dir) / options.algo / options.env_name / f"seed_{seed}"
        for changes in _variants_of(trained):
            evaluate_with(trained, evaluated_folder(trained, changes), changes, device)
    return 0


def evaluated_folder(trained: Path, changes: Mapping[str, Any], base: Path | None = None) -> Path:
    """Where the evaluation of a trained seed's folder .../<variant>/<algo>/<env_name>/seed_<k> is written: beside its
    variant, or below `base`."""
    variant = trained.parents[2]
    return (variant.parent if base is None else base) / _name(changes, ",") / trained.relative_to(variant)


def evaluate_with(trained: Path, folder: Path, changes: Mapping[str, Any], device: torch.device) -> None:
    """Episodes of a trained seed under changed settings, as a run's folder of one evaluation."""
    described = read_config(trained)
    described["settings"] |= changes
    if _is_current(folder, described):
        return
    seed = load([trained / checkpoint.CURRENT], AGENTS, device, changes)[0]
    step, fresh = seed.agent.step, described["run"]["eval_seeds"] == "fresh"
    episodes = play(seed, described["settings"]["eval_episodes"], fresh)
    scores = seed.source.normalized_score(episodes.returns)[0]
    columns = zip(scores, episodes.returns[0], episodes.lengths[0], episodes.unstable[0], strict=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluations.csv").unlink(missing_ok=True)
    file = CsvFile(folder / "evaluations.csv", EVALUATION_COLUMNS)
    file.rows(
        {"step": step, "episode": e, "return": float(r), "normalized_score": float(s), "length": int(n),
         "unstable": int(u)}
        for e, (s, r, n, u) in enumerate(columns)
    )  # fmt: skip
    file.close()
    write_json(folder / "config.json", described)  # last: a folder with both files is whole


def _is_current(folder: Path, described: dict[str, Any]) -> bool:
    """Whether the same trained run has been evaluated already, at its last step."""
    if not (folder / "config.json").exists() or read_config(folder) != described:
        return False
    last = max(read_evaluations(folder / "evaluations.csv")["step"])
    return last == described["settings"]["num_epochs"] * described["settings"]["num_steps_per_epoch"]


# --- What choosing on test episodes is worth ----------------------------------------------------------------


def chosen(report: Report, label: str) -> list[Table]:
    """The best setting of each task and method, chosen on all episodes, and on one half for the score on the other."""
    groups: dict[tuple[str, str, int], list[Cell]] = {}
    for cell in report.cells:
        if cell.label == label:
            trained = {name: value for name, value in cell.changed.items() if name not in ACTING}
            method = f"{cell.algo} {_name(trained, ' ')}".strip()
            groups.setdefault((cell.env_name, method, cell.total_steps), []).append(cell)
    lines = []
    for (env_name, method, steps), cells in groups.items():
        names = _names(cells)
        episodes = [np.stack([run.last_scores for run in cell.runs]) for cell in cells]  # [n, E] each
        if len(cells) < 2 or len({scores.shape for scores in episodes}) > 1 or episodes[0].shape[1] < 2:
            continue
        best, picked, held_out = choose(np.stack(episodes))
        lines.append([env_name, method, f"{steps:,}", names[best], mean_and_deviation(episodes[best].mean(axis=1)),
                      "; ".join(dict.fromkeys(names[i] for i in picked)), mean_and_deviation(held_out)])  # fmt: skip
    columns = ["task", "method", "gradient steps", "best †", "its score", "chosen on half", "score on the other half"]
    notes = ["† best: of the settings, chosen on the test episodes themselves; it overstates.",
             "chosen on half: on every second episode of all seeds, then the other way round; scored on the episodes "
             "that had no part in the choice.", DEVIATION_NOTE]  # fmt: skip
    title = f"Settings of acting chosen by task, data: {label}"
    return [Table(title, columns, lines, notes, names=4)] if lines else []


def _names(cells: Sequence[Cell]) -> list[str]:
    """What sets each of the cells apart from the others: `action_candidates=16 greedy_action=True`."""
    settings = [cell.runs[0].settings for cell in cells]
    apart = [name for name in settings[0] if len({str(own.get(name)) for own in settings}) > 1]
    return [_name({name: own[name] for name in apart}, " ") for own in settings]


def _name(settings: Mapping[str, Any], separator: str) -> str:
    return separator.join(f"{name}={plain(value)}" for name, value in settings.items())


def choose(episodes: np.ndarray) -> tuple[int, list[int], np.ndarray]:
    """Of scores [settings, seeds, episodes]: the setting that is best on all episodes; those that are best on the even
    and on the odd ones; each seed's mean score [seeds] on the episodes that the choice did not see."""
    halves = [episodes[:, :, start::2].mean(axis=2) for start in (0, 1)]  # [settings, seeds]
    picked = [int(half.mean(axis=1).argmax()) for half in halves]
    held_out = np.mean([halves[1][picked[0]], halves[0][picked[1]]], axis=0)
    return int(episodes.mean(axis=(1, 2)).argmax()), picked, held_out


# --- Runs that are there already ----------------------------------------------------------------------------


def score(argv: Sequence[str]) -> int:
    """`score`: evaluate runs of run.py with every setting, and show what came out."""
    parser = Parser(prog="python -m experiments.candidates score", allow_abbrev=False,
                            description="Evaluate finished runs with each setting of acting.")  # fmt: skip
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs with their checkpoints")
    parser.add_argument("--to", type=Path, required=True, help="folder for the evaluations")
    parser.add_argument("--eval_episodes", type=int, help="episodes each (default: the run's)")
    parser.add_argument("--device", default="auto", help="as for run.py (default: %(default)s)")
    _add_output(parser)
    options = parser.parse_args(argv)
    if options.eval_episodes is not None and options.eval_episodes < 1:
        parser.error("--eval_episodes must be at least 1")
    device = resolve_device(options.device)
    trained = [path.parent for place in options.runs for path in sorted(place.resolve().rglob(checkpoint.CURRENT))]
    if not trained:
        raise UserError(
            f"no {checkpoint.CURRENT} below {', '.join(map(str, options.runs))}: name folders that run.py made"
        )
    episodes = {} if options.eval_episodes is None else {"eval_episodes": options.eval_episodes}
    found: dict[Path, Path] = {}
    for seed in trained:
        for changes in _variants_of(seed):
            folder = evaluated_folder(seed, changes, options.to)
            if found.setdefault(folder, seed) != seed:
                raise UserError(f"{found[folder]} and {seed} are one method, task and seed: give each its own --to")
            evaluate_with(seed, folder, changes | episodes, device)
    return show(list(found), options)


def compare(argv: Sequence[str]) -> int:
    """`compare`: show evaluations that `score` or `run` left, or an exported copy of them."""
    parser = Parser(prog="python -m experiments.candidates compare", allow_abbrev=False,
                            description="Show evaluations by setting of acting.")  # fmt: skip
    parser.add_argument("evaluations", nargs="+", type=Path, help="folders of evaluations")
    _add_output(parser)
    options = parser.parse_args(argv)
    return show(options.evaluations, options)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--label", action="append", default=[], metavar="NAME=PREFIX", help="as for utils.report")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write DIR/tables and DIR/figures")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained page")


def show(folders: Sequence[Path], options: argparse.Namespace) -> int:
    """Tables on the screen, files where asked for."""
    runs, notes = find_runs(folders, Labels.parse(options.label))
    report = summarise(runs, notes, Choice(), settings_of(BY, {run.algo for run in runs}), extra=chosen)
    done = save(report, options.out, options.html, title=EXPERIMENT.about)
    for label in report.labels:
        print("\n".join(table.markdown() for table in report.tables(label)))
    print("\n".join(done))
    return 0


EXPERIMENT = Experiment(
    folder="candidates",
    about="Scores by the settings that rule acting alone",
    tasks=("halfcheetah-medium-v2", "hopper-medium-v2", "walker2d-medium-v2", "antmaze-umaze-v0",
           "antmaze-medium-diverse-v0"),
    seeds="0-2",
    job=train_and_evaluate,
    by=BY,
    extra=chosen,
    evaluated=lambda trained: [evaluated_folder(trained, changes) for changes in _variants_of(trained)],
)  # fmt: skip


def command(argv: Sequence[str]) -> int:
    """Run a command line: that of every experiment, `score` or `compare`."""
    for action in (score, compare):
        if list(argv[:1]) == [action.__name__]:
            return command_line(f"experiments.candidates {action.__name__}", partial(action, argv[1:]))
    return main(EXPERIMENT, "candidates", argv)


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
