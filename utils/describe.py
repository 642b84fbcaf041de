"""What is in a set of recorded rows, on one screen: `python -m utils.describe FILE_OR_ID`.

It reads rows as they lie in the file and refuses nothing that can be read, so that a set which `utils.data.d4rl.load`
turns down, for NaN say, can be looked at.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from utils import tasks
from utils.data import d4rl
from utils.data.doubts import doubts, guess_env_name
from utils.data.rows import (
    ACTION_TOLERANCE,
    Rows,
    episode_ends,
    episode_returns,
    hdf5_errors,
    open_unchanged,
    read_rows,
    sha256_of,
    timeouts,
)
from utils.errors import UserError
from utils.options import command_line

Array = np.ndarray
_BINS = 10
_BAR = 40
_SATURATED = 0.5  # share of actions on the edge of the box that is worth a word (AntMaze: a third)


# --------------------------------------------------------------------------------------------------
# Facts
# --------------------------------------------------------------------------------------------------
def summarize(rows: Rows, env_name: str | None = None, score: Callable[[Array], Array] | None = None) -> dict[str, Any]:
    """Plain numbers about `rows`. A D4RL id gives the time limit and the scores; `score` gives scores elsewhere.

    Keys: rows, transitions (of `qlearning_dataset`), episodes, terminals, timeouts (None where the file has no such
    key), returns, normalized_returns, lengths (one number per episode, in order; the last may be unfinished),
    actions and states (min, mean, max per dimension), suspicious (a list of sentences).
    """
    limit = tasks.task(env_name).max_episode_steps if env_name else None
    if env_name:
        score = functools.partial(tasks.normalized_score, env_name)
    ends = episode_ends(rows, limit)
    starts = np.concatenate([[0], ends[:-1] + 1])
    returns = episode_returns(rows, ends)
    return {
        "env_name": env_name,
        "rows": len(rows.rewards),
        "transitions": int((~timeouts(rows, limit)[:-1]).sum()),
        "episodes": len(ends),
        "terminals": int(rows.terminals.sum()),
        "timeouts": None if rows.timeouts is None else int(rows.timeouts.sum()),
        "returns": returns.tolist(),
        "normalized_returns": None if score is None else score(returns).tolist(),
        "lengths": (ends - starts + 1).tolist(),
        "actions": _ranges(rows.actions),
        "states": _ranges(rows.observations),
        "suspicious": [
            *_suspicious(rows, starts, ends, returns, limit),
            *(doubts(rows, tasks.task(env_name)) if env_name else ()),
        ],
    }


def _ranges(values: Array) -> dict[str, list[float]]:
    return {
        "min": values.min(0).tolist(),
        "mean": values.mean(0, dtype=np.float64).tolist(),
        "max": values.max(0).tolist(),
    }


def _suspicious(rows: Rows, starts: Array, ends: Array, returns: Array, limit: int | None) -> Iterable[str]:
    """What a careful reader would want to know before training on it."""
    yield from _bad_numbers(rows)
    yield from _odd_actions(rows.actions)
    if rows.timeouts is None:
        yield "no key 'timeouts': d4rl counts time limits out instead, and not quite right after a terminal"
    elif both := int((rows.terminals & rows.timeouts).sum()):
        yield f"{both} rows are terminal and timeout at once; d4rl drops them, and their terminal with them"
    if not (rows.terminals[-1] or timeouts(rows, limit)[-1]):
        yield "the last episode is unfinished"
    yield from _unlabelled_ends(rows, starts, limit, ends)
    yield from _repetitions(rows, starts, ends, returns)
    if np.ptp(rows.rewards) == 0:
        yield f"every reward is {rows.rewards[0]:.4g}"


def _bad_numbers(rows: Rows) -> Iterable[str]:
    for key in ("observations", "actions", "rewards"):
        values = getattr(rows, key).reshape(len(rows.rewards), -1)
        bad = ~np.isfinite(values)
        if bad.any():
            yield f"{key}: NaN or infinity in {int(bad.any(1).sum())} rows, the first is row {bad.any(1).argmax()}"
        if key != "rewards":
            constant = np.flatnonzero(values.min(0) == values.max(0))
            if len(constant) and len(values) > 1:
                yield f"{key}: dimension {_listed(constant)} never changes"


def _odd_actions(actions: Array) -> Iterable[str]:
    outside = np.abs(actions) > 1 + ACTION_TOLERANCE
    if outside.any():
        yield f"actions: {int(outside.any(1).sum())} rows leave the box [-1, 1], up to {np.abs(actions).max():.4g}"
    share = float((np.abs(actions) >= 1 - 1e-6).mean())
    if share > _SATURATED:
        yield f"actions: {share:.0%} of the numbers lie on the edge of the box"


def _unlabelled_ends(rows: Rows, starts: Array, limit: int | None, ends: Array) -> Iterable[str]:
    """Episodes longer than the time limit, and states that look like a reset where nothing marks an end."""
    if limit is not None and (long := int((ends - starts + 1 > limit).sum())):
        yield f"{long} episodes are longer than the time limit of {limit} steps: ends are not marked"
    if len(starts) < 5:
        return
    low, high = rows.observations[starts].min(0), rows.observations[starts].max(0)
    room = (high - low) / 2  # a few starts do not span all that a reset may draw
    inside = ((rows.observations >= low - room) & (rows.observations <= high + room)).all(1)
    jumps = inside[1:] & ~inside[:-1]
    jumps[starts[1:] - 1] = False
    if count := int(jumps.sum()):
        yield f"{count} rows look like a reset, the first is row {jumps.argmax() + 1}, but no end is marked before"


def _repetitions(rows: Rows, starts: Array, ends: Array, returns: Array) -> Iterable[str]:
    same = (rows.observations[1:] == rows.observations[:-1]).all(1)
    same[ends[:-1]] = False
    if count := int(same.sum()):
        yield f"{count} rows repeat the state of the row before"
    keys = np.column_stack([rows.observations[starts].astype(np.float64), returns, ends - starts])
    if copies := len(keys) - len(np.unique(keys, axis=0)):
        yield f"{copies} episodes repeat another one (same first state, return and length)"


def _listed(numbers: Array) -> str:
    return ", ".join(map(str, numbers[:8])) + (" ..." if len(numbers) > 8 else "")


# --------------------------------------------------------------------------------------------------
# The screen
# --------------------------------------------------------------------------------------------------
def render(summary: dict[str, Any], title: Sequence[str] = ()) -> str:
    """`summarize`'s numbers as text, at most 100 columns wide."""
    marked = "no such key" if summary["timeouts"] is None else f"{summary['timeouts']:,}"
    scores = summary["normalized_returns"]
    lines = [
        *title,
        "",
        f"rows {summary['rows']:,}   transitions {summary['transitions']:,}   episodes {summary['episodes']:,}"
        f"   terminals {summary['terminals']:,}   timeouts {marked}",
        "",
        f"{'per episode':<20}" + "".join(f"{name:>11}" for name in ("mean", "std", "min", "median", "max")),
        _spread("return", summary["returns"]),
        *([_spread("normalised (%)", scores)] if scores else []),
        _spread("length", summary["lengths"]),
        "",
        "normalised returns" if scores else "returns",
        *_histogram(scores or summary["returns"]),
        "",
        *_grid("actions, min … max (mean) of each dimension", summary["actions"]),
        *_grid("states, min … max (mean) of each dimension", summary["states"]),
        "",
        "suspicious: nothing seen" if not summary["suspicious"] else "suspicious:",
        *(f"  - {sentence}" for sentence in summary["suspicious"]),
    ]
    return "\n".join(lines)


