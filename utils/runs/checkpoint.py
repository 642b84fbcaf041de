"""Whole-run state in one file per seed, written so that a kill at any moment leaves good ones behind.

A checkpoint holds tensors and plain values only, so it loads with `weights_only=True`: nothing is ever unpickled. It
says of which format it is, and of which algorithm, task and seed (`Owner`): others are refused.

Its SHA-256 stands in the file itself, as the comment of the zip archive that `torch.save` writes: any reader of such
files skips it, and a damaged byte is noticed, which PyTorch alone does not. The archive's own CRCs are not enough: they
leave out its list of records, where one flipped bit makes a record a folder, for which PyTorch gives whatever was in
memory (a test shows it). A seed's folder keeps two checkpoints, so that there is one to go back to when the newest is
damaged.

In a state's nested dicts every tensor has the seeds axis first; `split` and `join` cut and glue along it, so that a
seed's file is the same whether it was trained alone or in company.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from utils.errors import UserError
from utils.files import atomic_write, first_line, write_to_disk

CURRENT, PREVIOUS, TEMPORARY = "checkpoint.pt", "checkpoint.previous.pt", "checkpoint.pt.tmp"
Moment = tuple[int, int]  # of a run, in order: gradient steps, and how many of them metrics.csv has
FORMAT = 2  # of what a checkpoint holds; others are refused
_SEAL = b"sha256:"
_SEAL_BYTES = len(_SEAL) + 64


@dataclass(frozen=True)
class Owner:
    """Whose a checkpoint is."""

    algo: str
    env_name: str
    seed: int

    def __str__(self) -> str:
        return f"{self.algo} on {self.env_name}, seed {self.seed}"


# --- Writing ----------------------------------------------------------------------------------------------


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain values, whole or not at all. Raises UserError where the disk refuses."""
    try:
        atomic_write(path, _sealed(content))
    except OSError as error:
        raise _no_room(path, error) from error


class Part(Protocol):
    """What has a state to keep."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, saved: Mapping[str, Any]) -> None: ...


def save_run(
    folders: Sequence[Path], parts: Mapping[str, Part], logs: Sequence[Mapping[str, int]], owners: Sequence[Owner]
) -> None:
    """A checkpoint of all parts in each seed's folder; the one before is kept as `checkpoint.previous.pt`.

    All are on the disk and verified before the first takes its name, so that whatever moment a kill comes at, there
    is a step that every seed has (`load_newest_common`). logs: the lengths of each seed's logs, in bytes. Raises
    UserError where the disk refuses; nothing has changed then.
    """
    states = split({name: part.state_dict() for name, part in parts.items()}, len(folders))
    contents = [
        {**state, "format": FORMAT, "owner": asdict(owner), "logs": dict(lengths)}
        for state, owner, lengths in zip(states, owners, logs, strict=True)
    ]
    _write_all([folder / TEMPORARY for folder in folders], contents)
    for folder in folders:
        _rotate(folder)


def restore(parts: Mapping[str, Part], states: Sequence[Mapping[str, Any]]) -> None:
    """Give every part its state back, the seeds' states joined.

    Raises UserError where they do not fit.
    """
    try:
        for name, part in parts.items():
            part.load_state_dict(join([state[name] for state in states]))
    except UserError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"the checkpoint does not fit this run ({type(error).__name__}: {first_line(error)}); "
                        "use --overwrite or another --dir") from error  # fmt: skip


def _rotate(folder: Path) -> None:
    """The temporary file becomes the current one, and that the previous one."""
    if (folder / CURRENT).exists():
        os.replace(folder / CURRENT, folder / PREVIOUS)
    os.replace(folder / TEMPORARY, folder / CURRENT)


def _write_all(paths: Sequence[Path], contents: Sequence[Mapping[str, Any]]) -> None:
    """Write and verify each; on any failure none is left."""
    try:
        for path, content in zip(paths, contents, strict=True):
            sealed = _sealed(content)
            write_to_disk(path, sealed)
            if path.read_bytes() != sealed:
                raise OSError("what was written is not what is read back")
    except OSError as error:
        for path in paths:
            path.unlink(missing_ok=True)
        raise _no_room(paths[0], error) from error


def _sealed(content: Mapping[str, Any]) -> bytes:
    """A file of `torch.save` whose archive comment is the SHA-256 of all bytes before it."""
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    # The archive ends with the comment's length, so far 0, in two bytes.
    archive = buffer.getvalue()[:-2] + _SEAL_BYTES.to_bytes(2, "little")
    return archive + _SEAL + hashlib.sha256(archive).hexdigest().encode()


def _no_room(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {path}: {first_line(error)}; free some space and run again")


def save_published(folders: Sequence[Path], states: Sequence[Mapping[str, Any]], epoch: int) -> None:
    """Each seed's weights as the published code saves them: `<network>_<epoch>.pth`, a dict of tensors by name."""
    for folder, networks in zip(folders, states, strict=True):
        for name, weights in networks.items():
            if isinstance(weights, Mapping):
                save(folder / f"{name}_{epoch}.pth", weights)


