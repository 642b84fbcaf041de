"""D4RL's evaluation environments under D4RL's own physics, registered with gymnasium.

Importing this module registers `D4RL/Hopper-v2`, `D4RL/HalfCheetah-v2`, `D4RL/Walker2d-v2` and
`D4RL/antmaze-*-v0/v2`. The locomotion environments are gymnasium's -v4 classes (observation, reward, termination
and start states of gym's -v2) with MuJoCo 2.1.0's inertia and D4RL's handling of actions.
"""

import pathlib
import re
import warnings
from collections.abc import Mapping
from typing import Any

import gymnasium
import mujoco
import numpy as np
from gymnasium.envs.mujoco.half_cheetah_v4 import HalfCheetahEnv
from gymnasium.envs.mujoco.hopper_v4 import HopperEnv
from gymnasium.envs.mujoco.mujoco_env import MujocoEnv
from gymnasium.envs.mujoco.walker2d_v4 import Walker2dEnv

from utils.errors import UserError
from utils.lockstep import LockstepEnvs
from utils.physics import count_instabilities, d4rl_action, restored_model, warn_of_version

__all__ = [
    "D4RLHalfCheetah",
    "D4RLHopper",
    "D4RLWalker2d",
    "environment_id",
    "make",
    "make_lockstep",
]

LOCOMOTION_STEPS = 1000
LOCOMOTION_TASK = re.compile(
    r"(?P<family>hopper|halfcheetah|walker2d)-(random|medium|medium-replay|medium-expert|expert|full-replay)-v2"
)
FAMILIES: Mapping[str, str] = {
    "hopper": "D4RL/Hopper-v2",
    "halfcheetah": "D4RL/HalfCheetah-v2",
    "walker2d": "D4RL/Walker2d-v2",
}


class _D4RLPhysics(MujocoEnv):
    """What the three locomotion environments add to gymnasium's: weights, actions, and ends of unstable episodes.

    `sample_start`, `observe` and `judge` state the task on arrays of many environments; `LockstepEnvs` runs on them.
    """

    def _initialize_simulation(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
        model = restored_model(pathlib.Path(self.fullpath).read_text())
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, self.width)
        model.vis.global_.offheight = max(model.vis.global_.offheight, self.height)
        return model, mujoco.MjData(model)

    def control(self, actions: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Turn actions in [-1, 1] of the given shape into the actuators' controls, float64."""
        return d4rl_action(actions, shape, self.action_space.high)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Clip the action and step; an unstable simulation ends the episode with reward 0 and a warning.

        Raises:
            UserError: the action is NaN, infinite or of the wrong shape.
        """
        control = self.control(action, self.action_space.shape)
        state = self._get_obs()
        observation, reward, terminated, truncated, info = super().step(control)
        info["unstable"] = count_instabilities(self.data) > 0 or not np.isfinite(observation).all()
        if info["unstable"]:
            warnings.warn(
                "the simulation became unstable: the episode ends here", RuntimeWarning, stacklevel=2
            )
            return state, 0.0, True, truncated, info
        return observation, float(reward), bool(terminated), truncated, info

    def observe(self, qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
        """Observations [n, state_dim] of positions [n, nq] and velocities [n, nv]."""
        return np.concatenate([qpos[:, 1:], np.clip(qvel, -10, 10)], axis=1)

    def judge(
        self, before: np.ndarray, qpos: np.ndarray, qvel: np.ndarray, controls: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rewards and terminations [n] of a step from positions `before` to `qpos`, `qvel` under `controls`."""
        forward = self._forward_reward_weight * ((qpos[:, 0] - before[:, 0]) / self.dt)
        cost = self._ctrl_cost_weight * np.sum(np.square(controls), axis=1)
        return forward + self._healthy_reward - cost, ~self._standing(qpos, qvel)

    def _standing(self, qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
        return _between(qpos[:, 1], self._healthy_z_range) & _between(qpos[:, 2], self._healthy_angle_range)


def _between(values: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    return (limits[0] < values) & (values < limits[1])


class D4RLHopper(_D4RLPhysics, HopperEnv):
    """D4RL's Hopper-v2: state 11, action 3, 8 ms a step."""

    def _standing(self, qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
        state = np.concatenate([qpos[:, 2:], qvel], axis=1)
        return super()._standing(qpos, qvel) & _between(state, self._healthy_state_range).all(axis=1)


class D4RLWalker2d(_D4RLPhysics, Walker2dEnv):
    """D4RL's Walker2d-v2: state 17, action 6, 8 ms a step."""


class D4RLHalfCheetah(_D4RLPhysics, HalfCheetahEnv):
    """D4RL's HalfCheetah-v2: state 17, action 6, 50 ms a step; it never terminates."""

    def observe(self, qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
        """Observations [n, 17] of positions [n, 9] and velocities [n, 9]."""
        return np.concatenate([qpos[:, 1:], qvel], axis=1)

    def judge(
        self, before: np.ndarray, qpos: np.ndarray, qvel: np.ndarray, controls: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rewards and terminations (none) [n] of a step from `before` to `qpos`, `qvel` under `controls`."""
        forward = self._forward_reward_weight * ((qpos[:, 0] - before[:, 0]) / self.dt)
        cost = self._ctrl_cost_weight * np.sum(np.square(controls), axis=1)
        return forward - cost, np.zeros(len(qpos), dtype=bool)


def environment_id(env_name: str) -> str:
    """The registered id of a D4RL task: "hopper-medium-v2" -> "D4RL/Hopper-v2".

    Raises:
        UserError: no such task; the message names the known ones.
    """
    match = LOCOMOTION_TASK.fullmatch(env_name)
    if match:
        return FAMILIES[match["family"]]
    raise UserError(
        f"unknown task {env_name!r}; known are {{hopper,halfcheetah,walker2d}}-{{random,medium,medium-replay,"
        "medium-expert,expert,full-replay}-v2"
    )


def make(env_name: str, **kwargs: Any) -> gymnasium.Env:
    """The evaluation environment of a D4RL task, with D4RL's time limit.

    Args:
        env_name: D4RL's name of the task, such as "hopper-medium-v2".
        kwargs: passed on to the environment, for instance `render_mode="rgb_array"`.

    Raises:
        UserError: no such task.
    """
    return gymnasium.make(environment_id(env_name), **kwargs)


def make_lockstep(env_name: str, num_envs: int) -> LockstepEnvs:
    """`num_envs` environments of a D4RL task that step together; see `LockstepEnvs`.

    Raises:
        UserError: no such task, or not one environment at least.
    """
    return LockstepEnvs(make(env_name), num_envs)


for _name, _entry in (("Hopper", D4RLHopper), ("HalfCheetah", D4RLHalfCheetah), ("Walker2d", D4RLWalker2d)):
    gymnasium.register(f"D4RL/{_name}-v2", entry_point=_entry, max_episode_steps=LOCOMOTION_STEPS)
warn_of_version()
