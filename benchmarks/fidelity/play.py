"""Plays fixed episodes in one backend and writes what came of them; `benchmarks.fidelity.crosscheck` runs it in both.

    python -m benchmarks.fidelity.play --backend d4rl|mujoco --out DIR [--policies DIR] [--episodes N]

It writes `plays.json` and, of the original, `steps.npz`: single steps with what they started from and led to. It
needs NumPy and the environments, nothing more, so it runs in what `utils/environments/install_classic.sh
--environments-only` builds. Episode k is reset with seed 1000 + k and takes its noise from a generator of its own,
so that one episode that ends a step later does not shift the noise of all that follow. Three kinds of play:

- fixed action sequences, whose states are written too;
- published locomotion policies (`DIR/locomotion.npz`: SAC snapshots of the Deep OPE benchmark, Fu et al., 2021);
- D4RL's ant in its mazes (`DIR/ant_goal_reaching.npz`: D4RL's low-level policy) behind D4RL's waypoint planner.
"""

from __future__ import annotations

import argparse
import collections
import importlib.metadata
import json
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError

# v2 draws a goal every episode; physics, walls and limits are those of v0.
MAZES = ("antmaze-umaze-v2", "antmaze-medium-play-v2")
TASKS = ("hopper-medium-v2", "halfcheetah-medium-v2", "walker2d-medium-v2", *MAZES, "antmaze-large-diverse-v2")
FIXED_ACTIONS = "fixed actions"
FIXED_EPISODES, FIXED_STEPS, STATES_KEPT = 20, 100, 20
STEPS_KEPT_EVERY = 10
MAZE_EPISODES = 5  # times those of the other policies: a goal reached or missed tells less than a return
FIRST_SEED, FIRST_NOISE_SEED = 1000, 1
PLANNER_NOISE, HEADING_LENGTH = 0.2, 10.0
CELL = 4.0

Cell = tuple[int, int]


@dataclass(frozen=True)
class Play:
    """One episode. `states` ([up to 21][state_dim], the first ones) is kept of fixed action sequences only."""

    task: str
    policy: str
    episode: int
    seed: int
    total: float
    length: int
    states: list[list[float]] | None = None


