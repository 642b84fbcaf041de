"""Many environments of one kind, stepped together: one compiled model, an `MjData` each, a thread per core."""

import os
import queue
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import gymnasium
import mujoco
import numpy as np

from utils.environments.physics import instabilities
from utils.errors import UserError


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Team:
    """This thread and some helpers. `concurrent.futures` does the same, at 0.1 ms a call."""

    def __init__(self, helpers: int) -> None:
        self._calls: queue.SimpleQueue = queue.SimpleQueue()
        self._errors: queue.SimpleQueue = queue.SimpleQueue()
        self._helpers = [
            threading.Thread(target=_help, args=(self._calls, self._errors), daemon=True) for _ in range(helpers)
        ]
        for helper in self._helpers:
            helper.start()
        self.close = weakref.finalize(self, _dismiss, self._calls, helpers)

    def do(self, work: Callable[[], None]) -> None:
        """Call `work` in this thread and in every helper; return when all calls have ended.

        A helper that did not get to its call while this thread worked is let off, so that a busy machine, which
        wakes helpers late, makes nobody wait.
        """
        for _ in self._helpers:
            self._calls.put(work)
        errors = [_error_of(work)]
        for _ in self._helpers:
            try:
                self._calls.get_nowait()
            except queue.Empty:
                errors.append(self._errors.get())
        for error in errors:
            if error is not None:
                raise error


def _help(calls: queue.SimpleQueue, errors: queue.SimpleQueue) -> None:
    while (work := calls.get()) is not None:
        errors.put(_error_of(work))
        del work  # what it refers to may have to go while this thread waits


def _error_of(work: Callable[[], None]) -> Exception | None:
    try:
        work()
    except Exception as error:  # raised again by the thread that asked
        return error
    return None


def _dismiss(calls: queue.SimpleQueue, helpers: int) -> None:
    for _ in range(helpers):
        calls.put(None)


