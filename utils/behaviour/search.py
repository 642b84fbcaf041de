"""Find the behaviour policies of `--dataset local` again, from nothing.

    python -m utils.behaviour.search --env hopper

- hopper: augmented random search, about two minutes;
- halfcheetah, walker2d: soft actor-critic, about an hour each on one core; an interrupted search goes on;
- ant: a gait by the cross-entropy method, cloned to a network, about two minutes.

Snapshots go to `--dir`; from them *medium*, *expert* and the steps to medium (*replay_1* ...) are chosen by the
mean return of the policy as it will act, with its noise, and written to `--out`. All runs on the processor; another
machine's rounding gives other policies of like quality.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from utils import tasks
from utils.behaviour.gait_search import GaitSettings, clone, cross_entropy_method, open_envs, walk
from utils.behaviour.local import REPLAY_SNAPSHOTS, as_behaviour, behaviour_folder
from utils.behaviour.policies import load_policy, save_policy
from utils.behaviour.policy_search import (
    ARSSettings,
    SACSettings,
    Snapshot,
    augmented_random_search,
    mean_return,
    soft_actor_critic,
)
from utils.environments import make_lockstep
from utils.errors import UserError
from utils.options import command_line

MEDIUM_SHARE = (1 / 3, 1 / 2)
"""*medium* scores this share of the expert's normalised score."""
SELECTION_EPISODES = 20
REPORT_EPISODES = 50


def _search(body: str, folder: Path, seed: int, steps: int | None) -> Iterator[Snapshot]:
    env_name = f"{body}-medium-v2"
    if body == "hopper":
        settings = ARSSettings() if steps is None else ARSSettings(iterations=steps)
        return augmented_random_search(env_name, seed, settings)
    sac = SACSettings() if steps is None else SACSettings(steps=steps)
    return soft_actor_critic(env_name, seed, sac, folder / "checkpoint.pt")


def find_locomotion(body: str, folder: Path, out: Path, seed: int = 0, steps: int | None = None) -> dict[str, Any]:
    """Search, keep the snapshots in `folder`, choose among them, write `out/<body>/*.npz`.

    Returns each chosen policy's `info` by name. Raises UserError where no snapshot came out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    method = "augmented random search" if body == "hopper" else "soft actor-critic"
    with tqdm(desc=f"{body}: {method}", unit=" snapshots") as bar:
        for snapshot in _search(body, folder, seed, steps):
            snapshot.policy.info = {"environment": body, "search": method, "seed": seed, "step": snapshot.step}
            save_policy(folder / f"{snapshot.step:09d}.npz", snapshot.policy)
            bar.update()
            bar.set_postfix(steps=f"{snapshot.step:,}", mean_return=f"{snapshot.mean_return:.0f}")
    return write_chosen(body, folder, out)


def write_chosen(body: str, folder: Path, out: Path) -> dict[str, Any]:
    """Choose among the snapshots in `folder` and write them to `out/<body>`; returns their `info` by name."""
    paths = sorted(folder.glob("[0-9]*.npz"))
    if not paths:
        raise UserError(f"no snapshots in {folder}; run the search longer")
    env_name = f"{body}-medium-v2"
    policies: list[Any] = [load_policy(path) for path in paths]
    envs = make_lockstep(env_name, SELECTION_EPISODES)
    scores = [
        float(tasks.normalized_score(env_name, mean_return(envs, as_behaviour(policy), seed=20_000, noise=True)))
        for policy in tqdm(policies, desc=f"{body}: evaluate snapshots")
    ]
    envs.close()
    chosen = choose(scores)
    # Measured anew, with other seeds: the score that a policy was chosen for flatters it.
    envs = make_lockstep(env_name, REPORT_EPISODES)
    for name, k in chosen.items():
        value = mean_return(envs, as_behaviour(policies[k]), seed=30_000, noise=True)
        policies[k].info["mean_return"] = round(value, 1)
        policies[k].info["normalized_return"] = round(float(tasks.normalized_score(env_name, value)), 2)
        save_policy(out / body / f"{name}.npz", policies[k])
    envs.close()
    return {name: policies[k].info for name, k in chosen.items()}


def choose(scores: Sequence[float]) -> dict[str, int]:
    """Which of the snapshots, in the order of the search, become which behaviour.

    *expert* has the highest score. *medium* is the first whose share of it is a third to a half, or the one nearest
    to that where none is. The replay snapshots are those up to medium whose scores are nearest to even steps from the
    first snapshot's to medium's.
    """
    values = np.asarray(scores, dtype=np.float64)
    expert = int(values.argmax())
    low, high = (share * values[expert] for share in MEDIUM_SHARE)
    outside = np.maximum(low - values, 0) + np.maximum(values - high, 0)
    medium = int(outside[: expert + 1].argmin())
    chosen = {"expert": expert, "medium": medium}
    for k in range(REPLAY_SNAPSHOTS):
        target = values[0] + (values[medium] - values[0]) * k / REPLAY_SNAPSHOTS
        chosen[f"replay_{k + 1}"] = int(np.abs(values[: medium + 1] - target).argmin())
    return chosen


def find_ant(out: Path, seed: int = 0, settings: GaitSettings | None = None) -> dict[str, Any]:
    """Tune the gait, clone it, measure it on open ground, write `out/ant/gait.npz`; returns its `info`."""
    settings = settings or GaitSettings()
    rng = np.random.default_rng(seed)
    policy = clone(cross_entropy_method(settings, rng), settings, rng)
    envs = open_envs(40)
    result = walk(envs, rng, 200, policy=policy)
    envs.close()
    policy.info = {
        "environment": "antmaze",
        "search": "cross-entropy method on an oscillator, cloned",
        "seed": seed,
        "metres_per_step": round(float(result.progress.mean()) / 200, 4),
        "upright": float((result.upright > 0.3).mean()),
    }
    save_policy(out / "ant" / "gait.npz", policy)
    return {"gait": policy.info}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one search as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m utils.behaviour.search", description=__doc__.splitlines()[0])
    parser.add_argument("--env", required=True, choices=["hopper", "halfcheetah", "walker2d", "ant"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="length: search iterations (hopper), environment steps (others)")
    parser.add_argument("--dir", type=Path, default=Path("results/runs/behaviour"), help="snapshots, to go on from")
    parser.add_argument("--out", type=Path, default=behaviour_folder(), help="where the chosen policies are written")
    parser.add_argument("--choose_only", action="store_true", help="choose among the snapshots that are there")
    args = parser.parse_args(arguments)
    if args.seed < 0 or (args.steps is not None and args.steps < 1):
        raise UserError("--seed must be at least 0 and --steps at least 1")
    torch.set_num_threads(1)  # networks this small are slower on more
    if args.env == "ant":
        found = find_ant(args.out, args.seed)
    elif args.choose_only:
        found = write_chosen(args.env, args.dir / args.env, args.out)
    else:
        found = find_locomotion(args.env, args.dir / args.env, args.out, args.seed, args.steps)
    for name, info in sorted(found.items()):
        print(f"{name:10s}", ", ".join(f"{key} {value}" for key, value in info.items()))


if __name__ == "__main__":
    sys.exit(command_line("utils.behaviour.search", main))
