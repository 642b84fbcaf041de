"""D4RL's AntMaze on today's MuJoCo: mazes, goals, sparse reward.

The ant is gymnasium's, with D4RL's time step, torques and contact softness; the walls are generated from the maze
maps. Maps and constants are facts of D4RL (`d4rl/locomotion/maze_env.py`, `ant.py`, `assets/ant.xml`).
gymnasium-robotics' AntMaze differs in time step, torque, noise, goal radius, frame and observation.
"""

import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from typing import Any

import mujoco
import numpy as np
from gymnasium import spaces, utils
from gymnasium.envs.mujoco.mujoco_env import MujocoEnv

from utils.environments.physics import D4RLPhysics, warn_of_antmaze
from utils.errors import UserError

MAZES: Mapping[str, tuple[str, ...]] = {
    "umaze": (
        "11111",
        "1r001",
        "11101",
        "1g001",
        "11111",
    ),
    "medium": (
        "11111111",
        "1r011001",
        "10010001",
        "11000111",
        "10010001",
        "10100101",
        "100010g1",
        "11111111",
    ),
    "large": (
        "111111111111",
        "1r0001000001",
        "101101010101",
        "100000010001",
        "101111011101",
        "100101000001",
        "110101010111",
        "100100010g01",
        "111111111111",
    ),
}
"""1 wall, 0 free, r start, g goal; rows run along +y, columns along +x. "play" and "diverse" share a maze."""

CELL = 4.0
"""Side of a cell in metres; the start cell's centre is the origin."""
WALL_HEIGHT = 2.0
GOAL_RADIUS = 0.5
TIMESTEP = 0.02
FRAME_SKIP = 5
TORQUE = 30.0
RESET_NOISE = 0.1


def cell_center(maze: str, row: int, column: int) -> np.ndarray:
    """World coordinates [2] of a cell's centre, in metres."""
    start_row, start_column = _find(MAZES[maze], "r")
    return CELL * np.array([column - start_column, row - start_row], dtype=np.float64)


def draw_goal(maze: str, rng: np.random.Generator) -> np.ndarray:
    """Draw a goal [2], in metres: the goal cell's centre + U(0, 1) + U(0, 0.5) per axis, as D4RL does."""
    center = cell_center(maze, *_find(MAZES[maze], "g"))
    return np.maximum(center + rng.uniform(0, 1, 2) + rng.uniform(0, 0.5, 2), 0.0)


def _find(layout: Sequence[str], kind: str) -> tuple[int, int]:
    return next((row, line.index(kind)) for row, line in enumerate(layout) if kind in line)


def _first_child(rng: np.random.Generator) -> np.random.Generator:
    """The generator that `rng` would spawn first, without spawning it: a function of `rng`'s seed alone."""
    seeds: Any = rng.bit_generator.seed_seq
    return np.random.default_rng(np.random.SeedSequence(seeds.entropy, spawn_key=(*seeds.spawn_key, 0)))


