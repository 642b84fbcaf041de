"""What is shown when a run ends: the table of scores and the learning curve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from utils.errors import UserError
from utils.runs.columns import STOPPED
from utils.runs.reading import read_events, scores_by_step

LAST = 5  # evaluations in the "mean of the last" column


def summary_table(folders: Sequence[Path], behaviour_score: float | None = None) -> str:
    """Last, mean of the last five and best evaluation of each seed, then their mean and deviation over seeds.

    `behaviour_score`: the data's own mean normalised return, shown beside them.
    """
    rows, lines = [], [f"{'seed':>10} {'last':>8} {f'mean of last {LAST}':>15} {'best':>8}  at step"]
    for folder in folders:
        means, name = _means(folder), folder.name.removeprefix("seed_")
        stopped = next((step for step, event in read_events(folder / "metrics.csv") if event.startswith(STOPPED)), None)
        if not means and stopped is None:
            return "no evaluation was made"
        numbers = f"{'-':>8} {'-':>15} {'-':>8}"
        if means:
            values = list(means.values())
            best = max(means, key=lambda step: means[step])
            row = (values[-1], float(np.mean(values[-LAST:])), means[best])
            numbers = f"{row[0]:8.1f} {row[1]:15.1f} {row[2]:8.1f}  {best}"
        if stopped is not None:
            numbers += f"  stopped at {stopped:,}: numbers not finite; in no mean"
        else:
            rows.append(row)
        lines.append(f"{name:>10} {numbers}")
    if len(rows) > 1:
        mean, deviation = np.mean(rows, axis=0), np.std(rows, axis=0)
        for label, x in (("mean", mean), ("deviation", deviation)):
            lines.append(f"{label:>10} {x[0]:8.1f} {x[1]:15.1f} {x[2]:8.1f}")
    if behaviour_score is not None:
        lines.append(f"{'data':>10} {behaviour_score:8.1f}  mean of the episodes in the dataset")
    lines.append("Normalised scores. Best is chosen on test episodes: it is no estimate of what the policy will do.")
    return "\n".join(lines)


def _means(folder: Path) -> dict[int, float]:
    """Mean normalised score of each evaluation of a seed, by step."""
    return {step: float(x.mean()) for step, x in scores_by_step(folder / "evaluations.csv").items()}


def save_curve(folders: Sequence[Path], title: str, behaviour_score: float | None = None) -> Path | None:
    """Draw every seed's evaluations, their mean, and the data's own mean return; the picture's path.

    The mean is that of the seeds that went to the end. None where nothing was evaluated. Raises UserError where the
    disk refuses.
    """
    curves = [curve for folder in folders if (curve := _means(folder))]
    last = max((step for curve in curves for step in curve), default=None)
    whole = [curve for curve in curves if last in curve]
    if not whole:
        return None
    steps = sorted(set.intersection(*(set(curve) for curve in whole)))
    figure = Figure(figsize=(5.5, 3.5), layout="constrained")
    axes = figure.add_subplot()
    for curve in curves:
        axes.plot(list(curve), list(curve.values()), color="0.6", linewidth=1)
    axes.plot(steps, [np.mean([curve[s] for curve in whole]) for s in steps], "ko-", markersize=3, label="evaluation")
    if behaviour_score is not None:
        axes.axhline(behaviour_score, color="black", linestyle="--", linewidth=1, label="the data's mean")
    axes.set(xlabel="gradient step", ylabel="normalised score", title=title)
    axes.legend(frameon=False)
    path = folders[0].parent / "curve.png"
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; the run is complete all the same") from error
    return path


def show_scores(folders: Sequence[Path], title: str, behaviour_score: float | None = None) -> None:
    """Print the table of scores, draw the learning curve, and say where the results are."""
    print(summary_table(folders, behaviour_score))
    curve = save_curve(folders, title, behaviour_score)
    print(f"results in {folders[0].parent}" + (f", learning curve in {curve}" if curve else ""))
