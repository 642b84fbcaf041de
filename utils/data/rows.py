"""D4RL-format HDF5 files as rows, and the transitions that d4rl's `qlearning_dataset` makes of them."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import h5py
import numpy as np

from utils.errors import UserError

Array = np.ndarray


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

    def __len__(self) -> int:
        return len(self.rewards)


# Deflate cannot shrink by more than 1032; more than this is a header that claims what the file does not hold.
_MOST_COMPRESSION = 1100
# Observations and rewards of D4RL's files pack to half or a quarter; what is under 256 MB harms nobody.
_PLAUSIBLE_COMPRESSION, _HARMLESS_BYTES = 20, 256 << 20
ACTION_TOLERANCE = 1e-3


@contextlib.contextmanager
def open_unchanged(path: str | os.PathLike[str]) -> Iterator[BufferedReader]:
    """A regular file, open for reading: what is hashed and what is read out of it are the same bytes.

    Another file that takes its name meanwhile changes nothing. Raises UserError, one line, for what cannot be opened,
    is no regular file (a pipe would hang, a device never end), or was written to before the end of the `with` block.
    """
    path = Path(path)
    try:
        # O_NONBLOCK: opening a pipe must not wait for somebody who writes to it.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    before = os.fstat(descriptor)
    if not stat.S_ISREG(before.st_mode):
        os.close(descriptor)
        raise UserError(f"{path} is not a file; give the path of a D4RL-format HDF5 file")
    with os.fdopen(descriptor, "rb") as file:
        yield file
        after = os.fstat(descriptor)
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise UserError(f"{path} was written to while it was read; run again when it is complete")


def sha256_of(file: BufferedReader) -> str:
    """SHA-256 of all of an open file, in hexadecimal."""
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


def read_rows(
    path: str | os.PathLike[str],
    state_dim: int | None = None,
    action_dim: int | None = None,
    opened: BufferedReader | None = None,
) -> Rows:
    """Read one D4RL-format HDF5 file whose arrays fit together and the task; other keys in it are ignored.

    Without dimensions the file's own are taken; `opened` is the file at `path` where the caller has it open. Raises
    UserError, one line, for what is not HDF5 or is truncated, a missing key, a wrong type, shape or length, numbers
    that lie outside the file, more rows claimed than stored or than can be meant, or no rows.
    """
    path = Path(path)
    if opened is None:
        with open_unchanged(path) as opened:
            return read_rows(path, state_dim, action_dim, opened)
    with hdf5_errors(path), h5py.File(opened, "r") as file:
        rewards = _find(file, path, "rewards")
        size = rewards.shape[0] if rewards.shape else 0
        if size == 0:
            raise UserError(f"{path}: 'rewards' is empty; a dataset needs at least two rows")
        observations = _find(file, path, "observations")
        actions = _find(file, path, "actions")
        terminals = _find(file, path, "terminals")
        timeouts = _find(file, path, "timeouts") if _link(file, "timeouts") is not None else None
        _check_shape(path, observations, (size, state_dim or _width(observations)))
        _check_shape(path, actions, (size, action_dim or _width(actions)))
        for column in (rewards, terminals, timeouts):
            if column is not None:
                _check_shape(path, column, (size,))
        _check_memory(path, os.fstat(opened.fileno()).st_size, observations, actions, rewards, terminals, timeouts)
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


def _link(file: h5py.File, key: str) -> int | None:
    """The kind of the link under `key`, None where there is none. h5py's `in` would open what a link leads to."""
    links, name = file.id.links, key.encode()
    return links.get_info(name).type if links.exists(name) else None


def _find(file: h5py.File, path: Path, key: str) -> h5py.Dataset:
    """The array under `key`, stored in this file in full and numeric; nothing of it has been read yet."""
    link = _link(file, key)
    if link is None:
        raise UserError(f"{path}: key {key!r} is missing; it has {', '.join(sorted(file)) or 'no keys'}")
    if link != h5py.h5l.TYPE_HARD:
        raise UserError(f"{path}: {key!r} is a link; copy the array itself into the file, whose SHA-256 is recorded")
    dataset = file[key]
    if not isinstance(dataset, h5py.Dataset) or dataset.shape is None or dataset.dtype.kind not in "fiub":
        raise UserError(f"{path}: {key!r} is not an array of numbers")
    if dataset.external or dataset.is_virtual:
        raise UserError(f"{path}: {key!r} is stored in another file; copy it into this one, whose SHA-256 is recorded")
    claimed = math.prod(dataset.shape) * dataset.dtype.itemsize
    if claimed and not _is_stored(dataset, claimed, path.stat().st_size):
        raise UserError(f"{path}: {key!r} claims shape {dataset.shape}, more than the file holds: truncated?")
    return dataset


def _is_stored(dataset: h5py.Dataset, claimed: int, file_bytes: int) -> bool:
    """Whether the `claimed` bytes can come out of what the file stores: asked before memory is set aside."""
    stored = dataset.id.get_storage_size()
    if stored > file_bytes:
        return False
    if dataset.chunks is None:  # an unwritten array stores nothing
        return stored >= claimed
    chunks = math.prod(-(-a // b) for a, b in zip(dataset.shape, dataset.chunks, strict=True))
    return dataset.id.get_num_chunks() == chunks and claimed <= _MOST_COMPRESSION * stored


def _check_memory(path: Path, file_bytes: int, *arrays: h5py.Dataset | None) -> None:
    """Raise UserError for arrays that would unpack to far more than recorded numbers do, before any memory is taken.

    A block (chunk) may be larger than its array and is unpacked whole. One that packs more than it is long is not
    what it says: it would unpack beyond its length.
    """
    total = 0
    for array in arrays:
        if array is None:
            continue
        length = math.prod(array.shape) * array.dtype.itemsize
        block = math.prod(array.chunks or ()) * array.dtype.itemsize
        total += max(length, block)
        if array.chunks and array.id.get_storage_size() > array.id.get_num_chunks() * (1.01 * block + 1024):
            raise UserError(f"{path}: {array.name.lstrip('/')!r} is packed into more bytes than it has: damaged?")
    if total > max(_HARMLESS_BYTES, _PLAUSIBLE_COMPRESSION * file_bytes):
        raise UserError(
            f"{path}: its arrays would unpack to {total / 1e6:,.0f} MB out of {file_bytes / 1e6:,.1f} MB; recorded "
            f"numbers do not pack {_PLAUSIBLE_COMPRESSION} times smaller. If they are meant, store them unpacked"
        )


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
    for end in np.flatnonzero(terminals).tolist():
        timeouts[start + max_episode_steps - 1 - count : end + 1 : max_episode_steps] = True
        start, count = end + 1, 0 if timeouts[end] else 1
    timeouts[start + max_episode_steps - 1 - count :: max_episode_steps] = True
    return timeouts
