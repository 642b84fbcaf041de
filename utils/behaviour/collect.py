"""Behaviour policies -> a D4RL-format HDF5 file.

    python -m utils.behaviour.collect --env hopper --policy utils/behaviour/hopper/medium.npz --episodes 100 --out FILE

The file has D4RL's keys (`observations, actions, rewards, terminals, timeouts`), `infos/behaviour` (which of the
behaviours made a row), and as attributes what it is made of. Nothing in it depends on when or where it was written:
on one installation the same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import utils.interrupts  # noqa: F401  first, for what follows takes seconds to import

# isort: split
import h5py
import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from utils import tasks
from utils.behaviour.policies import NoisyPolicy, Policy, load_policy
from utils.data.rows import Rows, episode_ends, episode_returns
from utils.environments import make_lockstep
from utils.environments.lockstep import LockstepEnvs
from utils.errors import UserError
from utils.files import atomic_write, remove_stale_parts
from utils.options import command_line

MAX_STREAMS = 10
ROWS_PER_STREAM = 2_000
DATA_LICENCE_NOTE = "Collected by this project's own behaviour policies; this is not the official D4RL file."


@dataclass(frozen=True)
class Recording(Rows):
    """Rows as they happened; timeouts mark the time limit and the cut at the end of a stream.

    `cut` [N] marks those timeouts that are cuts: their episodes count in no mean return.
    """

    timeouts: np.ndarray
    cut: np.ndarray

    def whole_returns(self) -> np.ndarray:
        """Undiscounted returns [E] of the whole episodes."""
        ends = episode_ends(self, max_episode_steps=None)
        return episode_returns(self, ends)[~self.cut[ends]]


def streams_for(rows: int) -> int:
    """How many environments collect `rows` rows: at least 2,000 rows each, so that cut episodes stay few."""
    return int(np.clip(rows // ROWS_PER_STREAM, 1, MAX_STREAMS))


def record(
    envs: LockstepEnvs,
    policy: Policy,
    seed: np.random.SeedSequence,
    *,
    rows: int | None = None,
    episodes: int | None = None,
    begin: Callable[[int, np.random.Generator], None] | None = None,
    progress: tqdm | None = None,
) -> Recording:
    """Let a policy act, sampled or noisy as it is, in N environments at once.

    Each environment is a stream of episodes with a generator of its own. The `rows` (or `episodes`) are dealt to
    the streams beforehand and a stream's last episode is cut at its share, so no episode is chosen by its length.

    `envs` may be in any state. How much is one of `rows` and `episodes`; everything random comes from `seed`; `begin`
    is called with (environment, its generator) when an episode has begun; `progress` is a bar that moves by one per
    row. NumPy's products run with one thread meanwhile. Returns the streams one after another. ValueError for neither
    or both of rows and episodes, or fewer than one.
    """
    total = rows if episodes is None else episodes
    if (rows is None) == (episodes is None) or total is None or total < 1:
        raise ValueError("record needs either rows >= 1 or episodes >= 1")
    count = envs.num_envs
    quota = total // count + (np.arange(count) < total % count)
    noise_seed, *stream_seeds = seed.spawn(1 + count)
    noise = np.random.default_rng(noise_seed)
    rngs = [np.random.default_rng(s) for s in stream_seeds]

    done = np.zeros(count, dtype=np.int64)  # rows or episodes of each stream
    running = quota > 0
    log: list[tuple[np.ndarray, ...]] = []
    states = envs.reset(rngs)
    if begin is not None:
        for row in range(count):
            begin(row, rngs[row])
    # In products as small as a policy's, BLAS's threads mostly wait: beside other work they cost five times the time.
    with threadpool_limits(1, user_api="blas"):
        while running.any():
            actions = policy.act(states, noise).astype(np.float32)
            next_states, rewards, terminated, truncated = envs.step(actions, running)
            over = terminated | truncated
            done += running if episodes is None else over
            cut = running & ~over & (done >= quota)
            log.append(
                (
                    states.astype(np.float32),
                    actions,
                    rewards.astype(np.float32),
                    terminated,
                    (truncated & ~terminated) | cut,
                    cut,
                    running,
                )
            )
            if progress is not None:
                progress.update(int(running.sum()))
            running = running & (done < quota)
            for row in np.flatnonzero(over & running).tolist():
                next_states[row] = envs.reset_one(row, rngs[row])
                if begin is not None:
                    begin(row, rngs[row])
            states = next_states
    *columns, was_running = (np.stack(column) for column in zip(*log, strict=True))
    return Recording(*(column.swapaxes(0, 1)[was_running.T] for column in columns))


def join(parts: Sequence[Recording]) -> Recording:
    """The rows of several recordings, one after another."""
    names = Recording.__dataclass_fields__
    return Recording(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def describe(env_name: str, name: str, policy: Policy, part: Recording) -> dict[str, Any]:
    """What the file says of one behaviour: its policy, rows, whole episodes, their mean return, raw and normalised."""
    returns = part.whole_returns()
    mean = float(returns.mean()) if len(returns) else None
    return {
        "name": name,
        "policy": policy.info,
        "rows": len(part),
        "episodes": len(returns),
        "mean_return": mean,
        "normalized_return": None if mean is None else float(tasks.normalized_score(env_name, mean)),
    }


def write_hdf5(path: str | os.PathLike[str], parts: Sequence[Recording], attributes: dict[str, Any]) -> None:
    """Write recordings as one D4RL-format file, to a temporary name that is then renamed: whole, or not at all.

    `attributes` are written as JSON texts under sorted names; there are no time stamps in the file. Raises UserError
    where the disk refuses.
    """
    path = Path(path)
    rows = join(parts)
    behaviour = np.repeat(np.arange(len(parts), dtype=np.int16), [len(part) for part in parts])
    columns = {
        "observations": rows.observations,
        "actions": rows.actions,
        "rewards": rows.rewards,
        "terminals": rows.terminals,
        "timeouts": rows.timeouts,
        "infos/behaviour": behaviour,
    }
    # Made in memory: the HDF5 library cannot close a file that a full disk has cut off.
    content = io.BytesIO()
    with h5py.File(content, "w", libver=("earliest", "v110"), track_order=False) as file:
        for name, column in columns.items():
            file.create_dataset(name, data=column, compression="gzip", track_times=False)
        for name in sorted(attributes):
            file.attrs[name] = json.dumps(attributes[name], sort_keys=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale_parts(path)
        atomic_write(path, content.getbuffer())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free some space and run again") from error


def read_attributes(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `write_hdf5` wrote of a file. Raises OSError or ValueError where it is no such file."""
    with h5py.File(path, "r") as file:
        return {name: json.loads(value) for name, value in file.attrs.items()}


