"""The claim that this project's environments are D4RL's, checked against the original stack while it runs.

    python -m benchmarks.fidelity.crosscheck --classic VENV [--policies DIR] [--episodes 40] [--out results/benchmarks]

VENV is what ``bash utils/environments/install_classic.sh --environments-only VENV`` builds. The same episodes are
played there and here, at the same time in two processes (``benchmarks.fidelity.play`` says which; without
``--policies`` fixed action sequences only). Then three kinds of claims are looked at, a line each:

- *states*: after up to 20 fixed actions from the same seed, the two sides' states are the same;
- *steps*: every tenth step of every episode of the original, repeated here from the same state, leads to the same
  state, reward and termination (walls, falls and goals are among them);
- *returns*: of whole episodes, where a chaotic body magnifies the last digit: Hopper's means are equal to the decimal
  (the two policies of the reference recordings), all others lie within two standard errors of each other. Where nothing
  differs, one such claim in twenty still fails by chance: a check that must not cry wolf asks for three
  (``--standard_errors 3``).

The exit code is 1 where a claim does not hold. ``--out`` writes ``crosscheck.md`` and ``crosscheck.csv`` (a row an
episode).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fidelity.physics import Errors, one_step_errors
from benchmarks.fidelity.play import FIXED_ACTIONS, load_arrays
from utils import environments
from utils.errors import UserError
from utils.options import command_line

__all__ = ["Claim", "return_claims", "state_claims", "step_claims"]

ROOT = Path(__file__).parents[2]
# Those of the recordings' table. The third one staggers: a few episodes differ by more than the decimal.
EQUAL_POLICIES = ("hopper_online_3", "hopper_online_6")
STATE_TOLERANCE = 1e-6
STEP_TOLERANCE = Errors(qpos=1e-7, qvel=1e-5, observation=1e-5, reward=1e-6, terminations=0)
DECIMAL = 0.05

Plays = dict[tuple[str, str], list[dict[str, Any]]]


@dataclass(frozen=True)
class Claim:
    """One line of the report: what was compared, what each side gave, and whether it is as claimed."""

    subject: str
    original: str
    restored: str
    claim: str
    found: str
    holds: bool


def state_claims(original: Plays, restored: Plays) -> Iterator[Claim]:
    """Fixed actions: as many states in every episode, and these within `STATE_TOLERANCE`."""
    for (task, policy), ours in restored.items():
        if policy != FIXED_ACTIONS:
            continue
        pairs = [(a["states"], b["states"]) for a, b in zip(original[task, policy], ours, strict=True)]
        error = max(_largest_difference(a, b) for a, b in pairs)
        counts = [f"{sum(map(len, side))} states" for side in zip(*pairs, strict=True)]
        holds = error <= STATE_TOLERANCE and all(len(a) == len(b) for a, b in pairs)
        yield Claim(f"{task}, fixed actions", *counts, f"equal within {STATE_TOLERANCE:.0e}", f"{error:.0e}", holds)


def _largest_difference(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> float:
    common = min(len(a), len(b))
    return float(np.abs(np.array(a[:common]) - np.array(b[:common])).max())


def step_claims(steps: dict[str, np.ndarray]) -> Iterator[Claim]:
    """The original's single steps (``task/field`` [rows, ...]), repeated in this project's environments."""
    for task in dict.fromkeys(key.partition("/")[0] for key in steps):
        rows = {key.partition("/")[2]: array for key, array in steps.items() if key.startswith(f"{task}/")}
        errors = _replay(task, rows)
        holds = all(found <= limit for found, limit in zip(astuple(errors), astuple(STEP_TOLERANCE), strict=True))
        found = f"{errors.qpos:.0e}, {errors.qvel:.0e}, {errors.reward:.0e}, {errors.terminations}"
        count, ends = len(rows["done"]), int(rows["done"].sum())
        yield Claim(
            f"{task}, {count} steps ({ends} ends)", "", "", "qpos, qvel, reward, ends that differ", found, holds
        )


def _replay(task: str, rows: dict[str, np.ndarray]) -> Errors:
    """The largest errors over all rows; a maze's rows are taken goal by goal."""
    env = environments.make(task)
    goals = rows.pop("goal", None)
    if goals is None:
        return one_step_errors(env, rows)
    found = []
    for goal in np.unique(goals, axis=0):
        chosen = (goals == goal).all(axis=1)
        found.append(one_step_errors(env, {name: array[chosen] for name, array in rows.items()} | {"goal": goal}))
    largest = np.max([astuple(errors) for errors in found], axis=0)
    return Errors(*largest[:-1].tolist(), terminations=sum(errors.terminations for errors in found))


def return_claims(original: Plays, restored: Plays, allowed: float = 2.0) -> Iterator[Claim]:
    """Whole episodes: mean return ± standard error of both sides (in mazes: the share of goals reached).

    Means may differ by ``allowed`` standard errors of their difference.
    """
    for (task, policy), ours in restored.items():
        if policy == FIXED_ACTIONS:
            continue
        sides = [np.array([play["total"] for play in plays]) for plays in (original[task, policy], ours)]
        means, errors = [side.mean() for side in sides], [side.std(ddof=1) / np.sqrt(len(side)) for side in sides]
        texts = [_mean_text(mean, error, task) for mean, error in zip(means, errors, strict=True)]
        difference, error = abs(means[0] - means[1]), float(np.hypot(*errors))
        equal = int((np.abs(sides[0] - sides[1]) < DECIMAL).sum())
        if policy in EQUAL_POLICIES:
            claim, holds = "means equal to the decimal", difference < DECIMAL
        else:
            claim, holds = f"means within {allowed:g} standard errors", difference <= allowed * error
        in_errors = difference / error if error else 0.0
        found = f"{difference:.2g} ({in_errors:.1f} s.e.); {equal} of {len(sides[0])} episodes equal"
        yield Claim(f"{task}, {policy}, {len(sides[0])} episodes", *texts, claim, found, bool(holds))


