"""Figure 3: learning curves with 5, 15 and 20 diffusion steps on some Gym tasks, three seeds.

The paper shows "selected" tasks in a picture; here the three medium sets by default (`--tasks` takes others). The
runs are those of Table 2, in the same folder: what one of the two has trained, the other shows.

    python -m experiments.figure3_diffusion_steps plan|run|show [--help]
"""

from __future__ import annotations

import sys

from experiments.study.study import Experiment, main
from experiments.table2_diffusion_steps import STEPS

EXPERIMENT = Experiment(
    folder="diffusion_steps",
    about="Figure 3 of the paper: learning curves with 5, 15 and 20 diffusion steps",
    tasks=("halfcheetah-medium-v2", "hopper-medium-v2", "walker2d-medium-v2"),
    seeds="0-2",
    grid={"diffusion_steps": STEPS},
    by=("diffusion_steps",),
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, "figure3_diffusion_steps", sys.argv[1:]))
