"""Not in the paper: DiffCPS's bound from a clone of the data (--kappa auto) beside the published one, on rebuilt sets.

    python -m experiments.kappa plan|run|show --dataset DIR [--protocol slacks|starts] [--help]

slacks: the published kappa, auto as it is (slack 0.01, lambda at least 1), with four slacks and no floor of lambda,
Diffusion-QL and cloning. starts: auto without the floor, with a slack that opens slowly or a large lambda at the start.
Runs lie beside those of experiments.rebuilt, which has the baselines.
"""

from __future__ import annotations

import sys
from functools import partial

import numpy as np

from experiments import rebuilt
from experiments.study.study import Experiment, main_of
from utils.report.build import Report
from utils.report.overview import PLAYED, SCORES, UNCHOSEN, played_again, played_note
from utils.report.runs import Cell, SeedRun
from utils.report.tables import BEST_NOTE, DEVIATION_NOTE, Choice, Table, mean_and_deviation, number
from utils.runs.constraint import Constraint

SLACKS = (0.03, 0.1, 0.3, 1.0)
OPENING = 50_000  # gradient steps


def free(slack: float, **more: float) -> dict[str, float | str]:
    """--kappa auto without the floor of lambda that it brings."""
    return {"kappa": "auto", "kappa_slack": slack, "lambda_min": 0.0, **more}


def tables(report: Report, label: str) -> list[Table]:
    """A line per task and method: every score, and the constraint over the last half."""
    cells = [cell for cell in report.cells if cell.label == label]
    constraint = ["κ", "loss", "% of steps above κ", "λ"]
    columns = ["task", "method", "gradient steps", *SCORES.values(), UNCHOSEN, *constraint]
    about = "κ and λ: at the end. Loss and steps above κ: of the last half. Means over seeds."
    unchosen = [played_again(cell, PLAYED[UNCHOSEN]) for cell in cells]
    counts = {n for _, found in unchosen for n in found}
    notes = [DEVIATION_NOTE, BEST_NOTE, *([played_note(UNCHOSEN, counts)] if counts else []), about]
    lines = [_line(cell, score) for cell, (score, _) in zip(cells, unchosen, strict=True)]
    return [Table(f"The bound κ, data: {label}", columns, lines, notes)] if cells else []


def _line(cell: Cell, unchosen: str) -> list[str]:
    scores = [Choice().scores(cell, protocol) for protocol in SCORES]
    texts = ["–" if one is None else mean_and_deviation(one) for one in scores]
    means = np.mean([_constraint(run) for run in cell.runs], axis=0)
    constraint = ["–" if np.isnan(x) else number(x, ".3g") for x in means]
    return [cell.env_name, cell.method, f"{cell.reached:,}", *texts, unchosen or "–", *constraint]


def _constraint(run: SeedRun) -> list[float]:
    """kappa, loss, percent of steps above kappa and lambda; NaN for what a run does not have."""
    one = Constraint.of(run.metrics, run.settings)
    return [np.nan] * 4 if one is None else [one.kappa, one.loss, 100 * one.above, one.lambda_]


_Kappa = partial(
    Experiment,
    folder="rebuilt",
    tasks=("hopper-medium-v2", "walker2d-medium-v2", "halfcheetah-medium-expert-v2"),
    seeds="0-1",
    max_steps=100_000,
    evaluations={"eval_interval": 10, "eval_episodes": 10},
    task_by_task=True,
    dataset=None,
    labels=rebuilt.labels,
    extra=tables,
)

PROTOCOLS = {
    "slacks": _Kappa(
        about="--kappa auto beside the published kappa, Diffusion-QL and cloning (--protocol starts: its other forms)",
        algos=("diffcps", "diffusion_ql", "diffusion_bc"),
        variants={"diffcps": [{}, {"kappa": "auto"}, *map(free, SLACKS)]},
    ),
    "starts": _Kappa(
        about="--kappa auto with a slack that opens slowly, a large lambda at the start",
        variants={"diffcps": [free(0.1, kappa_opening=OPENING), free(0.1, lambda_init=10.0)]},
    ),
}


command = partial(main_of, PROTOCOLS, "kappa")

if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
