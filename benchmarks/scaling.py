"""How the cost of a step grows with seeds, diffusion steps and batch size: a CSV and a figure.

    python -m benchmarks.scaling --out results/benchmarks --name h200

Each point is one `benchmarks.training` measurement without the plain form; `--quick` takes fewer points.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import training

AXES: dict[str, tuple[int, ...]] = {
    "seeds": (1, 2, 4, 8, 16, 32),
    "T": (5, 10, 20),
    "batch_size": (64, 256, 1024, 4096),
}
QUICK: dict[str, tuple[int, ...]] = {"seeds": (1, 2, 4), "T": (5, 10), "batch_size": (64, 256)}
LABELS = {"seeds": "seeds in one process", "T": "diffusion steps T", "batch_size": "batch size"}
COLUMNS = ("axis", "value", "seeds", "steps_per_s", "seed_steps_per_s", "execution", "device", "threads", "torch")


def points(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a measured point."""
    rows = []
    for axis, values in (QUICK if options.quick else AXES).items():
        for value in values:
            flags = ["--device", options.device, "--env_name", options.env_name, "--execution", options.execution]
            flags += [
                f"--{axis}",
                str(value),
                "--steps",
                str(options.steps),
                "--repeats",
                str(options.repeats),
                "--rows",
                str(options.rows),
            ]
            result = training.measure(training.parser().parse_args([*flags, "--no-plain"]))
            rows.append({"axis": axis, "value": value, **{name: result[name] for name in COLUMNS[2:]}})
            print(f"{axis} {value}: {result['steps_per_s']:.1f} steps/s, {result['seed_steps_per_s']:.1f} seed-steps/s")
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Time of a step relative to each axis' first point, against proportional growth."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    panels = figure.subplots(1, len(LABELS))
    for axes, (axis, label) in zip(panels, LABELS.items(), strict=True):
        own = [row for row in rows if row["axis"] == axis]
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
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = points(options)
    with open(options.out / f"scaling_{options.name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, options.out / f"scaling_{options.name}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
