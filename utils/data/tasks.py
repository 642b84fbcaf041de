"""What D4RL fixes about its tasks, once: ids, addresses, reference scores, time limits and sizes.

The facts are those of Farama-Foundation/D4RL: d4rl/infos.py,
d4rl/{gym_mujoco,locomotion,hand_manipulation_suite,kitchen}/__init__.py (code Apache-2.0, data CC-BY-4.0).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from utils.errors import UserError

Array = np.ndarray


@dataclass(frozen=True)
class Task:
    """What D4RL fixes about one id. Scores are returns of a random and of an expert policy."""

    env_name: str
    url: str
    min_score: float
    max_score: float
    max_episode_steps: int
    state_dim: int
    action_dim: int

    @property
    def file_name(self) -> str:
        """The name under which d4rl keeps the file."""
        return self.url.rsplit("/", 1)[1]


_SERVER = "http://rail.eecs.berkeley.edu/datasets/offline_rl"

# body -> (score of a random policy, score of an expert, state_dim, action_dim)
_LOCOMOTION = {
    "hopper": (-20.272305, 3234.3, 11, 3),
    "walker2d": (1.629008, 4592.3, 17, 6),
    "halfcheetah": (-280.178953, 12135.0, 17, 6),
}
_QUALITIES = ("random", "medium", "medium-replay", "medium-expert", "expert", "full-replay")

# The AntMaze files of a version lie in one folder: version -> (folder, ending, {maze: file's middle}).
# multistart/multigoal in the name are D4RL's own, the surprising ones of the `eval` mazes too.
_ANTMAZE = {
    "v0": (
        "ant_maze_new",
        "sparse",
        {
            "umaze": "u-maze_noisy_multistart_False_multigoal_False",
            "umaze-diverse": "u-maze_noisy_multistart_True_multigoal_True",
            "medium-play": "big-maze_noisy_multistart_True_multigoal_False",
            "medium-diverse": "big-maze_noisy_multistart_True_multigoal_True",
            "large-play": "hardest-maze_noisy_multistart_True_multigoal_False",
            "large-diverse": "hardest-maze_noisy_multistart_True_multigoal_True",
            "eval-umaze": "umaze_eval_noisy_multistart_True_multigoal_False",
            "eval-umaze-diverse": "umaze_eval_noisy_multistart_True_multigoal_True",
            "eval-medium-play": "medium_eval_noisy_multistart_True_multigoal_True",
            "eval-medium-diverse": "medium_eval_noisy_multistart_True_multigoal_False",
            "eval-large-play": "large_eval_noisy_multistart_True_multigoal_True",
            "eval-large-diverse": "large_eval_noisy_multistart_True_multigoal_False",
        },
    ),
    "v1": (
        "ant_maze_v1",
        "sparse",
        {
            "umaze": "umaze_noisy_multistart_False_multigoal_False",
            "umaze-diverse": "umaze_noisy_multistart_True_multigoal_True",
            "medium-play": "medium_noisy_multistart_True_multigoal_False",
            "medium-diverse": "medium_noisy_multistart_True_multigoal_True",
            "large-play": "large_noisy_multistart_True_multigoal_False",
            "large-diverse": "large_noisy_multistart_True_multigoal_True",
        },
    ),
    "v2": (
        "ant_maze_v2",
        "sparse_fixed",
        {
            "umaze": "u-maze_noisy_multistart_False_multigoal_False",
            "umaze-diverse": "u-maze_noisy_multistart_True_multigoal_True",
            "medium-play": "big-maze_noisy_multistart_True_multigoal_False",
            "medium-diverse": "big-maze_noisy_multistart_True_multigoal_True",
            "large-play": "hardest-maze_noisy_multistart_True_multigoal_False",
            "large-diverse": "hardest-maze_noisy_multistart_True_multigoal_True",
        },
    ),
}

# Evaluated by the original stack only. id -> (file, random score, expert score, steps, state_dim, action_dim)
_OTHERS = {
    "pen-human-v1": ("hand_dapg_v1/pen-human-v1", 96.262799, 3076.8331017826877, 100, 45, 24),
    "pen-cloned-v1": ("hand_dapg_v1/pen-cloned-v1", 96.262799, 3076.8331017826877, 100, 45, 24),
    "kitchen-complete-v0": ("kitchen/mini_kitchen_microwave_kettle_light_slider-v0", 0.0, 4.0, 280, 60, 9),
    "kitchen-partial-v0": ("kitchen/kitchen_microwave_kettle_light_slider-v0", 0.0, 4.0, 280, 60, 9),
    "kitchen-mixed-v0": ("kitchen/kitchen_microwave_kettle_bottomburner_light-v0", 0.0, 4.0, 280, 60, 9),
}


def _tasks() -> Iterator[Task]:
    for body, (low, high, state_dim, action_dim) in _LOCOMOTION.items():
        for quality in _QUALITIES:
            url = f"{_SERVER}/gym_mujoco_v2/{body}_{quality.replace('-', '_')}-v2.hdf5"
            yield Task(f"{body}-{quality}-v2", url, low, high, 1000, state_dim, action_dim)
    for version, (folder, ending, files) in _ANTMAZE.items():
        for maze, middle in files.items():
            url = f"{_SERVER}/{folder}/Ant_maze_{middle}_{ending}.hdf5"
            limit = 700 if "umaze" in maze else 1000
            yield Task(f"antmaze-{maze}-{version}", url, 0.0, 1.0, limit, 29, 8)
    for env_name, (file, *facts) in _OTHERS.items():
        yield Task(env_name, f"{_SERVER}/{file}.hdf5", *facts)


TASKS: dict[str, Task] = {entry.env_name: entry for entry in _tasks()}


def ids() -> tuple[str, ...]:
    """Every D4RL id known here."""
    return tuple(TASKS)


def task(env_name: str) -> Task:
    """The facts of one id; UserError names the nearest and all known ids for any other."""
    if env_name not in TASKS:
        near = difflib.get_close_matches(env_name, TASKS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"unknown task {env_name!r}; {hint}known: {', '.join(TASKS)}")
    return TASKS[env_name]


def reference_scores(env_name: str) -> tuple[float, float]:
    """Returns of the random and of the expert policy that D4RL scores 0 and 100."""
    return task(env_name).min_score, task(env_name).max_score


def normalized_score(env_name: str, returns: float | Array) -> float | Array:
    """100 · (return − random) / (expert − random): D4RL's normalised score in percent, element by element."""
    low, high = reference_scores(env_name)
    return 100.0 * (returns - low) / (high - low)
