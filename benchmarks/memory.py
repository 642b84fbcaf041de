"""Steps a second with freed memory kept (`utils.training.memory`) and with the C library's own way, on a CPU.

    python -m benchmarks.memory --algos cql qgpo diffcps --seeds 3 --name NAME

Each measurement is a process of its own, for the choice cannot be taken back; the two alternate, medians are reported
and the ratio is the median of the pairs' ratios. With --name the table goes to results/benchmarks/memory_NAME.md.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import hyperparameters
from agents import AGENTS
from benchmarks.training import random_dataset, steady_step
from utils.options import command_line
from utils.seeding import torch_generators
from utils.training.memory import keep_freed_memory
from utils.training.runner import Runner

WAYS = ("default", "kept")


def measure(algo: str, env_name: str, seeds: int, seconds: float, way: str) -> dict[str, float]:
    """Steps and page faults per step of this process, after it has warmed up."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if way == "kept" and not keep_freed_memory(device):
        raise SystemExit("benchmarks.memory: this C library has no such choice")
    dataset, config = random_dataset(env_name, 2_000), hyperparameters.get(algo, env_name)
    numbers = list(range(seeds))
    agent = AGENTS[algo](dataset.state_dim, dataset.action_dim, 1.0, config, numbers, device)
    generators = torch_generators(numbers, "training", device)
    runner = Runner(agent, dataset.batches_to(device, agent.windows), config.batch_size, generators, "eager")
    agent.step = steady_step(config)
    runner.run(4)
    steps, began, faults = 0, time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    while (took := time.perf_counter() - began) < seconds:
        runner.run(2)
        steps += 2
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    return {"steps_per_s": steps / took, "faults_per_step": faults / steps,
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}  # fmt: skip


def compare(algo: str, options: argparse.Namespace) -> list[str]:
    """A row of the table."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(options.repeats):
        for way in WAYS:
            command = [sys.executable, "-m", "benchmarks.memory", "--algos", algo, "--way", way]
            for name in ("env_name", "seeds", "seconds"):
                command += [f"--{name}", str(getattr(options, name))]
            found[way].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    ratios = [k["steps_per_s"] / d["steps_per_s"] for d, k in zip(found["default"], found["kept"], strict=True)]
    middle = {w: {n: statistics.median(run[n] for run in found[w]) for n in found[w][0]} for w in WAYS}
    cells = [f"{middle[w][n]:,.{digits}f}" for n, digits in (("steps_per_s", 2), ("faults_per_step", 0),
             ("peak_mib", 0)) for w in WAYS]  # fmt: skip
    return [algo, str(options.seeds), *cells, f"{statistics.median(ratios):.2f}"]


def main(argv: Sequence[str]) -> None:
    """Measure, print the table, and write it with --name."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--algos", nargs="+", default=list(AGENTS), choices=list(AGENTS), metavar="ALGO")
    parser.add_argument("--env_name", default="halfcheetah-medium-v2")
    parser.add_argument("--seeds", type=int, default=3, help="trained at once (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help="measure this process only, and print it as JSON")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"), help="(default: %(default)s)")
    parser.add_argument("--name", help="write OUT/memory_NAME.md")
    options = parser.parse_args(argv)
    if options.way:
        print(json.dumps(measure(options.algos[0], options.env_name, options.seeds, options.seconds, options.way)))
        return
    columns = ["algorithm", "seeds", "steps/s, default", "kept", "page faults per step, default", "kept",
               "peak MiB, default", "kept", "ratio of speeds"]  # fmt: skip
    command = f"python -m benchmarks.memory --seeds {options.seeds} --seconds {options.seconds:g}"
    lines = [f"`{command}`; {options.env_name}, one thread, eager, torch {torch.__version__}; medians of "
             f"{options.repeats}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]  # fmt: skip
    for algo in options.algos:
        lines.append("| " + " | ".join(compare(algo, options)) + " |")
        print(lines[-1], flush=True)
    if options.name:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"memory_{options.name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(command_line("benchmarks.memory", lambda: main(sys.argv[1:])))
