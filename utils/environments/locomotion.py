"""Hopper, HalfCheetah and Walker2d as D4RL has them: gymnasium's -v4 classes under MuJoCo 2.1.0's inertia.

Observation, reward, termination and start states are those of gym's -v2; actions are handled as in D4RL.
"""

from typing import Any

import numpy as np
from gymnasium.envs.mujoco.half_cheetah_v4 import HalfCheetahEnv
from gymnasium.envs.mujoco.hopper_v4 import HopperEnv
from gymnasium.envs.mujoco.walker2d_v4 import Walker2dEnv

from utils.environments.physics import D4RLPhysics


class _Runner(D4RLPhysics):
    """The reward of running, stated on arrays of n environments as gymnasium states it on one."""

    # gymnasium's settings of the body
    _forward_reward_weight: float
    _ctrl_cost_weight: float
    _healthy_reward: float
    _healthy_z_range: tuple[float, float]
    _healthy_angle_range: tuple[float, float]

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
    """D4RL's Hopper-v2: state 11, action 3, 8 ms per step."""

    metadata = HopperEnv.metadata | D4RLPhysics.metadata

    def _stands(self, qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
        state = np.concatenate([qpos[:, 2:], qvel], axis=1)
        return super()._stands(qpos, qvel) & _between(state, self._healthy_state_range).all(axis=1)


class D4RLWalker2d(_Runner, Walker2dEnv):
    """D4RL's Walker2d-v2: state 17, action 6, 8 ms per step."""

    metadata = Walker2dEnv.metadata | D4RLPhysics.metadata


class D4RLHalfCheetah(_Runner, HalfCheetahEnv):
    """D4RL's HalfCheetah-v2: state 17, action 6, 50 ms per step; it never terminates."""

    metadata = HalfCheetahEnv.metadata | D4RLPhysics.metadata

    def observe(self, qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
        """Observations [n, 17] of positions [n, 9] and velocities [n, 9]."""
        return np.concatenate([qpos[:, 1:], qvel], axis=1)

    def judge(
        self, before: np.ndarray, qpos: np.ndarray, _qvel: Any, controls: np.ndarray, _goals: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rewards and terminations (none) [n] of a step from `before` to `qpos` under `controls`."""
        return self._progress(before, qpos) - self._cost(controls), np.zeros(len(qpos), dtype=bool)
