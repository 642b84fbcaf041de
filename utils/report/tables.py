"""Cells to tables: every protocol's mean and deviation, interquartile means with intervals, the paper's figure."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import hyperparameters
from utils.report import protocols
from utils.report.protocols import PROTOCOLS, TITLES, Index
from utils.report.runs import Cell
from utils.report.statistics import FEW, bootstrap_interval, interquartile_mean, t_interval

PUBLISHED = Path(__file__).resolve().parents[2] / "results" / "published"
# Algorithms that Table 1 prints under another name than theirs in capitals.
COLUMNS = {"idql": "IDQL-A", "decision_diffuser": "DD"}
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


class Published:
    """Table 1 of the paper: (mean, deviation) by task and algorithm; and CORL's last and best scores. NaN for none."""

    def __init__(self, folder: Path = PUBLISHED) -> None:
        self._table = pd.read_csv(folder / "table1.csv", index_col="env_name")
        names = [str(name) for name in self._table.columns]
        self.columns = {name.lower().replace("-", "_"): name for name in names} | COLUMNS  # "diffusion_ql"
        self._corl = pd.read_csv(folder / "corl.csv", index_col=["env_name", "algorithm", "score"])

    def get(self, env_name: str, algo: str) -> tuple[float, float]:
        """The figure of `algo` on a task."""
        columns = [f"{self.columns.get(algo)}{suffix}" for suffix in ("", "_std")]
        mean, deviation = self._table.reindex(index=[env_name], columns=columns).to_numpy(np.float64)[0]
        return mean, deviation

    def corl(self, env_name: str, algo: str, protocol: str) -> tuple[float, float]:
        """CORL's (mean, deviation) of `algo` on a task, for the protocols `last` and `best`."""
        mean, deviation = self._corl.reindex([(env_name, CORL.get(algo, ""), protocol)]).to_numpy(np.float64)[0]
        return mean, deviation


# --- Estimates ------------------------------------------------------------------------------------------


def make_rows(cells: Sequence[Cell], choice: Choice, published: Published) -> pd.DataFrame:
    """A row per cell and protocol that it has a score for, each origin with its averages after it.

    Columns: row (the cell's number here), data, task, method, seeds, reached (gradient steps of the last evaluation),
    steps (the same beside those of the task's own settings), protocol, mean, deviation (over seeds, NaN for one), iqm,
    iqm_low, iqm_high (NaN without two seeds; Student's for few of one task), paper, paper_deviation, difference (ours
    minus the paper's, for runs of the task's own length: a shorter one says nothing of the method), corl,
    corl_deviation; scores in percent.
    """
    lines: list[tuple[str, list[Cell]]] = []
    for label in dict.fromkeys(cell.label for cell in cells):
        own = [cell for cell in cells if cell.label == label]
        lines += [(cell.env_name, [cell]) for cell in own]
        for method in dict.fromkeys(cell.method for cell in own):
            for name, tasks in AVERAGES.items():
                members = [cell for cell in own if cell.method == method and cell.env_name in tasks]
                # Over those tasks that were run; no average of fewer than two, or of a task with several lengths.
                if len({cell.env_name for cell in members}) == len(members) > 1:
                    lines.append((f"{name} ({len(members)} of {len(tasks)})", members))
    rows = [
        {"row": number, **line}
        for number, (name, members) in enumerate(lines)
        for line in _estimates(name, members, choice, published)
    ]
    return pd.DataFrame(rows)


