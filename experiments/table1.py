"""Table 1: normalised scores on D4RL's 15 locomotion and AntMaze tasks, five seeds.

python -m experiments.table1 plan|run|show [--algos diffcps diffusion_ql diffusion_bc dtql] [--help]
"""

from __future__ import annotations

import sys

import hyperparameters
from experiments.study.study import Experiment, main

EXPERIMENT = Experiment(
    folder="table1",
    about="Table 1 of the paper: normalised scores on 15 D4RL tasks",
    tasks=hyperparameters.PAPER_TASKS,
    seeds="0-4",
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, "table1", sys.argv[1:]))
