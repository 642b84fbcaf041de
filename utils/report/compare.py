"""Runs side by side: a small table of scores, the settings that differ, and the difference over the seeds in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from utils.report import protocols
from utils.report.names import short_names
from utils.report.runs import Cell, SeedRun, plain
from utils.report.statistics import FEW, t_interval
from utils.report.tables import BEST_NOTE, DEVIATION_NOTE, Choice, Table, mean_and_deviation, number, seeds_text

COMPARED = ("last", "last5")  # protocols of which the difference is taken
MISSING = "–"


def comparison(cells: Sequence[Cell], choice: Choice) -> list[Table]:
    """The tables of runs that were named to be compared, those of each origin of the data apart."""
    tables: list[Table] = []
    for label in dict.fromkeys(cell.label for cell in cells):
        # In the order in which they were named; the others are compared with the first.
        own = sorted((cell for cell in cells if cell.label == label), key=lambda cell: cell.runs[0].named)
        tables += [summary(own, choice), *_settings(own), *_differences(own, choice)]
    if len({cell.label for cell in cells}) > 1:
        note = "No difference is taken between runs on data of different origin."
        tables[-1] = dataclasses.replace(tables[-1], notes=[*tables[-1].notes, note])
    return tables


def summary(cells: Sequence[Cell], choice: Choice) -> Table:
    """A row per task and method, with short names: last, mean of the last five, best, and each of a few seeds."""
    rows = []
    for cell, name in zip(cells, short_names(cells), strict=True):
        found = {protocol: choice.scores(cell, protocol) for protocol in ("last", "last5", "best")}
        texts = [MISSING if values is None else mean_and_deviation(values) for values in found.values()]
        last = found["last"]
        few = last is not None and 1 < len(last) < FEW
        each = ", ".join(map(number, last)) if few and last is not None else ""
        rows.append([cell.env_name, name, seeds_text(cell), f"{cell.reached:,}", *texts, each])
    columns = ["task", "run", "seeds", "gradient steps", "last", "mean of last 5", "best †", "last, seed by seed"]
    if not any(row[-1] for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return _of_tasks(f"Normalised scores, data: {cells[0].label}", columns, rows, [DEVIATION_NOTE, BEST_NOTE])


def _of_tasks(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]) -> Table:
    """A table whose first column is the task: in the title where there is one."""
    if len({row[0] for row in rows}) > 1:
        return Table(title, columns, rows, notes, names=3)
    return Table(f"{title}, {rows[0][0]}", columns[1:], [row[1:] for row in rows], notes)


def _settings(cells: Sequence[Cell]) -> list[Table]:
    """For each task with several methods, in which settings and circumstances they differ."""
    tables = []
    for task, own, names in _by_task(cells):
        facts = [_facts(cell.runs[0]) for cell in own]
        shared = set.intersection(*(set(fact) for fact in facts))
        rows = [
            [name, *(_short(fact[name]) for fact in facts)]
            for name in facts[0]
            if name in shared and len({str(fact[name]) for fact in facts}) > 1
        ]
        if not rows:
            rows = [["none", *("" for _ in own)]]
        tables.append(Table(f"Settings that differ, {task}", ["setting", *names], rows, names=1))
    return tables


def _facts(run: SeedRun) -> dict[str, Any]:
    """What a run was made with, by name: settings first, then what may move its numbers in other ways."""
    config, given = run.config, run.config["run"]
    dataset: Mapping[str, Any] = config["dataset"]
    around = {"algorithm": run.algo, **run.settings}
    around |= {name: given.get(name, MISSING) for name in ("eval_seeds", "backend", "precision", "load_published")}
    versions = config.get("versions")
    torch = versions.get("torch", MISSING) if isinstance(versions, Mapping) else MISSING
    return around | {
        "data (SHA-256)": str(dataset.get("sha256") or MISSING)[:12],
        "commit": str(config.get("git_commit") or MISSING)[:12],
        "device": config.get("device", MISSING),
        "execution": config.get("execution", MISSING),
        "threads": config.get("threads", MISSING),
        "torch": torch,
    }


def _short(value: Any) -> str:
    text = plain(value)
    return text if len(text) <= 40 else text[:39] + "…"


def _differences(cells: Sequence[Cell], choice: Choice) -> list[Table]:
    """Every other run's scores minus the first one's, over the seeds that both have."""
    rows, notes = [], []
    for task, own, names in _by_task(cells):
        first, base = own[0], names[0]
        for other, name in zip(own[1:], names[1:], strict=True):
            common = sorted(set(first.seeds) & set(other.seeds))
            texts = [_difference(first, other, common, protocol, choice) for protocol in COMPARED]
            rows.append([task, f"{name} − {base}", ",".join(map(str, common)) or MISSING, *texts])
            if why := _without_interval(first, other, common, choice):
                notes.append(f"{task}, {name}: no interval, for {why}.")
    if not rows:
        return []
    if any("[" in text for row in rows for text in row):
        notes.insert(0, "In brackets Student's 95 % interval of the mean difference over the seeds in common: it takes "
                        "the differences for normal, and of two or three seeds it is wide.")  # fmt: skip
    columns = ["task", "difference", "seeds in common", "last", "mean of last 5"]
    return [_of_tasks("Paired differences", columns, rows, notes)]


def _difference(first: Cell, other: Cell, common: Sequence[int], protocol: str, choice: Choice) -> str:
    """`3.1 [−1.0, 7.2]`, without an interval where there is none, "–" where a seed has no such score."""
    values = _paired(first, other, common, protocol, choice)
    if not len(values) or np.isnan(values).any():
        return MISSING
    interval = t_interval(values) if np.ptp(values) > 0 else None
    return number(float(values.mean())) + (f" [{number(interval[0])}, {number(interval[1])}]" if interval else "")


def _without_interval(first: Cell, other: Cell, common: Sequence[int], choice: Choice) -> str:
    """Why there is no interval; "" where there is one."""
    if not common:
        return "they have no seed in common"
    if len(common) == 1:
        return "one seed in common says nothing of how much seeds differ"
    return "" if np.ptp(_paired(first, other, common, "last", choice)) > 0 else "the differences are all the same"


def _paired(first: Cell, other: Cell, common: Sequence[int], protocol: str, choice: Choice) -> np.ndarray:
    """The other's score minus the first one's, of each seed in `common` [n]."""
    one, two = (protocols.scores(c.frame(), protocol, choice.top_k, choice.index) for c in (first, other))
    return (two.reindex(list(common)) - one.reindex(list(common))).to_numpy(np.float64)


def _by_task(cells: Sequence[Cell]) -> list[tuple[str, list[Cell], list[str]]]:
    """Tasks that several cells have, with these and their names."""
    names = short_names(cells)
    found = []
    for task in dict.fromkeys(cell.env_name for cell in cells):
        own = [(cell, name) for cell, name in zip(cells, names, strict=True) if cell.env_name == task]
        if len(own) > 1:
            found.append((task, [cell for cell, _ in own], [name for _, name in own]))
    return found
