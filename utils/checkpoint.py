"""Whole-run state in one file a seed, written so that a crash at any moment leaves a good one behind.

A checkpoint holds tensors and plain values only, so it loads with `weights_only=True`: nothing is ever unpickled.
In a state's nested dicts every tensor has the seeds axis first; `split` and `join` cut and glue along it, so that a
seed's file is the same whether it was trained alone or in company.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError

__all__ = ["join", "load", "load_named", "load_weights", "save", "save_all", "save_published", "split"]


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write to a temporary file, flush to the disk, rename. Raises UserError where the disk refuses."""
    save_all([path], [content])


def save_all(paths: Sequence[Path], contents: Sequence[Mapping[str, Any]]) -> None:
    """`save` for files that belong together: all are on the disk before the first takes its name."""
    temporary = [path.with_suffix(path.suffix + ".tmp") for path in paths]
    try:
        for path, content in zip(temporary, contents, strict=True):
            with open(path, "wb") as file:
                torch.save(dict(content), file)
                file.flush()
                os.fsync(file.fileno())
        for source, path in zip(temporary, paths, strict=True):
            os.replace(source, path)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        for path in temporary:
            path.unlink(missing_ok=True)
        raise UserError(f"cannot write {paths[0]}: {_first_line(error)}; free some space and run again") from error


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote. Raises UserError for a missing or damaged file."""
    state = load_weights(path)
    if not isinstance(state, dict) or "agent" not in state:
        raise UserError(f"{path} is not a checkpoint of this project")
    return state


def load_weights(path: Path) -> Any:
    """Any file of tensors and plain values, on the CPU. Raises UserError for a missing, damaged or unsafe file."""
    if not path.is_file():
        raise UserError(f"no file {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways: zip, unpickling, key or end-of-file errors
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise UserError(f"{path} cannot be read as a file of weights, damaged or none at all ({reason})") from error


def load_named(pairs: Sequence[str]) -> dict[str, Any]:
    """NAME=FILE pairs as weights by name. Raises UserError for another form, or as `load_weights`."""
    named = {}
    for pair in pairs:
        name, separator, file = pair.partition("=")
        if not separator:
            raise UserError(f"weights are given as NAME=FILE, such as actor=actor_50.pth, not {pair!r}")
        named[name] = load_weights(Path(file))
    return named


def save_published(folders: Sequence[Path], states: Sequence[Mapping[str, Any]], epoch: int) -> None:
    """Each seed's weights as the published code saves them: `<network>_<epoch>.pth`, a dict of tensors by name."""
    for folder, networks in zip(folders, states, strict=True):
        for name, weights in networks.items():
            if isinstance(weights, Mapping):
                save(folder / f"{name}_{epoch}.pth", weights)


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


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
