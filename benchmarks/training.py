"""Steps a second of training: the plain form against ours, in one process, alternating.

    python -m benchmarks.training --algo diffcps --env_name halfcheetah-medium-v2 --seeds 1 --json

The data are random numbers of the task's shapes (speed does not depend on their values), so nothing is downloaded.
Each repeat times the plain form, then ours; medians are reported, and the ratio is the median of the pairs' ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

import hyperparameters
from agents import AGENTS
from agents.parts.precision import PRECISIONS
from benchmarks.plain import HostSampler, PlainDiffusionLearner
from benchmarks.plain_dtql import PlainDTQL
from utils.data.dataset import Dataset
from utils.data.windows import rows_of
from utils.options import command_line, resolve_device
from utils.runs.folder import processor
from utils.seeding import torch_generators
from utils.tasks import task
from utils.training.capture import MODES, choose_mode
from utils.training.memory import keep_freed_memory
from utils.training.runner import Runner

PLAIN = {
    "diffcps": PlainDiffusionLearner,
    "diffusion_ql": PlainDiffusionLearner,
    "diffusion_bc": PlainDiffusionLearner,
    "dtql": PlainDTQL,
}
STEADY = 1000  # the step at which measuring starts: past the start of the policy's average


def steady_step(config: Any) -> int:
    """A step of the last phase of training, in which a run spends most of its time."""
    return max(STEADY, *(getattr(config, name, 0) for name in ("bc_steps", "warmup_steps", "value_steps")))


def random_dataset(env_name: str, size: int, seed: int = 0) -> Dataset:
    """Transitions of the task's shapes, standard normal states and uniform actions."""
    rng = np.random.default_rng(seed)
    wanted = task(env_name)
    normal = lambda width: rng.standard_normal((size, width), dtype=np.float32)  # noqa: E731
    found = Dataset(
        states=normal(wanted.state_dim),
        actions=rng.uniform(-1, 1, (size, wanted.action_dim)).astype(np.float32),
        rewards=normal(1),
        next_states=normal(wanted.state_dim),
        not_dones=(rng.random((size, 1)) > 0.01).astype(np.float32),
        env_name=env_name,
        source="random",
    )
    return replace(found, raw=partial(rows_of, found.states, found.actions, found.rewards))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], None], device: torch.device) -> float:
    """Wall-clock time of `run`, the device's queue included."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def matmul_rate(device: torch.device) -> float:
    """Measured float32 matrix-product rate in FLOP/s (no TF32), the best of a few square products."""
    size = 8192 if device.type == "cuda" else 2048  # some 20 ms on a data-centre GPU: far more than the launch
    x = torch.randn(size, size, device=device)
    best = min(seconds(lambda: x @ x, device) for _ in range(5))
    return 2 * size**3 / best


def flops_per_step(agent: Any, batch: dict[str, torch.Tensor], draws: dict[str, torch.Tensor]) -> float:
    """Floating-point operations of the matrix products of one step, averaged over a period."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        for k in range(agent.period):
            agent.gradient_step(batch, draws, steady_step(agent.config) + k)
    return counter.get_total_flops() / agent.period


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one configuration."""
    device = resolve_device(options.device)
    config = hyperparameters.get(options.algo, options.env_name, **overrides(options))
    dataset = random_dataset(options.env_name, options.rows)
    keep_freed_memory(device)  # as run.py does; the plain form, in the same process, gains from it too
    seeds = list(range(options.seeds))
    mode, _ = choose_mode(options.execution, device, 10**9)
    sizes = dataset.state_dim, dataset.action_dim, 1.0
    agent = AGENTS[options.algo](*sizes, config, seeds, device, options.precision)
    table = dataset.batches_to(device, agent.windows)
    agent.observe(table)
    counted = AGENTS[options.algo](*sizes, config, seeds, device)  # float32: fused layers would hide their products
    counted.observe(table)
    flops = flops_per_step(counted, *one_batch(counted, table, config.batch_size, seeds, device))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    runner = Runner(agent, table, config.batch_size, torch_generators(seeds, "training", device), mode)
    agent.step = steady_step(config)
    runner.run(2 * runner.block)
    synchronize(device)
    warm_up = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None  # dataset and graphs included
    plain = plain_runner(options, config, dataset, device)
    steps = options.steps // runner.block * runner.block or runner.block
    times = []
    for _ in range(options.repeats):
        plain_time = (
            seconds(lambda: plain(options.plain_steps), device) / options.plain_steps if plain else float("nan")
        )
        times.append((plain_time, seconds(lambda: runner.run(steps), device) / steps))
        runner.metrics()
    plain_rate = 1 / statistics.median(p for p, _ in times)
    rate = 1 / statistics.median(o for _, o in times)
    return {
        "algo": options.algo,
        "env_name": options.env_name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "machine": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seeds": options.seeds,
        "batch_size": config.batch_size,
        "execution": runner.mode,
        "precision": options.precision,
        "warm_up_s": warm_up,
        "repeats": options.repeats,
        "plain_steps_per_s": plain_rate,
        "steps_per_s": rate,
        "seed_steps_per_s": rate * options.seeds,
        # Several seeds stand for as many plain processes one after the other.
        "ratio": statistics.median(options.seeds * p / o for p, o in times),
        "peak_memory_gb": peak / 1e9 if peak is not None else None,
        "gflop_per_seed_step": flops / options.seeds / 1e9,
        "share_of_matmul_rate": rate * flops / matmul_rate(device),
    }


def overrides(options: argparse.Namespace) -> dict[str, Any]:
    """Settings changed on the command line."""
    named = {"diffusion_steps": options.T, "batch_size": options.batch_size}
    return {name: value for name, value in named.items() if value is not None}


def one_batch(agent: Any, table: Any, batch_size: int, seeds: list[int], device: torch.device) -> tuple[Any, Any]:
    """A batch and its draws, from generators of their own."""
    generators = torch_generators(seeds, "probe", device)
    planned = {n: torch.zeros(len(seeds), batch_size, width, device=device) for n, width in agent.planned.items()}
    batch = table.gather(table.draw_indices(generators, batch_size, steps=1)[0])
    return batch | planned, agent.draw(generators, batch_size)


def plain_runner(
    options: argparse.Namespace, config: Any, dataset: Dataset, device: torch.device
) -> Callable[[int], None] | None:
    """A function that runs so many plain steps; None where none is written or wanted."""
    if options.algo not in PLAIN or not options.plain:
        return None
    learner = PLAIN[options.algo](options.algo, dataset.state_dim, dataset.action_dim, 1.0, config, device)
    learner.step = STEADY
    sampler = HostSampler(dataset.columns, device)

    def run(steps: int) -> None:
        for _ in range(steps):
            learner.train_step(sampler.sample(config.batch_size))

    run(4)
    return run


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    flags = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.splitlines()[0])
    flags.add_argument("--algo", default="diffcps", choices=list(AGENTS))
    flags.add_argument("--env_name", default="halfcheetah-medium-v2")
    flags.add_argument("--device", default="auto")
    flags.add_argument("--execution", default="auto", choices=MODES)
    flags.add_argument("--precision", default="float32", choices=PRECISIONS)
    flags.add_argument("--seeds", type=int, default=1, help="number of seeds trained at once")
    flags.add_argument("--threads", type=int)
    flags.add_argument("--T", type=int)
    flags.add_argument("--batch_size", type=int)
    flags.add_argument("--rows", type=int, default=100_000, help="transitions in the random dataset")
    flags.add_argument("--steps", type=int, default=100, help="steps of ours a repeat")
    flags.add_argument("--plain_steps", type=int, default=100, help="plain steps per repeat")
    flags.add_argument("--repeats", type=int, default=5)
    flags.add_argument("--plain", action=argparse.BooleanOptionalAction, default=True, help="time the plain form too")
    flags.add_argument("--json", action="store_true")
    return flags


def main(argv: list[str]) -> None:
    """Measure and print, as a few lines or with --json as one object."""
    options = parser().parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    result = measure(options)
    if options.json:
        print(json.dumps(result))
    else:
        print("\n".join(f"{name:22} {value}" for name, value in result.items()))


if __name__ == "__main__":
    sys.exit(command_line("benchmarks.training", lambda: main(sys.argv[1:])))
