"""`python -m utils.report RUNS [--out DIR] [--html FILE]`: see --help and the README."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt

from utils.errors import UserError
from utils.options import Parser
from utils.report import figures
from utils.report.export import export
from utils.report.page import Section, make_page, runs_table
from utils.report.runs import Cell, Labels, SeedRun, find_runs, group
from utils.report.tables import Choice, Published, Row, Table, make_rows, make_tables, scores_csv

SELECTIONS = {"none": "last", "online": "best", "offline": "offline"}


@dataclass(frozen=True)
class Report:
    """What was read and what was made of it, before any file is written."""

    cells: Sequence[Cell]
    rows: Sequence[Row]
    choice: Choice
    warnings: Sequence[str]

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
        return make_tables(label, self.rows, self.choice, remarks)

    def section(self, label: str) -> Section:
        """The same and its figures, drawn as they are taken."""
        own = [cell for cell in self.cells if cell.label == label]
        return label, self.tables(label), figures.figures(own, self.choice)


def make_report(
    places: Sequence[Path], labels: Labels, choice: Choice, by: Sequence[str] = (), partial: bool = False
) -> Report:
    """Read and summarise. Runs that did not reach their last step are left out, and said to be, unless `partial`."""
    runs = find_runs(places, labels)
    evaluated = [run for run in runs if len(run.steps) and (partial or run.complete)]
    left_out = [run for run in runs if run not in evaluated]
    if not evaluated:
        raise UserError("no run has reached its last step; --partial shows them as far as they are")
    warnings = [
        f"left out, at step {int(run.steps[-1]) if len(run.steps) else 0:,} of {run.total_steps:,}: "
        f"{run.algo} {run.env_name} seed {run.seed} ({run.label})"
        for run in left_out
    ]
    warnings += [
        f"unfinished, at step {int(run.steps[-1]):,} of {run.total_steps:,}: {run.algo} {run.env_name} seed {run.seed}"
        for run in evaluated
        if not run.complete
    ]
    cells = group(evaluated, by)
    return Report(cells, make_rows(cells, choice, Published()), choice, warnings)


def write(report: Report, out: Path) -> list[Path]:
    """OUT/tables/*.md, .csv, .tex and OUT/figures/*.png, .pdf."""
    tables, drawings = out / "tables", out / "figures"
    tables.mkdir(parents=True, exist_ok=True)
    written = [tables / "scores.csv"]
    written[0].write_text(scores_csv(report.rows))
    (tables / "runs.md").write_text(runs_table(report.runs).markdown())
    for label in report.labels:
        name = "".join(letter if letter.isalnum() else "-" for letter in label.lower())
        _, made, drawn = report.section(label)
        for suffix, text in (("md", [t.markdown() for t in made]), ("tex", [t.latex() for t in made])):
            written.append(tables / f"{name}.{suffix}")
            written[-1].write_text("\n".join(text))
        for title, _, figure in drawn:
            figures.save(figure, drawings / f"{name}-{title}")
            written.append(drawings / f"{name}-{title}.png")
            plt.close(figure)
    return written


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m utils.report",
        description="Tables, figures and one page from the folders that runs left.",
        epilog="Data of different origin never share a table: official D4RL files, local data and files are apart.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUNS", help="folders of runs; everything below them is read")
    add("--label", action="append", default=[], metavar="NAME=PREFIX",
        help="name for data from files whose path or SHA-256 begins so, such as rebuilt=/data/rebuilt")  # fmt: skip
    add("--by", default="", metavar="SETTING,...", help="settings whose value is part of the method's name")
    add("--model_selection", choices=SELECTIONS, default="none", help="the evaluation in the comparison table: "
        "none (the last), online (the best, chosen on test episodes) or offline (by the training loss)")  # fmt: skip
    add("--top_k", type=int, help="offline: rank of the loss, 0 the smallest (default: the run's own setting, else 0)")
    add("--published_index", action="store_true", help="offline: take the wrong evaluation that the published code "
        "takes")  # fmt: skip
    add("--partial", action="store_true", help="include runs that have not reached their last step")
    add("--out", type=Path, metavar="DIR", help="write DIR/tables (Markdown, CSV, LaTeX) and DIR/figures (PNG, PDF)")
    add("--html", type=Path, metavar="FILE", help="write one self-contained page")
    add("--export", type=Path, metavar="DIR", help="copy the runs' settings and CSV files there, without paths of "
        "this machine and with the origin of the data written down")  # fmt: skip
    return parser


def run(given: argparse.Namespace) -> None:
    """Make what was asked for; print the tables."""
    if given.top_k is not None and given.top_k < 0:
        raise UserError(f"--top_k must be at least 0, not {given.top_k}")
    choice = Choice(SELECTIONS[given.model_selection], given.top_k, "published" if given.published_index else "right")
    by = [name.strip() for name in given.by.split(",") if name.strip()]
    report = make_report(given.runs, Labels.parse(given.label), choice, by, given.partial)
    for line in report.warnings:
        print(f"note: {line}", file=sys.stderr)
    for label in report.labels:
        print("\n".join(table.markdown() for table in report.tables(label)))
    try:
        if given.out:
            print("\n".join(f"wrote {path}" for path in write(report, given.out)))
        if given.html:
            page = make_page(
                "Results", [report.section(label) for label in report.labels], report.runs, report.warnings
            )
            given.html.parent.mkdir(parents=True, exist_ok=True)
            given.html.write_text(page)
            print(f"wrote {given.html}")
        if given.export:
            print(f"exported {len(export(report.runs, given.export))} runs to {given.export}")
    except OSError as error:
        raise UserError(f"cannot write {error.filename}: {error.strerror}") from error


def main(argv: Sequence[str]) -> int:
    """Run a command line; 2 for what the user can mend."""
    try:
        run(build_parser().parse_args(argv))
    except UserError as error:
        print(f"utils.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
