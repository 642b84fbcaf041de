"""Environment steps per second, lockstep against gymnasium's: `python -m benchmarks.stepping [--json]`.

Both step N of the same registered environments with the same random actions and restart each that ends. They take
turns, so that what else the machine does meets both; the medians of the rounds are compared.
"""

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Sequence

import gymnasium
import numpy as np

from utils import environments
from utils.options import command_line

TASKS = ("hopper-medium-v2", "halfcheetah-medium-v2", "walker2d-medium-v2", "antmaze-large-play-v0")


def compare(env_name: str, num_envs: int = 10, steps: int = 300, rounds: int = 5) -> dict[str, float]:
    """Environment steps per second of both, medians over rounds.

    Args:
        env_name: a D4RL task.
        num_envs: N.
        steps: steps of all N in a round.
        rounds: how often each is measured, in turn.

    Returns:
        `sync` and `lockstep` in environment steps/s, and `ratio` = lockstep/sync.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # gymnasium calls AntMaze -v0 out of date
        sync = gymnasium.make_vec(environments.environment_id(env_name), num_envs, vectorization_mode="sync")
    lockstep = environments.make_lockstep(env_name, num_envs)
    shape = (steps, num_envs, lockstep.action_dim)
    actions = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    times = [(_time_sync(sync, actions), _time_lockstep(lockstep, actions)) for _ in range(rounds)]
    sync.close()
    lockstep.close()
    rates = [num_envs * steps / statistics.median(kind) for kind in zip(*times, strict=True)]
    return {"sync": rates[0], "lockstep": rates[1], "ratio": rates[1] / rates[0]}


def _time_sync(envs: gymnasium.vector.VectorEnv, actions: np.ndarray) -> float:
    envs.reset(seed=0)
    start = time.perf_counter()
    for action in actions:
        envs.step(action)  # restarts those that ended by itself
    return time.perf_counter() - start


def _time_lockstep(envs: environments.LockstepEnvs, actions: np.ndarray) -> float:
    rngs = [np.random.default_rng(row) for row in range(envs.num_envs)]
    running = np.ones(envs.num_envs, dtype=bool)
    envs.reset(rngs)
    start = time.perf_counter()
    for action in actions:
        _, _, terminated, truncated = envs.step(action, running)
        for row in np.flatnonzero(terminated | truncated):
            envs.reset_one(row, rngs[row])
    return time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare on all tasks and print a table or, with `--json`, one object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--envs", type=int, default=10, help="environments of a kind (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="steps per round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; their median counts (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    results = {task: compare(task, options.envs, options.steps, options.rounds) for task in TASKS}
    if options.json:
        print(json.dumps(results))
        return
    print(f"environment steps/s of {options.envs} environments, {os.cpu_count()} cores")
    print(f"{'task':24}{'sync':>10}{'lockstep':>10}{'ratio':>8}")
    for task, rates in results.items():
        print(f"{task:24}{rates['sync']:10.0f}{rates['lockstep']:10.0f}{rates['ratio']:8.2f}")


if __name__ == "__main__":
    sys.exit(command_line("benchmarks.stepping", main))