# --- Reading ----------------------------------------------------------------------------------------------


def load_newest_common(
    folders: Sequence[Path],
    owners: Sequence[Owner],
    check: Callable[[Path, dict[str, Any]], None] = lambda folder, state: None,
) -> list[dict[str, Any]] | None:
    """Every seed's state at the newest step that all have; None where no seed has a checkpoint.

    Damaged files are passed over, and seeds that are further set back, with a warning. What was chosen is the current
    checkpoint afterwards. check: called with each folder and its state before anything changes. Raises UserError where
    some seeds have none that can be read, there is no step common to all, or one is of another run.
    """
    reasons: dict[Path, str] = {}
    found = [_readable(folder, reasons, owner) for folder, owner in zip(folders, owners, strict=True)]
    common = set.intersection(*(set(states) for states in found))
    if not common:
        begun = any((folder / name).exists() for folder in folders for name in (CURRENT, PREVIOUS))
        if not begun:  # a kill came while the very first ones were written
            return None
        _refuse(folders, found, reasons)
    moment = max(common)
    for folder, states in zip(folders, found, strict=True):
        check(folder, states[moment][1])
    ahead = [line for pair in zip(folders, found, strict=True) for line in _set_back(*pair, moment)]
    if reasons or ahead:
        warnings.warn(f"{'; '.join([*reasons.values(), *ahead])}; continuing from step {moment[0]}", stacklevel=2)
    try:
        for folder, states in zip(folders, found, strict=True):
            _settle(folder, states[moment][0], spare=any(states[m][0] == CURRENT for m in common))
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}") from error
    return [states[moment][1] for states in found]


def _set_back(folder: Path, states: Mapping[Moment, tuple[str, Any]], moment: Moment) -> list[str]:
    """A line where a seed is further; a file that has not taken its name is what a kill left, and no news."""
    further = [step for (step, _), (name, _) in states.items() if name != TEMPORARY and step > moment[0]]
    return [f"{folder.name} goes back from step {max(further)}"] if further else []


def saved_moments(folder: Path) -> set[Moment]:
    """What a seed could continue from."""
    return set(_readable(folder, {}))


def _moment(state: Mapping[str, Any]) -> Moment:
    """Two checkpoints may be of one step, which a signal ended before its metrics were written: those differ."""
    step = int(state["agent"]["step"])
    return step, step - int(state.get("runner", {}).get("unread", 0))


def _readable(
    folder: Path, reasons: dict[Path, str], owner: Owner | None = None
) -> dict[Moment, tuple[str, dict[str, Any]]]:
    """A seed's checkpoints by moment, with their names; why a named one cannot be read goes to `reasons`.

    Raises UserError for a checkpoint that is not `owner`'s.
    """
    states = {}
    for name in (TEMPORARY, PREVIOUS, CURRENT):  # of one moment twice, the current one counts
        path = folder / name
        if not path.exists():
            continue
        try:
            state = load(path)
        except UserError as error:
            if name != TEMPORARY:  # a kill leaves unfinished ones: no news
                reasons[path] = str(error)
            continue
        if owner is not None and state["owner"] != asdict(owner):
            raise UserError(f"{path} is of another run ({Owner(**state['owner'])}), not of {owner}; "
                            "move it away, or use another --dir")  # fmt: skip
        states[_moment(state)] = (name, state)
    return states


def _refuse(folders: Sequence[Path], found: Sequence[Mapping[Moment, Any]], reasons: Mapping[Path, str]) -> NoReturn:
    """Raise UserError saying which seeds have nothing to continue from, or at which steps they stand."""
    if without := [str(folder) for folder, states in zip(folders, found, strict=True) if not states]:
        why = f" ({'; '.join(reasons.values())})" if reasons else ""
        raise UserError(f"no checkpoint to continue from in {', '.join(without)}{why}; resume the other seeds apart "
                        "from these, or use --overwrite")  # fmt: skip
    steps = ", ".join(f"{folder.name} at {max(states)[0]}" for folder, states in zip(folders, found, strict=True))
    raise UserError(f"the seeds' checkpoints are not from the same step ({steps}); resume each step's seeds apart")


