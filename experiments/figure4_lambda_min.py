"""Figure 4: the least value that lambda may take, on AntMaze and locomotion, three seeds.

The paper gives its values in a picture only; here 0 (locomotion's own), 0.3 (AntMaze's own), and one below, between
and above.

    python -m experiments.figure4_lambda_min plan|run|show [--help]
"""

from __future__ import annotations

import sys

from experiments.study.study import Experiment, main

EXPERIMENT = Experiment(
    folder="lambda_min",
    about="Figure 4 of the paper: scores against the least lambda",
    tasks=(
        "halfcheetah-medium-v2", "hopper-medium-v2", "walker2d-medium-v2",
        "antmaze-umaze-v0", "antmaze-medium-diverse-v0", "antmaze-large-diverse-v0",
    ),
    seeds="0-2",
    grid={"lambda_min": (0.0, 0.1, 0.3, 0.5, 1.0)},
    by=("lambda_min",),
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, "figure4_lambda_min", sys.argv[1:]))
