"""D4RL's evaluation environments under D4RL's own physics, registered with gymnasium.

Importing this module registers `D4RL/Hopper-v2`, `D4RL/HalfCheetah-v2`, `D4RL/Walker2d-v2` and AntMaze's twelve
`D4RL/antmaze-*`. It warns where another MuJoCo is installed than the one that matches D4RL's.
"""

import re
import warnings
from collections.abc import Mapping
from typing import Any

import gymnasium

from utils.environments.antmaze import MAX_STEPS, AntMazeEnv
from utils.environments.lockstep import LockstepEnvs
from utils.environments.locomotion import D4RLHalfCheetah, D4RLHopper, D4RLWalker2d
from utils.environments.physics import warn_of_version
from utils.errors import UserError

LOCOMOTION_STEPS = 1000
LOCOMOTION: Mapping[str, str] = {
    "hopper": "D4RL/Hopper-v2",
    "halfcheetah": "D4RL/HalfCheetah-v2",
    "walker2d": "D4RL/Walker2d-v2",
}
ANTMAZE = ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse")
LOCOMOTION_TASK = re.compile(
    f"({'|'.join(LOCOMOTION)})-(?:random|medium|medium-replay|medium-expert|expert|full-replay)-v2"
)
ANTMAZE_TASK = re.compile(f"(antmaze-(?:{'|'.join(ANTMAZE)}))-v([012])")


def environment_id(env_name: str) -> str:
    """The registered id of a D4RL task: "hopper-medium-v2" -> "D4RL/Hopper-v2".

    AntMaze's -v1 tasks are other data for the same environments as -v0.

    Raises:
        UserError: no such task; the message names the known ones.
    """
    if match := LOCOMOTION_TASK.fullmatch(env_name):
        return LOCOMOTION[match[1]]
    if match := ANTMAZE_TASK.fullmatch(env_name):
        return f"D4RL/{match[1]}-v{'2' if match[2] == '2' else '0'}"
    raise UserError(
        f"unknown task {env_name!r}; known are {{{','.join(LOCOMOTION)}}}-{{random,medium,medium-replay,"
        f"medium-expert,expert,full-replay}}-v2 and antmaze-{{{','.join(ANTMAZE)}}}-{{v0,v1,v2}}"
    )


def make(env_name: str, **kwargs: Any) -> gymnasium.Env:
    """The evaluation environment of a D4RL task, with D4RL's time limit.

    Args:
        env_name: D4RL's name of the task, such as "hopper-medium-v2" or "antmaze-umaze-v0".
        kwargs: passed on to the environment, for instance `render_mode="rgb_array"`.

    Raises:
        UserError: no such task.
    """
    with warnings.catch_warnings():
        # gymnasium calls -v0 out of date; the paper's AntMaze results are on -v0.
        warnings.filterwarnings("ignore", message=".*is out of date", category=DeprecationWarning)
        return gymnasium.make(environment_id(env_name), **kwargs)


def make_lockstep(env_name: str, num_envs: int) -> LockstepEnvs:
    """`num_envs` environments of a D4RL task that step together; see `LockstepEnvs`.

    Raises:
        UserError: no such task, or less than one environment.
    """
    return LockstepEnvs(make(env_name), num_envs)


def _register() -> None:
    for name, entry in (("Hopper", D4RLHopper), ("HalfCheetah", D4RLHalfCheetah), ("Walker2d", D4RLWalker2d)):
        gymnasium.register(f"D4RL/{name}-v2", entry_point=entry, max_episode_steps=LOCOMOTION_STEPS)
    for name in ANTMAZE:
        maze = name.split("-")[0]
        for version in (0, 2):
            gymnasium.register(
                f"D4RL/antmaze-{name}-v{version}",
                entry_point=AntMazeEnv,
                max_episode_steps=MAX_STEPS[maze],
                kwargs={"maze": maze, "goal_every_reset": version == 2},
            )


_register()
warn_of_version()
