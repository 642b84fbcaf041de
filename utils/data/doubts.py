"""What speaks against rows being data of a task: `run.py` warns of it, `utils.describe` lists it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from utils import tasks
from utils.data.rows import Rows, timeouts
from utils.tasks import Task

WALKER_HEIGHTS = (0.8, 2.0)  # where an episode of Walker2d goes on
FEW = 0.01  # share of rows that may be odd without a word


def doubts(rows: Rows, task: Task, path: Path | None = None) -> Iterator[str]:
    """A sentence for each thing that a set of this task would not have; `path`: the rows' file, for its name."""
    if not (rows.terminals.any() or timeouts(rows, task.max_episode_steps).any()):
        yield "no row ends an episode: all rows are taken for one, and bootstrapping crosses every reset"
    yield from _of_another_world(rows, task)
    named = None if path is None else guess_env_name(path)
    if named is not None and _set_of(tasks.task(named)) != _set_of(task):
        yield f"by its name it is data of {named}, not of {task.env_name}"


def _of_another_world(rows: Rows, task: Task) -> Iterator[str]:
    """Tasks whose states and actions have the same sizes differ in what their rows can hold."""
    if task.world == "halfcheetah" and rows.terminals.any():
        yield f"{int(rows.terminals.sum())} rows are terminal; HalfCheetah's episodes end at the time limit alone"
    if task.world == "walker2d":
        low, high = WALKER_HEIGHTS
        height = rows.observations[:, 0]
        share = float(((height < low) | (height > high)).mean())
        if share > FEW:
            yield f"in {share:.0%} of the rows the torso is not between {low} and {high} m high, as Walker2d's is"
    if task.domain == "antmaze" and not np.isin(rows.rewards, (0.0, 1.0)).all():
        yield f"rewards other than 0 and 1, up to {rows.rewards.max():.4g}; AntMaze has no other"


def _set_of(task: Task) -> tuple[str, str, str]:
    """A set whatever its version."""
    return task.domain, task.world, task.behaviour


def guess_env_name(path: Path) -> str | None:
    """The D4RL id whose file name, or whose own name, the file's name begins with."""
    for task in tasks.TASKS.values():
        if path.name == task.file_name:
            return task.env_name
    stem = path.stem.replace("_", "-")
    for env_name in sorted(tasks.ids(), key=lambda name: (-len(name), name)):
        if stem == env_name or stem.startswith((f"{env_name}-", f"{env_name}.")):
            return env_name
    short = {name.rsplit("-", 1)[0]: name for name in reversed(tasks.ids())}
    matches = [name for name in short if stem == name or stem.startswith(f"{name}-")]
    return short[max(matches, key=len)] if matches else None
