"""How far one control step is from D4RL's original: `python -m benchmarks.fidelity.physics [--json]`.

For the installed MuJoCo it prints, per environment, the largest error of positions and velocities over recorded
steps of the original stack (gym 0.23.1, d4rl 1.1, MuJoCo 2.1.0): of gymnasium's -v4 environment as it comes, its
actions clipped ("stock"; AntMaze, which gymnasium lacks: the same maze with the installed MuJoCo's own weights),
and of this project's ("restored"). In AntMaze also of the steps in which the ant touches no wall ("off_walls"): since
MuJoCo 3.2.7 the contact of capsules with boxes is another one, which cannot be restored.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium
import mujoco
import numpy as np
from gymnasium.envs.mujoco.half_cheetah_v4 import HalfCheetahEnv
from gymnasium.envs.mujoco.hopper_v4 import HopperEnv
from gymnasium.envs.mujoco.walker2d_v4 import Walker2dEnv

from utils import environments
from utils.environments.antmaze import TORQUE, AntMazeEnv
from utils.environments.physics import antmaze_warning
from utils.options import command_line

RECORDINGS = pathlib.Path(__file__).parents[2] / "tests" / "fixtures" / "physics.npz"
FIELDS = ("qpos", "qvel", "warm", "action", "next_qpos", "next_qvel", "obs", "reward", "done")


@dataclasses.dataclass(frozen=True)
class Errors:
    """Largest absolute differences of one control step, and how many terminations differ."""

    qpos: float
    qvel: float
    observation: float
    reward: float
    terminations: int


class _StockAntMaze(AntMazeEnv):
    """AntMaze as the installed MuJoCo weighs it, with actions clipped and scaled without D4RL's rounding."""

    def _initialize_simulation(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
        model = mujoco.MjModel.from_xml_string(self.mjcf())
        return model, mujoco.MjData(model)

    def control(self, actions: np.ndarray, _shape: tuple[int, ...]) -> np.ndarray:
        """Controls of actions in [-1, 1]."""
        return TORQUE * actions.astype(np.float64)


# Environment -> (the registered environment's D4RL task, how to make the stock one).
ENVIRONMENTS: Mapping[str, tuple[str, Callable[[], gymnasium.Env]]] = {
    "hopper": ("hopper-medium-v2", HopperEnv),
    "halfcheetah": ("halfcheetah-medium-v2", HalfCheetahEnv),
    "walker2d": ("walker2d-medium-v2", Walker2dEnv),
    "antmaze-umaze-v0": ("antmaze-umaze-v0", lambda: _StockAntMaze("umaze", False)),
    "antmaze-medium-play-v0": ("antmaze-medium-play-v0", lambda: _StockAntMaze("medium", False)),
    "antmaze-large-diverse-v0": ("antmaze-large-diverse-v0", lambda: _StockAntMaze("large", False)),
}


def load_recording(environment: str, path: pathlib.Path = RECORDINGS) -> dict[str, np.ndarray]:
    """The recorded rows of a key of `ENVIRONMENTS`: `FIELDS`, [n, ...] each, and in AntMaze `goal` [2].

    The file has the keys `<environment>/<field>`.
    """
    with np.load(path) as recordings:
        rows = {field: recordings[f"{environment}/{field}"] for field in FIELDS}
        if f"{environment}/goal" in recordings:
            rows["goal"] = recordings[f"{environment}/goal"]
        elif f"{environment}/goals" in recordings:
            rows["goal"] = recordings[f"{environment}/goals"][0]
    return rows


def one_step_rows(env: gymnasium.Env, recording: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Step `env` once from each recorded state: what it gives, under the names of the recording.

    A state is positions, velocities and the solver's warm start; reset clears what a row before left behind.
    """
    task: Any = env.unwrapped
    results: dict[str, list] = {name: [] for name in ("next_qpos", "next_qvel", "obs", "reward", "done")}
    for qpos, qvel, warm, action in zip(*(recording[name] for name in FIELDS[:4]), strict=True):
        env.reset()
        if "goal" in recording:
            task.target_goal = recording["goal"]
        task.set_state(qpos, qvel)
        task.data.qacc_warmstart[:] = warm
        observation, reward, terminated, _, _ = env.step(action)
        step = (task.data.qpos.copy(), task.data.qvel.copy(), observation, reward, terminated)
        for values, value in zip(results.values(), step, strict=True):
            values.append(value)
    return {name: np.array(values) for name, values in results.items()}


def one_step_errors(env: gymnasium.Env, recording: Mapping[str, np.ndarray]) -> Errors:
    """The largest errors of `env` over a recording's rows."""
    rows = one_step_rows(env, recording)
    errors = [float(np.abs(rows[name] - recording[name]).max()) for name in ("next_qpos", "next_qvel", "obs", "reward")]
    return Errors(errors[0], errors[1], errors[2], errors[3], int((rows["done"] != recording["done"]).sum()))


def off_walls(env: gymnasium.Env, recording: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The rows of an AntMaze recording in whose control step, 0.1 s, the ant touches no wall."""
    task: Any = env.unwrapped
    walls = task.model.geom_type == mujoco.mjtGeom.mjGEOM_BOX
    free = []
    for qpos, qvel, warm, action in zip(*(recording[name] for name in FIELDS[:4]), strict=True):
        env.reset()
        task.set_state(qpos, qvel)
        task.data.qacc_warmstart[:] = warm
        task.data.ctrl[:] = task.control(action, action.shape)
        touched = False
        for _ in range(task.frame_skip + 1):  # contacts are found at the start of a step: one more for the last state
            mujoco.mj_step(task.model, task.data)
            touched |= bool(walls[task.data.contact.geom].any())
        free.append(not touched)
    return {name: array[free] if name in FIELDS else array for name, array in recording.items()}


def measure(environment: str, path: pathlib.Path = RECORDINGS) -> dict[str, Errors]:
    """The errors of one environment: "stock", "restored" and, in AntMaze, "off_walls"."""
    task, stock = ENVIRONMENTS[environment]
    recording = load_recording(environment, path)
    clipped = {**recording, "action": np.clip(recording["action"], -1.0, 1.0)}
    restored = environments.make(task)
    errors = {"stock": one_step_errors(stock(), clipped), "restored": one_step_errors(restored, recording)}
    if "goal" in recording:
        errors["off_walls"] = one_step_errors(restored, off_walls(restored, recording))
    return errors


def main() -> None:
    """Measure all environments and print a table or, with `--json`, one object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fidelity.physics", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--recordings", type=pathlib.Path, default=RECORDINGS, help="default: those of the tests")
    arguments = parser.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a badly wrong stock step may be unstable
        warnings.simplefilter("ignore", UserWarning)  # what another MuJoCo changes is said once, below
        measured = {environment: measure(environment, arguments.recordings) for environment in ENVIRONMENTS}
    if arguments.json:
        kinds = {name: {kind: dataclasses.asdict(e) for kind, e in both.items()} for name, both in measured.items()}
        print(json.dumps(kinds))
        return
    print(f"largest error of one control step against MuJoCo 2.1.0, mujoco {mujoco.__version__}")
    print(f"{'environment':26}{'stock qpos':>12}{'stock qvel':>12}{'restored qpos':>15}{'restored qvel':>15}")
    for name, both in measured.items():
        stock, restored = both["stock"], both["restored"]
        print(f"{name:26}{stock.qpos:12.1e}{stock.qvel:12.1e}{restored.qpos:15.1e}{restored.qvel:15.1e}")
        if "off_walls" in both:
            print(f"{'  off its walls':50}{both['off_walls'].qpos:15.1e}{both['off_walls'].qvel:15.1e}")
    if changes := antmaze_warning(mujoco.__version__):
        print(changes)


if __name__ == "__main__":
    sys.exit(command_line("benchmarks.fidelity.physics", main))