class LockstepEnvs:
    """N environments that step together and give, bit for bit, what N single ones give.

    A registered environment lends its model, its reset and its rules for arrays; only `mj_step`, which releases
    Python's lock, runs a row at a time, spread over the cores. (`mujoco.rollout` would save those calls, but does
    not hand back each row's warm start, without which the next step differs.)

    num_envs is N; state_dim, action_dim, max_action and max_episode_steps are the task's sizes and limits; unstable,
    int [N], counts the unstable episodes of each row since construction.
    """

    def __init__(self, prototype: gymnasium.Env, num_envs: int, threads: int | None = None) -> None:
        """Take over an environment of `utils.environments`, with its time limit; nobody else may use it from here on.

        `threads` simulate; by default as many as the cores that this process may use, as long as each has two rows
        at least. UserError where num_envs or threads is less than 1.
        """
        if num_envs < 1 or (threads is not None and threads < 1):
            raise UserError(f"num_envs is {num_envs} and threads {threads}; at least one of each is needed")
        self._prototype = cast(Any, prototype)  # gymnasium's types know nothing of boxes, time limits and models
        self._task = self._prototype.unwrapped
        self.num_envs = num_envs
        self.state_dim = self._prototype.observation_space.shape[0]
        self.action_dim = self._prototype.action_space.shape[0]
        self.max_action = float(self._prototype.action_space.high[0])
        self.max_episode_steps = int(self._prototype.spec.max_episode_steps)
        model = self._task.model
        self._datas = [mujoco.MjData(model) for _ in range(num_envs)]
        # Views, because asking MuJoCo's bindings for an array anew costs as much as a tenth of a step.
        self._views = [(data, data.ctrl, data.qpos, data.qvel, instabilities(data)) for data in self._datas]
        self._qpos = np.zeros((num_envs, model.nq))
        self._qvel = np.zeros((num_envs, model.nv))
        self._states = np.zeros((num_envs, self.state_dim))
        self._goals = np.zeros((num_envs, 2)) if hasattr(self._task, "target_goal") else None
        self._elapsed = np.zeros(num_envs, dtype=np.int64)
        self.unstable = np.zeros(num_envs, dtype=np.int64)
        self._team = _Team((threads or max(1, min(_cores(), num_envs // 2))) - 1)

    @property
    def goals(self) -> np.ndarray | None:
        """AntMaze's goals, float64 [N, 2] in metres (a copy); None in other tasks."""
        return None if self._goals is None else self._goals.copy()

    def reset(self, rngs: Sequence[np.random.Generator]) -> np.ndarray:
        """Start every row anew, in order.

        A generator stands for one seeded environment (`gymnasium.utils.seeding.np_random(seed)[0]` is what
        `reset(seed=seed)` and gym's `env.seed(seed)` make) and may stand in several rows: they then draw from it
        one after another, as successive resets of that environment do. So they share AntMaze-v0's one goal.

        Returns the states, float64 [N, state_dim]. UserError where there is not one generator per row.
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
        if self._goals is not None:
            task.unsettle_goal()
        self._states[row], _ = task.reset()
        self._qpos[row], self._qvel[row] = data.qpos, data.qvel
        if self._goals is not None:
            self._goals[row] = task.target_goal
        self._elapsed[row] = 0
        return self._states[row].copy()

    def step(self, actions: np.ndarray, running: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Step the running rows; the others keep their last state and get reward 0 and False.

        A row whose simulation becomes unstable keeps its last state, gets reward 0, is terminated, warned of and
        counted in `unstable`.

        `actions` [N, action_dim] in [-1, 1], clipped; `running` bool [N]. Returns states float64 [N, state_dim],
        rewards float64 [N], terminated and truncated bool [N]. UserError where a running row's action is NaN or
        infinite, or a shape is wrong.
        """
        actions, running = np.asarray(actions), np.asarray(running, dtype=bool)
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
        goals = None if self._goals is None else self._goals[rows]
        rewards[rows], terminated[rows] = self._task.judge(before, qpos, qvel, controls, goals)
        self._elapsed[rows] += 1
        truncated[rows] = self._elapsed[rows] >= self.max_episode_steps
        bad = self._unstable(rows, states)
        rewards[rows[bad]], terminated[rows[bad]] = 0.0, True
        self._states[rows[~bad]] = states[~bad]
        return self._states.copy(), rewards, terminated, truncated

    @property
    def fps(self) -> float:
        """Control steps in a simulated second."""
        return 1 / float(self._task.dt)

    def frame(self) -> np.ndarray:
        """Row 0 as it is now, uint8 [height, width, 3]; the prototype must have a `render_mode`.

        UserError where OpenGL cannot draw offscreen here.
        """
        self._task.data = self._task.mujoco_renderer.data = self._datas[0]
        if self._goals is not None:
            self._task.target_goal = self._goals[0]
        return np.asarray(self._task.render())

    def close(self) -> None:
        """End the threads and the prototype."""
        self._team.close()
        self._prototype.close()

    def _simulate(self, rows: np.ndarray, controls: np.ndarray) -> None:
        """Simulate one step of the rows; each thread takes the next one until none is left."""
        model, frame_skip, views = self._task.model, self._task.frame_skip, self._views
        jobs = iter(list(zip(rows.tolist(), controls, strict=True)))

        def work() -> None:
            for row, control in jobs:  # a list's iterator hands each of its items to one thread only
                data, ctrl, *_ = views[row]
                ctrl[:] = control
                mujoco.mj_step(model, data, frame_skip)

        self._team.do(work)
        for row in rows.tolist():
            _, _, self._qpos[row], self._qvel[row], _ = views[row]

    def _unstable(self, rows: np.ndarray, states: np.ndarray) -> np.ndarray:
        """Find, count and warn of the rows whose simulation was unstable: bool [n]."""
        bad = ~np.isfinite(states).all(axis=1) | [self._views[row][-1].any() for row in rows.tolist()]
        if bad.any():
            self.unstable[rows[bad]] += 1
            warnings.warn(
                f"the simulation of environments {rows[bad].tolist()} became unstable: their episodes end",
                RuntimeWarning,
                stacklevel=3,
            )
        return bad
