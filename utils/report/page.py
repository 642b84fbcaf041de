"""One HTML file that a person can open anywhere: tables, figures and the list of runs, nothing fetched from outside."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from utils.report.runs import SeedRun
from utils.report.tables import Table, harmless

TEMPLATE = Path(__file__).with_name("page.html")
DOTS = 160  # per inch: a figure of ten inches stays sharp on the page's 1,000 pixels


@dataclass(frozen=True)
class Section:
    """The data of one origin: the tables that come first, figures by name and caption, and all other tables."""

    label: str
    summaries: Sequence[Table]
    drawings: Iterable[tuple[str, str, Figure]]
    tables: Sequence[Table]


@dataclass(frozen=True)
class Made:
    """When, by which commit of this project and by which command a page was made."""

    date: str
    commit: str
    command: str


def make_page(
    title: str, made: Made, sections: Sequence[Section], runs: Sequence[SeedRun], warnings: Sequence[str]
) -> str:
    """The page as text. Figures are embedded as PNG and closed."""
    shown = [
        {"label": one.label, "summaries": one.summaries, "tables": one.tables,
         "pictures": [(caption, *_picture(figure)) for _, caption, figure in one.drawings]}
        for one in sections
    ]  # fmt: skip
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["harmless"] = harmless
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title, made=made, sections=shown, runs=runs_table(runs), warnings=warnings
    )


def runs_table(runs: Sequence[SeedRun]) -> Table:
    """Where every number comes from: data, commit, machine and settings of each seed."""
    lines = []
    for run in runs:
        episodes = run.episodes["step"].value_counts(sort=False)  # by evaluation
        lines.append([
            f"{run.algo}/{run.env_name}/seed_{run.seed}",
            run.label,
            ", ".join(f"{name}={value}" for name, value in sorted(run.changed.items())) or "the task's own",
            f"{episodes.index.max() if len(episodes) else 0:,} of {run.total_steps:,}",
            f"{len(episodes)} × {episodes.iloc[-1] if len(episodes) else 0}",
            f"{run.config['dataset'].get('rows', '–')}",
            str(run.config["dataset"].get("sha256") or "–")[:12],
            str(run.config.get("git_commit") or "–")[:12],
            f"{run.config.get('device', '–')}, {run.config.get('execution', '–')}",
        ])  # fmt: skip
    columns = ["run", "data", "settings changed", "steps", "evaluations × episodes", "rows of data", "SHA-256",
               "commit", "device"]  # fmt: skip
    return Table("Every seed that was read", columns, lines, names=3)


def _picture(figure: Figure) -> tuple[str, int]:
    """The figure as PNG in base64, and its width on the page in pixels; it is closed."""
    picture, width = io.BytesIO(), round(100 * figure.get_figwidth())
    figure.savefig(picture, format="png", dpi=DOTS)
    plt.close(figure)
    return base64.b64encode(picture.getvalue()).decode(), width
