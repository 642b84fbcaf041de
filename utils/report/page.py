"""One HTML file that a person can open anywhere: tables, figures and the list of runs, nothing fetched from outside."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from utils.report.runs import SeedRun
from utils.report.tables import Table

__all__ = ["Section", "make_page"]

Section = tuple[str, Sequence[Table], Iterable[tuple[str, str, Figure]]]  # origin of the data, tables, figures

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #111; background: #fff; max-width: 1400px; margin: 2em auto;
       padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { margin-top: 2em; border-bottom: 2px solid #111; } h3 { margin-bottom: .4em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .7em; border-bottom: 1px solid #ccc; white-space: nowrap; text-align: right; }
th.name, td.name { text-align: left; } thead th { border-bottom: 2px solid #111; }
tr.average td { font-weight: 600; background: #f2f2f2; }
.notes { font-size: 13px; color: #444; } .warning { border-left: 4px solid #b30; padding-left: .8em; }
figure { margin: 1em 0; } figure img { max-width: 100%; height: auto; } figcaption { font-size: 13px; color: #444; }
nav a { margin-right: 1.2em; }
"""


def make_page(title: str, sections: Sequence[Section], runs: Sequence[SeedRun], warnings: Sequence[str]) -> str:
    """The page as text. Figures are embedded as PNG and closed."""
    parts = [f"<h1>{_text(title)}</h1>", _navigation([label for label, _, _ in sections])]
    if warnings:
        parts.append(_list(warnings, "warning"))
    for number, (label, tables, drawings) in enumerate(sections):
        parts.append(f'<h2 id="data{number}">Data: {_text(label)}</h2>')
        parts += [_table(table) for table in tables]
        parts += [_figure(caption, figure) for _, caption, figure in drawings]
    parts += ['<h2 id="runs">Runs</h2>', _table(runs_table(runs))]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{_text(title)}</title>'
    body = "\n".join(parts)
    page = f'<!DOCTYPE html>\n<html lang="en">\n<head>{head}<style>{_STYLE}</style></head>\n'
    return f"{page}<body>\n{body}\n</body>\n</html>\n"


def runs_table(runs: Sequence[SeedRun]) -> Table:
    """Where every number comes from: data, commit, machine and settings of each seed."""
    lines = [
        [
            f"{run.algo}/{run.env_name}/seed_{run.seed}",
            run.label,
            ", ".join(f"{name}={value}" for name, value in sorted(run.changed.items())) or "the task's own",
            f"{int(run.steps[-1]) if len(run.steps) else 0:,} of {run.total_steps:,}",
            f"{len(run.steps)} × {len(run.episodes[-1]) if len(run.episodes) else 0}",
            f"{run.config['dataset'].get('rows', '–')}",
            str(run.config["dataset"].get("sha256") or "–")[:12],
            str(run.config.get("git_commit") or "–")[:12],
            f"{run.config.get('device', '–')}, {run.config.get('execution', '–')}",
        ]
        for run in runs
    ]
    columns = ["run", "data", "settings changed", "steps", "evaluations × episodes", "rows of data", "SHA-256",
               "commit", "device"]  # fmt: skip
    return Table("Every seed that was read", columns, lines, names=3)


def _text(text: str) -> str:
    return html.escape(text)


def _navigation(labels: Sequence[str]) -> str:
    links = [f'<a href="#data{number}">{_text(label)}</a>' for number, label in enumerate(labels)]
    return f'<nav>{"".join(links)}<a href="#runs">runs</a></nav>'


def _list(items: Sequence[str], kind: str) -> str:
    return f'<ul class="{kind}">' + "".join(f"<li>{_text(item)}</li>" for item in items) + "</ul>"


def _table(table: Table) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        classes = [' class="name"' if i < table.names else "" for i in range(len(cells))]
        return "".join(f"<{tag}{kind}>{_text(cell)}</{tag}>" for kind, cell in zip(classes, cells, strict=True))

    body = "".join(
        f"<tr{' class=average' if row[0].startswith('average') else ''}>{line(row, 'td')}</tr>" for row in table.rows
    )
    return (
        f'<h3>{_text(table.title)}</h3><div class="wide"><table><thead><tr>{line(table.columns, "th")}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>" + (_list(table.notes, "notes") if table.notes else "")
    )


def _figure(caption: str, figure: Figure) -> str:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    plt.close(figure)
    data = base64.b64encode(picture.getvalue()).decode()
    return (
        f'<figure><img alt="{_text(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )
