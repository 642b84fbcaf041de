"""Where the time of a training step goes, on a CPU with one thread: products, Mish, Adam, gathers, Python.

    python -m benchmarks.profile --precision bfloat16

PyTorch's profiler times every operation of some blocks of steps; the least of the blocks counts, so that another
process on the machine does little harm. What the step needs without a profiler, and no operation explains, is Python.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import hyperparameters
from agents import AGENTS
from agents.parts.precision import PRECISIONS
from benchmarks.training import random_dataset, steady_step
from utils.options import command_line
from utils.seeding import torch_generators
from utils.training.memory import keep_freed_memory
from utils.training.runner import Runner

PRODUCTS = {"aten::bmm", "aten::baddbmm", "aten::mm", "aten::addmm", "mkldnn::_linear_pointwise"}
# Operations that make a tensor and touch no number of it.
FREE = {"view", "expand", "as_strided", "unsqueeze", "squeeze", "transpose", "slice", "select", "split", "unflatten",
        "reshape", "flatten", "detach", "empty", "empty_strided", "empty_like", "t", "permute", "narrow"}  # fmt: skip
# Function or file on the way to an operation -> what the operation belongs to; the first that fits.
PLACES = {
    "_Mish": "Mish", "): mish": "Mish", "parts/adam.py": "clipping and Adam", "): follow": "averages",
    "): _refill": "random numbers and rows", "): gather": "gathers", "): gradients": "gradients into one buffer",
}  # fmt: skip
REST, PYTHON = "other arithmetic", "Python and calls"


def kind(event: Any) -> str:
    """What the time of a profiler's event belongs to."""
    if event.name in PRODUCTS:
        return "matrix products"
    if event.name.startswith("diffcps::"):
        return "fused layers: products and what surrounds them"
    way, at = [event.name], event.cpu_parent
    while at is not None:
        way.append(at.name)
        at = at.cpu_parent
    if event.name == "<built-in function kernel>":  # what torch.compile makes of the rest
        return "compiled: Mish, sums, casts"
    if not event.name.startswith("aten::") or event.name.removeprefix("aten::") in FREE:
        return PYTHON
    found = next((part for place, part in PLACES.items() if any(place in name for name in way)), None)
    casting = event.name in ("aten::copy_", "aten::_to_copy") and any("aten::_to_copy" in name for name in way)
    return found or ("casts" if casting else REST)


def milliseconds(runner: Runner, blocks: int) -> dict[str, float]:
    """Of one step, by what they belong to; all together are the step's CPU time without a profiler."""
    plain, profiled = [], []
    verbose = torch._C._profiler._ExperimentalConfig(verbose=True)
    for _ in range(blocks):
        start = time.process_time()
        runner.run(runner.block)
        plain.append(time.process_time() - start)
        with profile(activities=[ProfilerActivity.CPU], with_stack=True, experimental_config=verbose) as seen:
            runner.run(runner.block)
        taken: Counter[str] = Counter()
        for event in seen.events():
            taken[kind(event)] += event.self_cpu_time_total  # microseconds
        profiled.append(taken)
    names = set().union(*profiled) - {PYTHON}
    parts = {name: min(taken[name] for taken in profiled) / 1000 / runner.block for name in names}
    whole = min(plain) * 1000 / runner.block
    ordered = dict(sorted(parts.items(), key=lambda part: -part[1]))
    return ordered | {PYTHON: max(whole - sum(parts.values()), 0.0)}


def main(argv: list[str]) -> None:
    """Print a table of one configuration."""
    flags = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__.splitlines()[0])
    flags.add_argument("--algo", default="diffcps", choices=list(AGENTS))
    flags.add_argument("--env_name", default="halfcheetah-medium-v2")
    flags.add_argument("--precision", default="float32", choices=PRECISIONS)
    flags.add_argument("--execution", default="eager", choices=("eager", "compile"))
    flags.add_argument("--blocks", type=int, default=10, help="blocks of steps that are timed (default: %(default)s)")
    options = flags.parse_args(argv)
    torch.set_num_threads(1)
    keep_freed_memory(torch.device("cpu"))
    config, data = hyperparameters.get(options.algo, options.env_name), random_dataset(options.env_name, 100_000)
    sizes = data.state_dim, data.action_dim, 1.0
    agent = AGENTS[options.algo](*sizes, config, [0], "cpu", options.precision)
    generators = torch_generators([0], "training", "cpu")
    runner = Runner(agent, data.to("cpu"), config.batch_size, generators, options.execution)
    agent.step = steady_step(config)
    runner.run(2 * runner.block)
    parts = milliseconds(runner, options.blocks)
    whole = sum(parts.values())
    print(f"{options.algo}, {options.precision}, {runner.mode}, 1 thread, torch {torch.__version__}\n")
    print("| part of a step | ms | share |\n|---|---|---|")
    for name, taken in {**parts, "a step": whole}.items():
        print(f"| {name} | {taken:.2f} | {taken / whole:.0%} |")


if __name__ == "__main__":
    sys.exit(command_line("benchmarks.profile", lambda: main(sys.argv[1:])))
