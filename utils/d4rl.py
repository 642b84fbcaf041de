"""D4RL's datasets without d4rl: ids, addresses, reference scores, and HDF5 files read into a `Dataset`.

The facts (addresses, reference scores, time limits) are those of Farama-Foundation/D4RL: d4rl/infos.py,
d4rl/{gym_mujoco,locomotion,hand_manipulation_suite,kitchen}/__init__.py (code Apache-2.0, data CC-BY-4.0).
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from utils.dataset import Dataset
from utils.download import download
from utils.errors import UserError

__all__ = [
    "ACTION_TOLERANCE",
    "TASKS",
    "Rows",
    "Task",
    "cache_folder",
    "cached_file",
    "check_values",
    "file_sha256",
    "hdf5_errors",
    "ids",
    "implied_timeouts",
    "load",
    "normalized_score",
    "qlearning_transitions",
    "read_rows",
    "reference_scores",
    "task",
]

Array = np.ndarray


# --------------------------------------------------------------------------------------------------
# Tasks
# --------------------------------------------------------------------------------------------------
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


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------
def cache_folder() -> Path:
    """Where d4rl keeps its files, so that existing caches serve: $D4RL_DATASET_DIR, else ~/.d4rl/datasets."""
    return Path(os.environ.get("D4RL_DATASET_DIR") or Path.home() / ".d4rl" / "datasets")


def cached_file(env_name: str) -> Path:
    """Where the file of `env_name` lies or would lie."""
    return cache_folder() / task(env_name).file_name


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _checksum_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _verify_checksum(path: Path, digest: str) -> None:
    """Compare with the SHA-256 kept beside the file when it was first downloaded, where there is one."""
    kept = _checksum_file(path)
    if not kept.exists():
        return
    words = kept.read_text(errors="replace").split()
    if not words or words[0].lower() != digest:
        raise UserError(
            f"{path} has SHA-256 {digest}, not the one kept in {kept.name}: the file changed since it "
            "was first downloaded; delete both to download it again, or restore the file"
        )


def _download(wanted: Task, target: Path) -> None:
    """Fetch D4RL's file to `target`, which appears only once it has been read and found good."""

    def check(part: Path) -> None:
        rows = read_rows(part, wanted.state_dim, wanted.action_dim)
        check_values(rows, part)
        qlearning_transitions(rows, wanted.max_episode_steps)
        digest = file_sha256(part)
        kept = _checksum_file(target)
        if not kept.exists():
            kept.write_text(f"{digest}  {target.name}\n")
        elif kept.read_text(errors="replace").split()[:1] != [digest]:
            raise UserError(
                f"the server's file has SHA-256 {digest}, not the first download's, kept in {kept}; "
                f"delete {kept.name} to accept the new one"
            )

    try:
        download(wanted.url, target, check)
    except UserError as error:
        raise UserError(
            f"{wanted.env_name}: no file {target}, and it cannot be downloaded ({error}); put the file "
            "there, or name one with --dataset PATH, or train on data collected here with --dataset local"
        ) from error


def load(env_name: str, path: str | os.PathLike[str] | None = None, verify: bool = True) -> Dataset:
    """The transitions that d4rl's `qlearning_dataset` makes of a D4RL-format file, before reward tuning.

    Without `path` the file is d4rl's own: from its cache, else downloaded to it. `verify` compares it with
    the SHA-256 kept beside it, where there is one. Another set is never taken instead.
    Raises UserError for an unknown id, and for a file that is not sound, or missing and not to be downloaded.
    """
    wanted = task(env_name)
    file = cached_file(env_name) if path is None else Path(os.path.expanduser(path))
    if not os.path.exists(file):  # also where its name is none that the system takes
        if path is not None:
            raise UserError(f"no dataset file {file}; give the path of a D4RL-format HDF5 file")
        _download(wanted, file)
    if not file.is_file():
        raise UserError(f"{file} is not a file; give the path of a D4RL-format HDF5 file")
    try:
        digest = file_sha256(file)
        if verify:
            _verify_checksum(file, digest)
        size = file.stat().st_size
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    rows = read_rows(file, wanted.state_dim, wanted.action_dim)
    check_values(rows, file)
    returns = episode_returns(rows, episode_ends(rows, wanted.max_episode_steps))
    info = {
        "path": str(file.resolve()),
        "bytes": size,
        "sha256": digest,
        "rows": len(rows.rewards),
        "episodes": len(returns),
        "behaviour_score": float(normalized_score(env_name, returns.mean())),
    }
    arrays = qlearning_transitions(rows, wanted.max_episode_steps, name=file)
    return Dataset(**arrays, env_name=env_name, source="d4rl" if path is None else str(path), info=info)


