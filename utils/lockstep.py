"""Many environments of one kind, stepped together: one compiled model, one `MjData` each, one thread a core."""

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gymnasium
import mujoco
import numpy as np

from utils.errors import UserError
from utils.physics import count_instabilities

__all__ = ["LockstepEnvs"]


class LockstepEnvs:
    """N environments that step together and give, bit for bit, what N single ones give.

    The prototype lends its model, its reset and its vectorised rules; only `mj_step`, which releases Python's lock,
    runs a row at a time, spread over the cores. (`mujoco.rollout` would save those calls, but does not hand back
    the warm start of each row, without which the next step differs.)

    Attributes:
        num_envs: N.
        state_dim, action_dim, max_action, max_episode_steps: the task's sizes and limits.
        unstable: int [N], the unstable episodes of each row since construction.
        goals: float64 [N, 2], AntMaze's goals (None elsewhere).
    """

    def __init__(self, prototype: gymnasium.Env, num_envs: int) -> None:
        """Take over a registered environment; it must not be used by anyone else from here on.

        Args:
            prototype: one of this project's registered environments, with its time limit.
            num_envs: N >= 1.

        Raises:
            UserError: num_envs < 1.
        """
        if num_envs < 1:
            raise UserError(f"num_envs is {num_envs}; at least one environment is needed")
        self._prototype = prototype
        self._task: Any = prototype.unwrapped
        self.num_envs = num_envs
        self.state_dim = int(np.prod(prototype.observation_space.shape))
        self.action_dim = int(np.prod(prototype.action_space.shape))
        self.max_action = float(prototype.action_space.high.max())
        self.max_episode_steps = int(prototype.spec.max_episode_steps)
        model = self._task.model
        self._datas = [mujoco.MjData(model) for _ in range(num_envs)]
        self._qpos = np.zeros((num_envs, model.nq))
        self._qvel = np.zeros((num_envs, model.nv))
        self._states = np.zeros((num_envs, self.state_dim))
        self._elapsed = np.zeros(num_envs, dtype=np.int64)
        self.unstable = np.zeros(num_envs, dtype=np.int64)
        self._workers = min(num_envs, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(self._workers) if self._workers > 1 else None

    def reset(self, rngs: Sequence[np.random.Generator]) -> np.ndarray:
        """Start every row anew, in order.

        The same generator may stand in several rows: they then draw from it one after another, exactly as as many
        resets of one seeded environment do (`gymnasium.utils.seeding.np_random(seed)[0]` is what `reset(seed=seed)`
        and gym's `env.seed(seed)` make).

        Args:
            rngs: one generator a row.

        Returns:
            states, float64 [N, state_dim].

        Raises:
            UserError: not one generator a row.
        """
        if len(rngs) != self.num_envs:
            raise UserError(f"reset got {len(rngs)} generators for {self.num_envs} environments")
        for row, rng in enumerate(rngs):
            self.reset_one(row, rng)
        return self._states.copy()

    def reset_one(self, row: int, rng: np.random.Generator) -> np.ndarray:
        """Start one row anew while the others go on; returns its state, float64 [state_dim]."""
        task, data = self._task, self._datas[row]
        task.data, task.np_random = data, rng
        observation, _ = task.reset()
        self._qpos[row], self._qvel[row] = data.qpos, data.qvel
        self._states[row] = observation
        self._elapsed[row] = 0
        return self._states[row].copy()

    def step(
        self, actions: np.ndarray, running: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Step the running rows; the others keep their last state and get reward 0, terminated and truncated False.

        A row whose simulation becomes unstable keeps its last state, gets reward 0, is terminated, warned of and
        counted in `unstable`.

        Args:
            actions: [N, action_dim] in [-1, 1]; values beyond are clipped.
            running: bool [N].

        Returns:
            states float64 [N, state_dim], rewards float64 [N], terminated bool [N], truncated bool [N].

        Raises:
            UserError: a running row's action is NaN or infinite, or a shape is wrong.
        """
        actions, running = np.asarray(actions), np.asarray(running)
        if actions.shape != (self.num_envs, self.action_dim) or running.shape != (self.num_envs,):
            raise UserError(
                f"step got actions {actions.shape} and running {running.shape}; "
                f"expected {(self.num_envs, self.action_dim)} and {(self.num_envs,)}"
            )
        rows = np.flatnonzero(running)
        rewards = np.zeros(self.num_envs)
        terminated, truncated = np.zeros((2, self.num_envs), dtype=bool)
        if rows.size == 0:
            return self._states.copy(), rewards, terminated, truncated
        controls = self._task.control(actions[rows], (rows.size, self.action_dim))
        before = self._qpos[rows]
        self._simulate(rows, controls)
        qpos, qvel = self._qpos[rows], self._qvel[rows]
        states = self._task.observe(qpos, qvel)
        rewards[rows], terminated[rows] = self._task.judge(before, qpos, qvel, controls)
        self._elapsed[rows] += 1
        truncated[rows] = self._elapsed[rows] >= self.max_episode_steps
        bad = self._unstable_rows(rows, states)
        if bad.any():
            self._end_unstable(rows[bad])
            rewards[rows[bad]], terminated[rows[bad]] = 0.0, True
        self._states[rows[~bad]] = states[~bad]
        return self._states.copy(), rewards, terminated, truncated

    def close(self) -> None:
        """End the threads and the prototype."""
        if self._pool is not None:
            self._pool.shutdown()
        self._prototype.close()

    def _simulate(self, rows: np.ndarray, controls: np.ndarray) -> None:
        if self._pool is None:
            self._simulate_rows(rows, controls)
            return
        parts = np.array_split(np.arange(rows.size), self._workers)
        done = [self._pool.submit(self._simulate_rows, rows[part], controls[part]) for part in parts[1:]]
        self._simulate_rows(rows[parts[0]], controls[parts[0]])
        for future in done:
            future.result()

    def _simulate_rows(self, rows: np.ndarray, controls: np.ndarray) -> None:
        model, frame_skip = self._task.model, self._task.frame_skip
        for row, control in zip(rows, controls, strict=True):
            data = self._datas[row]
            data.ctrl[:] = control
            mujoco.mj_step(model, data, frame_skip)
            self._qpos[row], self._qvel[row] = data.qpos, data.qvel

    def _unstable_rows(self, rows: np.ndarray, states: np.ndarray) -> np.ndarray:
        warned = np.array([count_instabilities(self._datas[row]) > 0 for row in rows])
        return warned | ~np.isfinite(states).all(axis=1)

    def _end_unstable(self, rows: np.ndarray) -> None:
        self.unstable[rows] += 1
        warnings.warn(
            f"the simulation of environment {rows.tolist()} became unstable: its episode ends here, with reward 0",
            RuntimeWarning,
            stacklevel=3,
        )
