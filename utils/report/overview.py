"""The one table for a reader: sets by methods, each with its scores one below the other and the paper's figure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from utils.report.figures import METHODS
from utils.report.runs import Cell
from utils.report.tables import (
    BEST_NOTE,
    DEVIATION_NOTE,
    PAPER_NOTE,
    Choice,
    Published,
    Table,
    mean_and_deviation,
    number,
    with_deviation,
)
from utils.runs.played import played_scores, way_of

SCORES = {"last": "last", "last5": "mean of last 5", "best": "best †"}
AGAIN, UNCHOSEN = "last, played again ‡", "last, one action per state §"
PLAYED: dict[str, dict[str, Any]] = {AGAIN: {}, UNCHOSEN: {"action_candidates": 1}}  # what is not the run's own


def overview(cells: Sequence[Cell], label: str) -> list[Table]:
    """A table of cells of one origin: for each set and length of the runs a line per score, a column per method.

    Methods that went further stand in the lines of the shorter ones too, with what they had there. [] without cells.
    """
    methods = sorted(dict.fromkeys(cell.method for cell in cells), key=lambda name: _rank(name, cells))
    lines: list[list[str]] = []
    faint: list[int] = []
    episodes: dict[str, set[int]] = {name: set() for name in PLAYED}
    for env_name in dict.fromkeys(cell.env_name for cell in cells):
        own = [cell for cell in cells if cell.env_name == env_name]
        for steps in sorted({cell.total_steps for cell in own}):
            # Of several lengths of a method the nearest.
            found = {cell.method: cut(cell, steps) for cell in sorted(own, key=lambda c: -c.total_steps)
                     if cell.total_steps >= steps}  # fmt: skip
            names = [env_name, _facts(found.values(), "rows", lambda rows: f"{rows:,}"), f"{steps:,}"]
            texts = {name: _row(found, methods, _score(protocol)) for protocol, name in SCORES.items()}
            for name, differs in PLAYED.items():
                again = {method: played_again(cell, differs) for method, cell in found.items()}
                texts[name] = _row(again, methods, lambda scores: scores[0])
                episodes[name] |= {n for _, counts in again.values() for n in counts}
            texts["paper"] = _row(found, methods, _paper)
            for name, row in texts.items():
                if name not in SCORES.values() and not any(row):
                    continue
                if name == "paper":
                    faint.append(len(lines))
                first = name == SCORES["last"]
                data = _facts(found.values(), "behaviour_score", number) if first else ""
                lines.append([*(names if first else [""] * len(names)), name, *row, data])
    if not lines:
        return []
    columns = ["set", "rows", "gradient steps", "score", *methods, "the data"]
    return [Table(f"Overview, data: {label}", columns, lines, _notes(cells, episodes), names=4, faint=faint)]


def cut(cell: Cell, steps: int) -> Cell:
    """The cell as it was at this step: without the evaluations after it. Itself where it went no further."""
    if cell.total_steps <= steps:
        return cell
    runs = [dataclasses.replace(run, episodes=run.episodes[run.episodes["step"] <= steps], total_steps=steps)
            for run in cell.runs]  # fmt: skip
    return dataclasses.replace(cell, runs=runs, total_steps=steps)


def _rank(method: str, cells: Sequence[Cell]) -> tuple[int, str]:
    algo = next(cell.algo for cell in cells if cell.method == method)
    return list(METHODS).index(algo) if algo in METHODS else len(METHODS), method


def _row(found: Mapping[str, Any], methods: Sequence[str], text: Callable[[Any], str]) -> list[str]:
    return [text(found[method]) if method in found else "" for method in methods]


def _score(protocol: str) -> Callable[[Cell], str]:
    def text(cell: Cell) -> str:
        scores = Choice().scores(cell, protocol)
        if scores is None:
            return "–"
        early = f" (at {cell.reached:,})" if cell.reached < cell.total_steps else ""
        return mean_and_deviation(scores) + early

    return text


@cache
def _published() -> Published:
    return Published()


def _paper(cell: Cell) -> str:
    """The paper's Table 1; nothing for other settings than the published ones, or where it has no figure."""
    mean, deviation = _published().get(cell.env_name, cell.algo) if cell.published else (np.nan, np.nan)
    return "" if np.isnan(mean) else with_deviation(mean, deviation)


def played_again(cell: Cell, differs: Mapping[str, Any]) -> tuple[str, set[int]]:
    """What `play.py` got on fresh start states with the weights of the last step; and how many episodes a seed.

    differs: from the run's own number of candidates and backend; where that is the run's own way, nothing.
    """
    own = way_of(cell.runs[0].config)
    if differs and differs.items() <= own.items():
        return "", set()
    how = {"eval_seeds": "fresh", **own, **differs}
    played = {run.seed: played_scores(run.played, cell.total_steps, how) for run in cell.runs}
    found = {seed: scores for seed, scores in played.items() if scores is not None}
    if not found:
        return "", set()
    means = np.array([scores.mean() for scores in found.values()])
    some = "" if len(found) == len(cell.runs) else f" (seed {', '.join(map(str, found))})"
    return mean_and_deviation(means) + some, {len(scores) for scores in found.values()}


def played_note(name: str, counts: set[int]) -> str:
    """What a line of `PLAYED` is, with so many episodes per seed."""
    about = {
        AGAIN: "‡ the last weights on new start states",
        UNCHOSEN: "§ with --action_candidates 1, so without a choice by Q",
    }
    return f"{about[name]}, {' or '.join(map(str, sorted(counts)))} episodes per seed (play.py)."


def _facts(cells: Iterable[Cell], name: str, text: Callable[[Any], str]) -> str:
    """A fact of the cells' data; of several files all of them."""
    facts = dict.fromkeys(run.config["dataset"].get(name) for cell in cells for run in cell.runs)
    return ", ".join("–" if fact is None else text(fact) for fact in facts)


def _notes(cells: Sequence[Cell], episodes: Mapping[str, set[int]]) -> list[str]:
    notes = [DEVIATION_NOTE, BEST_NOTE]
    notes += [played_note(name, counts) for name, counts in episodes.items() if counts]
    if any(_paper(cell) for cell in cells):
        notes.append(PAPER_NOTE)
    notes.append("the data: mean of the set's own episodes.")
    seeds = {cell.method: ", ".join(map(str, cell.seeds)) for cell in cells}
    if len(set(seeds.values())) == 1:
        notes.append(f"Seeds: {next(iter(seeds.values()))}.")
    else:
        notes += [f"Seeds of {cell.method} on {cell.env_name}: {', '.join(map(str, cell.seeds))}." for cell in cells]
    return notes