class AntMazeEnv(D4RLPhysics, utils.EzPickle):
    """D4RL's AntMaze: state 29 (qpos, qvel), action 8 in [-1, 1], 0.1 s per step, reward 1 and end at the goal.

    D4RL drew goals from NumPy's global generator. Here they come from generators spawned by the environment's own,
    so that they are seeded with it and the start states stay those that D4RL draws from the same seed. Version 2
    draws a goal at every reset. Version 0 draws one per construction: the first reset settles it (with that reset's
    seed), later ones keep it, and so does setting `target_goal` by hand.
    """

    metadata = D4RLPhysics.metadata | {"render_fps": round(1 / (TIMESTEP * FRAME_SKIP))}

    def __init__(self, maze: str, goal_every_reset: bool, **kwargs: Any) -> None:
        """Build the maze of a key of `MAZES`; `goal_every_reset` is True in version 2, False in version 0.

        `kwargs` are gymnasium's `MujocoEnv` options, such as `render_mode`, `width` and `height`. UserError where there
        is no such maze. Warns where the installed MuJoCo moves the ant otherwise than D4RL's.
        """
        utils.EzPickle.__init__(self, maze, goal_every_reset, **kwargs)
        if maze not in MAZES:
            raise UserError(f"unknown maze {maze!r}; known are {', '.join(MAZES)}")
        warn_of_antmaze()
        self.maze = maze
        self.goal_every_reset = goal_every_reset
        observation_space = spaces.Box(-np.inf, np.inf, (29,), np.float64)
        rows, columns = len(MAZES[maze]), len(MAZES[maze][0])
        camera = {
            "lookat": np.append((cell_center(maze, 0, 0) + cell_center(maze, rows - 1, columns - 1)) / 2, 0.0),
            "distance": 1.3 * CELL * max(rows, columns),
            "azimuth": 90.0,
            "elevation": -70.0,
        }
        kwargs.setdefault("default_camera_config", camera)
        kwargs.setdefault("camera_id", -1)  # the free camera, set up above, and not the ant's own
        MujocoEnv.__init__(self, "ant.xml", FRAME_SKIP, observation_space, **kwargs)
        self.target_goal = draw_goal(maze, self.np_random.spawn(1)[0])
        self._goal_settled = False

    @property
    def target_goal(self) -> np.ndarray:
        """The goal's position [2], in metres."""
        return self._target_goal.copy()

    @target_goal.setter
    def target_goal(self, goal: Sequence[float] | np.ndarray) -> None:
        goal = np.array(goal, dtype=np.float64)
        if goal.shape != (2,) or not np.isfinite(goal).all():
            raise UserError(f"target_goal must be two finite numbers, x and y in metres, not {goal.tolist()}")
        self._target_goal = goal
        self._goal_settled = True

    def unsettle_goal(self) -> None:
        """Let the next reset draw a goal, as if the environment were new."""
        self._goal_settled = False

    def mjcf(self) -> str:
        """The MJCF text of gymnasium's ant with D4RL's settings, in its maze."""
        root = ElementTree.fromstring(super().mjcf())
        _element(root, "option").set("timestep", str(TIMESTEP))
        default = _element(root, "default/geom")
        default.set("solref", ".02 1")
        default.set("solimp", ".8 .8 .01")
        for motor in root.iter("motor"):
            motor.set("gear", "1")
            motor.set("ctrlrange", f"{-TORQUE} {TORQUE}")
        _element(root, "worldbody").extend([*self._walls(), _goal_marker()])
        return ElementTree.tostring(root, encoding="unicode")

    def _walls(self) -> list[ElementTree.Element]:
        cells = [(i, j) for i, line in enumerate(MAZES[self.maze]) for j, kind in enumerate(line) if kind == "1"]
        walls = []
        for row, column in cells:
            x, y = cell_center(self.maze, row, column)
            wall = {
                "name": f"block_{row}_{column}",
                "type": "box",
                "pos": f"{x} {y} {WALL_HEIGHT / 2}",
                "size": f"{CELL / 2} {CELL / 2} {WALL_HEIGHT / 2}",
                "contype": "1",
                "conaffinity": "1",
                "rgba": "0.7 0.5 0.3 1",
            }
            walls.append(ElementTree.Element("geom", wall))
        return walls

    def set_state(self, qpos: np.ndarray, qvel: np.ndarray) -> None:
        """Set positions [15] and velocities [14]; the torso's quaternion is normalised, as 2.1.0 did."""
        qpos = np.array(qpos, dtype=np.float64)
        mujoco.mj_normalizeQuat(self.model, qpos)
        super().set_state(qpos, np.asarray(qvel))

    def reset_model(self) -> np.ndarray:
        """Draw a start state with D4RL's noise and, where one is due, a goal."""
        qpos = self.init_qpos + self.np_random.uniform(-RESET_NOISE, RESET_NOISE, self.model.nq)
        qvel = self.init_qvel + RESET_NOISE * self.np_random.standard_normal(self.model.nv)
        self.set_state(qpos, qvel)
        if self.goal_every_reset:
            self.target_goal = draw_goal(self.maze, self.np_random.spawn(1)[0])
        elif not self._goal_settled:
            self.target_goal = draw_goal(self.maze, _first_child(self.np_random))
        return self._get_obs()

    def _get_obs(self) -> np.ndarray:
        return np.concatenate([self.data.qpos, self.data.qvel])

    def _step_task(self, control: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.do_simulation(control, self.frame_skip)
        reward, terminated = self.judge(None, self.data.qpos[None], None, None, self._target_goal[None])
        return self._get_obs(), reward[0], terminated[0], False, {}

    def observe(self, qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
        """Observations [n, 29] of positions [n, 15] and velocities [n, 14]."""
        return np.concatenate([qpos, qvel], axis=1)

    def judge(
        self, _before: Any, qpos: np.ndarray, _qvel: Any, _controls: Any, goals: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rewards and terminations [n]: 1 and True within `GOAL_RADIUS` of the goals [n, 2]."""
        arrived = np.linalg.norm(qpos[:, :2] - goals, axis=1) <= GOAL_RADIUS
        return arrived.astype(np.float64), arrived

    def render(self) -> np.ndarray | None:
        """A frame with the goal as a green disc; see `D4RLPhysics.render`."""
        self.data.site("goal").xpos[:2] = self._target_goal  # in place: a forward pass would touch the warm start
        return super().render()


def _element(root: ElementTree.Element, path: str) -> ElementTree.Element:
    found = root.find(path)
    assert found is not None, f"gymnasium's ant.xml has no {path}"
    return found


def _goal_marker() -> ElementTree.Element:
    marker = {"name": "goal", "type": "cylinder", "size": f"{GOAL_RADIUS} 0.01", "rgba": "0.1 0.8 0.2 1"}
    return ElementTree.Element("site", marker)
