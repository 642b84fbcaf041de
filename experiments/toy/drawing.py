"""The toy problem's figures: generated actions over the data, and scores over diffusion steps.

Data are light grey, actions black, methods told apart by line and marker: all can be read in black and white.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.toy.scores import COVERED, NEAR
from utils.data import bandit
from utils.report.figures import style

Array = np.ndarray
Which = tuple[str, int | None]  # algorithm and, for a chain, T
Samples = Mapping[Which, Array]  # actions [N, 2]
Scores = Mapping[Which, Mapping[str, Sequence[float]]]  # by name, a value per seed

DATA, CHAIN, SOLVER = "data, drawn again", "exact chain", "exact solver"
NAMES = {"awr": "AWR", "sfbc": "SfBC", "diffusion_ql": "DQL", "diffcps": "DiffCPS", "diffusion_bc": "diffusion BC",
         "td3_bc": "TD3+BC", "bcq": "BCQ", "bear": "BEAR", "dtql": "DTQL", "bc": "BC", "iql": "IQL"}  # fmt: skip
PANEL = 2.1  # inches
BELOW = (f"Below each panel: share of its actions within {NEAR:g} of a data point, and share of the data within "
         f"{COVERED:g} of one of its actions; means over the seeds.")  # fmt: skip


def name(algo: str) -> str:
    """A method as the paper writes it."""
    return NAMES.get(algo, algo)


def title(which: Which) -> str:
    return name(which[0]) + (f", T = {which[1]}" if which[1] else "")


def draw(task: str, samples: Samples, scores: Scores) -> Iterator[tuple[str, str, Figure]]:
    """File name, caption and figure of everything of which at least one method is there."""
    if task == "bandit-gaussians-v0":
        yield "gaussians", "The data and the actions of each method. " + _MODES, _gaussians(task, samples, scores)
        return
    every_T = sorted({T for algo, T in samples if T and algo not in (CHAIN, SOLVER)})
    for file, caption, rows in _layouts(every_T):
        there = [[which for which in row if which is None or which in samples] for row in rows]
        if any(which is not None for row in there for which in row):
            yield file, f"{caption} {BELOW}", _panels(task, there, samples, scores)
    if len(every_T) > 1:
        yield "figure6", _FIGURE6, _over_T(scores, every_T)


_FIGURE6 = (
    f"Scores over the diffusion steps T, mean and deviation over seeds: share of actions within {NEAR:g} of a data "
    f"point, share of the data within {COVERED:g} of an action, both higher for better, and the maximum mean "
    "discrepancy to the data, lower for better. Dashed: AWR; dotted: the data's distribution; exact "
    "chain and exact solver: what the samplers of DQL and DiffCPS and of SfBC draw without any error of the network. "
    "The paper's Figure 6 shows "
    "its Jaccard index, which is 0 for all of these."
)
_MODES = "Below each panel: share of its actions at the best mode, and at none; means over the seeds."


def _layouts(every_T: Sequence[int]) -> Iterator[tuple[str, str, list[list[Which | None]]]]:
    """Each figure of panels: rows of methods, None for the data alone."""

    def over(algo: str) -> list[Which | None]:
        return [(algo, T) for T in every_T]

    T = 15 if 15 in every_T else max(every_T, default=15)  # the one T that the paper's text names here
    first: list[Which | None] = [None, ("awr", None), ("sfbc", T), ("diffusion_ql", T), ("diffcps", T)]
    yield "figure1", "The data, what four methods make of them, and DiffCPS over T.", [first, over("diffcps")]
    chains = [over(algo) for algo in ("diffusion_ql", "sfbc", "diffcps")]
    yield "figure7", "DQL, SfBC and DiffCPS over T.", chains
    prior: list[Which | None] = [("td3_bc", None), ("bcq", None), ("bear", None), ("diffcps", T)]
    yield "figure8", "Prior offline methods, and DiffCPS.", [prior]
    cloned = ("Diffusion behaviour cloning over T; below it what the samplers alone draw, with the best of all noise "
              "networks: the chain of DQL, DiffCPS and diffusion BC, and SfBC's solver.")  # fmt: skip
    yield "figure9", cloned, [over("diffusion_bc"), over(CHAIN), over(SOLVER)]


# --- Panels ---------------------------------------------------------------------------------------------


def _panels(task: str, rows: Sequence[Sequence[Which | None]], samples: Samples, scores: Scores) -> Figure:
    """A grid of scatter plots."""
    rows = [row for row in rows if row]
    columns = max(map(len, rows))
    figure = Figure(figsize=(PANEL * columns, (PANEL + 0.35) * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes_row, row in zip(grid, rows, strict=True):
        for axes, which in zip(axes_row, row, strict=False):
            if which is None:
                _scatter(axes, task, None, "data", "")
            else:
                value = {score: 100 * np.mean(scores[which][score]) for score in ("precision", "coverage")}
                below = f"near {value['precision']:.0f} %, covered {value['coverage']:.0f} %"
                _scatter(axes, task, samples[which], title(which), below)
        for axes in axes_row[len(row) :]:
            axes.set_axis_off()
    return figure


def _scatter(axes: Axes, task: str, actions: Array | None, above: str, below: str) -> None:
    data = bandit.load(task).actions
    shade = "0.35" if actions is None else "0.82"
    axes.scatter(*data.T, s=1.5, color=shade, linewidths=0, rasterized=True)
    if actions is not None:
        axes.scatter(*actions.T, s=2.5, color="black", linewidths=0, alpha=0.75, rasterized=True)
    limit = 1.15 * bandit.find(task).max_action
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=(-1, 0, 1), yticks=(-1, 0, 1))
    axes.tick_params(labelsize=7)
    axes.set_title(above, fontsize=9)
    axes.set_xlabel(below, fontsize=7)


def _gaussians(task: str, samples: Samples, scores: Scores) -> Figure:
    """The four Gaussians: the data with their rewards, then every method."""
    samples = {which: actions for which, actions in samples.items() if which[0] not in (DATA, CHAIN, SOLVER)}
    columns = min(5, 1 + len(samples))
    height = -(-(1 + len(samples)) // columns)
    figure = Figure(figsize=(PANEL * columns, (PANEL + 0.35) * height), layout="constrained")
    panels = list(figure.subplots(height, columns, squeeze=False).flat)
    _scatter(panels[0], task, None, "data", "numbers: mean rewards")
    for (x, y), reward in zip(bandit.CORNERS, bandit.CORNER_REWARDS, strict=True):
        panels[0].text(0.5 * x, 0.5 * y, f"{reward:g}", ha="center", va="center", fontsize=9)
    best = f"mode of reward {bandit.CORNER_REWARDS.max():g}"
    for axes, (which, actions) in zip(panels[1:], samples.items(), strict=False):
        value = {score: 100 * np.mean(scores[which][score]) for score in (best, "elsewhere")}
        below = f"best mode {value[best]:.0f} %, none {value['elsewhere']:.0f} %"
        _scatter(axes, task, actions, title(which), below)
    for axes in panels[1 + len(samples) :]:
        axes.set_axis_off()
    return figure


# --- Curves ---------------------------------------------------------------------------------------------

_CURVES = {
    "precision": (f"actions within {NEAR:g}\nof a data point, %", 100),
    "coverage": (f"data within {COVERED:g}\nof an action, %", 100),
    "mmd": ("MMD to the data", 1),
}


def _over_T(scores: Scores, every_T: Sequence[int]) -> Figure:
    """Three scores over T."""
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    panels = figure.subplots(1, len(_CURVES))
    for axes, (score, (label, scale)) in zip(panels, _CURVES.items(), strict=True):
        for algo in ("diffusion_ql", "sfbc", "diffcps", CHAIN, SOLVER):
            there = [T for T in every_T if (algo, T) in scores]
            values = scale * np.array([scores[algo, T][score] for T in there])
            if there:
                # The samplers alone look like the methods that use them, hollow and broken.
                look = style("diffusion_ql" if algo == CHAIN else "sfbc", 8) if algo in (CHAIN, SOLVER) else style(algo)
                axes.errorbar(there, values.mean(axis=1), values.std(axis=1), capsize=2, label=name(algo), **look)
        for which, line, text in ((("awr", None), "--", "AWR"), ((DATA, None), ":", "the data")):
            if which in scores:
                level = scale * np.mean(scores[which][score])
                axes.axhline(level, color="0.3", linestyle=line, linewidth=1.2, label=text)
        axes.set(xlabel="diffusion steps T", ylabel=label, xticks=list(every_T))
        axes.set_ylim(bottom=0, top=105 if scale == 100 else None)
        axes.grid(color="0.92")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False, fontsize=8
    )
    return figure
