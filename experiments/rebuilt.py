"""Not in the paper: DiffCPS beside its baselines on sets of the official size, in as many steps as a CPU can do.

    python -m experiments.rebuilt plan|run|show --dataset DIR [--protocol main|antmaze|long] [--help]

DIR holds D4RL-format files (docs/data.md says how to make them). Settings and schedules are the published ones; a run
ends after `--max_steps` of its schedule, and a later call with more goes on from there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from experiments.study.study import Experiment, main_of
from utils.report.build import Report
from utils.report.overview import overview
from utils.report.tables import Table
from utils.runs.reading import read_config

# In the order of running: what is cheap first, so that a table begins to fill early.
ALGORITHMS = ("bc", "td3_bc", "diffusion_bc", "iql", "diffcps", "diffusion_ql", "dtql")
# Rows of D4RL's own sets, without which a rebuilt one is not called of full size.
ROWS = {"medium-expert": 1_998_000, "medium": 998_000, "umaze": 998_000}


def labels(folders: Sequence[Path]) -> list[str]:
    """Each set's name: "rebuilt", and whether it has as many rows as D4RL's own, to within the last episodes."""
    found = {}
    for folder in (folder for folder in folders if (folder / "config.json").exists()):
        config = read_config(folder)
        data, behaviour = config["dataset"], config["run"]["env_name"].partition("-")[2].rpartition("-v")[0]
        if "path" in data and data["source"] == data["path"]:
            full = data.get("rows", 0) >= ROWS.get(behaviour, float("inf"))
            found[data["path"]] = "rebuilt, full size" if full else "rebuilt"
    return [f"{name}={path}" for path, name in found.items()]


def tables(report: Report, label: str) -> list[Table]:
    """The overview, after the tables of every report."""
    return overview([cell for cell in report.cells if cell.label == label], label)


# What the three protocols share.
_Rebuilt = partial(Experiment, dataset=None, task_by_task=True, extra=tables, labels=labels)

PROTOCOLS = {
    "main": _Rebuilt(
        folder="rebuilt",
        about="DiffCPS and its baselines on three sets, three seeds, 100,000 steps (--protocol antmaze, long: others)",
        tasks=("hopper-medium-v2", "walker2d-medium-v2", "halfcheetah-medium-expert-v2"),
        seeds="0-2",
        algos=ALGORITHMS,
        max_steps=100_000,
        evaluations={"eval_interval": 10, "eval_episodes": 10},
    ),
    "antmaze": _Rebuilt(
        folder="rebuilt_antmaze",
        about="DiffCPS and three baselines on antmaze-umaze, three seeds, 50,000 steps",
        tasks=("antmaze-umaze-v0",),
        seeds="0-2",
        algos=("diffusion_bc", "iql", "diffcps", "diffusion_ql"),
        max_steps=50_000,
        evaluations={"eval_interval": 10, "eval_episodes": 50},
    ),
    "long": _Rebuilt(
        folder="rebuilt_long",
        about="How DiffCPS's constraint works over 1,000,000 steps, one seed",
        tasks=("hopper-medium-v2",),
        seeds="0",
        max_steps=1_000_000,
        evaluations={"eval_interval": 50, "eval_episodes": 10},
    ),
}


command = partial(main_of, PROTOCOLS, "rebuilt")

if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
