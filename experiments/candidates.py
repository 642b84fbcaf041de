"""Not in the paper: what the choice among several action candidates at evaluation is worth.

The published code draws 50 actions a state and takes one by softmax of the critics (DEVIATIONS 7); the paper does not
say so. Training does not depend on it, so every run is trained once and its last policy evaluated with 1, 10, 50 and
200 candidates, on the same start states.

    python -m experiments.candidates plan|run|show [--help]
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import hyperparameters
from agents import AGENTS
from experiments.common import Experiment, main
from experiments.training import continue_run
from utils import checkpoint, options, sources
from utils.evaluation import acting_generators, environment_rngs, evaluate
from utils.log import EVALUATION_COLUMNS, CsvFile, write_json

CANDIDATES = (1, 10, 50, 200)


def train_and_evaluate(command: Sequence[str]) -> int:
    """Train as run.py would, then evaluate with every number of candidates; run.py's exit code."""
    if code := continue_run(command):
        return code
    given = options.parse(command, AGENTS)
    for seed in options.parse_seeds(given):
        for number in CANDIDATES:
            evaluate_with(given, seed, number)
    return 0


def evaluated_folder(trained: Path, number: int) -> Path:
    """Where the evaluation of a trained seed's folder .../<variant>/<algo>/<env_name>/seed_<k> is written."""
    variant = trained.parents[2]
    return variant.parent / f"action_candidates={number}" / trained.relative_to(variant)


def evaluate_with(given: argparse.Namespace, seed: int, number: int) -> None:
    """Episodes of a trained seed with `number` candidates, as a run's folder of one evaluation."""
    trained = Path(given.dir) / given.algo / given.env_name / f"seed_{seed}"
    folder = evaluated_folder(trained, number)
    described = json.loads((trained / "config.json").read_text())
    described["settings"]["action_candidates"] = number
    if _is_current(folder, described):
        return
    overrides = {**options.overrides(given), "action_candidates": number}
    config = hyperparameters.get(given.algo, given.env_name, **overrides)
    device = options.resolve_device(given.device)
    environments = sources.make_environments(given, config.eval_episodes)
    dims = (environments.state_dim, environments.action_dim, environments.max_action)
    agent = AGENTS[given.algo](*dims, config, [seed], device)
    agent.load_state_dict(checkpoint.load(trained / "checkpoint.pt")["agent"])
    rngs = environment_rngs([seed], agent.step, given.eval_seeds == "fresh")
    with torch.no_grad():
        acting = acting_generators([seed], agent.step, device)
        episodes = evaluate(agent.act, environments, [seed], rngs, acting, device)
    scores = sources.normalized_score(given, episodes.returns)[0]
    columns = zip(scores, episodes.returns[0], episodes.lengths[0], episodes.unstable[0], strict=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluations.csv").unlink(missing_ok=True)
    file = CsvFile(folder / "evaluations.csv", EVALUATION_COLUMNS)
    file.rows(
        {"step": agent.step, "episode": e, "return": float(r), "normalized_score": float(s), "length": int(n),
         "unstable": int(u)}
        for e, (s, r, n, u) in enumerate(columns)
    )  # fmt: skip
    file.close()
    write_json(folder / "config.json", described)  # last: a folder with both files is whole


def _is_current(folder: Path, described: dict[str, Any]) -> bool:
    """Whether the same trained run has been evaluated already, at its last step."""
    if not (folder / "config.json").exists() or json.loads((folder / "config.json").read_text()) != described:
        return False
    with open(folder / "evaluations.csv", newline="") as file:
        last = max(int(row["step"]) for row in csv.DictReader(file))
    return last == described["settings"]["num_epochs"] * described["settings"]["num_steps_per_epoch"]


EXPERIMENT = Experiment(
    folder="candidates",
    about="Scores with 1, 10, 50 and 200 action candidates",
    tasks=("halfcheetah-medium-v2", "hopper-medium-v2", "walker2d-medium-v2", "antmaze-umaze-v0",
           "antmaze-medium-diverse-v0"),
    seeds="0-2",
    job=train_and_evaluate,
    by=("action_candidates",),
    evaluated=lambda trained: [evaluated_folder(trained, number) for number in CANDIDATES],
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, "candidates", sys.argv[1:]))
