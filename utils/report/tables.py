"""Cells to tables: every protocol's mean and deviation, interquartile means with intervals, the paper's figure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

import hyperparameters
from utils.report import protocols
from utils.report.protocols import PROTOCOLS, TITLES, Index
from utils.report.runs import Cell
from utils.report.statistics import bootstrap_interval, interquartile_mean

PUBLISHED = Path(__file__).resolve().parents[2] / "results" / "published"
COLUMNS = {"idql": "IDQL-A"}  # algorithms that Table 1 prints under another name than theirs in capitals
CORL = {"bc": "BC", "td3_bc": "TD3+BC", "cql": "CQL", "iql": "IQL"}  # what CORL measured of ours, by its names
_V0 = tuple(name for name in hyperparameters.PAPER_TASKS if name.startswith("antmaze"))
AVERAGES: dict[str, tuple[str, ...]] = {
    "average-locomotion": tuple(name for name in hyperparameters.PAPER_TASKS if name not in _V0),
    "average-antmaze": _V0,
    "average-antmaze-v2": tuple(name.replace("-v0", "-v2") for name in _V0),
}
HEADINGS = {
    "last": "Last evaluation",
    "best": "Best evaluation †",
    "offline": "Evaluation selected by the training loss",
}
PAPER_NOTE = (
    "The paper's figures rest on the official data; its own method's are the best of all evaluations of a run, the "
    "others' as their papers report them."
)
CORL_NOTE = (
    "CORL: last and best of four seeds on the official data, as its README reports them (results/published/corl.csv); "
    "its implementations and settings are its own."
)
BEST_NOTE = "† best: the highest of a run's evaluations, chosen on the test episodes themselves; it overstates."
DEVIATION_NOTE = "± is the standard deviation over seeds (of the population, as NumPy's default)."


@dataclass(frozen=True)
class Choice:
    """How a report chooses: `protocol` of the comparison table (last, best, offline), and the offline options."""

    protocol: str = "last"
    top_k: int | None = None
    index: Index = "right"

    def scores(self, cell: Cell, protocol: str) -> np.ndarray | None:
        """A score per seed [n], or None where one of them has none."""
        values = protocols.scores(cell.frame(), protocol, self.top_k, self.index).to_numpy(np.float64)
        return None if np.isnan(values).any() else values


@dataclass(frozen=True)
class Estimate:
    """Normalised score in percent. deviation: over seeds, None for one; interval of the IQM: None without two."""

    mean: float
    deviation: float | None
    iqm: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Row:
    """A task (or an average) and a method: an estimate per protocol, beside the paper's figure where it has one.

    reached: gradient steps of the last evaluation; steps: the same beside those of the task's own settings; whole:
    whether all of those were made.
    """

    label: str
    name: str
    method: str
    seeds: str
    reached: str
    steps: str
    estimates: Mapping[str, Estimate | None]
    paper: float | None
    paper_deviation: float | None
    whole: bool
    corl: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # (mean, deviation) by protocol

    def difference(self, protocol: str) -> float | None:
        """Ours minus the paper's, for runs of the task's own length: a shorter one says nothing of the method."""
        estimate = self.estimates[protocol]
        return None if estimate is None or self.paper is None or not self.whole else estimate.mean - self.paper


class Published:
    """Table 1 of the paper: (mean, deviation or None) by task and algorithm; and CORL's last and best scores."""

    def __init__(self, folder: Path = PUBLISHED) -> None:
        self._table = pd.read_csv(folder / "table1.csv", index_col="env_name")
        self.columns = {name.lower().replace("-", "_"): name for name in self._table}  # "diffusion_ql": "Diffusion-QL"
        self.columns |= COLUMNS
        corl = pd.read_csv(folder / "corl.csv")
        self._corl = dict(iter(corl.set_index("score").groupby(["env_name", "algorithm"])[["mean", "std"]]))

    def get(self, env_name: str, algo: str) -> tuple[float | None, float | None]:
        """The figure of `algo` on a task, (None, None) where the paper has none."""
        mean, deviation = (self._cell(env_name, f"{self.columns.get(algo)}{suffix}") for suffix in ("", "_std"))
        return mean, None if mean is None else deviation

    def _cell(self, env_name: str, column: str) -> float | None:
        found = self._table.get(column, pd.Series(dtype=float)).get(env_name, np.nan)
        return None if np.isnan(found) else float(found)

    def corl(self, env_name: str, algo: str) -> Mapping[str, tuple[float, float]]:
        """CORL's (mean, deviation) of `algo` on a task by protocol, `last` and `best`; empty where it has none."""
        found = self._corl.get((env_name, CORL.get(algo, "")))
        return {} if found is None else {score: (row["mean"], row["std"]) for score, row in found.iterrows()}


