"""Seconds an evaluation takes: the published loop, one state at a time, against ours in lockstep.

    python -m benchmarks.evaluation --env_name halfcheetah-medium-v2 --episodes 10 --json

Both play an untrained policy with the same candidates in the same environments, in one process and alternating.
Episodes are cut after `--max_steps`, so that a repeat is short; medians are reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import hyperparameters
from agents import AGENTS
from benchmarks.plain import PlainDiffusionLearner
from benchmarks.training import seconds
from utils import environments
from utils.options import command_line, resolve_device
from utils.seeding import torch_generators
from utils.tasks import task
from utils.training.capture import MODES, acting, choose_mode
from utils.training.evaluation import environment_rngs, evaluate
from utils.training.memory import keep_freed_memory


class Cut:
    """Lockstep environments whose episodes end after `limit` steps."""

    def __init__(self, wrapped: Any, limit: int) -> None:
        self._wrapped, self._limit, self._time = wrapped, limit, 0
        self.num_envs, self.state_dim = wrapped.num_envs, wrapped.state_dim
        self.max_episode_steps = min(limit, wrapped.max_episode_steps)

    @property
    def unstable(self) -> np.ndarray:
        return self._wrapped.unstable

    def reset(self, rngs: Sequence[np.random.Generator]) -> np.ndarray:
        self._time = 0
        return self._wrapped.reset(rngs)

    def step(self, actions: np.ndarray, running: np.ndarray) -> tuple[np.ndarray, ...]:
        states, rewards, terminated, truncated = self._wrapped.step(actions, running)
        self._time += 1
        return states, rewards, terminated, truncated | (self._time >= self._limit)


def one_at_a_time(learner: PlainDiffusionLearner, env: Any, episodes: int, limit: int) -> int:
    """The published loop; the number of environment steps."""
    taken = 0
    for _ in range(episodes):
        state, _ = env.reset()
        for _ in range(limit):
            state, _, terminated, truncated, _ = env.step(learner.act(state))
            taken += 1
            if terminated or truncated:
                break
    return taken


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one task."""
    device = resolve_device(options.device)
    keep_freed_memory(device)
    wanted, limit = task(options.env_name), options.max_steps
    config = hyperparameters.get("diffcps", options.env_name)
    seeds = list(range(options.seeds))
    agent = AGENTS["diffcps"](wanted.state_dim, wanted.action_dim, 1.0, config, seeds, device)
    plain = PlainDiffusionLearner("diffcps", wanted.state_dim, wanted.action_dim, 1.0, config, device)
    plain.load_published({k: v for k, v in agent.published_state()[0].items() if isinstance(v, dict)})
    act = acting(agent, choose_mode(options.execution, device, 10**9)[0])
    ours = Cut(environments.make_lockstep(options.env_name, options.episodes * options.seeds), limit)
    single = environments.make(options.env_name)
    single.reset(seed=100)
    steps: dict[str, int] = {}

    def run_ours() -> None:
        rngs, generators = environment_rngs(seeds, 0, False), torch_generators(seeds, "acting", device)
        steps["ours"] = int(evaluate(act, ours, seeds, rngs, generators, device).lengths.sum())

    def run_plain() -> None:
        # One seed's episodes: several seeds cost the published loop as many times as much.
        steps["plain"] = one_at_a_time(plain, single, options.plain_episodes, limit)

    run_ours()
    pairs = []
    for _ in range(options.repeats):
        plain_time = seconds(run_plain, device) / steps["plain"]
        pairs.append((plain_time, seconds(run_ours, device) / steps["ours"]))
    total = steps["ours"]  # environment steps of the whole evaluation, at this cut
    return {
        "env_name": options.env_name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "execution": choose_mode(options.execution, device, 10**9)[0],
        "threads": torch.get_num_threads(),
        "seeds": options.seeds,
        "episodes": options.episodes,
        "max_steps": limit,
        "candidates": config.action_candidates,
        "repeats": options.repeats,
        "environment_steps": total,
        "one_at_a_time_s": statistics.median(p for p, _ in pairs) * total,
        "seconds": statistics.median(o for _, o in pairs) * total,
        "ratio": statistics.median(p / o for p, o in pairs),
    }


def main(argv: list[str]) -> None:
    """Measure and print, as a few lines or with --json as one object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation", description=__doc__.splitlines()[0])
    parser.add_argument("--env_name", default="halfcheetah-medium-v2")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--execution", default="auto", choices=MODES)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--plain_episodes", type=int, default=2, help="episodes of the published loop a repeat")
    parser.add_argument("--max_steps", type=int, default=100, help="cut episodes here")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    result = measure(options)
    print(json.dumps(result) if options.json else "\n".join(f"{k:20} {v}" for k, v in result.items()))


if __name__ == "__main__":
    sys.exit(command_line("benchmarks.evaluation", lambda: main(sys.argv[1:])))