def _estimates(name: str, cells: Sequence[Cell], choice: Choice, published: Published) -> list[dict[str, Any]]:
    """`make_rows` for one cell, or for the average over several."""
    first, single, paired = cells[0], len(cells) == 1, len({tuple(cell.seeds) for cell in cells}) == 1
    papers = [published.get(cell.env_name, cell.algo) if cell.published else (np.nan, np.nan) for cell in cells]
    # The mean of the paper's own rows for the same tasks, not its printed average over all of them.
    paper = float(np.mean([mean for mean, _ in papers]))
    whole = all(cell.whole for cell in cells)
    reached = f"{first.reached:,}" if single else ""
    of = f" of {first.own_steps:,}" if single and first.own_steps not in (None, first.reached) else ""
    lines = []
    for protocol in PROTOCOLS:
        scores = [choice.scores(cell, protocol) for cell in cells]
        if (found := estimate(scores, paired)) is None:
            continue
        other = published.corl(name, first.algo, protocol) if single and first.published else (np.nan, np.nan)
        lines.append({
            "data": first.label, "task": name, "method": first.method,
            "seeds": seeds_text(first) if paired else "various",
            "reached": reached, "steps": reached + of, "protocol": protocol, **found, "paper": paper,
            "paper_deviation": papers[0][1] if single else np.nan,
            "difference": found["mean"] - paper if whole else np.nan, "corl": other[0], "corl_deviation": other[1],
        })  # fmt: skip
    return lines


def estimate(scores: Sequence[np.ndarray | None], paired: bool) -> dict[str, float] | None:
    """Over tasks [n_i] each: the mean of the tasks' means, and the IQM over all runs; None where a task has none.

    paired: entry k of every task is the same seed, so that a deviation over seeds' averages exists.
    """
    tasks = [task for task in scores if task is not None]
    if len(tasks) < len(scores) or not tasks:
        return None
    deviation = float(np.mean(tasks, axis=0).std()) if paired and len(tasks[0]) > 1 else np.nan
    if len(tasks) == 1 and len(tasks[0]) < FEW:  # whose IQM is their mean
        interval = t_interval(tasks[0])
    else:  # one fixed stream: the same files give the same interval
        interval = bootstrap_interval(tasks, interquartile_mean, np.random.default_rng(0))
    low, high = interval or (np.nan, np.nan)
    return {"mean": float(np.mean([task.mean() for task in tasks])), "deviation": deviation,
            "iqm": float(interquartile_mean(tasks)), "iqm_low": low, "iqm_high": high}  # fmt: skip


def seeds_text(cell: Cell) -> str:
    """`0-4` or `0,3`."""
    low, high, number = cell.seeds[0], cell.seeds[-1], len(cell.seeds)
    if number > 2 and cell.seeds == list(range(low, high + 1)):
        return f"{low}-{high}"
    return ",".join(map(str, cell.seeds))


# --- Tables ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Cells of text under a title, with notes below. The first `names` columns are names, the rest numbers. faint: rows
    that are there to compare with, shown small or grey."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    names: int = 2
    faint: Collection[int] = ()

    def without(self, words: str, note: str) -> Table:
        """The table without these words in any cell or note, and with a note that says them."""
        columns, notes, *rows = ([text.replace(words, "") for text in row]
                                 for row in (self.columns, self.notes, *self.rows))  # fmt: skip
        return dataclasses.replace(self, columns=columns, rows=rows, notes=[*notes, note])

    def markdown(self) -> str:
        """GitHub's tables."""
        rule = ["---" if i < self.names else "---:" for i in range(len(self.columns))]
        small = [[f"<sub>{x}</sub>" if x and k in self.faint else x for x in map(_markdown, row)]
                 for k, row in enumerate(self.rows)]  # fmt: skip
        head, *body = ["| " + " | ".join(row) + " |" for row in (list(map(_markdown, self.columns)), *small)]
        lines = [head, "| " + " | ".join(rule) + " |", *body]
        notes = [f"- {note}" for note in self.notes]
        return "\n".join([f"### {self.title}", "", *lines, *([""] if notes else []), *notes, ""])

    def text(self, width: int = 100) -> str:
        """Aligned columns for a terminal; notes are wrapped at `width`."""
        lines = [self.columns, *self.rows]
        widths = [max(len(row[k]) for row in lines) for k in range(len(self.columns))]
        padded = [
            "  ".join(f"{cell:<{w}}" if k < self.names else f"{cell:>{w}}"
                      for k, (cell, w) in enumerate(zip(row, widths, strict=True))).rstrip()
            for row in lines
        ]  # fmt: skip
        notes = [textwrap.fill(note, width) for note in self.notes]
        return "\n".join([self.title, *(f"  {line}".rstrip() for line in padded), *notes, ""])

    def latex(self) -> str:
        """A `tabular` for booktabs."""
        align = "l" * self.names + "r" * (len(self.columns) - self.names)
        grey = [r"\color{gray}" if k in self.faint else "" for k in range(len(self.rows))]
        body = [
            " & ".join(colour + _latex(x) for x in row) + r" \\" for colour, row in zip(grey, self.rows, strict=True)
        ]
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