# --- Estimates ------------------------------------------------------------------------------------------


def estimate(scores: Sequence[np.ndarray | None], paired: bool) -> Estimate | None:
    """Over tasks [n_i] each: the mean of the tasks' means, and the IQM over all runs.

    paired: entry k of every task is the same seed, so that a deviation over seeds' averages exists.
    """
    tasks = [task for task in scores if task is not None]
    if len(tasks) < len(scores) or not tasks:
        return None
    deviation = None
    if paired and len(tasks[0]) > 1:
        deviation = float(np.mean(tasks, axis=0).std())
    # One fixed stream: the same files give the same interval.
    interval = bootstrap_interval(tasks, interquartile_mean, np.random.default_rng(0))
    return Estimate(float(np.mean([task.mean() for task in tasks])), deviation, float(interquartile_mean(tasks)),
                    interval)  # fmt: skip


def make_rows(cells: Sequence[Cell], choice: Choice, published: Published) -> list[Row]:
    """A row per cell, each origin of data with its averages after it."""
    rows: list[Row] = []
    for label in dict.fromkeys(cell.label for cell in cells):
        own = [cell for cell in cells if cell.label == label]
        rows += [_cell_row(cell, choice, published) for cell in own]
        for method in dict.fromkeys(cell.method for cell in own):
            members = [cell for cell in own if cell.method == method]
            for name, tasks in AVERAGES.items():
                rows += _average_row(name, tasks, members, choice, published)
    return rows


def _cell_row(cell: Cell, choice: Choice, published: Published) -> Row:
    paired = {name: estimate([choice.scores(cell, name)], paired=True) for name in PROTOCOLS}
    paper = (None, None) if cell.changed else published.get(cell.env_name, cell.algo)
    reached = steps = f"{cell.reached:,}"
    if cell.own_steps not in (None, cell.reached):
        steps += f" of {cell.own_steps:,}"
    corl = {} if cell.changed else published.corl(cell.env_name, cell.algo)
    return Row(cell.label, cell.env_name, cell.method, _seeds(cell), reached, steps, paired, *paper, cell.whole, corl)


def _average_row(
    name: str, tasks: Sequence[str], cells: Sequence[Cell], choice: Choice, published: Published
) -> list[Row]:
    """The average over those of `tasks` that were run; none for fewer than two, or a task with several lengths."""
    members = [cell for cell in cells if cell.env_name in tasks]
    if len(members) < 2 or len({cell.env_name for cell in members}) < len(members):
        return []
    paired = len({tuple(cell.seeds) for cell in members}) == 1
    estimates = {p: estimate([choice.scores(cell, p) for cell in members], paired) for p in PROTOCOLS}
    papers = [None if cell.changed else published.get(cell.env_name, cell.algo)[0] for cell in members]
    known = [value for value in papers if value is not None]
    # The mean of the paper's own rows for the same tasks, not its printed average over all of them.
    paper = float(np.mean(known)) if len(known) == len(papers) else None
    first = members[0]
    whole = all(cell.whole for cell in members)
    return [Row(first.label, f"{name} ({len(members)} of {len(tasks)})", first.method,
                _seeds(first) if paired else "various", "", "", estimates, paper, None, whole)]  # fmt: skip


def _seeds(cell: Cell) -> str:
    low, high, number = cell.seeds[0], cell.seeds[-1], len(cell.seeds)
    if number > 2 and cell.seeds == list(range(low, high + 1)):
        return f"{low}-{high}"
    return ",".join(map(str, cell.seeds))


