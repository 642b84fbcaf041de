"""Not in the paper: DiffCPS beside its baselines on sets of the official size, in as many steps as a CPU can do.

    python -m experiments.rebuilt plan|run|show --dataset DIR [--protocol main|antmaze|long] [--help]

DIR holds D4RL-format files (docs/data.md says how to make them). Settings and schedules are the published ones; a run
ends after `--max_steps` of its schedule, and a later call with more goes on from there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from experiments.study.study import Experiment, main
from utils.options import Parser

# In the order of running: what is cheap first, so that a table begins to fill early.
ALGORITHMS = ("bc", "td3_bc", "diffusion_bc", "iql", "diffcps", "diffusion_ql", "dtql")

PROTOCOLS = {
    "main": Experiment(
        folder="rebuilt",
        about="DiffCPS and its baselines on three sets, three seeds, 100,000 steps (--protocol antmaze, long: others)",
        tasks=("hopper-medium-v2", "walker2d-medium-v2", "halfcheetah-medium-expert-v2"),
        seeds="0-2",
        algos=ALGORITHMS,
        max_steps=100_000,
        evaluations={"eval_interval": 10, "eval_episodes": 10},
        task_by_task=True,
        dataset=None,
    ),
    "antmaze": Experiment(
        folder="rebuilt_antmaze",
        about="DiffCPS and three baselines on antmaze-umaze, three seeds, 50,000 steps",
        tasks=("antmaze-umaze-v0",),
        seeds="0-2",
        algos=("diffusion_bc", "iql", "diffcps", "diffusion_ql"),
        max_steps=50_000,
        evaluations={"eval_interval": 10, "eval_episodes": 50},
        task_by_task=True,
        dataset=None,
    ),
    "long": Experiment(
        folder="rebuilt_long",
        about="How DiffCPS's constraint works over 1,000,000 steps, one seed",
        tasks=("hopper-medium-v2",),
        seeds="0",
        max_steps=1_000_000,
        evaluations={"eval_interval": 50, "eval_episodes": 10},
        dataset=None,
    ),
}


def command(argv: Sequence[str]) -> int:
    """Run a command line: that of every experiment, of the `--protocol` that it names."""
    first = Parser(prog="python -m experiments.rebuilt", add_help=False, allow_abbrev=False)
    first.add_argument("--protocol", default="main", choices=PROTOCOLS)
    options, rest = first.parse_known_args(argv)
    return main(PROTOCOLS[options.protocol], f"rebuilt --protocol {options.protocol}", rest)


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
