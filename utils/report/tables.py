"""Cells to tables: every protocol's mean and deviation, interquartile means with intervals, the paper's figure."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import hyperparameters
from utils.report.protocols import PROTOCOLS, TITLES, Index, score
from utils.report.runs import Cell
from utils.report.statistics import bootstrap_interval, interquartile_mean

__all__ = [
    "Choice",
    "Estimate",
    "Published",
    "Row",
    "Table",
    "make_rows",
    "make_tables",
    "mean_and_deviation",
    "scores_csv",
    "signed",
]

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
        """A score a seed [n], or None where one of them has none."""
        values = [score(run, protocol, self.top_k, self.index) for run in cell.runs]
        return None if any(value is None for value in values) else np.array(values, dtype=np.float64)


@dataclass(frozen=True)
class Estimate:
    """Normalised score in percent. deviation: over seeds, None for one; interval of the IQM: None without two."""

    mean: float
    deviation: float | None
    iqm: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Row:
    """A task (or an average) and a method: an estimate a protocol, beside the paper's figure where it has one.

    reached: gradient steps of the last evaluation; steps: the same beside those of the task's own settings.
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
    corl: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # (mean, deviation) by protocol

    def difference(self, protocol: str) -> float | None:
        """Ours minus the paper's."""
        estimate = self.estimates[protocol]
        return None if estimate is None or self.paper is None else estimate.mean - self.paper


class Published:
    """Table 1 of the paper: (mean, deviation or None) by task and algorithm; and CORL's last and best scores."""

    def __init__(self, folder: Path = PUBLISHED) -> None:
        with open(folder / "table1.csv", newline="") as file:
            self._rows = {row["env_name"]: row for row in csv.DictReader(file)}
        columns = next(iter(self._rows.values()))
        self.columns = {name.lower().replace("-", "_"): name for name in columns}  # "diffusion_ql": "Diffusion-QL"
        self.columns |= COLUMNS
        self._corl: dict[tuple[str, str], dict[str, tuple[float, float]]] = {}
        with open(folder / "corl.csv", newline="") as file:
            for row in csv.DictReader(file):
                found = self._corl.setdefault((row["env_name"], row["algorithm"]), {})
                found[row["score"]] = (float(row["mean"]), float(row["std"]))

    def get(self, env_name: str, algo: str) -> tuple[float | None, float | None]:
        """The figure of `algo` on a task, (None, None) where the paper has none."""
        row, column = self._rows.get(env_name), self.columns.get(algo)
        if row is None or column is None or not row[column]:
            return None, None
        deviation = row.get(f"{column}_std")
        return float(row[column]), float(deviation) if deviation else None

    def corl(self, env_name: str, algo: str) -> Mapping[str, tuple[float, float]]:
        """CORL's (mean, deviation) of `algo` on a task by protocol, `last` and `best`; empty where it has none."""
        return self._corl.get((env_name, CORL.get(algo, "")), {})


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
    """A row a cell, each origin of data with its averages after it."""
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
    if (own := _own_steps(cell)) not in (None, cell.reached):
        steps += f" of {own:,}"
    corl = {} if cell.changed else published.corl(cell.env_name, cell.algo)
    return Row(cell.label, cell.env_name, cell.method, _seeds(cell), reached, steps, paired, *paper, corl)


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
    return [Row(first.label, f"{name} ({len(members)} of {len(tasks)})", first.method,
                _seeds(first) if paired else "various", "", "", estimates, paper, None)]  # fmt: skip


def _own_steps(cell: Cell) -> int | None:
    """Gradient steps of the task's own settings."""
    try:
        config = hyperparameters.get(cell.algo, cell.env_name)
    except ValueError:
        return None
    return config.num_epochs * config.num_steps_per_epoch


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
        lines = ["| " + " | ".join(row) + " |" for row in (self.columns, rule, *self.rows)]
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


_LATEX = {"\\": r"\textbackslash{}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "±": r"$\pm$",
          "†": r"$\dagger$", "−": "$-$", "–": "--", "$": r"\$", "~": r"\textasciitilde{}"}  # fmt: skip


def _latex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)


def make_tables(label: str, rows: Iterable[Row], choice: Choice, remarks: Sequence[str] = ()) -> list[Table]:
    """Comparison of methods, all protocols, and interquartile means, for the data of one origin only."""
    own = [row for row in rows if row.label == label]
    return [_comparison(label, own, choice), _protocols(label, own, choice, remarks), _iqm(label, own)]


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
    """Of a score a seed [n]; without the deviation for one seed."""
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
    """All rows in long form, a line a protocol, unrounded."""
    out = io.StringIO()
    columns = ("data", "task", "method", "seeds", "steps", "protocol", "mean", "deviation", "iqm", "iqm_low",
               "iqm_high", "paper", "difference")  # fmt: skip
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        for protocol, value in row.estimates.items():
            if value is not None:
                low, high = value.interval or (None, None)
                what = (row.label, row.name, row.method, row.seeds, row.steps, protocol)
                numbers = (value.mean, value.deviation, value.iqm, low, high, row.paper, row.difference(protocol))
                writer.writerow([*what, *numbers])
    return out.getvalue()