# --- Tables ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Cells of text under a title, with notes below. The first `names` columns are names, the rest numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    names: int = 2

    def markdown(self) -> str:
        """GitHub's tables."""
        rule = ["---" if i < self.names else "---:" for i in range(len(self.columns))]
        head, *body = ["| " + " | ".join(map(_markdown, row)) + " |" for row in (self.columns, *self.rows)]
        lines = [head, "| " + " | ".join(rule) + " |", *body]
        notes = [f"- {note}" for note in self.notes]
        return "\n".join([f"### {self.title}", "", *lines, *([""] if notes else []), *notes, ""])

    def latex(self) -> str:
        """A `tabular` for booktabs."""
        align = "l" * self.names + "r" * (len(self.columns) - self.names)
        body = [" & ".join(map(_latex, row)) + r" \\" for row in self.rows]
        head = " & ".join(map(_latex, self.columns)) + r" \\"
        notes = [f"% {note}" for note in self.notes]
        parts = [f"% {self.title}", *notes, rf"\begin{{tabular}}{{{align}}}", r"\toprule", head, r"\midrule"]
        return "\n".join([*parts, *body, r"\bottomrule", r"\end{tabular}", ""])


def harmless(text: str) -> str:
    """`text` for a cell that a spreadsheet may open: what begins like a formula, and is no number, begins with '."""
    try:
        float(text.replace("−", "-"))
    except ValueError:
        return f"'{text}" if text.lstrip()[:1] in ("=", "+", "-", "@") or text[:1] in ("\t", "\r") else text
    return text


def _markdown(text: str) -> str:
    return harmless(text).replace("|", "\\|")


_LATEX = {"\\": r"\textbackslash{}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "±": r"$\pm$",
          "†": r"$\dagger$", "−": "$-$", "–": "--", "$": r"\$", "~": r"\textasciitilde{}",
          "^": r"\textasciicircum{}", "{": r"\{", "}": r"\}"}  # fmt: skip


def _latex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in harmless(text))


def make_tables(label: str, rows: Iterable[Row], choice: Choice, remarks: Sequence[str] = ()) -> list[Table]:
    """Comparison of methods, all protocols, and interquartile means, for the data of one origin only."""
    own = [row for row in rows if row.label == label]
    tables = [_comparison(label, own, choice), _protocols(label, own, choice, remarks), _iqm(label, own)]
    return [_without_empty_columns(table) for table in tables]


def _without_empty_columns(table: Table) -> Table:
    """The table with those columns of numbers only in which some row has one."""
    kept = [i for i in range(len(table.columns))
            if i < table.names or any(row[i] not in ("–", "") for row in table.rows)]  # fmt: skip
    rows = [[row[i] for i in kept] for row in table.rows]
    return dataclasses.replace(table, columns=[table.columns[i] for i in kept], rows=rows)


def _comparison(label: str, rows: Sequence[Row], choice: Choice) -> Table:
    """Tasks by methods at one protocol, the paper's figures beside them."""
    methods = list(dict.fromkeys(row.method for row in rows))
    papers = list(dict.fromkeys(row.method for row in rows if row.paper is not None))
    lines = []
    for name, reached in dict.fromkeys((row.name, row.reached) for row in rows):
        here = {row.method: row for row in rows if (row.name, row.reached) == (name, reached)}
        lines.append(
            [name, reached]
            + [_mean(here[method].estimates[choice.protocol]) if method in here else "–" for method in methods]
            + [_paper(here[method]) if method in here else "–" for method in papers]
        )
    # Rows of averages stand where the first method's do: after all tasks.
    lines.sort(key=lambda line: line[0].startswith("average"))
    columns = ["task", "gradient steps", *methods, *(f"paper: {method}" for method in papers)]
    notes = [DEVIATION_NOTE, _origin_note(label)]
    if choice.protocol == "best":
        notes.insert(0, BEST_NOTE)
    if papers:
        notes.append(PAPER_NOTE)
    return Table(f"{HEADINGS[choice.protocol]}, data: {label}", columns, lines, notes)


