"""The classic backend: gym 0.23.1, d4rl 1.1 and MuJoCo 2.1.0 through mujoco-py, where the user has them.

It offers the lockstep interface of `utils.environments`, so `--backend d4rl` changes where an episode
is played and nothing else. It is what the project's own environments are checked against
(`benchmarks.fidelity.crosscheck`); they are faster and need none of this. `install_classic.sh` builds a Python
environment that has it all.

gym and d4rl are imported when the first environment is made: this module imports without them.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.files import first_line

FRAME = 480
"""Pixels in width and height of a frame."""
INSTALL_HINT = (
    "build a Python environment that has it with 'bash utils/environments/install_classic.sh VENV' and run "
    "'VENV/bin/python run.py --backend d4rl ...', or leave --backend at its default"
)


def make_lockstep(env_name: str, num_envs: int) -> ClassicEnvs:
    """`num_envs` original environments of one D4RL id, stepped together.

    Raises UserError (one line) where gym, d4rl or mujoco-py cannot be loaded, or d4rl does not know the id.
    """
    return ClassicEnvs(env_name, num_envs)


class ClassicEnvs:
    """N environments of a kind in D4RL's original stack, one after another in this process.

    `states` are float64 `[N, state_dim]` and actions lie in [-1, 1]. A row that does not run is not
    stepped: it keeps its last state, with reward 0 and neither flag set.

    `unstable[i]` counts the episodes of row i that MuJoCo broke off (mujoco-py raises on NaN or huge
    accelerations); such an episode ends as terminated, with reward 0 for the broken step and a warning.
    """

    def __init__(self, env_name: str, num_envs: int) -> None:
        if num_envs < 1:
            raise UserError(f"num_envs is {num_envs}; at least one environment is needed")
        self._stack = _load_stack()
        with _as_d4rl_expects(0):
            self._envs = [_make(self._stack.gym, env_name) for _ in range(num_envs)]
        # Around the environment that owns the generator stand d4rl's NormalizedBoxEnv, then gym's wrappers.
        self.bases: list[Any] = [env.unwrapped.wrapped_env for env in self._envs]
        self._is_maze = hasattr(self.bases[0], "set_target")
        self.env_name = env_name
        self.num_envs = num_envs
        self.state_dim = int(self._envs[0].observation_space.shape[0])
        self.action_dim = int(self._envs[0].action_space.shape[0])
        self.max_action = float(self._envs[0].action_space.high[0])
        self.max_episode_steps = int(self._envs[0].spec.max_episode_steps)
        self.unstable = np.zeros(num_envs, dtype=np.int64)
        self._states = np.zeros((num_envs, self.state_dim))

    @property
    def goals(self) -> np.ndarray | None:
        """AntMaze's goals, float64 [N, 2] in metres (a copy); None in other tasks."""
        return np.array([base.target_goal for base in self.bases], dtype=np.float64) if self._is_maze else None

    def reset(self, rngs: Sequence[np.random.Generator]) -> np.ndarray:
        """Start an episode in every row, in order -> states `[N, state_dim]`. Row i draws from `rngs[i]`.

        A generator stands for one seeded environment and may stand in several rows: they then draw from it one after
        another, as successive resets of that environment do. So they share AntMaze-v0's one goal.
        """
        if len(rngs) != self.num_envs:
            raise UserError(f"reset got {len(rngs)} generators for {self.num_envs} environments")
        for i, rng in enumerate(rngs):
            self.reset_one(i, rng)
        return self._states.copy()

    def reset_one(self, i: int, rng: np.random.Generator) -> np.ndarray:
        """Start an episode in row i with draws from `rng` -> its first state `[state_dim]`.

        `numpy.random.default_rng(s)` gives the start states of gym 0.23.1's `env.reset(seed=s)`. AntMaze's goals
        are drawn by D4RL from NumPy's global generator, which is seeded for the time of the call and put back
        afterwards; the seed is of `rng`'s kin, so it takes nothing from the start states' draws. A v2 maze draws a
        goal at every reset, seeded by a generator spawned from `rng`; a v0 maze has one goal for each `rng`
        (D4RL: one for each construction, which no seed reaches).
        """
        # RandomNumberGenerator adds the old names that d4rl calls; the stream is the bit generator's.
        base, env = self.bases[i], self._envs[i]
        base.np_random = self._stack.generator(rng.bit_generator)
        if not self._is_maze:
            self._states[i] = env.reset()
            return self._states[i].copy()
        with _as_d4rl_expects(_goal_seed(rng, spawn=base.v2_resets)):
            if not base.v2_resets:
                base.set_target()
            self._states[i] = env.reset()
        return self._states[i].copy()

    def step(self, actions: np.ndarray, running: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """One control step of the rows that run -> states `[N, S]`, rewards, terminated, truncated `[N]`.

        `actions` [N, action_dim] are given to D4RL in the type they come in (its rescaling to the actuators' range
        rounds float32 actions to 1e-7, as it does in any program that uses D4RL); `running` is [N] bool.
        A broken episode is warned of. Raises UserError for a wrong shape, or an action that is NaN or infinite in a
        row that runs.
        """
        actions, running = np.asarray(actions), np.asarray(running, dtype=bool)
        _check_actions(actions, running, (self.num_envs, self.action_dim))
        rewards = np.zeros(self.num_envs)
        terminated = np.zeros(self.num_envs, dtype=bool)
        truncated = np.zeros(self.num_envs, dtype=bool)
        for i in np.flatnonzero(running):
            try:
                self._states[i], rewards[i], done, info = self._envs[i].step(actions[i])
            except self._stack.instability as error:
                self.unstable[i] += 1
                terminated[i] = True
                warnings.warn(
                    f"the simulation of environment {i} became unstable: its episode ends ({error})",
                    RuntimeWarning,
                    stacklevel=2,
                )
            else:
                # gym 0.23.1 has one flag for both ends; its time limit leaves a note, false where both fell together.
                truncated[i] = "TimeLimit.truncated" in info
                terminated[i] = done and not info.get("TimeLimit.truncated", False)
        return self._states.copy(), rewards, terminated, truncated

    @property
    def fps(self) -> float:
        """Control steps in a simulated second."""
        return 1 / float(self.bases[0].dt)

    def frame(self) -> np.ndarray:
        """Row 0 as it is now, uint8 [height, width, 3]; a maze from above, its goal a green box.

        Raises UserError where mujoco-py cannot draw offscreen here.
        """
        base, size = self.bases[0], {"width": FRAME, "height": FRAME}
        try:
            if not self._is_maze:
                return np.asarray(base.render(mode="rgb_array", **size))
            viewer, model = base._get_viewer("rgb_array"), base.model
            viewer.cam.lookat[:] = model.stat.center
            viewer.cam.distance, viewer.cam.elevation, viewer.cam.azimuth = 1.2 * model.stat.extent, -70, 90
            viewer._markers.clear()
            viewer.add_marker(pos=np.append(base.target_goal, 0.5), size=np.full(3, 0.5), label="",
                              rgba=np.array([0.1, 0.8, 0.2, 1.0]))  # fmt: skip
            # -1: this camera, and not the one that follows the ant.
            return np.asarray(base.render(mode="rgb_array", camera_id=-1, **size))
        except Exception as error:  # OpenGL's, the compiler's or mujoco-py's own
            raise UserError(f"mujoco-py cannot draw here ({first_line(error)}); it needs libosmesa6-dev") from error

    def close(self) -> None:
        """Free the simulations. The environments cannot be used afterwards."""
        for env in self._envs:
            env.close()
        self._envs, self.bases = [], []


def _load_stack() -> SimpleNamespace:
    """The original stack: `gym`, gym's `generator` class, and mujoco-py's `instability`."""
    # Silent about the task suites that are not installed (mjrl, flow, carla). No build against a GPU's GL.
    os.environ.setdefault("D4RL_SUPPRESS_IMPORT_ERROR", "1")
    os.environ.setdefault("MUJOCO_PY_FORCE_CPU", "1")
    try:
        # gym 0.23.1 prints a note on its age, and mujoco-py loads its extension in a deprecated way.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            # `import d4rl` stops at the first suite whose dependencies are missing: name those needed here.
            import d4rl.gym_mujoco
            import d4rl.locomotion  # noqa: F401
            import gym
            import mujoco_py
            from gym.utils import seeding
    # Whatever a third party's import, or the compiler it calls, may raise: one cause, one remedy.
    except Exception as error:
        raise UserError(
            f"--backend d4rl needs gym 0.23.1, d4rl 1.1 and mujoco-py, which cannot be loaded here "
            f"({type(error).__name__}: {first_line(error)}): {INSTALL_HINT}"
        ) from error
    # Errors only: what d4rl calls is "deprecated" in gym 0.23.1, which says so at every call.
    gym.logger.set_level(gym.logger.ERROR)
    return SimpleNamespace(gym=gym, generator=seeding.RandomNumberGenerator, instability=mujoco_py.MujocoException)


def _make(gym: Any, env_name: str) -> Any:
    """`gym.make` without the notes on deprecation that d4rl gives for v0 ids."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return gym.make(env_name)
    except gym.error.Error as error:
        raise UserError(f"--backend d4rl: d4rl 1.1 has no environment {env_name!r} ({error})") from error


def _check_actions(actions: np.ndarray, running: np.ndarray, shape: tuple[int, int]) -> None:
    if actions.shape != shape or running.shape != shape[:1]:
        raise UserError(
            f"step got actions {actions.shape} and running {running.shape}; expected {shape} and {shape[:1]}"
        )
    if not np.isfinite(actions[running]).all():
        raise UserError("an action is NaN or infinite; check the policy's weights and the observations it was given")


def _goal_seed(rng: np.random.Generator, spawn: bool) -> int:
    """A seed from a child of `rng`: a new one each time (spawn), or always the first; no draw of `rng` is used."""
    parent: Any = rng.bit_generator.seed_seq
    first = np.random.SeedSequence(parent.entropy, spawn_key=(*parent.spawn_key, 0))
    return int((parent.spawn(1)[0] if spawn else first).generate_state(1)[0])


@contextlib.contextmanager
def _as_d4rl_expects(seed: int) -> Iterator[None]:
    """Around a construction or reset of d4rl's: its goal draws seeded, its prints dropped, its files removed.

    D4RL draws goals from NumPy's global generator (seeded here, restored afterwards), prints
    each goal, and leaves an open temporary file per maze: a large evaluation would run out of descriptors.
    """
    state, make_file = np.random.get_state(), tempfile.mkstemp
    paths: list[str] = []

    def make_closed_file(*args: Any, **kwargs: Any) -> tuple[int, str]:
        descriptor, path = make_file(*args, **kwargs)
        os.close(descriptor)
        paths.append(path)
        return descriptor, path

    np.random.seed(seed)
    tempfile.mkstemp = make_closed_file  # type: ignore[assignment]  # for the time of the call
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        np.random.set_state(state)
        tempfile.mkstemp = make_file
        for path in paths:
            os.unlink(path)