def _spread(name: str, values: Sequence[float]) -> str:
    array = np.asarray(values, dtype=np.float64)
    numbers = (array.mean(), array.std(), array.min(), np.median(array), array.max())
    return f"{name:<20}" + "".join(f"{number:>11.2f}" for number in numbers)


def _histogram(values: Sequence[float]) -> Iterable[str]:
    finite = np.asarray(values, dtype=np.float64)
    finite = finite[np.isfinite(finite)]
    if not len(finite):
        return
    counts, edges = np.histogram(finite, bins=_BINS if np.ptp(finite) > 0 else 1)
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        bar = "█" * int(np.ceil(_BAR * count / counts.max()))
        yield f"  {low:>10.1f} … {high:<10.1f} {bar:<{_BAR}} {count:,}"


def _grid(name: str, ranges: dict[str, list[float]]) -> Iterable[str]:
    """Three dimensions per line, so that 29 of them fit."""
    yield name
    cells = [
        f"{k:>4}: {low:.3g} … {high:.3g} ({mean:.3g})"
        for k, (low, mean, high) in enumerate(zip(ranges["min"], ranges["mean"], ranges["max"], strict=True))
    ]
    for start in range(0, len(cells), 3):
        yield "".join(f"{cell:<33}" for cell in cells[start : start + 3]).rstrip()