def _protocols(label: str, rows: Sequence[Row], choice: Choice, remarks: Sequence[str]) -> Table:
    """Every protocol of every row, and how far from the paper."""
    lines = [
        [row.name, row.method, row.steps, row.seeds, *(_mean(row.estimates[p]) for p in PROTOCOLS), _paper(row),
         signed(row.difference("last")), signed(row.difference("best"))]
        for row in rows
    ]  # fmt: skip
    columns = ["task", "method", "gradient steps", "seeds", *(TITLES[p] for p in PROTOCOLS), "paper",
               "last − paper", "best − paper"]  # fmt: skip
    corl = any(row.corl for row in rows)
    if corl:
        columns += ["CORL last", "CORL best †"]
        lines = [[*line, *(_corl(row, p) for p in ("last", "best"))] for line, row in zip(lines, rows, strict=True)]
    rank = "the run's own rank (0 where it has none)" if choice.top_k is None else f"rank {choice.top_k}"
    index = "" if choice.index == "right" else ", with the published code's index, which is another evaluation"
    notes = [DEVIATION_NOTE, BEST_NOTE, f"offline-selected: by the policy's loss on the data's actions, {rank}{index}.",
             _origin_note(label), *([CORL_NOTE] if corl else []), *remarks]  # fmt: skip
    return Table(f"All protocols, data: {label}", columns, lines, notes, names=4)


def _iqm(label: str, rows: Sequence[Row]) -> Table:
    """Interquartile means with their intervals."""
    lines = [[row.name, row.method, row.seeds, *(_interval(row.estimates[p]) for p in PROTOCOLS)] for row in rows]
    notes = ["In brackets the 95 % percentile interval of the stratified bootstrap (5,000 draws) over runs; "
             "none for a single seed. With 2 or 3 runs the IQM is the mean.", BEST_NOTE]  # fmt: skip
    return Table(f"Interquartile means, data: {label}", ["task", "method", "seeds", *(TITLES[p] for p in PROTOCOLS)],
                 lines, notes, names=3)  # fmt: skip


def _origin_note(label: str) -> str:
    if label == "official D4RL":
        return "Data: D4RL's own files."
    return f"Data: {label}, not the official D4RL sets: a difference to the paper measures the data as well."


def _number(value: float, form: str = ".1f") -> str:
    """One decimal, a real minus sign, and no minus before zero."""
    text = f"{value:{form}}"
    return text.replace("-", "" if float(text) == 0 else "−")


def _mean(value: Estimate | None) -> str:
    return "–" if value is None else _with_deviation(value.mean, value.deviation)


def mean_and_deviation(scores: np.ndarray) -> str:
    """Of a score per seed [n]; without the deviation for one seed."""
    return _with_deviation(float(scores.mean()), float(scores.std()) if len(scores) > 1 else None)


def _with_deviation(mean: float, deviation: float | None) -> str:
    return _number(mean) + (f" ± {deviation:.1f}" if deviation is not None else "")


def _interval(value: Estimate | None) -> str:
    if value is None:
        return "–"
    bounds = "" if value.interval is None else f" [{_number(value.interval[0])}, {_number(value.interval[1])}]"
    return _number(value.iqm) + bounds


def _paper(row: Row) -> str:
    if row.paper is None:
        return "–"
    return f"{row.paper:.1f}" + (f" ± {row.paper_deviation:.1f}" if row.paper_deviation is not None else "")


def _corl(row: Row, protocol: str) -> str:
    return "{:.1f} ± {:.1f}".format(*row.corl[protocol]) if protocol in row.corl else "–"


def signed(value: float | None) -> str:
    """A difference: with its sign, "–" for None."""
    return "–" if value is None else _number(value, "+.1f")


def scores_csv(rows: Iterable[Row]) -> str:
    """All rows in long form, a line per protocol, unrounded."""
    lines = []
    for row in rows:
        for protocol, value in row.estimates.items():
            if value is not None:
                low, high = value.interval or (None, None)
                names = {"data": row.label, "task": row.name, "method": row.method, "seeds": row.seeds}
                lines.append({**{column: harmless(name) for column, name in names.items()},
                              "steps": row.steps, "protocol": protocol, "mean": value.mean,
                              "deviation": value.deviation, "iqm": value.iqm, "iqm_low": low, "iqm_high": high,
                              "paper": row.paper, "difference": row.difference(protocol)})  # fmt: skip
    return pd.DataFrame(lines).to_csv(index=False, lineterminator="\n")
