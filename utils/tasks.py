"""What D4RL fixes about its tasks, once: ids, addresses, reference scores, time limits and sizes.

Data, environments and behaviour policies look their facts up here, so this file imports none of them. The facts are
those of Farama-Foundation/D4RL: d4rl/infos.py, d4rl/{gym_mujoco,locomotion,hand_manipulation_suite,kitchen}/__init__.py
(code Apache-2.0, data CC-BY-4.0).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from utils.errors import UserError

Returns = TypeVar("Returns", float, np.ndarray)  # of one episode, or an array of any shape


@dataclass(frozen=True)
class Task:
    """What D4RL fixes about one id. Scores are returns of a random and of an expert policy.

    domain: "locomotion", "antmaze", "adroit" or "kitchen".
    world: what is simulated: a body ("hopper"), a maze ("umaze", "eval-large"), "pen" or "kitchen".
    behaviour: which of its sets: "medium-replay", "play" (AntMaze; "" where a maze has one set), "human", "partial".
    version: "v0", "v1" or "v2".
    """

    domain: str
    world: str
    behaviour: str
    version: str
    url: str
    min_score: float
    max_score: float
    max_episode_steps: int
    state_dim: int
    action_dim: int

    @property
    def env_name(self) -> str:
        """The id: "hopper-medium-replay-v2", "antmaze-umaze-v0"."""
        parts = ("antmaze" if self.domain == "antmaze" else "", self.world, self.behaviour, self.version)
        return "-".join(filter(None, parts))

    @property
    def collectable(self) -> bool:
        """Whether `utils.behaviour.local` can collect a set like it (`--dataset local`)."""
        if self.domain == "locomotion":
            return self.behaviour in ("medium", "medium-replay", "medium-expert")
        return self.domain == "antmaze" and self.world in MAZE_STEPS and self.version != "v1"

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
LOCOMOTION_STEPS = 1000
_QUALITIES = ("random", "medium", "medium-replay", "medium-expert", "expert", "full-replay")

MAZE_STEPS: Mapping[str, int] = {"umaze": 700, "medium": 1000, "large": 1000}
"""AntMaze's time limits by maze."""

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

# Evaluated by the original stack only: set -> the file's name on the server.
_PEN = {"human": "pen-human-v1", "cloned": "pen-cloned-v1"}
_KITCHEN = {
    "complete": "mini_kitchen_microwave_kettle_light_slider-v0",
    "partial": "kitchen_microwave_kettle_light_slider-v0",
    "mixed": "kitchen_microwave_kettle_bottomburner_light-v0",
}


def _tasks() -> Iterator[Task]:
    for body, (low, high, state_dim, action_dim) in _LOCOMOTION.items():
        for quality in _QUALITIES:
            url = f"{_SERVER}/gym_mujoco_v2/{body}_{quality.replace('-', '_')}-v2.hdf5"
            yield Task("locomotion", body, quality, "v2", url, low, high, LOCOMOTION_STEPS, state_dim, action_dim)
    for version, (folder, ending, files) in _ANTMAZE.items():
        for name, middle in files.items():
            words = name.split("-")
            behaviour = words.pop() if words[-1] in ("play", "diverse") else ""
            url = f"{_SERVER}/{folder}/Ant_maze_{middle}_{ending}.hdf5"
            yield Task("antmaze", "-".join(words), behaviour, version, url, 0.0, 1.0, MAZE_STEPS[words[-1]], 29, 8)
    for people, file in _PEN.items():
        url = f"{_SERVER}/hand_dapg_v1/{file}.hdf5"
        yield Task("adroit", "pen", people, "v1", url, 96.262799, 3076.8331017826877, 100, 45, 24)
    for part, file in _KITCHEN.items():
        yield Task("kitchen", "kitchen", part, "v0", f"{_SERVER}/kitchen/{file}.hdf5", 0.0, 4.0, 280, 60, 9)


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


def normalized_score(env_name: str, returns: Returns) -> Returns:
    """100 · (return − random) / (expert − random): D4RL's normalised score in percent, element by element."""
    low, high = reference_scores(env_name)
    return 100.0 * (returns - low) / (high - low)