class Game:
    """One environment of a backend: `d4rl` is the original stack, `mujoco` this project's."""

    def __init__(self, backend: str, env_name: str) -> None:
        if backend == "d4rl":
            from utils.classic import make_lockstep
        else:
            from utils.environments import make_lockstep
        self.backend, self.env_name = backend, env_name
        self.envs: Any = make_lockstep(env_name, 1)
        self.steps: list[dict[str, np.ndarray]] = []

    def reset(self, seed: int) -> np.ndarray:
        """Start an episode -> state [state_dim]."""
        return self.envs.reset([np.random.default_rng(seed)])[0]

    def rollout(
        self, state: np.ndarray, act: Callable[[np.ndarray], np.ndarray], limit: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Play on from a state to the episode's end, or `limit` steps -> states [L + 1, state_dim], rewards [L]."""
        states, rewards, over = [state], [], False
        while not over and len(rewards) != limit:
            action, before = act(states[-1]), self._simulation()
            found, reward, terminated, truncated = self.envs.step(action[None], np.ones(1, dtype=bool))
            over = bool(terminated[0] or truncated[0])
            if before and (len(rewards) % STEPS_KEPT_EVERY == 0 or over):
                after = {f"next_{name}": value for name, value in self._simulation().items()}
                outcome = {"action": action, "obs": found[0], "reward": reward[0], "done": terminated[0]}
                self.steps.append(before | outcome | after)
            states.append(found[0])
            rewards.append(reward[0])
        return np.array(states), np.array(rewards)

    def _simulation(self) -> dict[str, np.ndarray]:
        """What decides the next step of the original: positions, velocities, warm start, goal."""
        if self.backend != "d4rl":
            return {}
        data = self.envs.bases[0].sim.data
        values = {"qpos": data.qpos.copy(), "qvel": data.qvel.copy(), "warm": data.qacc_warmstart.copy()}
        return values if self.envs.goals is None else values | {"goal": self.envs.goals[0]}

    def maze(self) -> tuple[np.ndarray, Cell]:
        """AntMaze's walls, bool [rows, columns], and the start cell."""
        if self.backend == "d4rl":
            cells = np.array([[str(cell) for cell in row] for row in self.envs.bases[0]._maze_map])
        else:
            from utils.environments.antmaze import MAZES as MAPS

            cells = np.array([list(row) for row in MAPS[self.env_name.split("-")[1]]])
        row, column = np.argwhere(cells == "r")[0]
        return cells == "1", (int(row), int(column))


@dataclass(frozen=True)
class TanhGaussian:
    """A SAC policy: two ReLU layers of 256, then a = clip(tanh(mean + std·noise), -1, 1), log std in [-20, 2].

    It is computed in float64, observations included: the rounding of a float32 policy would magnify differences of
    1e-15 between two simulations to 1e-7 at once.
    """

    weights: dict[str, np.ndarray]

    def act(self, observation: np.ndarray, random: np.random.RandomState) -> np.ndarray:
        """Observation [S] -> action [A]."""
        hidden = observation
        for layer in ("fc0", "fc1"):
            hidden = np.maximum(self._affine(layer, hidden), 0)
        mean, log_std = self._affine("last_fc", hidden), self._affine("last_fc_log_std", hidden)
        std = np.exp(np.clip(log_std, -20, 2))
        return np.clip(np.tanh(mean + std * random.randn(len(mean))), -1, 1)

    def _affine(self, layer: str, x: np.ndarray) -> np.ndarray:
        return self.weights[f"{layer}.weight"] @ x + self.weights[f"{layer}.bias"]


class WaypointPlanner:
    """D4RL's way through a maze: towards the next cell of the shortest path, and in the last one to the goal itself.

    D4RL counts cells from their centre on (x in [0, 4) is the start's column) and aims at a cell's centre + U(0, 1)
    per axis, drawn anew at every step.
    """

    def __init__(self, walls: np.ndarray, start: Cell, goal: np.ndarray) -> None:
        """walls: bool [rows, columns]; start: the cell whose centre is the origin; goal [2] in metres."""
        self.start, self.goal = start, goal
        self.goal_cell = _cell_of(goal)
        self.towards = _next_cells(walls, self.goal_cell)

    def waypoint(self, position: np.ndarray, random: np.random.RandomState) -> np.ndarray:
        """Where to head for from a position [2], in metres."""
        cell = _cell_of(position)
        target = self.goal_cell if cell == self.goal_cell else self.towards[cell]
        if target == self.goal_cell:
            return self.goal
        centre = CELL * np.array([target[1] - self.start[1], target[0] - self.start[0]])
        return centre + random.uniform(0, CELL / 4, 2)


def _cell_of(position: np.ndarray) -> Cell:
    x, y = np.maximum(position, 1e-4)
    return int(1 + y / CELL), int(1 + x / CELL)


def _next_cells(walls: np.ndarray, goal: Cell) -> dict[Cell, Cell]:
    """For each cell, its neighbour on the shortest path to the goal (breadth first, from the goal outwards).

    Walls beside a free cell are in it too, as first cells only: by D4RL's counting the ant often stands in one.
    """
    towards: dict[Cell, Cell] = {}
    frontier = collections.deque([goal])
    while frontier:
        row, column = cell = frontier.popleft()
        for neighbour in ((row, column - 1), (row, column + 1), (row + 1, column), (row - 1, column)):
            inside = 0 <= neighbour[0] < walls.shape[0] and 0 <= neighbour[1] < walls.shape[1]
            if inside and neighbour != goal and neighbour not in towards:
                towards[neighbour] = cell
                if not walls[neighbour]:
                    frontier.append(neighbour)
    return towards


def play_fixed_actions(game: Game) -> Iterator[Play]:
    """Uniform random actions, drawn beforehand: 20 episodes of up to 100 steps."""
    for episode in range(FIXED_EPISODES):
        actions = iter(_noise(episode).uniform(-1, 1, (FIXED_STEPS, game.envs.action_dim)))
        start = game.reset(FIRST_SEED + episode)
        states, rewards = game.rollout(start, lambda _state, actions=actions: next(actions), FIXED_STEPS)
        yield _play(game, FIXED_ACTIONS, episode, rewards, states[: STATES_KEPT + 1].tolist())


def play_locomotion(game: Game, weights: dict[str, np.ndarray], episodes: int) -> Iterator[Play]:
    """Every SAC snapshot of the game's body, for whole episodes. Weights are named `policy|layer.weight`."""
    body = game.env_name.split("-")[0].removesuffix("2d")
    for name in sorted({key.partition("|")[0] for key in weights if key.startswith(body) and "|" in key}):
        policy = TanhGaussian(_layers(weights, f"{name}|"))
        for episode in range(episodes):
            noise, start = _noise(episode), game.reset(FIRST_SEED + episode)
            _, rewards = game.rollout(start, lambda state, policy=policy, noise=noise: policy.act(state, noise))
            yield _play(game, name, episode, rewards)


def play_maze(game: Game, weights: dict[str, np.ndarray], episodes: int) -> Iterator[Play]:
    """D4RL's ant and planner, with the noise of D4RL's collection: 0.2·N(0, 1) on every action, then clipped."""
    policy = TanhGaussian(_layers(weights))
    walls, start_cell = game.maze()
    for episode in range(episodes):
        noise, start = _noise(episode), game.reset(FIRST_SEED + episode)
        planner = WaypointPlanner(walls, start_cell, game.envs.goals[0])
        _, rewards = game.rollout(
            start, lambda state, planner=planner, noise=noise: _navigate(state, planner, policy, noise)
        )
        yield _play(game, "ant with planner", episode, rewards)


def _noise(episode: int) -> np.random.RandomState:
    """The legacy generator: its streams are the same in every NumPy."""
    return np.random.RandomState(FIRST_NOISE_SEED + episode)


def _layers(weights: dict[str, np.ndarray], prefix: str = "") -> dict[str, np.ndarray]:
    """The weights and biases under a prefix, without it, in float64."""
    named = {key.removeprefix(prefix): array for key, array in weights.items() if key.startswith(prefix)}
    return {key: array.astype(np.float64) for key, array in named.items() if key.endswith(("weight", "bias"))}


def _navigate(
    state: np.ndarray, planner: WaypointPlanner, policy: TanhGaussian, random: np.random.RandomState
) -> np.ndarray:
    heading = planner.waypoint(state[:2], random) - state[:2]
    heading *= HEADING_LENGTH / np.linalg.norm(heading)
    action = policy.act(np.concatenate([state[2:], heading]), random)
    return np.clip(action + PLANNER_NOISE * random.randn(len(action)), -1, 1)


def _play(game: Game, policy: str, episode: int, rewards: np.ndarray, states: list[list[float]] | None = None) -> Play:
    return Play(game.env_name, policy, episode, FIRST_SEED + episode, float(rewards.sum()), len(rewards), states)


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Every array of an `.npz` file. Raises UserError (one line) where it cannot be read."""
    try:
        with np.load(path) as archive:
            return {key: archive[key] for key in archive.files}
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror or error}); name the policies' folder") from error


def play_all(backend: str, policies: Path | None, episodes: int) -> tuple[list[Play], dict[str, np.ndarray]]:
    """Everything there is to play -> the episodes, and the original's steps as arrays `task/field` [rows, ...].

    The fields are those of the recordings that `benchmarks.fidelity.physics` replays; AntMaze has a goal per row.
    """
    ant = locomotion = None
    if policies is not None:
        locomotion, ant = load_arrays(policies / "locomotion.npz"), load_arrays(policies / "ant_goal_reaching.npz")
    plays: list[Play] = []
    steps: dict[str, np.ndarray] = {}
    for env_name in TASKS:
        game = Game(backend, env_name)
        plays += play_fixed_actions(game)
        if locomotion is not None and not env_name.startswith("antmaze"):
            plays += play_locomotion(game, locomotion, episodes)
        if ant is not None and env_name in MAZES:
            plays += play_maze(game, ant, MAZE_EPISODES * episodes)
        for name in game.steps[0] if game.steps else ():
            steps[f"{env_name}/{name}"] = np.array([step[name] for step in game.steps])
        game.envs.close()
    return plays, steps


def main() -> None:
    """Play as the command line says and write the files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fidelity.play", description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=("d4rl", "mujoco"), required=True)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write to")
    parser.add_argument("--policies", type=Path, help="folder of the two policy files; left out: fixed actions only")
    parser.add_argument("--episodes", type=int, default=40, help="episodes per policy, five times as many in mazes")
    args = parser.parse_args()
    plays, steps = play_all(args.backend, args.policies, args.episodes)
    packages = ("gym", "d4rl", "free-mujoco-py") if args.backend == "d4rl" else ("gymnasium", "mujoco")
    versions = {package: importlib.metadata.version(package) for package in (*packages, "numpy")}
    result = {"versions": {"python": platform.python_version()} | versions, "plays": [asdict(play) for play in plays]}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "plays.json").write_text(json.dumps(result))
    if steps:
        np.savez(args.out / "steps.npz", **steps)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
