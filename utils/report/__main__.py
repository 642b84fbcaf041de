"""`python -m utils.report RUNS [--out DIR] [--html FILE]`: see --help and the README."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.errors import UserError
from utils.options import Parser, command_line
from utils.report.build import SELECTIONS, make_report, save
from utils.report.runs import Labels
from utils.report.tables import Choice


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m utils.report",
        description="Tables, figures and one page from the folders that runs left. Two or more folders are compared: "
        "their scores, the settings that differ, and the difference over the seeds in common.",
        epilog="Data of different origin never share a table: official D4RL files, local data and files are apart.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUNS", help="folders of runs, everything below which is read, or of an "
        "export")  # fmt: skip
    add("--only", action="append", default=[], metavar="NAME=VALUE,...", help="the runs of these values of data, task, "
        "algorithm, steps, seed or a setting; may be given several times")  # fmt: skip
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
    add("--export", type=Path, metavar="DIR", help="write DIR/runs.jsonl, a line of settings per run, and "
        "tables of all episodes, epochs and replays, without paths of this machine and with the origin of the data "
        "written down")  # fmt: skip
    return parser


def run(given: argparse.Namespace, command: str) -> None:
    """Make what was asked for, files first, and print the tables: of several places a comparison."""
    if given.top_k is not None and given.top_k < 0:
        raise UserError(f"--top_k must be at least 0, not {given.top_k}")
    choice = Choice(SELECTIONS[given.model_selection], given.top_k, "published" if given.published_index else "right")
    by = [name.strip() for name in given.by.split(",") if name.strip()]
    report = make_report(given.runs, Labels.parse(given.label), choice, by, given.partial, only=given.only,
                         compared=len(given.runs) > 1)  # fmt: skip
    for line in report.warnings:
        print(f"note: {line}", file=sys.stderr)
    done = save(report, given.out, given.html, given.export, command=command)
    print("\n".join(report.shown()))
    print("\n".join(done))


def main(argv: Sequence[str]) -> int:
    """Run a command line; 2 for what the user can fix."""
    command = shlex.join(["python", "-m", "utils.report", *argv])
    return command_line("utils.report", lambda: run(build_parser().parse_args(argv), command))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