def _settle(folder: Path, chosen: str, spare: bool) -> None:
    """Make the chosen file the current one, without a moment at which it could be lost.

    spare: whether the current one is good, and of a step that all seeds have; otherwise the previous one stays.
    """
    if chosen == TEMPORARY and spare:
        _rotate(folder)
    elif chosen != CURRENT:
        os.replace(folder / chosen, folder / CURRENT)
    (folder / TEMPORARY).unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint. Raises UserError for a missing or damaged file, another format, or one without its seal."""
    state = load_weights(path)
    if not isinstance(state, dict) or not isinstance(state.get("agent"), dict):
        raise UserError(f"{path} is not a checkpoint of this project")
    if state.get("format") != FORMAT:
        raise UserError(f"{path} was written by another version of this project (format {state.get('format', 1)!r}, "
                        f"here {FORMAT}); go on with that version, or use --overwrite to start anew")  # fmt: skip
    try:
        Owner(**state["owner"])
        _moment(state)
    except (TypeError, LookupError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a checkpoint of this project") from error
    if not is_ours(path):
        raise UserError(f"{path} has lost the SHA-256 that it was written with: something else wrote it since")
    return state


def load_weights(path: Path) -> Any:
    """Any file of tensors and plain values, on the CPU. Raises UserError for a missing, damaged or unsafe file."""
    if not path.is_file():
        raise UserError(f"no file {path}")
    try:
        content = path.read_bytes()
        if not content:
            raise UserError(f"{path} is empty")
        if _has_seal(content) and not _seal_holds(content):
            raise UserError(f"{path} is damaged: its bytes do not have the SHA-256 that it was written with")
        with warnings.catch_warnings():  # of what such a file could hold; it holds no more than is unpickled safely
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # a damaged file fails in many ways: zip, unpickling, key or end-of-file errors
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{path} cannot be read as a file of weights, damaged or none at all ({reason})") from error


def is_ours(path: Path) -> bool:
    """Whether a file has the seal of those that this project writes. Raises OSError."""
    return path.is_file() and _has_seal(path.read_bytes())


def _has_seal(content: bytes) -> bool:
    return content[-_SEAL_BYTES:].startswith(_SEAL)


def _seal_holds(content: bytes) -> bool:
    archive, seal = content[:-_SEAL_BYTES], content[-_SEAL_BYTES:]
    return seal[len(_SEAL) :] == hashlib.sha256(archive).hexdigest().encode()


def load_named(pairs: Sequence[str], known: Mapping[str, Any]) -> dict[str, Any]:
    """NAME=FILE pairs as weights by name.

    known: what the agent has under each name, a network's weights or a single number. Raises UserError for another
    form, a name not in `known`, a file that holds something else, or as `load_weights`.
    """
    named = {}
    for pair in pairs:
        name, separator, file = pair.partition("=")
        if not separator:
            raise UserError(f"weights are given as NAME=FILE, such as actor=actor_50.pth, not {pair!r}")
        if name not in known:
            raise UserError(f"--load_published {pair}: this algorithm has no {name!r}; it takes {', '.join(known)}")
        weights = load_weights(Path(file))
        network = isinstance(known[name], Mapping)
        if not (_is_network(weights) if network else _is_number(weights)):
            wanted = "weights by name, each an ordinary tensor" if network else "a number"
            raise UserError(f"--load_published {pair}: the file does not hold {wanted}")
        named[name] = weights
    return named


def _is_network(weights: Any) -> bool:
    return isinstance(weights, Mapping) and all(isinstance(k, str) and _is_plain(v) for k, v in weights.items())


def _is_number(weights: Any) -> bool:
    return isinstance(weights, float | int) or (_is_plain(weights) and weights.numel() == 1)


def _is_plain(tensor: Any) -> bool:
    """Whether it is a tensor with numbers, of a kind that is copied into a network's."""
    return (
        isinstance(tensor, Tensor)
        and tensor.layout is torch.strided
        and not (tensor.is_meta or tensor.is_quantized or tensor.is_complex())
    )


# --- The seeds axis -----------------------------------------------------------------------------------------


def split(state: Any, seeds: int) -> list[Any]:
    """A state of S seeds as S states of one seed."""
    if isinstance(state, Tensor):
        return [part.clone() for part in state.split(1)]
    if isinstance(state, Mapping):
        parts = {key: split(value, seeds) for key, value in state.items()}
        return [{key: part[k] for key, part in parts.items()} for k in range(seeds)]
    return [state] * seeds


def join(states: Sequence[Any]) -> Any:
    """The inverse of `split`. Raises UserError where plain values (steps, counts) differ between the seeds."""
    first = states[0]
    if isinstance(first, Tensor):
        return torch.cat(list(states))
    if isinstance(first, Mapping):
        return {key: join([state[key] for state in states]) for key in first}
    if any(state != first for state in states):
        raise UserError("the seeds' checkpoints are not from the same step; resume the seeds one at a time")
    return first