def make_tables(label: str, rows: pd.DataFrame, choice: Choice, remarks: Sequence[str] = ()) -> list[Table]:
    """Comparison of methods, all protocols, and interquartile means, for the data of one origin only."""
    own = rows[rows["data"] == label]
    tables = [_comparison(label, own, choice), _protocols(label, own, choice, remarks), _iqm(label, own)]
    return [_without_empty_columns(table) for table in tables]


def _without_empty_columns(table: Table) -> Table:
    """The table with those columns of numbers only in which some row has one."""
    kept = [i for i in range(len(table.columns))
            if i < table.names or any(row[i] not in ("–", "") for row in table.rows)]  # fmt: skip
    rows = [[row[i] for i in kept] for row in table.rows]
    return dataclasses.replace(table, columns=[table.columns[i] for i in kept], rows=rows)


def _comparison(label: str, rows: pd.DataFrame, choice: Choice) -> Table:
    """Tasks by methods at one protocol, the paper's figures beside them."""
    methods = list(rows["method"].unique())
    rows = rows[rows["protocol"] == choice.protocol].drop_duplicates(["task", "reached", "method"], keep="last")
    # Rows of averages stand where the first method's do: after all tasks.
    rows = rows.sort_values("task", key=lambda names: names.str.startswith("average"), kind="stable")

    def wide(texts: pd.Series) -> pd.DataFrame:
        table = rows.assign(text=texts).pivot(index=["task", "reached"], columns="method", values="text").fillna("–")
        return table.reindex(pd.MultiIndex.from_frame(rows[["task", "reached"]].drop_duplicates()))

    scores = wide(_texts(rows, "mean", "deviation")).reindex(columns=methods, fill_value="–")
    papers = (
        wide(_texts(rows, "paper", "paper_deviation")).reindex(columns=methods, fill_value="–").add_prefix("paper: ")
    )
    lines = [[*at, *values] for at, *values in scores.join(papers).itertuples(name=None)]
    notes = [DEVIATION_NOTE, _origin_note(label)]
    if choice.protocol == "best":
        notes.insert(0, BEST_NOTE)
    if rows["paper"].notna().any():
        notes.append(PAPER_NOTE)
    columns = ["task", "gradient steps", *scores.columns, *papers.columns]
    return Table(f"{HEADINGS[choice.protocol]}, data: {label}", columns, lines, notes)


