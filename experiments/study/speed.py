"""Gradient steps per second of a kind of run: from the metrics of earlier runs, else timed on the spot."""

from __future__ import annotations

import statistics
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import hyperparameters
from agents import AGENTS
from utils import tasks
from utils.data.dataset import Dataset
from utils.data.windows import rows_of
from utils.environments import make_lockstep
from utils.options import parse_seeds, resolve_device
from utils.report.runs import Labels, read_run
from utils.seeding import torch_generators
from utils.training.capture import choose_mode
from utils.training.evaluation import Evaluator
from utils.training.runner import Runner

# What a step's time depends on, beside the algorithm, the device and the number of seeds in the process.
SETTINGS = ("diffusion_steps", "batch_size", "max_q_backup", "policy_interval")
ROWS = 10_000
EVALUATED = ("locomotion", "antmaze")  # without the original stack
SECONDS = 2.0


class Speeds:
    """Speeds of runs on one device, looked up in the runs below `base`."""

    def __init__(self, base: Path, device: str, measure: bool) -> None:
        self.device, self.measure = resolve_device(device), measure
        self.known: dict[tuple[Any, ...], tuple[float, str]] = {}
        self.evaluations: dict[tuple[Any, ...], float | None] = {}
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

    def evaluation(self, algo: str, env_name: str, config: Any, seeds: int) -> float | None:
        """Seconds of an evaluation whose episodes go to their limit, where speeds are measured and the task has an
        environment here; else None."""
        acting = (config.eval_episodes, getattr(config, "action_candidates", 1))
        key = (*self._key(algo, env_name, vars(config), seeds), env_name.split("-")[0], *acting)
        if not self.measure or hyperparameters.domain(env_name) not in EVALUATED:
            return None
        if key not in self.evaluations:
            self.evaluations[key] = self._time_evaluation(algo, env_name, config, seeds)
        return self.evaluations[key]

    def _time_evaluation(self, algo: str, env_name: str, config: Any, seeds: int) -> float | None:
        """Some time steps of an untrained agent's episodes, for about `SECONDS`."""
        runner = self._runner(algo, env_name, config, seeds)
        environments = make_lockstep(env_name, seeds * config.eval_episodes)
        until = time.perf_counter() + SECONDS
        done, start = 0, time.perf_counter()

        def stop() -> bool:
            nonlocal done
            done += 1
            return done > 2 and time.perf_counter() > until

        with (
            closing(environments),
            closing(Evaluator(runner.agent, None, runner.agent.act, environments, False, stop)) as e,
        ):
            e.begin()
        return (time.perf_counter() - start) / (done - 1 or 1) * environments.max_episode_steps

    def _runner(self, algo: str, env_name: str, config: Any, seeds: int) -> Runner:
        """On random transitions of the task's shapes."""
        task, rng = tasks.task(env_name), np.random.default_rng(0)
        columns = {"states": task.state_dim, "actions": task.action_dim, "rewards": 1, "next_states": task.state_dim}
        arrays = {name: rng.uniform(-1, 1, (ROWS, width)).astype(np.float32) for name, width in columns.items()}
        dataset = Dataset(**arrays, not_dones=np.ones((ROWS, 1), np.float32), env_name=env_name, source="random",
                          raw=partial(rows_of, arrays["states"], arrays["actions"], arrays["rewards"]))  # fmt: skip
        numbers = list(range(seeds))
        agent = AGENTS[algo](task.state_dim, task.action_dim, 1.0, config, numbers, self.device)
        generators = torch_generators(numbers, "probe", self.device)
        mode, _ = choose_mode("auto", self.device, 1)
        return Runner(agent, dataset.batches_to(self.device, agent.windows), config.batch_size, generators, mode)

    def _time(self, algo: str, env_name: str, config: Any, seeds: int) -> float:
        """Eager or captured steps, for about `SECONDS`: at least one, however slow."""
        runner = self._runner(algo, env_name, config, seeds)
        until = time.perf_counter() + SECONDS
        runner.run(2 * runner.block, pause=lambda: time.perf_counter() > until)
        runner.metrics()  # waits for the device
        first, start = runner.agent.step, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < SECONDS:
            runner.run(runner.block, pause=lambda: time.perf_counter() - start > SECONDS)
            runner.metrics()
        return (runner.agent.step - first) / elapsed


def shown(rate: float) -> str:
    """Steps per second in a table: those below ten with two figures, none as 0."""
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"
