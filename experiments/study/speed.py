"""Gradient steps per second of a kind of run: from the metrics of earlier runs, else timed on the spot."""

from __future__ import annotations

import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents import AGENTS
from utils import tasks
from utils.data.dataset import Dataset
from utils.data.windows import rows_of
from utils.options import parse_seeds, resolve_device
from utils.report.runs import Labels, read_run
from utils.seeding import torch_generators
from utils.training.capture import choose_mode
from utils.training.runner import Runner

# What a step's time depends on, beside the algorithm, the device and the number of seeds in the process.
SETTINGS = ("diffusion_steps", "batch_size", "max_q_backup", "policy_interval")
ROWS = 10_000
SECONDS = 2.0


class Speeds:
    """Speeds of runs on one device, looked up in the runs below `base`."""

    def __init__(self, base: Path, device: str, measure: bool) -> None:
        self.device, self.measure = resolve_device(device), measure
        self.known: dict[tuple[Any, ...], tuple[float, str]] = {}
        found: dict[tuple[Any, ...], list[float]] = {}
        for config in sorted(base.rglob("config.json")) if base.is_dir() else ():
            if (config.parent / "metrics.csv").exists() and (config.parent / "evaluations.csv").exists():
                self._read(config.parent, found)
        self.known |= {key: (statistics.median(rates), "earlier runs") for key, rates in found.items() if rates}

    def _read(self, folder: Path, found: dict[tuple[Any, ...], list[float]]) -> None:
        run = read_run(folder, Labels())
        if self._kind(run.config["device"]) != self._kind(self._name()):
            return
        seeds = len(parse_seeds(run.config["run"]["seeds"], run.config["run"]["seed"]))
        rates = run.metrics["steps_per_s"][1:]  # the first interval includes compiling or capturing
        found.setdefault(self._key(run.algo, run.env_name, run.settings, seeds), []).extend(rates.tolist())

    def _name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    @staticmethod
    def _kind(device: str) -> str:
        return "cpu" if device.startswith("cpu") else device

    @staticmethod
    def _key(algo: str, env_name: str, settings: Any, seeds: int) -> tuple[Any, ...]:
        task = tasks.task(env_name)
        return algo, task.state_dim, task.action_dim, seeds, *(settings.get(name) for name in SETTINGS)

    def get(self, algo: str, env_name: str, config: Any, seeds: int) -> tuple[float | None, str]:
        """Steps a second of a process with so many seeds, and where that is from; None where nobody knows."""
        key = self._key(algo, env_name, vars(config), seeds)
        if key not in self.known and self.measure:
            self.known[key] = (self._time(algo, env_name, config, seeds), "timed now")
        return self.known.get(key, (None, "–"))

    def _time(self, algo: str, env_name: str, config: Any, seeds: int) -> float:
        """Eager or captured steps on random transitions of the task's shapes, for about `SECONDS`."""
        task, rng = tasks.task(env_name), np.random.default_rng(0)
        columns = {"states": task.state_dim, "actions": task.action_dim, "rewards": 1, "next_states": task.state_dim}
        arrays = {name: rng.uniform(-1, 1, (ROWS, width)).astype(np.float32) for name, width in columns.items()}
        dataset = Dataset(**arrays, not_dones=np.ones((ROWS, 1), np.float32), env_name=env_name, source="random",
                          raw=partial(rows_of, arrays["states"], arrays["actions"], arrays["rewards"]))  # fmt: skip
        numbers = list(range(seeds))
        agent = AGENTS[algo](task.state_dim, task.action_dim, 1.0, config, numbers, self.device)
        generators = torch_generators(numbers, "probe", self.device)
        mode, _ = choose_mode("auto", self.device, 1)
        runner = Runner(agent, dataset.batches_to(self.device, agent.windows), config.batch_size, generators, mode)
        runner.run(2 * runner.block)
        runner.metrics()  # waits for the device
        steps, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < SECONDS:
            runner.run(runner.block)
            runner.metrics()
            steps += runner.block
        return steps / elapsed
