"""D4RL's evaluation environments under D4RL's own physics, registered with gymnasium.

Importing this module registers `D4RL/Hopper-v2`, `D4RL/HalfCheetah-v2`, `D4RL/Walker2d-v2` and AntMaze's twelve
`D4RL/antmaze-*`.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import gymnasium

from utils import tasks
from utils.environments.antmaze import MAZES, AntMazeEnv
from utils.environments.lockstep import LockstepEnvs
from utils.environments.locomotion import D4RLHalfCheetah, D4RLHopper, D4RLWalker2d
from utils.errors import UserError

_LOCOMOTION: Mapping[str, tuple[str, Any]] = {
    "hopper": ("D4RL/Hopper-v2", D4RLHopper),
    "halfcheetah": ("D4RL/HalfCheetah-v2", D4RLHalfCheetah),
    "walker2d": ("D4RL/Walker2d-v2", D4RLWalker2d),
}


def _id_of(task: tasks.Task) -> str | None:
    """The registered id of a task; None where only the original stack has its environment."""
    if task.domain == "locomotion":
        return _LOCOMOTION[task.world][0]
    if task.domain == "antmaze" and task.world in MAZES:
        return f"D4RL/{task.env_name.replace('-v1', '-v0')}"  # -v1 is other data for the environments of -v0
    return None


_IDS = {name: env_id for name, task in tasks.TASKS.items() if (env_id := _id_of(task))}


def environment_id(env_name: str) -> str:
    """The registered id of a D4RL task: "hopper-medium-v2" -> "D4RL/Hopper-v2".

    AntMaze's -v1 tasks are other data for the same environments as -v0. UserError names the known tasks for any other.
    """
    if env_name not in _IDS:
        raise UserError(f"unknown task {env_name!r}; known are {', '.join(_IDS)}")
    return _IDS[env_name]


def make(env_name: str, **kwargs: Any) -> gymnasium.Env:
    """The evaluation environment of a D4RL task, such as "antmaze-umaze-v0", with D4RL's time limit.

    `kwargs` go on to the environment, for instance `render_mode="rgb_array"`. UserError for an unknown task.
    """
    with warnings.catch_warnings():
        # gymnasium calls -v0 out of date; the paper's AntMaze results are on -v0.
        warnings.filterwarnings("ignore", message=".*is out of date", category=DeprecationWarning)
        return gymnasium.make(environment_id(env_name), **kwargs)


def make_lockstep(env_name: str, num_envs: int, **kwargs: Any) -> LockstepEnvs:
    """`num_envs` environments of a D4RL task that step together; see `LockstepEnvs`.

    `kwargs` go on to the environment: `frame` needs `render_mode="rgb_array"`. UserError for an unknown task or less
    than one environment.
    """
    return LockstepEnvs(make(env_name, **kwargs), num_envs)


def _register() -> None:
    for env_id, entry in _LOCOMOTION.values():
        gymnasium.register(env_id, entry_point=entry, max_episode_steps=tasks.LOCOMOTION_STEPS)
    for name, env_id in _IDS.items():
        task = tasks.TASKS[name]
        if task.domain == "antmaze" and task.version != "v1":
            gymnasium.register(
                env_id,
                entry_point=AntMazeEnv,  # type: ignore[arg-type]  # called with the kwargs below
                max_episode_steps=task.max_episode_steps,
                kwargs={"maze": task.world, "goal_every_reset": task.version == "v2"},
            )


_register()
