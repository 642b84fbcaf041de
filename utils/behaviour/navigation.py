"""AntMaze's behaviour: a goal-directed gait under a shortest-path planner, as D4RL collected its AntMaze sets.

D4RL (`scripts/generation/generate_ant_maze_datasets.py`, `d4rl/locomotion/maze_env.py`) draws a goal per episode,
plans over the maze's cells, points a low-level policy towards the next waypoint, and adds noise of 0.2 to its
actions. Which cells may be starts and goals makes the sets: the plain umaze starts at the start cell and goes to the
goal cell; *play* starts in any cell that is no goal and goes to one of a few hand-picked cells; *diverse* starts and
goes anywhere.

Two things are not D4RL's. Rewards are relabelled by one goal for a whole set, as there, but by the mean of D4RL's
draws, not by one draw: a set of a tenth of D4RL's size would stand or fall by it. And an episode ends at the
relabelling goal, as in evaluation; D4RL's go on to the time limit, with a terminal per row while the ant stays there.
At any other goal the ant stays to the time limit, as there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec

from utils.behaviour.policies import Policy
from utils.environments.antmaze import CELL, MAZES, AntMazeEnv, cell_center
from utils.environments.lockstep import LockstepEnvs
from utils.tasks import MAZE_STEPS

ACTION_NOISE = 0.2
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
    """A goal [2] in one of the cells: centre + U(0, 1) + U(0, 0.5) per axis, not below 0, as D4RL draws it."""
    center = cell_center(maze, *cells[int(rng.integers(len(cells)))])
    return np.maximum(center + rng.uniform(0, 1, 2) + rng.uniform(0, 0.5, 2), 0.0)


def reward_goal(maze: str) -> np.ndarray:
    """The goal [2] whose rewards a set has: the mean of the environment's draws, 0.75 m off the goal cell's centre."""
    return cell_center(maze, *goal_cells(maze, "")[0]) + 0.75


class _CollectionMaze(AntMazeEnv):
    """AntMaze as data are collected in it: starts drawn among cells, one goal for the rewards of a whole set."""

    def __init__(self, maze: str, starts: Sequence[Cell], goal: Sequence[float], **kwargs: Any) -> None:
        self._starts = list(starts)
        self._reward_goal = goal
        super().__init__(maze, goal_every_reset=False, **kwargs)

    def reset_model(self) -> np.ndarray:
        observation = super().reset_model()
        self.target_goal = self._reward_goal
        if len(self._starts) == 1:
            return observation
        cell = self._starts[self.np_random.integers(len(self._starts))]
        qpos, qvel = observation[:15].copy(), observation[15:].copy()
        # D4RL's reset location: centre + U(0, 1) per axis, not below 0
        qpos[:2] = np.maximum(cell_center(self.maze, *cell) + self.np_random.uniform(0, 1, 2), 0.0)
        self.set_state(qpos, qvel)
        return self._get_obs()


def maze_envs(maze: str, style: str, num_envs: int) -> LockstepEnvs:
    """Environments to collect in; rewards, and the end of an episode, are those of `reward_goal`."""
    spec = EnvSpec(
        "diffcps/AntMazeCollection-v0",
        entry_point=_CollectionMaze,  # type: ignore[arg-type]  # called with the kwargs below
        max_episode_steps=MAZE_STEPS[maze],
        disable_env_checker=True,
        kwargs={"maze": maze, "starts": start_cells(maze, style), "goal": reward_goal(maze).tolist()},
    )
    return LockstepEnvs(gymnasium.make(spec), num_envs)


class Planner:
    """D4RL's waypoints: the next cell of a shortest path over the free cells, four neighbours each.

    D4RL counts the position in cell (row, column) from the cell's centre on: 1 + y/4 and 1 + x/4, rounded down. So an
    ant that walks along +x turns past a cell's centre, one that walks along -x a cell before; and it may count as
    standing in a wall, from where the path goes on through a free neighbour.
    """

    def __init__(self, maze: str) -> None:
        self.maze = maze
        self.shape = len(MAZES[maze]), len(MAZES[maze][0])
        self.centers = np.array([[cell_center(maze, i, j) for j in range(self.shape[1])] for i in range(self.shape[0])])
        free = set(free_cells(maze))
        # distance and next cell [goal row, goal column, row, column]; -1 where there is no way
        self.distance = np.full(self.shape * 2, -1)
        self.next_cell = np.full((*self.shape * 2, 2), -1)
        for goal in free:
            self.distance[(*goal, *goal)], self.next_cell[(*goal, *goal)] = 0, goal
            queue = deque([goal])
            while queue:
                row, column = cell = queue.popleft()
                for neighbour in ((row, column - 1), (row, column + 1), (row + 1, column), (row - 1, column)):
                    if self.distance[(*goal, *neighbour)] < 0:
                        self.distance[(*goal, *neighbour)] = self.distance[(*goal, *cell)] + 1
                        self.next_cell[(*goal, *neighbour)] = cell
                        if neighbour in free:  # a way may begin in a wall, and never leads through one
                            queue.append(neighbour)

    def locate(self, positions: np.ndarray) -> np.ndarray:
        """(row, column) [N, 2] of positions [N, 2], as D4RL counts."""
        cells = (1 + np.maximum(positions, 1e-4) / CELL).astype(np.int64)[:, ::-1]
        return np.minimum(cells, np.array(self.shape) - 1)

    def waypoints(self, positions: np.ndarray, goals: np.ndarray, offsets: np.ndarray | float) -> np.ndarray:
        """Where to aim now [N, 2]: `offsets` off the next cell's centre; the goal itself where that is its cell.

        Also the goal itself from within walls that have no free neighbour, where D4RL stops with an error.
        """
        there = self.locate(goals)
        following = self.next_cell[(*there.T, *self.locate(positions).T)]
        straight = (following == there).all(1) | (following < 0).all(1)
        return np.where(straight[:, None], goals, self.centers[tuple(following.T)] + offsets)


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
    """The whole AntMaze behaviour for N environments: a goal per episode, waypoints, gait, noise.

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
        """An episode has begun in environment `row`: draw its goal."""
        self.goals[row] = draw_goal(self.maze, goal_cells(self.maze, self.style), rng)

    def act(self, states: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        # anew at every step, as in D4RL; without noise the mean
        offsets = 0.5 if rng is None else rng.uniform(0, 1, (len(states), 2))
        directions = self.planner.waypoints(states[:, :2], self.goals, offsets) - states[:, :2]
        actions = self.gait.act(gait_features(states, directions))
        if rng is None:
            return actions
        return np.clip(actions + self.noise * rng.standard_normal(actions.shape), -1.0, 1.0)
