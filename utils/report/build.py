"""A report: what was read from folders of runs, its tables and figures, and the files that it is written to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from utils.errors import UserError
from utils.report import figures
from utils.report.compare import comparison, summary
from utils.report.export import export
from utils.report.page import Made, Section, make_page, runs_table
from utils.report.runs import Cell, Labels, SeedRun, find_runs, group, plain
from utils.report.tables import Choice, Published, Table, make_rows, make_tables, scores_csv
from utils.runs.folder import git_commit

SELECTIONS = {"none": "last", "online": "best", "offline": "offline"}  # --model_selection: the protocol


@dataclass(frozen=True)
class Report:
    """What was read and what was made of it, before any file is written."""

    cells: Sequence[Cell]
    rows: pd.DataFrame  # as `make_rows` gives them
    choice: Choice
    warnings: Sequence[str]
    by: Sequence[str] = ()
    extra: Callable[[Report, str], Sequence[Table]] | None = None  # more tables, for the data of one origin
    compared: bool = False  # methods are set side by side, with the difference to the first

    @property
    def labels(self) -> list[str]:
        return list(dict.fromkeys(cell.label for cell in self.cells))

    @property
    def runs(self) -> list[SeedRun]:
        return [run for cell in self.cells for run in cell.runs]

    def tables(self, label: str) -> list[Table]:
        """Tables of the data of one origin."""
        own = [cell for cell in self.cells if cell.label == label]
        remarks = [f"{c.env_name}, {c.method}: {remark}" for c in own for remark in c.remarks]
        tables = make_tables(label, self.rows, self.choice, remarks)
        tables += self.extra(self, label) if self.extra else ()
        precisions = {cell.changed.get("precision") for cell in own}
        if len(precisions) == 1 and (shared := precisions.pop()):  # a note says it once, and not every name
            tables = [table.without(f" precision={shared}", f"Precision: {shared}.") for table in tables]
        return tables

    def shown(self) -> list[str]:
        """What a terminal shows: all tables as Markdown, or the few small ones of a comparison."""
        if self.compared:
            return [table.text() for table in comparison(self.cells, self.choice)]
        return [table.markdown() for label in self.labels for table in self.tables(label)]

    def figures(self, label: str, each_task: bool = False) -> Iterator[tuple[str, str, Figure]]:
        """Figures of the data of one origin, drawn as they are taken; a line looks the same in all of them."""
        own = [cell for cell in self.cells if cell.label == label]
        return figures.figures(own, self.choice, self.by, figures.Legend(self.cells), each_task)

    def section(self, label: str) -> Section:
        """What the page shows of the data of one origin."""
        own = [cell for cell in self.cells if cell.label == label]
        first = comparison(own, self.choice) if self.compared else [summary(own, self.choice)]
        return Section(label, first, self.figures(label, each_task=True), self.tables(label))


def make_report(
    places: Sequence[Path],
    labels: Labels,
    choice: Choice,
    by: Sequence[str] = (),
    partial: bool = False,
    extra: Callable[[Report, str], Sequence[Table]] | None = None,
    only: Sequence[str] = (),
    compared: bool = False,
) -> Report:
    """Read and summarise those runs that `only` leaves (`select`)."""
    runs, notes = find_runs(places, labels)
    return summarise(select(runs, only), notes, choice, by, partial, extra, compared)


def select(runs: Sequence[SeedRun], only: Sequence[str]) -> list[SeedRun]:
    """The runs that every NAME=VALUE,... of `only` holds for: NAME is data, task, algorithm, steps, seed or a setting.

    Raises UserError for a name that no run has, and where nothing is left.
    """
    kept = list(runs)
    for text in only:
        name, _, values = text.partition("=")
        facts = [{**r.settings, "data": r.label, "task": r.env_name, "algorithm": r.algo, "steps": r.total_steps,
                  "seed": r.seed} for r in kept]  # fmt: skip
        if kept and not any(name in own for own in facts):
            raise UserError(f"--only {text}: none of the runs has {name!r}")
        kept = [r for r, own in zip(kept, facts, strict=True) if name in own and plain(own[name]) in values.split(",")]
    if not kept:
        raise UserError(f"no run is left by --only {' --only '.join(only)}")
    return kept


def summarise(
    runs: Sequence[SeedRun],
    notes: Sequence[str],
    choice: Choice,
    by: Sequence[str] = (),
    partial: bool = False,
    extra: Callable[[Report, str], Sequence[Table]] | None = None,
    compared: bool = False,
) -> Report:
    """A report of these runs; `notes` go before its warnings. compared: they are set side by side.

    Runs that did not reach their last step are left out, and said to be, unless `partial`.
    """
    faults = {run.place: fault for run in runs if (fault := _unusable(run, partial))}
    used = [run for run in runs if run.place not in faults]
    if not used:
        raise UserError(f"nothing to report: {'; '.join(dict.fromkeys(faults.values()))} (--partial shows unfinished "
                        "runs as far as they are)")  # fmt: skip
    warnings = [*notes, *(f"left out: {_describe(run)}: {faults[run.place]}" for run in runs if run.place in faults)]
    warnings += [f"unfinished: {_describe(run)}: {_reached(run)}" for run in used if not run.complete]
    lost = [run for run in runs if run.stopped and run.place in faults]
    cells = [_with_lost(cell, lost) for cell in group(used, by)]
    return Report(cells, make_rows(cells, choice, Published()), choice, warnings, by, extra, compared)


def _unusable(run: SeedRun, partial: bool) -> str | None:
    """Why a run has no place in a table; None where it has."""
    if run.stopped and not partial:
        return "its numbers were no longer finite: " + "; ".join(f"step {step:,}, {text}" for step, text in run.events)
    if not len(run.steps):
        return "no evaluation was made"
    if not np.isfinite(run.episodes["score"]).all():
        return "its set has no reference scores, so there is no normalised score"
    return None if partial or run.complete else _reached(run)


def _with_lost(cell: Cell, lost: Sequence[SeedRun]) -> Cell:
    """The cell with a remark on its seeds that were stopped and are in no mean."""
    key = (cell.label, cell.env_name, cell.algo, cell.changed, cell.total_steps)
    own = [run for run in lost if (run.label, run.env_name, run.algo, run.changed, run.total_steps) == key]
    if not own:
        return cell
    names, number = ", ".join(str(run.seed) for run in own), len(own) + len(cell.runs)
    remark = f"{len(own)} of {number} seeds stopped, their numbers not finite (seed {names}): in no mean"
    return dataclasses.replace(cell, remarks=(*cell.remarks, remark))


def _reached(run: SeedRun) -> str:
    return f"at step {int(run.steps[-1]):,} of {run.total_steps:,}"


def _describe(run: SeedRun) -> str:
    return f"{run.algo} {run.env_name} seed {run.seed} ({run.label})"


def write(report: Report, out: Path) -> list[Path]:
    """OUT/tables/*.md, .csv, .tex and OUT/figures/*.png, .pdf."""
    tables, drawings = out / "tables", out / "figures"
    tables.mkdir(parents=True, exist_ok=True)
    written = [tables / "scores.csv"]
    written[0].write_text(scores_csv(report.rows), encoding="utf-8")
    (tables / "runs.md").write_text(runs_table(report.runs).markdown(), encoding="utf-8")
    for label, name in zip(report.labels, _file_names(report.labels), strict=True):
        made = report.tables(label)
        for suffix, text in (("md", [t.markdown() for t in made]), ("tex", [t.latex() for t in made])):
            written.append(tables / f"{name}.{suffix}")
            written[-1].write_text("\n".join(text), encoding="utf-8")
        for title, _, figure in report.figures(label):
            figures.save(figure, drawings / f"{name}-{title}")
            written.append(drawings / f"{name}-{title}.png")
            plt.close(figure)
    return written


def _file_names(labels: Sequence[str]) -> list[str]:
    """A name for each label's files, none twice."""
    names: list[str] = []
    for label in labels:
        name = "".join(letter if letter.isalnum() else "-" for letter in label.lower())[:60]
        names.append(name if name not in (*names, "runs", "scores") else f"{name}-{len(names)}")
    return names


def write_page(report: Report, path: Path, title: str = "Results", command: str = "") -> None:
    """The one self-contained page. command: what it was asked for by."""
    sections = [report.section(label) for label in report.labels]
    path.parent.mkdir(parents=True, exist_ok=True)
    made = Made(datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), git_commit() or "none", command)
    path.write_text(make_page(title, made, sections, report.runs, report.warnings), encoding="utf-8")


def save(
    report: Report,
    out: Path | None = None,
    page: Path | None = None,
    copy: Path | None = None,
    title: str = "Results",
    command: str = "",
) -> list[str]:
    """Write what is named: tables and figures, the page, the copy of the runs. Returns a line for each.

    Raises UserError where the disk refuses.
    """
    done = []
    try:
        if out:
            done += [f"wrote {path}" for path in write(report, out)]
        if page:
            write_page(report, page, title, command)
            done.append(f"wrote {page}")
        if copy:
            export(report.runs, copy)
            done.append(f"exported {len(report.runs)} runs to {copy}")
    except OSError as error:
        raise UserError(f"cannot write {error.filename}: {error.strerror}") from error
    return done