def _mean_text(mean: float, error: float, task: str) -> str:
    return f"{mean:.3f} ± {error:.3f}" if task.startswith("antmaze") else f"{mean:.1f} ± {error:.1f}"


def _play_both(classic: Path, policies: Path | None, episodes: int, folder: Path) -> tuple[dict, dict]:
    """Both sides' ``plays.json``, played side by side; the original's steps stay in the folder."""
    pythons = {"d4rl": classic / "bin" / "python", "mujoco": Path(sys.executable)}
    if not pythons["d4rl"].exists():
        raise UserError(
            f"no Python in {classic}; run: bash utils/environments/install_classic.sh --environments-only {classic}"
        )
    options = ["--episodes", str(episodes), *(["--policies", str(policies.resolve())] if policies else [])]
    command = ["-m", "benchmarks.fidelity.play", *options]
    started = {
        backend: subprocess.Popen(
            [str(python), *command, "--backend", backend, "--out", str(folder / backend)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        for backend, python in pythons.items()
    }
    # Wait for both before any complaint: no process is left behind.
    codes = {backend: process.wait() for backend, process in started.items()}
    for backend, code in codes.items():
        if code:
            raise UserError(f"playing in the {backend} backend ended with exit code {code}; its message is above")
    return tuple(json.loads((folder / backend / "plays.json").read_text()) for backend in ("d4rl", "mujoco"))


def _by_policy(plays: Sequence[dict[str, Any]]) -> Plays:
    grouped: Plays = defaultdict(list)
    for play in plays:
        grouped[play["task"], play["policy"]].append(play)
    return dict(grouped)


def _table(claims: Sequence[Claim]) -> str:
    head = ("what", "original", "this project", "claim", "difference", "holds")
    rows = [[*astuple(claim)[:-1], "yes" if claim.holds else "**NO**"] for claim in claims]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _machine() -> str:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return f"{os.cpu_count()} cores, {model[1] if model else 'unknown processor'}"


def _write(out: Path, claims: Sequence[Claim], sides: dict[str, dict], command: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    versions = {name: ", ".join(f"{k} {v}" for k, v in side["versions"].items()) for name, side in sides.items()}
    text = f"""# The environments against the original stack

Command: `{command}`; machine: {_machine()}. A row per episode in `crosscheck.csv`.

- original: {versions["original"]}, MuJoCo 2.1.0
- this project: {versions["restored"]}

{_table(claims)}

What the lines mean stands at the head of `benchmarks/fidelity/crosscheck.py`. Returns are undiscounted; in the mazes
they are the share of episodes that reached the goal. ± is the standard error of the mean over episodes.
"""
    (out / "crosscheck.md").write_text(text)
    columns = ("task", "policy", "episode", "seed", "total", "length")
    with open(out / "crosscheck.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("side", "task", "policy", "episode", "seed", "return", "length"))
        for name, side in sides.items():
            writer.writerows((name, *(play[column] for column in columns)) for play in side["plays"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Play, compare, print; 0 where every claim holds.

    Raises:
        UserError: the classic environment or the policies are missing, or a side could not play.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fidelity.crosscheck", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--classic", type=Path, required=True, help="the environment of utils/environments/install_classic.sh"
    )
    parser.add_argument("--policies", type=Path, help="folder of locomotion.npz and ant_goal_reaching.npz")
    parser.add_argument("--episodes", type=int, default=40, help="episodes a policy, five times as many in mazes")
    parser.add_argument("--standard_errors", type=float, default=2.0, help="how far apart mean returns may lie")
    parser.add_argument("--out", type=Path, help="folder for crosscheck.md and crosscheck.csv")
    args = parser.parse_args(arguments)
    if args.episodes < 2:
        raise UserError(f"--episodes is {args.episodes}; a standard error needs at least 2")
    with tempfile.TemporaryDirectory() as folder:
        original, restored = _play_both(args.classic, args.policies, args.episodes, Path(folder))
        steps = load_arrays(Path(folder) / "d4rl" / "steps.npz")
    both = _by_policy(original["plays"]), _by_policy(restored["plays"])
    claims = [*state_claims(*both), *step_claims(steps), *return_claims(*both, args.standard_errors)]
    print(_table(claims))
    if args.out:
        command = f"python -m benchmarks.fidelity.crosscheck --classic VENV --episodes {args.episodes}"
        command += " --policies DIR" if args.policies else ""
        _write(args.out, claims, {"original": original, "restored": restored}, command)
    failed = sum(not claim.holds for claim in claims)
    print(f"crosscheck: {len(claims) - failed} of {len(claims)} claims hold")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(command_line("benchmarks.fidelity.crosscheck", main))
