"""Learning curves, performance profiles, lambda and the KL term: told apart by marker and line, not by colour alone."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: no window is ever opened

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from PIL import Image

from utils.report.names import lengths, short_names
from utils.report.protocols import evaluations
from utils.report.runs import Cell
from utils.report.statistics import FEW, bootstrap_interval, performance_profile, resample
from utils.report.tables import Choice

matplotlib.rcParams["pdf.fonttype"] = 42  # fonts that journals take and editors can edit
# One colour and one marker for each method, everywhere. The first seven colours are Okabe and Ito's.
METHODS = {
    "diffcps": ("#000000", "o"), "diffusion_ql": ("#0072B2", "s"), "dtql": ("#D55E00", "^"),
    "diffusion_bc": ("#009E73", "D"), "iql": ("#CC79A7", "v"), "idql": ("#E69F00", "P"), "qgpo": ("#56B4E9", "X"),
    "sfbc": ("#6A3D9A", "<"), "cql": ("#8C510A", ">"), "td3_bc": ("#7F7F7F", "p"), "awr": ("#B8A200", "h"),
    "bc": ("#8FD14F", "d"), "bcq": ("#C51B4A", "*"), "bear": ("#00504A", "8"),
    "diffuser": ("#3D3DF5", (4, 1, 0)), "decision_diffuser": ("#F0A58C", (6, 1, 0)),  # stars of four and six points
}  # fmt: skip
OTHER = ("#A0A0C0", "H")  # an algorithm that is not of this project
_LINES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
COLUMNS = 3  # panels side by side
LABELS, LETTERS = 8, 28  # lines of a panel, and letters of each name, that labels have room for
FAR = 5  # times as large as the usual curve: out of its panel's scale
THRESHOLDS = np.linspace(0, 120, 241)


def style(algo: str, variant: int = 0) -> dict[str, Any]:
    """Colour and marker of an algorithm; the first ten variants of its settings differ in line or in filled markers."""
    colour, marker = METHODS.get(algo, OTHER)
    line, filled = _LINES[variant % len(_LINES)], variant // len(_LINES) % 2 == 0
    return {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.4, "linestyle": line,
            "fillstyle": "full" if filled else "none"}  # fmt: skip


def distinct(lines: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """A look for each line's name, of the algorithm that `lines` has for it; no two alike.

    The first line of an algorithm has its colour and marker, filled, as everywhere. The others have those of
    algorithms that no line is of, with open markers; where these are used up, their own algorithm's colour again, in
    the variants of `style` and then with other markers.
    """
    free = [algo for algo in METHODS if algo not in lines.values()]
    looks: dict[str, dict[str, Any]] = {}
    for name, algo in lines.items():
        if free and any(lines[other] == algo for other in looks):
            looks[name] = {**style(free.pop(0), 1), "fillstyle": "none"}
        else:
            markers = [METHODS.get(algo, OTHER)[1], *(marker for _, marker in METHODS.values())]
            every = ({**style(algo, variant), "marker": marker} for marker in markers for variant in range(10))
            looks[name] = next((look for look in every if look not in looks.values()), style(algo))
    return looks


class Legend:
    """The names and looks of the lines of some cells: the same in every figure that is drawn with it."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        # A method looks the same on every task, its second length on a task the same on every such task. The task's
        # own settings come first, so that they have the algorithm's colour.
        keys = {id(cell): f"{cell.method} {lengths(cell, cells).index(cell.total_steps)}" for cell in cells}
        ordered = sorted(cells, key=lambda cell: (len(cell.changed), cell.copy, cell.total_steps))
        looks = distinct({keys[id(cell)]: cell.algo for cell in ordered})
        self._cells = {id(cell): (cell, literal(name), looks[keys[id(cell)]])
                       for cell, name in zip(cells, short_names(cells), strict=True)}  # fmt: skip

    def name(self, cell: Cell) -> str:
        return self._cells[id(cell)][1]

    def look(self, cell: Cell) -> dict[str, Any]:
        return self._cells[id(cell)][2]


