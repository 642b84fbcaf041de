"""Milliseconds an action takes: the plain form one state at a time, ours for one state and for many at once.

    python -m benchmarks.acting --algos diffcps diffusion_ql diffusion_bc dtql --states 1 1000 --json

Freshly initialised networks and standard normal states of the task's shapes: the time depends on neither. Each
algorithm acts with its own number of candidates; `--action_candidates` sets one for all that have candidates.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import hyperparameters
from agents import AGENTS
from benchmarks.training import PLAIN, synchronize
from utils.options import command_line, resolve_device
from utils.seeding import torch_generators
from utils.tasks import task
from utils.training.capture import CapturedActions
from utils.training.memory import keep_freed_memory

BUDGET = 20.0  # seconds of measuring a number; slower calls are repeated less often, once at least


def milliseconds(run: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Median wall-clock time of `run` after a warm-up call, the device's queue included."""
    times: list[float] = []
    while len(times) < repeats + 1 and (len(times) < 2 or sum(times) < 1e3 * BUDGET):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def measure(algo: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One algorithm's row: `plain_1_ms`, and `ms` for each number of states."""
    known = {field.name for field in dataclasses.fields(hyperparameters.CONFIGS[algo])}
    overrides = {"action_candidates": options.action_candidates}
    overrides = {name: value for name, value in overrides.items() if name in known and value is not None}
    config = hyperparameters.get(algo, options.env_name, **overrides)
    sizes = (task(options.env_name).state_dim, task(options.env_name).action_dim, 1.0, config)
    agent, rng = AGENTS[algo](*sizes, [0], device), torch_generators([0], "acting", device)
    act = CapturedActions(agent) if device.type == "cuda" else agent.act
    plain = PLAIN[algo](algo, *sizes, device) if algo in PLAIN else None
    state = np.random.default_rng(0).standard_normal(sizes[0])
    row: dict[str, Any] = {"algo": algo, "action_candidates": getattr(config, "action_candidates", 1)}
    row["plain_1_ms"] = milliseconds(lambda: plain.act(state), options.repeats, device) if plain else None
    row["ms"] = {}
    for number in options.states:
        states = torch.randn(1, number, sizes[0], device=device)
        row["ms"][str(number)] = milliseconds(lambda states=states: act(states, rng).cpu(), options.repeats, device)
    return row


def table(result: dict[str, Any]) -> str:
    """The rows as Markdown."""
    numbers = list(result["rows"][0]["ms"])
    head = ["algorithm", "candidates", "plain, 1 state"] + [f"ours, {n} state{'s' * (n != '1')}" for n in numbers]
    lines = [f"{result['device']}, {result['threads']} thread(s), torch {result['torch']}; milliseconds a call", ""]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in result["rows"]:
        plain = "" if row["plain_1_ms"] is None else f"{row['plain_1_ms']:.2f}"
        cells = [row["algo"], str(row["action_candidates"]), plain, *(f"{row['ms'][n]:.2f}" for n in numbers)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Measure and print a table, or with --json one object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.acting", description=__doc__.splitlines()[0])
    parser.add_argument("--algos", nargs="+", default=list(AGENTS), choices=list(AGENTS), metavar="ALGO")
    parser.add_argument("--env_name", default="halfcheetah-medium-v2")
    parser.add_argument("--states", nargs="+", type=int, default=[1, 1000])
    parser.add_argument("--action_candidates", type=int, help="for all algorithms (default: each its own)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    keep_freed_memory(device)
    result = {
        "env_name": options.env_name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "repeats": options.repeats,
        "rows": [measure(algo, options, device) for algo in options.algos],
    }
    print(json.dumps(result) if options.json else table(result))


if __name__ == "__main__":
    sys.exit(command_line("benchmarks.acting", lambda: main(sys.argv[1:])))
