"""AntMaze's behaviour: a goal-directed gait under a shortest-path planner, as D4RL collected its AntMaze sets.

D4RL (`scripts/generation/generate_ant_maze_datasets.py`, `d4rl/locomotion/maze_env.py`) draws a goal an episode,
plans over the maze's cells, points a low-level policy towards the next waypoint, and adds noise of 0.2 to its
actions. Which cells may be starts and goals makes the sets: the plain umaze starts at the start cell and goes to the
goal cell; *play* starts in any cell that is no goal and goes to one of a few hand-picked cells; *diverse* starts and
goes anywhere. Rewards are relabelled: all of a set's are those of one goal, drawn as the environment draws its own.
Two things are not D4RL's. The planner aims along the legs of the path instead of at random points of the next cell.
And an episode ends at the relabelling goal, as in evaluation; D4RL's go on to the time limit, with a terminal a row
while the ant stays there. At any other goal the ant stays until the time limit, as in D4RL.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec

from utils.antmaze import CELL, MAX_STEPS, MAZES, AntMazeEnv, cell_center
from utils.lockstep import LockstepEnvs
from utils.policies import Policy

__all__ = [
    "ACTION_NOISE",
    "Navigator",
    "Planner",
    "gait_features",
    "goal_cells",
    "maze_envs",
    "start_cells",
]

ACTION_NOISE = 0.2
LOOKAHEAD = 1.5
"""Metres along the path at which the ant aims: walks down the middle of corridors, cuts corners by less than a leg."""

PLAY_GOALS: Mapping[str, tuple[tuple[int, int], ...]] = {
    "medium": ((2, 6), (5, 1), (6, 5)),
    "large": ((1, 6), (3, 5), (3, 10), (5, 2), (7, 4), (7, 6), (7, 9)),
}
"""(row, column) of the goals marked in D4RL's BIG_MAZE and HARDEST_MAZE, the maps that *play* was collected in."""

Cell = tuple[int, int]


def free_cells(maze: str) -> list[Cell]:
    """(row, column) of every cell that is no wall, row by row."""
    return [(i, j) for i, line in enumerate(MAZES[maze]) for j, kind in enumerate(line) if kind != "1"]


def goal_cells(maze: str, style: str) -> list[Cell]:
    """Where the behaviour's goals lie; style is "", "play" or "diverse"."""
    if style == "diverse":
        return free_cells(maze)
    if style == "play":
        return list(PLAY_GOALS[maze])
    return [(i, j) for i, j in free_cells(maze) if MAZES[maze][i][j] == "g"]


def start_cells(maze: str, style: str) -> list[Cell]:
    """Where episodes start: the start cell alone (style ""), else any free cell; in *play* no goal's cell."""
    if style == "":
        return [(i, j) for i, j in free_cells(maze) if MAZES[maze][i][j] == "r"]
    goals = goal_cells(maze, style) if style == "play" else []
    return [cell for cell in free_cells(maze) if cell not in goals]


def draw_goal(maze: str, cells: Sequence[Cell], rng: np.random.Generator) -> np.ndarray:
    """A goal [2] in one of the cells: centre + U(0, 1) + U(0, 0.5) an axis, not below 0, as D4RL draws it."""
    center = cell_center(maze, *cells[rng.integers(len(cells))])
    return np.maximum(center + rng.uniform(0, 1, 2) + rng.uniform(0, 0.5, 2), 0.0)


class _CollectionMaze(AntMazeEnv):
    """AntMaze as data are collected in it: starts drawn among cells, one goal for the rewards of a whole set."""

    def __init__(self, maze: str, starts: Sequence[Cell], reward_goal: Sequence[float], **kwargs: Any) -> None:
        self._starts = list(starts)
        self._reward_goal = reward_goal
        super().__init__(maze, goal_every_reset=False, **kwargs)

    def reset_model(self) -> np.ndarray:
        observation = super().reset_model()
        self.target_goal = self._reward_goal
        if len(self._starts) == 1:
            return observation
        cell = self._starts[self.np_random.integers(len(self._starts))]
        qpos, qvel = observation[:15].copy(), observation[15:].copy()
        # D4RL's reset location: centre + U(0, 1) an axis, not below 0
        qpos[:2] = np.maximum(cell_center(self.maze, *cell) + self.np_random.uniform(0, 1, 2), 0.0)
        self.set_state(qpos, qvel)
        return self._get_obs()