# --------------------------------------------------------------------------------------------------
# HDF5 -> rows
# --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Rows:
    """A D4RL file's time steps as they were recorded, N of them, episode after episode.

    observations [N, state_dim] and actions [N, action_dim] float32, rewards [N] float32, terminals [N] bool,
    timeouts [N] bool or None where the file has no such key (D4RL's oldest files).
    """

    observations: Array
    actions: Array
    rewards: Array
    terminals: Array
    timeouts: Array | None


# Deflate cannot shrink by more than 1032; more than this is a header that claims what the file does not hold.
_MOST_COMPRESSION = 1100
ACTION_TOLERANCE = 1e-3


def read_rows(path: str | os.PathLike[str], state_dim: int | None = None, action_dim: int | None = None) -> Rows:
    """Read one D4RL-format HDF5 file whose arrays fit together and the task; other keys in it are ignored.

    Without dimensions the file's own are taken. Raises UserError, one line, for what is not HDF5 or is truncated,
    a missing key, a wrong type, shape or length, more rows claimed than stored, or no rows.
    """
    path = Path(path)
    with hdf5_errors(path), h5py.File(path, "r") as file:
        rewards = _find(file, path, "rewards")
        size = rewards.shape[0] if rewards.shape else 0
        if size == 0:
            raise UserError(f"{path}: 'rewards' is empty; a dataset needs at least two rows")
        observations = _find(file, path, "observations")
        actions = _find(file, path, "actions")
        terminals = _find(file, path, "terminals")
        timeouts = _find(file, path, "timeouts") if "timeouts" in file else None
        _check_shape(path, observations, (size, state_dim or _width(observations)))
        _check_shape(path, actions, (size, action_dim or _width(actions)))
        for column in (rewards, terminals, timeouts):
            if column is not None:
                _check_shape(path, column, (size,))
        return Rows(
            observations=_read_floats(observations),
            actions=_read_floats(actions),
            rewards=_read_floats(rewards).reshape(size),
            terminals=_read_flags(path, terminals),
            timeouts=None if timeouts is None else _read_flags(path, timeouts),
        )


def check_values(rows: Rows, path: str | os.PathLike[str]) -> None:
    """Raise UserError, one line, for NaN or infinity, or actions outside the box [-1, 1]."""
    for key in ("observations", "actions", "rewards"):
        values = getattr(rows, key)
        extremes = np.array([values.min(), values.max()])  # NaN spreads to both; no array of flags is needed
        if not np.isfinite(extremes).all():
            kind = "NaN" if np.isnan(extremes).any() else "infinity"
            raise UserError(f"{path}: {key!r} holds {kind}; every number must be finite")
    low, high = float(rows.actions.min()), float(rows.actions.max())
    if low < -1 - ACTION_TOLERANCE or high > 1 + ACTION_TOLERANCE:
        raise UserError(
            f"{path}: 'actions' reach from {low:.4g} to {high:.4g}, outside the action box [-1, 1]; "
            "D4RL's actions are scaled to it"
        )


