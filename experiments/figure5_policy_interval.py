"""Figure 5: gradient steps between the policy's ("policy evaluation interval"), three seeds.

The paper gives its values in a picture only; here 1, 2 (most tasks' own), 4 (large mazes' own) and 8.

    python -m experiments.figure5_policy_interval plan|run|show [--help]
"""

from __future__ import annotations

import sys

from experiments.study.study import Experiment, main

EXPERIMENT = Experiment(
    folder="policy_interval",
    about="Figure 5 of the paper: scores against the policy's update interval",
    tasks=(
        "halfcheetah-medium-v2", "hopper-medium-v2", "walker2d-medium-v2",
        "antmaze-umaze-v0", "antmaze-large-play-v0", "antmaze-large-diverse-v0",
    ),
    seeds="0-2",
    grid={"policy_interval": (1, 2, 4, 8)},
    by=("policy_interval",),
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, "figure5_policy_interval", sys.argv[1:]))