def _every(points: int, look: dict[str, Any]) -> dict[str, Any]:
    """`look` with about eight markers, those of each method elsewhere, so that curves on each other can be told."""
    spacing = max(1, points // 8)
    markers = [marker for _, marker in METHODS.values()] + [OTHER[1]]
    return {**look, "markevery": (markers.index(look["marker"]) * spacing // len(markers), spacing)}


def figures(
    cells: Sequence[Cell],
    choice: Choice,
    by: Sequence[str] = (),
    legend: Legend | None = None,
    each_task: bool = False,
) -> Iterator[tuple[str, str, Figure]]:
    """Name, caption and figure of everything that can be drawn, for the data of one origin.

    legend: that of all cells of a report. each_task: a figure for each task instead of panels for all.
    """
    title, legend = literal(f"data: {cells[0].label}"), legend or Legend(cells)
    for setting in by:
        if (figure := sensitivity(cells, choice, title, setting)) is not None:
            yield "sensitivity" if len(by) == 1 else f"sensitivity-{setting}", _CAPTIONS["sensitivity"], figure
    caption = f": {_CAPTIONS['learning_curves']}"
    for task in dict.fromkeys(cell.env_name for cell in cells) if each_task else ():
        if (figure := task_figure([cell for cell in cells if cell.env_name == task], legend)) is not None:
            yield f"task-{task}", f"{task}{caption}", figure
            caption = ""  # once is enough
    for name, draw in (("learning_curves", learning_curves), ("constraint", constraint)):
        if not each_task and (figure := draw(cells, title, legend)) is not None:
            yield name, _CAPTIONS[name], figure
    if (figure := performance_profiles(cells, choice, title, legend)) is not None:
        yield "performance_profiles", _CAPTIONS["performance_profiles"], figure


_CAPTIONS = {
    "learning_curves": "mean normalised score over seeds; up to three seeds are thin lines of their own, of more the "
    "95 % bootstrap interval of the mean is shaded. Dotted: the mean of the data's own episodes.",
    "sensitivity": "Mean normalised score over seeds against a setting; up to three seeds are dots of their own, of "
    "more the bars are the 95 % bootstrap interval of the mean.",
    "constraint": "DiffCPS's multiplier lambda, its denoising loss against the bound kappa, the share of the policy's "
    "steps with a loss above kappa, and mean Q, that of the critics' targets; mean over seeds, shaded: from the least "
    "to the largest seed. Dotted: kappa, and bounds of lambda. Where the Q of a method runs away, the upper half of "
    "its axis is logarithmic.",
    "performance_profiles": "Share of runs (seeds and tasks) whose score is above a threshold, on the tasks that all "
    "of the methods have; shaded: 95 % stratified bootstrap interval, of four runs or more.",
}


def save(figure: Figure, path: Path) -> None:
    """PATH.png and PATH.pdf. The PDF carries no date, so the same runs give the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_suffix(".png"), dpi=150)
    picture = Image.open(path.with_suffix(".png")).convert("RGB")
    if picture.getcolors(256):  # few colours, such as greys: the same picture in a third of the bytes
        picture = picture.quantize(256, dither=Image.Dither.NONE)
    picture.save(path.with_suffix(".png"), optimize=True)
    figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})


# --- The figures ----------------------------------------------------------------------------------------


def learning_curves(cells: Sequence[Cell], title: str, legend: Legend | None = None) -> Figure | None:
    """Score over gradient steps, a panel per task; None where no seed group shares an evaluation."""
    legend = legend or Legend(cells)
    drawn = [cell for cell in cells if len(curve(cell))]
    if not drawn:
        return None
    figure, panels = _panels(drawn, title)
    for cell in drawn:
        _draw_curve(panels[cell.env_name], cell, legend)
    for task, axes in panels.items():
        _mark_data(axes, [cell for cell in drawn if cell.env_name == task])
        _scale_scores(axes)
    return _finish(figure, panels)


def task_figure(cells: Sequence[Cell], legend: Legend) -> Figure | None:
    """One task, ten inches wide: score over gradient steps, beside it lambda and the KL term where runs have them."""
    drawn = [cell for cell in cells if len(curve(cell))]
    if not drawn:
        return None
    constrained = [cell for cell in drawn if _has_constraint(cell)]
    if constrained:
        names = _constraint_names(constrained)
        size = (10, 0.4 + 2 * len(names))
        figure, named = plt.subplot_mosaic([["score", name] for name in names], figsize=size, width_ratios=(3, 2))
        _draw_constraint(constrained, {name: named[name] for name in names}, legend)
    else:
        figure, named = plt.subplot_mosaic([["score"]], figsize=(10, 3.8))
    for cell in drawn:
        _draw_curve(named["score"], cell, legend)
    _mark_data(named["score"], drawn)
    _scale_scores(named["score"])
    named["score"].set_title(literal(cells[0].env_name), fontsize=9)
    for axes in named.values():
        axes.set_xlabel("gradient steps")
    return _finish(figure, dict(enumerate(named.values())))


def _draw_curve(axes: Axes, cell: Cell, legend: Legend) -> None:
    """The mean over seeds; each seed beside it, or of more than three the interval of the mean."""
    frame, look = curve(cell), legend.look(cell)
    steps, scores = frame.index, frame.to_numpy()
    axes.plot(steps, scores.mean(axis=1), label=legend.name(cell), **_every(len(steps), look))
    if scores.shape[1] >= FEW:
        low, high = np.transpose([_mean_interval(row) for row in scores])
        axes.fill_between(steps, low, high, color=look["color"], alpha=0.18, linewidth=0)
    elif scores.shape[1] > 1:
        axes.plot(steps, scores, color=look["color"], linewidth=0.6, alpha=0.45)


def _scale_scores(axes: Axes) -> None:
    axes.set_ylabel("normalised score [%]")
    low, high = axes.get_ylim()
    axes.set_ylim(low := min(0, low), high)  # from 0, so that no difference looks larger than it is
    if high - low < 1:  # a score that stays the same, such as 0 in a maze: no axis of hundredths
        axes.set_ylim(low - 1, high + 1)


def sensitivity(cells: Sequence[Cell], choice: Choice, title: str, setting: str) -> Figure | None:
    """Score against the values of `setting`, evenly spaced, a line per task and whatever else was changed; None where
    no line has two values."""
    lines: dict[tuple[str, str], list[tuple[float, np.ndarray]]] = {}
    for cell in cells:
        scores = choice.scores(cell, choice.protocol)
        if scores is not None and isinstance(cell.runs[0].settings.get(setting), int | float):
            others = [f"{name}={value}" for name, value in sorted(cell.changed.items()) if name != setting]
            line = f"{cell.env_name} ({' '.join([cell.algo, *others])})"
            lines.setdefault((cell.algo, literal(line)), []).append((cell.runs[0].settings[setting], scores))
    lines = {name: points for name, points in lines.items() if len({value for value, _ in points}) > 1}
    if not lines:
        return None
    values = sorted({value for points in lines.values() for value, _ in points})
    figure, axes = plt.subplots(figsize=(5.2, 3.8))
    looks = distinct({name: algo for algo, name in lines})
    for (_, name), points in lines.items():
        points.sort(key=lambda point: point[0])
        places = [values.index(value) for value, _ in points]
        means = np.array([scores.mean() for _, scores in points])
        ends = [_mean_interval(scores) if len(scores) >= FEW else (scores.mean(),) * 2 for _, scores in points]
        low, high = np.transpose(ends)
        axes.errorbar(places, means, [means - low, high - means], label=name, capsize=2, **looks[name])
        for place, (_, scores) in zip(places, points, strict=True):
            if 1 < len(scores) < FEW:
                axes.plot([place] * len(scores), scores, ".", color=looks[name]["color"], markersize=3, alpha=0.6)
    axes.set_xticks(range(len(values)), [f"{value:g}" for value in values])
    axes.set_xlabel(setting)
    axes.set_ylabel(f"normalised score [%] ({choice.protocol})")
    axes.set_title(title, fontsize=9)
    return _finish(figure, {0: axes}, counts=False)


def curve(cell: Cell) -> pd.DataFrame:
    """The score of each seed (columns) at the steps (rows) at which every seed was evaluated."""
    return evaluations(cell.frame())["score"].unstack("run").dropna()


def _mean_interval(scores: np.ndarray) -> tuple[float, float]:
    interval = bootstrap_interval([scores], lambda drawn: drawn[0].mean(axis=-1), np.random.default_rng(0), draws=1000)
    return interval or (float(scores.mean()), float(scores.mean()))


def _mark_data(axes: Axes, cells: Sequence[Cell]) -> None:
    """A dotted line at the mean score of the data's own episodes, where it is known."""
    means = {run.config["dataset"].get("behaviour_score") for cell in cells for run in cell.runs}
    for mean in (mean for mean in means if isinstance(mean, int | float)):
        axes.axhline(mean, color="0.35", linestyle=(0, (1, 2)), linewidth=1.2, zorder=1)
        _label_line(axes, mean, f"the data: {mean:.1f}")
        low, high = axes.get_ylim()
        axes.set_ylim(top=max(high, mean + 0.08 * (high - min(0, low))))  # room for the label


def _label_line(axes: Axes, y: float, text: str) -> None:
    """Small print at the left end of a horizontal line, just above it."""
    axes.annotate(text, (0.02, y), xycoords=("axes fraction", "data"), xytext=(0, 2), textcoords="offset points",
                  va="bottom", fontsize=7, color="0.25")  # fmt: skip


# What `constraint` shows, from above; the last two where some of the runs have them.
_CONSTRAINT = {
    "lambda": "multiplier λ",
    "kl_loss": "denoising loss (KL term)",
    "lambda_violated": "share of steps above κ",
    "q_mean": "mean Q",
}


def constraint(cells: Sequence[Cell], title: str, legend: Legend | None = None) -> Figure | None:
    """lambda, the KL term, how often it was above kappa, and mean Q over training; None where no run has the first
    two."""
    legend = legend or Legend(cells)
    drawn = [cell for cell in cells if _has_constraint(cell)]
    if not drawn:
        return None
    names = _constraint_names(drawn)
    tasks = list(dict.fromkeys(cell.env_name for cell in drawn))
    columns, rows = min(COLUMNS, len(tasks)), len(names)
    blocks = -(-len(tasks) // columns)
    size = (0.6 + 4.4 * columns, 0.5 + 2.4 * rows * blocks)
    figure, grid = plt.subplots(rows * blocks, columns, figsize=size, squeeze=False)
    for spare in grid[-rows:, (len(tasks) - 1) % columns + 1 :].ravel():
        spare.set_visible(False)
    for k, task in enumerate(tasks):
        stack = dict(zip(names, grid[rows * (k // columns) :][:rows, k % columns], strict=True))
        _draw_constraint([cell for cell in drawn if cell.env_name == task], stack, legend)
        stack["lambda"].set_title(literal(task), fontsize=9)
    figure.suptitle(title, fontsize=9)
    return _finish(figure, dict(enumerate(grid.ravel())))


def _has_constraint(cell: Cell) -> bool:
    return _has(cell, "lambda") and _has(cell, "kl_loss")


def _has(cell: Cell, name: str) -> bool:
    """Whether all runs have this metric."""
    return all(name in run.metrics for run in cell.runs)


def _constraint_names(cells: Sequence[Cell]) -> list[str]:
    return [name for name in _CONSTRAINT if any(_has(cell, name) for cell in cells)]


def _draw_constraint(cells: Sequence[Cell], stack: Mapping[str, Axes], legend: Legend) -> None:
    """The metrics of `stack` in their panels, the KL term beside its bounds kappa, of runs of one task."""
    for cell in cells:
        look = legend.look(cell)
        for name, axes in stack.items():
            if not _has(cell, name):
                continue
            values = _metric(cell, name)
            low, high = values.min(axis=1), values.max(axis=1)
            axes.plot(values.index, values.mean(axis=1), label=legend.name(cell), **_every(len(values), look))
            axes.fill_between(values.index, low, high, color=look["color"], alpha=0.18, lw=0)
    for name, axes in stack.items():
        axes.set(xlabel="gradient steps", ylabel=_CONSTRAINT[name])
    stack["kl_loss"].set_yscale("log")
    if "lambda_violated" in stack:
        stack["lambda_violated"].set_ylim(-0.03, 1.03)
    for name in ("lambda", "q_mean"):
        if name in stack:
            _make_room(stack[name])
    _mark_bounds(stack["lambda"], cells)
    _mark_kappa(stack["kl_loss"], cells, legend)


def _make_room(axes: Axes) -> None:
    """Where a curve goes far beyond most, half of the axis is linear and shows these, and the rest is logarithmic."""
    curves = [np.asarray(line.get_ydata(), float) for line in axes.get_lines()]
    largest = [float(np.abs(curve[np.isfinite(curve)]).max(initial=0)) for curve in curves] or [0.0]
    usual = statistics.median_low(largest)
    if 0 < FAR * usual < max(largest):
        linear = 1.2 * usual
        # matplotlib makes the linear part 10/9 times as high as asked for
        axes.set_yscale("symlog", linthresh=linear, linscale=0.9 * np.log10(max(largest) / linear))


def _mark_kappa(axes: Axes, cells: Sequence[Cell], legend: Legend) -> None:
    """The bounds of a task's cells: a line and its number, or with `auto` the curve, in the colour of its cell."""
    dotted = (0, (1, 2))
    bounds = [run.settings.get("kappa", 0) for cell in cells for run in cell.runs]
    for kappa in dict.fromkeys(x for x in bounds if isinstance(x, int | float) and 0 < x < np.inf):
        axes.axhline(kappa, color="0.35", linestyle=dotted, linewidth=1.2)
        _label_line(axes, kappa, f"κ = {kappa:g}")
    for cell in cells:
        if _has(cell, "kappa"):
            values = _metric(cell, "kappa")
            axes.plot(values.index, values.mean(axis=1), color=legend.look(cell)["color"], linestyle=dotted, lw=1.2)


def _mark_bounds(axes: Axes, cells: Sequence[Cell]) -> None:
    """lambda's bounds, as far as they lie within what is drawn; 0 is the axis."""
    low, high = axes.get_ylim()
    bounds = [run.settings.get(name, 0) for cell in cells for run in cell.runs for name in ("lambda_min", "lambda_max")]
    for bound in dict.fromkeys(x for x in bounds if isinstance(x, int | float) and max(0, low) < x < high):
        axes.axhline(bound, color="0.35", linestyle=(0, (1, 2)), linewidth=1.2)


def _metric(cell: Cell, name: str) -> pd.DataFrame:
    """The metric of each seed (columns) at the steps (rows) at which every seed has a value."""
    values = {run.seed: pd.Series(run.metrics[name], run.metrics["step"]).groupby(level=0).last() for run in cell.runs}
    frame = pd.DataFrame(values).replace([np.inf, -np.inf], np.nan).dropna()
    return frame[frame.index > 0]


def literal(text: str) -> str:
    """Text as Matplotlib shows it to the letter: no formula between dollars, no label hidden for its underscore."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def performance_profiles(
    cells: Sequence[Cell], choice: Choice, title: str, legend: Legend | None = None
) -> Figure | None:
    """A line per method over the tasks that all of them have; None where there is none, or no method has two runs."""
    legend = legend or Legend(cells)
    scored = [(cell, s) for cell in cells if (s := choice.scores(cell, choice.protocol)) is not None]
    methods = {cell.method: cell for cell, _ in reversed(scored)}
    shared = {cell.env_name for cell, _ in scored}
    for method in methods:
        shared &= {cell.env_name for cell, _ in scored if cell.method == method}
    figure, axes = plt.subplots(figsize=(5.2, 3.8))
    for method, first in reversed(methods.items()):
        scores = [s for cell, s in scored if cell.method == method and cell.env_name in shared]
        if (runs := sum(map(len, scores))) < 2:
            continue
        look = legend.look(first)
        axes.plot(THRESHOLDS, performance_profile(scores, THRESHOLDS), drawstyle="steps-post",
                  label=f"{legend.name(first)} ({runs} runs)", **_every(len(THRESHOLDS), look))  # fmt: skip
        if runs >= FEW and all(len(task) > 1 for task in scores):
            draws = performance_profile(resample(scores, np.random.default_rng(0), 1000), THRESHOLDS)
            low, high = np.quantile(draws, [0.025, 0.975], axis=0)
            axes.fill_between(THRESHOLDS, low, high, color=look["color"], alpha=0.15, step="post", linewidth=0)
    if not axes.lines:
        plt.close(figure)
        return None
    axes.set_xlabel(f"threshold τ, normalised score [%] ({choice.protocol})")
    axes.set_ylabel("share of runs above τ")
    axes.set_title(f"{title}, {len(shared)} task{'s' if len(shared) > 1 else ''}", fontsize=9)
    return _finish(figure, {0: axes})


# --- Shared ---------------------------------------------------------------------------------------------


def _panels(cells: Sequence[Cell], title: str) -> tuple[Figure, dict[object, Axes]]:
    """A grid of axes, one per task."""
    tasks = list(dict.fromkeys(cell.env_name for cell in cells))
    columns = min(COLUMNS, len(tasks))
    rows = -(-len(tasks) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(0.6 + 4.4 * columns, 0.5 + 2.8 * rows), squeeze=False)
    for spare in grid.ravel()[len(tasks) :]:
        spare.set_visible(False)
    panels: dict[object, Axes] = dict(zip(tasks, grid.ravel(), strict=False))
    for task, axes in panels.items():
        axes.set_title(literal(str(task)), fontsize=9)
        axes.set_xlabel("gradient steps")
    figure.suptitle(title, fontsize=9)
    return figure, panels


def _finish(figure: Figure, panels: dict[object, Axes] | dict[int, Axes], counts: bool = True) -> Figure:
    """Grids, and the names of the lines: beside them where there is room, else in one legend below all panels."""
    found: dict[str, Any] = {}
    for axes in panels.values():
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.tick_params(labelsize=8, which="both")
        axes.xaxis.label.set_fontsize(9)
        axes.yaxis.label.set_fontsize(9)
        if counts:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k, 1M
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.set_layout_engine("constrained")
    if max(map(len, found)) <= LETTERS and all(
        len(axes.get_legend_handles_labels()[1]) <= LABELS for axes in panels.values()
    ):
        for axes in panels.values():
            _label_lines(axes)
        return figure
    room = int(figure.get_figwidth() * 14)  # letters of this size side by side; a line's sample takes some 6
    fits = [n for n in (3, 2) if n <= len(found) and max(map(len, found)) <= room // n - 6]
    labels = [textwrap.fill(label, room - 6) for label in found]
    columns = max(fits, default=1)
    lines = -(-sum(label.count("\n") + 1 for label in labels) // columns)
    figure.set_figheight(figure.get_figheight() + 0.17 * max(0, lines - 3))  # the panels keep their height
    figure.legend(list(found.values()), labels, loc="outside lower center", ncols=columns, fontsize=8)
    return figure


def _label_lines(axes: Axes, gap: float = 0.075) -> None:
    """Each line's name at the right, at the height of its end or as near as the others let it."""
    limits = np.transpose([axes.get_xlim(), axes.get_ylim()])
    low, high = axes.transScale.transform(limits)
    ends = []
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
        line: Any = handle[0] if isinstance(handle, tuple) else handle  # of an error bar
        place = (axes.transScale.transform(line.get_xydata()[-1:])[0] - low) / (high - low)
        ends.append((np.clip(np.nan_to_num(place), 0, 1).tolist(), label, line.get_color()))
    ends.sort(key=lambda one: one[0][1])
    for height, (end, label, colour) in zip(_spread([end[1] for end, _, _ in ends], gap), ends, strict=True):
        thread = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "relpos": (0, 0.5), "shrinkA": 1}
        axes.annotate(label, end, (1.03, height), xycoords="axes fraction", color=colour, fontsize=8, va="center",
                      annotation_clip=False, arrowprops=thread)  # fmt: skip


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Rising heights in [0, 1], at least `gap` apart and together as near to the given ones (rising) as can be."""
    # Without the gaps before them they only have to rise: least squares pools those that do not (isotonic regression).
    pools: list[list[float]] = []
    for k, height in enumerate(heights):
        pools.append([height - k * gap])
        while len(pools) > 1 and np.mean(pools[-2]) >= np.mean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    level = [float(np.clip(np.mean(pool), 0, max(0, 1 - gap * (len(heights) - 1)))) for pool in pools for _ in pool]
    return [height + k * gap for k, height in enumerate(level)]
