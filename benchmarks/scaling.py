"""How the cost of a step grows with seeds, diffusion steps and batch size: a CSV and a figure.

    python -m benchmarks.scaling --out results/benchmarks --name h200

Each point is one `benchmarks.training` measurement without the plain form; `--quick` takes fewer points. The CSV is
written after every point, so a run that is stopped, or ends after `--minutes`, leaves what it has measured.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import training
from utils.options import command_line
from utils.training.capture import forget_compiled

AXES: dict[str, tuple[int, ...]] = {
    "seeds": (1, 2, 4, 8, 16, 32),
    "T": (5, 10, 20),
    "batch_size": (64, 256, 1024, 4096),
}
BASE = {"seeds": 1, "T": 5, "batch_size": 256}  # what the other axes stand at
QUICK: dict[str, tuple[int, ...]] = {"seeds": (1, 2, 4), "T": (5, 10), "batch_size": (64, 256)}
LABELS = {"seeds": "seeds in one process", "T": "diffusion steps T", "batch_size": "batch size"}
COLUMNS = ("axis", "value", "seeds", "steps_per_s", "seed_steps_per_s", "execution", "device", "threads", "torch")


def points(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row per point, measured as it is asked for; the point that the axes share is measured once."""
    started, measured = time.monotonic(), {}
    for axis, values in (QUICK if options.quick else AXES).items():
        for value in values:
            if options.minutes is not None and time.monotonic() - started > 60 * options.minutes:
                print(f"{options.minutes} minutes are over: the points from {axis} {value} on are left out")
                return
            settings = tuple((BASE | {axis: value}).items())
            if settings not in measured:
                forget_compiled()
                measured[settings] = measure(options, dict(settings))
            result = measured[settings]
            yield {"axis": axis, "value": value, **{name: result[name] for name in COLUMNS[2:]}}
            print(f"{axis} {value}: {result['steps_per_s']:.1f} steps/s, {result['seed_steps_per_s']:.1f} seed-steps/s")


def measure(options: argparse.Namespace, settings: dict[str, int]) -> dict[str, Any]:
    """`benchmarks.training` at these settings, without the plain form."""
    passed_on = ("device", "env_name", "execution", "steps", "repeats", "rows")
    values = {name: getattr(options, name) for name in passed_on} | settings
    flags = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    return training.measure(training.parser().parse_args([*flags, "--no-plain"]))


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Time of a step relative to each axis' first point, against proportional growth."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    panels = figure.subplots(1, len(LABELS))
    for axes, (axis, label) in zip(panels, LABELS.items(), strict=True):
        own = [row for row in rows if row["axis"] == axis]
        if not own:  # the time was over
            continue
        values = [row["value"] for row in own]
        cost = [own[0]["steps_per_s"] / row["steps_per_s"] for row in own]
        axes.plot(values, cost, "ko-", markersize=4, label="measured")
        axes.plot(values, [value / values[0] for value in values], "k:", linewidth=1, label="proportional")
        axes.set(xscale="log", yscale="log", xlabel=label, xticks=values, xticklabels=values)
        axes.minorticks_off()
    panels[0].set_ylabel("time of a step, relative")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def main(argv: list[str]) -> None:
    """Measure, write `<out>/scaling_<name>.csv` and `.png`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    parser.add_argument("--name", default="cpu", help="machine, for the files' names")
    parser.add_argument("--env_name", default="halfcheetah-medium-v2")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--execution", default="auto")
    parser.add_argument("--rows", type=int, default=100_000, help="transitions in the random dataset")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--minutes", type=float, help="begin no point after so long (default: all points)")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    with open(options.out / f"scaling_{options.name}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in points(options):
            writer.writerow(row)
            file.flush()
            rows.append(row)
    draw(rows, options.out / f"scaling_{options.name}.png")


if __name__ == "__main__":
    sys.exit(command_line("benchmarks.scaling", lambda: main(sys.argv[1:])))
