"""What is shown when a run ends: the table of scores and the learning curve."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from utils.errors import UserError
from utils.runs.columns import METRICS_FILE, STOPPED
from utils.runs.constraint import Constraint, constraint_lines
from utils.runs.reading import read_config, read_events, read_metrics, scores_by_step

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
            numbers = _columns(row) + f"  {best}"
        if stopped is not None:
            numbers += f"  stopped at {stopped:,}: numbers not finite; in no mean"
        else:
            rows.append(row)
        lines.append(f"{name:>10} {numbers}")
    if len(rows) > 1:
        mean, deviation = np.mean(rows, axis=0), np.std(rows, axis=0)
        for label, x in (("mean", mean), ("deviation", deviation)):
            lines.append(f"{label:>10} {_columns(x)}")
    if behaviour_score is not None:
        lines.append(f"{'data':>10} {behaviour_score:8.1f}  mean of the episodes in the dataset")
    lines.append("Normalised scores. Best is chosen on test episodes: it is no estimate of what the policy will do.")
    return "\n".join(lines)


def _columns(row: Sequence[float]) -> str:
    """Last, mean of the last and best; a dash where nobody says what a score of 0 or 100 is."""
    texts = [f"{value:.1f}" if np.isfinite(value) else "-" for value in row]
    return f"{texts[0]:>8} {texts[1]:>15} {texts[2]:>8}"


def constraint_notes(folders: Sequence[Path]) -> list[str]:
    """What the constraint of each seed did, where the algorithm has one (`utils.runs.constraint`)."""
    found = {}
    for folder in folders:
        metrics, settings = read_metrics(folder / METRICS_FILE), read_config(folder)["settings"]
        found[folder.name.removeprefix("seed_")] = Constraint.of(metrics, settings)
    return constraint_lines(found)


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
    axes.set(xlabel="gradient step", ylabel="normalised score")
    axes.set_title(title, fontsize="medium")
    axes.legend(frameon=False)
    path = folders[0].parent / "curve.png"
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; the run is complete all the same") from error
    return path


def all_seeds(folders: Sequence[Path]) -> list[Path]:
    """These seeds' folders and those of other seeds beside them that ran with the same settings on the same data."""

    def method(folder: Path) -> tuple[Any, ...]:
        config = read_config(folder)
        run, data = config["run"], config["dataset"]
        settings = {name: value for name, value in config["settings"].items() if name != "num_epochs"}
        return settings, data.get("sha256"), [run.get(name) for name in ("eval_seeds", "backend", "precision")]

    found, ours = set(folders), method(folders[0])
    for folder in folders[0].parent.glob("seed_*"):
        with contextlib.suppress(UserError):  # another process may be writing a row
            if folder not in found and method(folder) == ours and _means(folder):
                found.add(folder)
    return sorted(found, key=lambda folder: (len(folder.name), folder.name))


def show_scores(folders: Sequence[Path], title: str, behaviour_score: float | None = None, data: str = "") -> None:
    """Print the table of scores and what the constraint did, draw the learning curve of all seeds there are, and say
    where the results are.

    data: where they came from, as the curve says it.
    """
    print(summary_table(folders, behaviour_score))
    print("".join(f"{line}\n" for line in constraint_notes(folders)), end="")
    seeds = all_seeds(folders)
    number = f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    origin = f", data: {data if len(data) < 50 else '...' + data[-45:]}" if data else ""
    curve = save_curve(seeds, f"{title}\n{number}{origin}", behaviour_score)
    print(f"results in {folders[0].parent}" + (f", learning curve in {curve}" if curve else ""))