# --------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 after one line for what cannot be described."""
    parser = argparse.ArgumentParser(prog="python -m utils.describe", description="Describe a dataset in one screen.")
    parser.add_argument("set", metavar="FILE_OR_ID", help="a D4RL-format file, a D4RL id, local:ID or minari:ID")
    parser.add_argument("--env_name", help="the task by whose scores a FILE is normalised (default: by its name)")
    parser.add_argument("--local_size", type=int, default=100_000, help="rows of local:ID (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON instead")
    return command_line("utils.describe", lambda: _show(parser.parse_args(arguments)))


def _show(given: argparse.Namespace) -> None:
    if given.set.startswith("minari:"):
        title, summary = _describe_minari(given.set)
    else:
        title, summary = _describe_file(given)
    print(json.dumps({"title": title, **summary}) if given.json else render(summary, title))


def _describe_minari(source: str) -> tuple[list[str], dict[str, Any]]:
    from utils.data import minari

    known = minari.reference_scores(source)
    title = [f"{source}   " + ("scored by its own reference scores" if known else "no reference scores")]
    score = functools.partial(minari.normalized_score, source) if known else None
    return title, summarize(minari.read_rows(source), score=score)


def _describe_file(given: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """The lines that say which file it is, and its numbers."""
    path, env_name = _find(given)
    task = tasks.task(env_name) if env_name else None
    with open_unchanged(path) as opened:
        digest, megabytes = sha256_of(opened), os.fstat(opened.fileno()).st_size / 1e6
        rows = read_rows(path, task.state_dim if task else None, task.action_dim if task else None, opened)
        notes = list(_notes(path, opened))
    scored = f"scored as {env_name}" if env_name else "no reference scores (--env_name names the task)"
    title = [f"{path}   {megabytes:.1f} MB   SHA-256 {digest[:12]}…   {scored}", *notes]
    return title, summarize(rows, env_name)


def _find(given: argparse.Namespace) -> tuple[Path, str | None]:
    """The file that is meant, collected or downloaded where need be, and the id that scores it."""
    if given.set.startswith("local:"):
        from utils.behaviour import local

        env_name = given.set.removeprefix("local:")
        return Path(local.load(env_name, size=given.local_size).info["path"]), env_name
    if given.set in tasks.TASKS:
        path = d4rl.cached_file(given.set)
        return path if path.exists() else Path(d4rl.load(given.set).info["path"]), given.set
    path = Path(given.set).expanduser()
    if not path.exists():
        raise UserError(f"{given.set!r} is neither a file nor a D4RL id; ids: {', '.join(tasks.ids())}")
    return path, tasks.task(given.env_name).env_name if given.env_name else guess_env_name(path)


def _notes(path: Path, opened: BufferedReader) -> Iterable[str]:
    """What the file says of itself: rebuilt and local sets do, and must not be taken for official ones."""
    with hdf5_errors(path), h5py.File(opened, "r") as file:
        note = file.attrs.get("description")
    if isinstance(note, str):
        yield note.strip('"')


if __name__ == "__main__":
    raise SystemExit(main())
