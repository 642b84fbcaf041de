"""Collect every local set and describe it in one table.

    python -m benchmarks.local_sets

Writes `results/tables/local_sets.csv` and `.md`: rows, episodes, the behaviours' normalised mean returns, SHA-256,
and how long collecting took. Sets are collected anew into `--dir`, one after another. `cpu_seconds` is the
processor time of all threads: what one free core would take. Sets that the table has and `--env_names` leaves out
stay in it.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils import tasks
from utils.behaviour import local
from utils.behaviour.collect import read_attributes
from utils.options import command_line

PAPER_TASKS = tuple(name for name in local.ids() if not (name.startswith("antmaze") and name.endswith("v2")))
"""The paper's fifteen: nine of locomotion (v2), six of AntMaze (v0)."""
COLUMNS = (
    "env_name",
    "rows",
    "transitions",
    "episodes",
    "normalized_return",
    "behaviours",
    "seconds",
    "cpu_seconds",
    "megabytes",
    "sha256",
)


def describe_set(env_name: str, size: int, seed: int, folder: Path) -> dict[str, Any]:
    """Collect one set anew into `folder` and say what came out; the keys are `COLUMNS`."""
    path = local.local_file(env_name, size, seed, folder)
    path.unlink(missing_ok=True)
    wall, cpu = time.perf_counter(), time.process_time()
    dataset = local.load(env_name, size, seed, folder)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    parts = read_attributes(path)["behaviours"]
    whole = [part for part in parts if part["episodes"]]
    episodes = sum(part["episodes"] for part in whole)
    mean = sum(part["episodes"] * part["mean_return"] for part in whole) / episodes if episodes else np.nan
    return {
        "env_name": env_name,
        "rows": dataset.info["rows"],
        "transitions": dataset.size,
        "episodes": episodes,
        "normalized_return": round(float(tasks.normalized_score(env_name, mean)), 1),
        "behaviours": "; ".join(f"{part['name']} {part['normalized_return']:.1f}" for part in whole),
        "seconds": round(wall, 1),
        "cpu_seconds": round(cpu, 1),
        "megabytes": round(path.stat().st_size / 1e6, 1),
        "sha256": dataset.info["sha256"],
    }


def write_tables(rows: Sequence[dict[str, Any]], folder: Path, machine: str) -> None:
    """`local_sets.csv` and `.md` in `folder`; sets that are in that table and not in `rows` stay."""
    folder.mkdir(parents=True, exist_ok=True)
    kept: list[dict[str, Any]] = []
    if (folder / "local_sets.csv").exists():
        with open(folder / "local_sets.csv", newline="", encoding="utf-8") as file:
            kept = list(csv.DictReader(file))
    by_name = {row["env_name"]: row for row in [*kept, *rows]}
    rows = [by_name[name] for name in local.ids() if name in by_name]
    with open(folder / "local_sets.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    shown = [name for name in COLUMNS if name != "sha256"]
    lines = [
        "# Local sets",
        "",
        f"`python -m benchmarks.local_sets` on {machine}. Collected here by",
        "the policies of `utils/behaviour`; these are not D4RL's files, and scores on them are not comparable with",
        "scores on those. Normalised returns are means over whole episodes, of the set and of each behaviour in it.",
        "`cpu_seconds` is processor time of all threads, what one free core takes; `seconds` passed on the clock.",
        "SHA-256 sums are in `local_sets.csv`; they hold for the versions named in the files' attributes.",
        "",
        "| " + " | ".join(shown) + " |",
        "|" + "---|" * len(shown),
        *("| " + " | ".join(str(row[name]) for name in shown) + " |" for row in rows),
        "",
    ]
    (folder / "local_sets.md").write_text("\n".join(lines), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Collect and describe as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.local_sets", description=__doc__.splitlines()[0])
    parser.add_argument("--env_names", nargs="+", default=PAPER_TASKS)
    parser.add_argument("--size", type=int, default=local.DEFAULT_SIZE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", type=Path, default=local.cache_folder(), help="where the sets are kept")
    parser.add_argument("--out", type=Path, default=Path("results/tables"))
    parser.add_argument("--machine", default="this machine", help="what the table's heading says")
    args = parser.parse_args(arguments)
    for name in args.env_names:
        write_tables([describe_set(name, args.size, args.seed, args.dir)], args.out, args.machine)
    print((args.out / "local_sets.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(command_line("benchmarks.local_sets", main))