def maze_envs(maze: str, style: str, reward_goal: np.ndarray, num_envs: int) -> LockstepEnvs:
    """Environments to collect in; rewards, and the end of an episode, are those of ``reward_goal`` [2]."""
    spec = EnvSpec(
        "diffcps/AntMazeCollection-v0",
        entry_point=_CollectionMaze,
        max_episode_steps=MAX_STEPS[maze],
        disable_env_checker=True,
        kwargs={"maze": maze, "starts": start_cells(maze, style), "reward_goal": reward_goal.tolist()},
    )
    return LockstepEnvs(gymnasium.make(spec), num_envs)


class Planner:
    """Shortest paths over a maze's free cells, four neighbours each, every pair at once."""

    def __init__(self, maze: str) -> None:
        self.cells = free_cells(maze)
        self.centers = np.array([cell_center(maze, *cell) for cell in self.cells])
        index = {cell: k for k, cell in enumerate(self.cells)}
        count = len(self.cells)
        self.distance = np.full((count, count), -1)  # [goal, cell], in cells
        self.next_cell = np.tile(np.arange(count), (count, 1))  # [goal, cell]; the goal's next cell is itself
        for goal in range(count):
            self.distance[goal, goal] = 0
            queue = deque([goal])
            while queue:
                cell = queue.popleft()
                row, column = self.cells[cell]
                for neighbour in ((row, column - 1), (row, column + 1), (row + 1, column), (row - 1, column)):
                    k = index.get(neighbour)
                    if k is not None and self.distance[goal, k] < 0:
                        self.distance[goal, k] = self.distance[goal, cell] + 1
                        self.next_cell[goal, k] = cell
                        queue.append(k)

    def locate(self, positions: np.ndarray) -> np.ndarray:
        """Index [N] of the free cell whose centre is nearest to each position [N, 2]."""
        return np.square(positions[:, None] - self.centers).sum(-1).argmin(-1)

    def waypoints(self, positions: np.ndarray, goals: np.ndarray) -> np.ndarray:
        """Where to aim now, [N, 2]: a point ahead on the path's next leg; the goal itself once in its cell."""
        here, there = self.locate(positions), self.locate(goals)
        start, end = self.centers[here], self.centers[self.next_cell[there, here]]
        leg = (end - start) / CELL
        along = np.clip(((positions - start) * leg).sum(-1) + LOOKAHEAD, 0.0, CELL)
        return np.where((here == there)[:, None], goals, start + along[:, None] * leg)


def gait_features(states: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """What the gait sees, [N, 28]: the ant's posture and motion and the goal's direction, in the torso's own frame.

    AntMaze states [N, 29] without the position in the maze, directions [N, 2] of any length. By name: height (1),
    the world's up (3), velocity (3), angular velocity (3), joint angles (8), 0.3 x joint velocities (8), the
    direction turned by the torso's yaw, length 1 (2).
    """
    w, x, y, z = states[:, 3:7].T
    columns = [
        [1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)],
        [2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)],
        [2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)],
    ]
    axes = np.array(columns).transpose(2, 0, 1)  # [N, axis of the torso, world coordinate]
    velocity = (axes * states[:, None, 15:18]).sum(-1)
    cosine, sine = _in_torso_frame(states, directions)
    return np.column_stack(
        [states[:, 2], axes[:, :, 2], velocity, states[:, 18:21], states[:, 7:15], 0.3 * states[:, 21:29], cosine, sine]
    )


def _in_torso_frame(states: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    angle = np.arctan2(directions[:, 1], directions[:, 0]) - yaw(states)
    return np.cos(angle), np.sin(angle)


def yaw(states: np.ndarray) -> np.ndarray:
    """The torso's yaw [N] in radians, of AntMaze states [N, 29]."""
    w, x, y, z = states[:, 3:7].T
    return np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))


@dataclass
class Navigator:
    """The whole AntMaze behaviour for N environments: goals an episode, waypoints, gait, noise.

    A function of the state and the episode's goal: it has no phase or other memory.
    """

    maze: str
    style: str
    gait: Policy
    num_envs: int
    noise: float = ACTION_NOISE
    goals: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.planner = Planner(self.maze)
        self.goals = np.zeros((self.num_envs, 2))

    @property
    def info(self) -> dict[str, Any]:
        return {**self.gait.info, "action_noise": self.noise, "maze": self.maze, "style": self.style or "single"}

    def begin(self, row: int, rng: np.random.Generator) -> None:
        """An episode has begun in environment ``row``: draw its goal."""
        self.goals[row] = draw_goal(self.maze, goal_cells(self.maze, self.style), rng)

    def act(self, states: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        directions = self.planner.waypoints(states[:, :2], self.goals) - states[:, :2]
        actions = self.gait.act(gait_features(states, directions))
        if rng is None:
            return actions
        return np.clip(actions + self.noise * rng.standard_normal(actions.shape), -1.0, 1.0)