def _protocols(label: str, rows: pd.DataFrame, choice: Choice, remarks: Sequence[str]) -> Table:
    """Every protocol of every row, and how far from the paper."""
    names = rows.drop_duplicates("row").set_index("row")
    table = names[["task", "method", "steps", "seeds"]].set_axis(["task", "method", "gradient steps", "seeds"], axis=1)
    table = table.join(_by_protocol(rows, _texts(rows, "mean", "deviation")))
    table["paper"] = _texts(names, "paper", "paper_deviation")
    for protocol in ("last", "best"):
        table[f"{protocol} − paper"] = _by_protocol(rows, rows["difference"].map(signed))[TITLES[protocol]]
    for protocol in ("last", "best"):
        table[f"CORL {TITLES[protocol]}"] = _by_protocol(rows, _texts(rows, "corl", "corl_deviation"))[TITLES[protocol]]
    rank = "the run's own rank (0 where it has none)" if choice.top_k is None else f"rank {choice.top_k}"
    index = "" if choice.index == "right" else ", with the published code's index, which is another evaluation"
    notes = [DEVIATION_NOTE, BEST_NOTE, f"offline-selected: by the policy's loss on the data's actions, {rank}{index}.",
             _origin_note(label), *([CORL_NOTE] if rows["corl"].notna().any() else []), *remarks]  # fmt: skip
    return Table(
        f"All protocols, data: {label}", list(map(str, table.columns)), table.to_numpy().tolist(), notes, names=4
    )


def _iqm(label: str, rows: pd.DataFrame) -> Table:
    """Interquartile means with their intervals."""
    low, high = rows["iqm_low"].map(number), rows["iqm_high"].map(number)
    texts = rows["iqm"].map(number) + (" [" + low + ", " + high + "]").where(rows["iqm_low"].notna(), "")
    names = rows.drop_duplicates("row").set_index("row")[["task", "method", "seeds"]]
    table = names.join(_by_protocol(rows, texts))
    notes = ["In brackets the 95 % percentile interval of the stratified bootstrap (5,000 draws) over runs; for 2 or 3 "
             "seeds of a task, of which that would be the least and the largest, Student's t interval of their mean "
             "(2 or 1 degrees of freedom: wide); none for a single seed.", BEST_NOTE]  # fmt: skip
    return Table(
        f"Interquartile means, data: {label}", list(map(str, table.columns)), table.to_numpy().tolist(), notes, names=3
    )


def _by_protocol(rows: pd.DataFrame, texts: pd.Series) -> pd.DataFrame:
    """The texts of the rows as a column per protocol, "–" where a row has none."""
    wide = rows.assign(text=texts).pivot(index="row", columns="protocol", values="text").fillna("–")
    return wide.reindex(columns=list(PROTOCOLS), fill_value="–").rename(columns=TITLES)


def _texts(rows: pd.DataFrame, mean: str, deviation: str) -> pd.Series:
    """`90.0 ± 8.2` for each row, "–" where it has no mean."""
    pairs = zip(rows[mean], rows[deviation], strict=True)
    return pd.Series([with_deviation(*pair) for pair in pairs], index=rows.index, dtype=object)


def _origin_note(label: str) -> str:
    if label == "official D4RL":
        return "Data: D4RL's own files."
    return f"Data: {label}, not the official D4RL sets: a difference to the paper measures the data as well."


def number(value: float, form: str = ".1f") -> str:
    """One decimal, a real minus sign, and no minus before zero."""
    text = f"{value:{form}}"
    return text.replace("-", "" if float(text) == 0 else "−")


def with_deviation(mean: float, deviation: float) -> str:
    """Both with one decimal; the mean alone, or "–", for NaN."""
    return "–" if np.isnan(mean) else number(mean) + ("" if np.isnan(deviation) else f" ± {deviation:.1f}")


def mean_and_deviation(scores: np.ndarray) -> str:
    """Of a score per seed [n]; without the deviation for one seed."""
    return with_deviation(float(scores.mean()), float(scores.std()) if len(scores) > 1 else np.nan)


def signed(value: float) -> str:
    """A difference: with its sign, "–" for NaN."""
    return "–" if np.isnan(value) else number(value, "+.1f")


def scores_csv(rows: pd.DataFrame) -> str:
    """All rows in long form, unrounded."""
    names = ["data", "task", "method", "seeds"]
    shown = rows.drop(columns=["row", "reached", "paper_deviation", "corl", "corl_deviation"])
    return shown.assign(**{name: shown[name].map(harmless) for name in names}).to_csv(index=False, lineterminator="\n")