def versions() -> dict[str, str]:
    """What the rows of a file depend on besides its seed."""
    packages = {name: version(name) for name in ("mujoco", "gymnasium", "numpy", "h5py")}
    return {"python": platform.python_version(), **packages}


# --- The command ---

_BODIES = tuple(dict.fromkeys(task.world for task in tasks.TASKS.values() if task.domain == "locomotion"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Collect as the command line says; UserError where a setting, the policy file or the output cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m utils.behaviour.collect", description=__doc__.splitlines()[0])
    parser.add_argument("--env", required=True, help=f"{', '.join(_BODIES)}, or a D4RL id such as antmaze-umaze-v0")
    parser.add_argument(
        "--policy",
        required=True,
        nargs="+",
        help="linear or network .npz, or a stable-baselines3 .zip; of several the rows stand one part after the other",
    )
    amount = parser.add_mutually_exclusive_group(required=True)
    amount.add_argument("--transitions", type=int, help="rows to record of each policy")
    amount.add_argument("--episodes", type=int, help="whole episodes to record of each policy")
    parser.add_argument("--out", required=True, help="the HDF5 file to write; it must not exist")
    parser.add_argument(
        "--noise",
        type=float,
        help="σ of Gaussian noise added to the deterministic action, then clipped; left out, a policy that is a "
        "distribution is sampled and any other acts without noise",
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    collect_file(args.env, args.policy, args.out, args.transitions, args.episodes, noise=args.noise, seed=args.seed)


def collect_file(
    env: str,
    policy_path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    transitions: int | None = None,
    episodes: int | None = None,
    noise: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Collect with one policy file, or with several the same amount each; returns the attributes written.

    UserError for an unknown environment, a policy file that is unsound or of other sizes, an amount below 1, a negative
    noise or seed, or an output that exists.
    """
    paths = [policy_path] if isinstance(policy_path, str | os.PathLike) else list(policy_path)
    task = _check(env, transitions if episodes is None else episodes, seed, out)
    if noise is not None and not 0 <= noise < float("inf"):
        raise UserError(f"--noise is {noise}; it must be a number of at least 0")
    policies = [(Path(path).stem, _behaviour(path, env, task, noise)) for path in paths]
    digests = [hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest() for path in paths]
    about = {"policy_sha256": digests[0] if len(digests) == 1 else digests}
    return collect_parts(env, policies, out, transitions, episodes, seed, progress, about)


def _behaviour(path: str | os.PathLike[str], env: str, task: tasks.Task, noise: float | None) -> Policy:
    """The policy of a file as it is to act. UserError where it has other sizes than the task."""
    policy: Any = load_policy(path)
    if policy.sizes != (task.state_dim, task.action_dim):
        raise UserError(
            f"{path} is a policy of {policy.sizes[0]} state and {policy.sizes[1]} action dimensions; "
            f"{env} has {task.state_dim} and {task.action_dim}"
        )
    return policy if noise is None else NoisyPolicy(policy, noise)


def _check(env: str, amount: int | None, seed: int, out: str | os.PathLike[str]) -> tasks.Task:
    """The task of an environment; UserError where it, the amount, the seed or the output cannot be used."""
    task = tasks.task(f"{env}-medium-v2" if env in _BODIES else env)
    if amount is None or amount < 1:
        raise UserError(f"the amount is {amount}; give --transitions or --episodes of at least 1")
    if seed < 0:
        raise UserError(f"--seed is {seed}; it must be at least 0")
    if Path(out).exists():
        raise UserError(f"{out} exists; name another file or delete it")
    return task


def collect_parts(
    env: str,
    policies: Sequence[tuple[str, Policy]],
    out: str | os.PathLike[str],
    transitions: int | None = None,
    episodes: int | None = None,
    seed: int = 0,
    progress: bool = True,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Collect so many rows or episodes with each of several named policies of the task's sizes, one part after the
    other; returns the attributes written, with those in `about`.

    Part 0 is what its policy alone would record with this seed; every other part has a random stream of its own.

    UserError for an unknown environment, an amount below 1, a negative seed, or an output that exists.
    """
    amount = transitions if episodes is None else episodes
    env_name = _check(env, amount, seed, out).env_name
    assert amount is not None  # checked
    streams = streams_for(amount) if episodes is None else min(episodes, MAX_STREAMS)
    envs = make_lockstep(env_name, streams)
    parts: list[Recording] = []
    total = None if transitions is None else transitions * len(policies)
    with tqdm(total=total, desc=f"collect {env}", unit=" rows", disable=None if progress else True) as bar:
        for k, (_, policy) in enumerate(policies):
            random = np.random.SeedSequence(seed, spawn_key=(k,) if k else ())
            parts.append(record(envs, policy, random, rows=transitions, episodes=episodes, progress=bar))
    envs.close()
    attributes: dict[str, Any] = {
        "source": "utils.behaviour.collect",
        "description": DATA_LICENCE_NOTE,
        "env_name": env,
        "rows": sum(map(len, parts)),
        "seed": seed,
        "behaviours": [describe(env_name, *named, part) for named, part in zip(policies, parts, strict=True)],
        "versions": versions(),
        **(about or {}),
    }
    write_hdf5(out, parts, attributes)
    for behaviour in attributes["behaviours"] if progress else ():
        part = f" by {behaviour['name']}" if len(parts) > 1 else ""
        print(
            f"{out}: {behaviour['rows']:,} rows{part}, {behaviour['episodes']} whole episodes"
            + (
                ""
                if behaviour["mean_return"] is None
                else f", mean return {behaviour['mean_return']:.1f} (normalised {behaviour['normalized_return']:.1f})"
            )
        )
    return attributes


if __name__ == "__main__":
    sys.exit(command_line("utils.behaviour.collect", main))
