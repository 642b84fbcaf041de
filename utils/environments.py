"""D4RL's evaluation environments under D4RL's own physics, registered with gymnasium.

Importing this module registers `D4RL/Hopper-v2`, `D4RL/HalfCheetah-v2`, `D4RL/Walker2d-v2` and AntMaze's twelve
`D4RL/antmaze-*`. The locomotion environments are gymnasium's -v4 classes (observation, reward, termination and
start states of gym's -v2) with MuJoCo 2.1.0's inertia and D4RL's handling of actions; AntMaze is in
`utils.antmaze`. It warns where another MuJoCo is installed than the one that matches D4RL's.
"""

import re
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium.envs.mujoco.half_cheetah_v4 import HalfCheetahEnv
from gymnasium.envs.mujoco.hopper_v4 import HopperEnv
from gymnasium.envs.mujoco.walker2d_v4 import Walker2dEnv

from utils.antmaze import MAX_STEPS, AntMazeEnv
from utils.errors import UserError
from utils.lockstep import LockstepEnvs
from utils.physics import D4RLPhysics, warn_of_version

__all__ = ["D4RLHalfCheetah", "D4RLHopper", "D4RLWalker2d", "environment_id", "make", "make_lockstep"]

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


class _Runner(D4RLPhysics):
    """The reward of running, stated on arrays of n environments as gymnasium states it on one."""

    def observe(self, qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
        """Observations [n, state_dim] of positions [n, nq] and velocities [n, nv]."""
        return np.concatenate([qpos[:, 1:], np.clip(qvel, -10, 10)], axis=1)

    def judge(
        self, before: np.ndarray, qpos: np.ndarray, qvel: np.ndarray, controls: np.ndarray, _goals: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rewards and terminations [n] of a step from `before` to `qpos`, `qvel` under `controls`."""
        return self._progress(before, qpos) + self._healthy_reward - self._cost(controls), ~self._stands(qpos, qvel)

    def _progress(self, before: np.ndarray, qpos: np.ndarray) -> np.ndarray:
        return self._forward_reward_weight * ((qpos[:, 0] - before[:, 0]) / self.dt)

    def _cost(self, controls: np.ndarray) -> np.ndarray:
        # Squares are summed in the action's own precision, then weighted in float64, as NumPy 1 did for D4RL.
        return self._ctrl_cost_weight * np.sum(np.square(controls), axis=1).astype(np.float64)

    def control_cost(self, action: np.ndarray) -> float:
        """gymnasium's cost of one action, in D4RL's precision."""
        return self._cost(action[None])[0]

    def _stands(self, qpos: np.ndarray, _qvel: np.ndarray) -> np.ndarray:
        return _between(qpos[:, 1], self._healthy_z_range) & _between(qpos[:, 2], self._healthy_angle_range)


def _between(values: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    return (limits[0] < values) & (values < limits[1])


class D4RLHopper(_Runner, HopperEnv):
    """D4RL's Hopper-v2: state 11, action 3, 8 ms a step."""

    metadata: ClassVar[dict[str, Any]] = {**HopperEnv.metadata, **D4RLPhysics.metadata}

    def _stands(self, qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
        state = np.concatenate([qpos[:, 2:], qvel], axis=1)
        return super()._stands(qpos, qvel) & _between(state, self._healthy_state_range).all(axis=1)


class D4RLWalker2d(_Runner, Walker2dEnv):
    """D4RL's Walker2d-v2: state 17, action 6, 8 ms a step."""

    metadata: ClassVar[dict[str, Any]] = {**Walker2dEnv.metadata, **D4RLPhysics.metadata}


class D4RLHalfCheetah(_Runner, HalfCheetahEnv):
    """D4RL's HalfCheetah-v2: state 17, action 6, 50 ms a step; it never terminates."""

    metadata: ClassVar[dict[str, Any]] = {**HalfCheetahEnv.metadata, **D4RLPhysics.metadata}

    def observe(self, qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
        """Observations [n, 17] of positions [n, 9] and velocities [n, 9]."""
        return np.concatenate([qpos[:, 1:], qvel], axis=1)

    def judge(
        self, before: np.ndarray, qpos: np.ndarray, _qvel: Any, controls: np.ndarray, _goals: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rewards and terminations (none) [n] of a step from `before` to `qpos` under `controls`."""
        return self._progress(before, qpos) - self._cost(controls), np.zeros(len(qpos), dtype=bool)


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