@contextlib.contextmanager
def hdf5_errors(path: Path) -> Iterator[None]:
    """h5py reports damage as any of these; the user gets one line."""
    try:
        yield
    except UserError:
        raise
    except (OSError, KeyError, RuntimeError, ValueError, TypeError, OverflowError, MemoryError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is not a readable HDF5 file, or is truncated: {reason}") from error


def _find(file: h5py.File, path: Path, key: str) -> h5py.Dataset:
    """The array under `key`, stored in this file in full and numeric; nothing of it has been read yet."""
    if key not in file:
        raise UserError(f"{path}: key {key!r} is missing; it has {', '.join(sorted(file)) or 'no keys'}")
    dataset = file[key]
    if not isinstance(dataset, h5py.Dataset) or dataset.shape is None or dataset.dtype.kind not in "fiub":
        raise UserError(f"{path}: {key!r} is not an array of numbers")
    claimed = math.prod(dataset.shape) * dataset.dtype.itemsize
    if claimed and not _is_stored(dataset, claimed, path.stat().st_size):
        raise UserError(f"{path}: {key!r} claims shape {dataset.shape}, more than the file holds: truncated?")
    return dataset


def _is_stored(dataset: h5py.Dataset, claimed: int, file_bytes: int) -> bool:
    """Whether the `claimed` bytes can come out of what the file stores: asked before memory is set aside."""
    stored = dataset.id.get_storage_size()
    if stored > file_bytes:
        return False
    if dataset.chunks is None:  # unwritten, external and virtual arrays store nothing here
        return stored >= claimed
    chunks = math.prod(-(-a // b) for a, b in zip(dataset.shape, dataset.chunks, strict=True))
    return dataset.id.get_num_chunks() == chunks and claimed <= _MOST_COMPRESSION * stored


def _check_shape(path: Path, dataset: h5py.Dataset, expected: tuple[int, ...]) -> None:
    """Lengths that differ and dimensions that are not the task's; a column may also be stored as [N, 1]."""
    shape, key = dataset.shape, dataset.name.lstrip("/")
    if not shape or shape[0] != expected[0]:
        length = shape[0] if shape else "no"
        raise UserError(f"{path}: {key!r} has {length} rows where 'rewards' has {expected[0]}")
    if shape != expected and shape != (*expected[:1], *(expected[1:] or (1,))):
        raise UserError(f"{path}: {key!r} has shape {shape}, the task needs {expected}: another task's file?")


def _width(dataset: h5py.Dataset) -> int:
    return dataset.shape[-1] if dataset.shape else 0


def _read_floats(dataset: h5py.Dataset) -> Array:
    values = np.empty(dataset.shape, dtype=np.float32)
    dataset.read_direct(values)  # HDF5 converts block by block: no second array for a file in float64
    return values


def _read_flags(path: Path, dataset: h5py.Dataset) -> Array:
    values = dataset[()].reshape(-1)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise UserError(f"{path}: {dataset.name.lstrip('/')!r} holds NaN or infinity; it must hold 0 and 1")
    return values.astype(bool)


# --------------------------------------------------------------------------------------------------
# Rows -> transitions
# --------------------------------------------------------------------------------------------------
def qlearning_transitions(rows: Rows, max_episode_steps: int, name: object = "the set") -> dict[str, Array]:
    """The `Dataset` arrays that d4rl's `qlearning_dataset` (terminate_on_end=False) makes of `rows`.

    Row i becomes (s_i, a_i, r_i, s_{i+1}, terminal_i), in order, except for its quirks, kept here:
    - The file's last row is dropped, a terminal one too: it has no successor.
    - A row marked as a timeout is dropped (its successor is the next episode's start), its terminal flag too.
    - A terminal row is kept; its next state is the next episode's first, which `not_dones` masks.
    - Where an episode ends unmarked, the pair across the boundary is kept.
    - Without the key `timeouts`, see `implied_timeouts`.
    Raises UserError where nothing is left.
    """
    kept = np.flatnonzero(~timeouts(rows, max_episode_steps)[:-1])
    if len(kept) == 0:
        raise UserError(f"{name}: none of its {len(rows.rewards)} rows makes a transition; at least two are needed")
    return {
        "states": rows.observations[kept],
        "actions": rows.actions[kept],
        "rewards": rows.rewards[kept, None],
        "next_states": rows.observations[kept + 1],
        "not_dones": 1 - rows.terminals[kept, None].astype(np.float32),
    }


def timeouts(rows: Rows, max_episode_steps: int | None) -> Array:
    """The rows' time limits [N] bool: as recorded, else as `implied_timeouts` says, else (no known limit) none."""
    if rows.timeouts is not None:
        return rows.timeouts
    if max_episode_steps is None:
        return np.zeros_like(rows.terminals)
    return implied_timeouts(rows.terminals, max_episode_steps)


def episode_ends(rows: Rows, max_episode_steps: int | None) -> Array:
    """Last row of every episode; the file's last row ends one whether it is marked or not."""
    marked = rows.terminals | timeouts(rows, max_episode_steps)
    marked[-1] = True
    return np.flatnonzero(marked)


def episode_returns(rows: Rows, ends: Array) -> Array:
    """Undiscounted return of every episode, float64, given its last rows; the last one may be unfinished."""
    return np.add.reduceat(rows.rewards.astype(np.float64), np.concatenate([[0], ends[:-1] + 1]))


def implied_timeouts(terminals: Array, max_episode_steps: int) -> Array:
    """Timeouts [N] that d4rl counts out for a file without that key.

    Its counter starts at 0 in the file's first episode and after a timeout, but at 1 after a terminal, so
    that an episode after a terminal is taken to time out one row early: published behaviour, kept.
    """
    timeouts = np.zeros(len(terminals), dtype=bool)
    start, count = 0, 0
    for end in np.flatnonzero(terminals):
        timeouts[start + max_episode_steps - 1 - count : end + 1 : max_episode_steps] = True
        start, count = end + 1, 0 if timeouts[end] else 1
    timeouts[start + max_episode_steps - 1 - count :: max_episode_steps] = True
    return timeouts
