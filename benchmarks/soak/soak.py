"""Train, kill, resume, evaluate, in a loop, beside a process that only trains and evaluates.

    python -m benchmarks.soak --minutes 60 --name NAME        (--minutes 2 in continuous integration)

Runs that take a moment, of every algorithm with one and with three seeds, evaluated while training waits or beside
it, are killed at random moments, some of their files damaged as a crash could leave them, and resumed until they are
complete: then they must equal, bit for bit, runs that nothing happened to. The long-lived process must keep its
memory within 5 %, and its files and threads. Exit code 1 where anything of this fails. With --name the figures go to
results/benchmarks/soak_NAME.md.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

import hyperparameters
from agents import AGENTS
from benchmarks.soak import forked
from utils.behaviour import local
from utils.errors import UserError
from utils.runs import checkpoint, locks
from utils.runs.columns import TOOK

ROOT = Path(__file__).resolve().parents[2]
TASK = "hopper-medium-v2"
SHORT = {
    "num_epochs": 3, "num_steps_per_epoch": 4, "pretrain_epochs": 1, "eval_interval": 1, "eval_episodes": 1,
    "batch_size": 8, "hidden_dim": 16, "action_candidates": 4, "plan_interval": 6, "plan_actions": 2,
}  # fmt: skip
SHORT_WINDOWS = {"hidden_dim": 16, "horizon": 4, "dim_mults": "1,2", "diffusion_steps": 2}  # of what plans over windows
# How a run that is disturbed is told to evaluate and to save: none of it may change a number.
WAYS = ((), ("--eval_async",), ("--eval_async", "--checkpoint_interval", "0"))


def tiny(algo: str, seeds: str, data: str, folder: Path, *more: str) -> list[str]:
    """The command line of a run that takes a moment and goes through everything."""
    command = ["--algo", algo, "--env_name", TASK, "--dataset", data, "--dir", str(folder), "--seeds", seeds]
    known = hyperparameters.explain(algo, TASK)
    for name, value in {**SHORT, **(SHORT_WINDOWS if "horizon" in known else {})}.items():
        if name in known:
            command += [f"--{name}", str(value)]
    return [*command, "--device", "cpu", "--execution", "eager", "--threads", "1", "--quiet", *more]


def difference(one: Path, other: Path) -> str | None:
    """What differs between two folders of runs: a CSV file, its time column aside, or a tensor; None if nothing."""
    seeds = sorted(path.relative_to(one) for path in one.rglob("seed_*") if path.is_dir())
    if seeds != sorted(path.relative_to(other) for path in other.rglob("seed_*") if path.is_dir()) or not seeds:
        return f"the seeds' folders: {seeds}"
    for seed in seeds:
        if (one / seed / "evaluations.csv").read_bytes() != (other / seed / "evaluations.csv").read_bytes():
            return f"{seed}/evaluations.csv"
        if _without_time(one / seed / "metrics.csv") != _without_time(other / seed / "metrics.csv"):
            return f"{seed}/metrics.csv"
        states = [torch.load(base / seed / "checkpoint.pt", weights_only=True) for base in (one, other)]
        for state in states:
            state.pop("logs")  # lengths: the digits of the times vary
        if found := _unequal(*states):
            return f"{seed}/checkpoint.pt: {found}"
    return None


def _without_time(path: Path) -> list[list[str]]:
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    kept = [k for k, name in enumerate(rows[0]) if name not in TOOK]
    return [[row[k] for k in kept] for row in rows]


def _unequal(one: Any, other: Any, name: str = "") -> str | None:
    """The dotted name of what is not equal, bit for bit."""
    if isinstance(one, Mapping):
        if one.keys() != other.keys():
            return f"{name}: {sorted(one)} and {sorted(other)}"
        parts = (_unequal(one[key], other[key], f"{name}.{key}".strip(".")) for key in one)
        return next((part for part in parts if part), None)
    equal = torch.equal(one, other) if isinstance(one, Tensor) else one == other
    return None if equal else name


# --- Killing and damaging -----------------------------------------------------------------------------------


class Soak:
    """Counts what was done to runs; `failures` says what was not survived."""

    def __init__(self, base: Path, data: Mapping[str, str], seed: int) -> None:
        self.base, self.data, self.chance = base, data, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.whole: dict[tuple[str, str, str], tuple[int, float]] = {}  # exit code and seconds without a fault

    def round(self, algo: str, seeds: str, data: str) -> None:
        """One run, killed and damaged until it is through, then compared."""
        whole, hurt = self.base / f"whole-{algo}-{seeds}-{data}", self.base / "hurt"
        if (algo, seeds, data) not in self.whole:
            self.whole[algo, seeds, data] = forked.finish(tiny(algo, seeds, self.data[data], whole))
        code, seconds = self.whole[algo, seeds, data]
        shutil.rmtree(hurt, ignore_errors=True)
        for _ in range(self.chance.randint(1, 5)):
            argv = tiny(algo, seeds, self.data[data], hurt, "--resume", *self.chance.choice(WAYS))
            self.disturb(argv, self.chance.uniform(0, 0.9) * seconds)
            self.damage(sorted(hurt.rglob("seed_?")))
        argv = tiny(algo, seeds, self.data[data], hurt, "--resume", *self.chance.choice(WAYS))
        ended, _ = forked.finish(argv)
        found = difference(whole, hurt)
        if ended != code or found:
            why = f": {last_words(argv)}" if ended == 2 else ""
            self.failures.append(f"{algo}, seeds {seeds}, {data}: exit code {ended}{why}; {found}")
        self.counts["runs compared"] += 1

    def disturb(self, argv: Sequence[str], seconds: float) -> None:
        """SIGKILL or SIGTERM after so many seconds, or a second process on the same folder."""
        how = self.chance.choice(("kill", "kill", "kill", "terminate", "second"))
        if how == "kill":
            self.counts["SIGKILL"] += forked.kill_at(argv, seconds) == -signal.SIGKILL
            return
        process = forked.start(argv)
        process.join(seconds)
        if how == "second":
            if stopped_with_its_lock(process, argv):  # it can neither end nor let go in the meantime
                code, _ = forked.finish(argv)
                self.counts["second processes refused"] += code == 2
                if code != 2:
                    self.failures.append(f"a second process on one folder ended with {code}: {argv}")
            process.kill()
            process.join()
            self.counts["SIGKILL"] += process.exitcode == -signal.SIGKILL
        else:
            process.terminate()
            process.join()
            self.counts["SIGTERM"] += process.exitcode in (-signal.SIGTERM, 128 + signal.SIGTERM)
        process.close()

    def damage(self, folders: Sequence[Path]) -> None:
        """What a crash or a bad disk could leave of one seed's files, where there is something to go back to."""
        if not folders or not all(
            (f / name).exists() for f in folders for name in (checkpoint.CURRENT, checkpoint.PREVIOUS)
        ):
            return
        folder, what = self.chance.choice(list(folders)), self.chance.randint(0, 4)
        path = folder / checkpoint.CURRENT
        if len({min(checkpoint.saved_moments(f), default=None) for f in folders}) > 1:
            return  # a kill came between the seeds' files: the one before is needed
        if what == 0:
            path.write_bytes(path.read_bytes()[: self.chance.randrange(path.stat().st_size)])
            self.counts["checkpoints cut short"] += 1
        elif what == 1:
            content = bytearray(path.read_bytes())
            content[self.chance.randrange(len(content) - 80)] ^= 1 << self.chance.randrange(8)
            path.write_bytes(bytes(content))
            self.counts["checkpoints with a flipped bit"] += 1
        elif what == 2:
            path.unlink()
            self.counts["checkpoints lost"] += 1
        elif what == 3:
            for name in ("metrics.csv", "evaluations.csv"):
                with open(folder / name, "ab") as file:
                    file.write(b"12,0.31")
            self.counts["rows cut short"] += 2


def stopped_with_its_lock(process: BaseProcess, argv: Sequence[str]) -> bool:
    """Stop the process where it is (SIGSTOP); whether it holds one of its folders there."""
    if process.pid is None or not process.is_alive():
        return False
    try:
        os.kill(process.pid, signal.SIGSTOP)
        while (state := _state(process)) not in "TZX":
            time.sleep(0.001)
    except (ProcessLookupError, FileNotFoundError):
        return False  # it ended just now
    files = Path(argv[argv.index("--dir") + 1]).rglob(".seed_*.lock")
    return state == "T" and any(_held(path.with_name(path.stem[1:])) for path in files)


def _state(process: BaseProcess) -> str:
    """The kernel's letter for what the process does: R, S, D, T (stopped), Z (ended) ..."""
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]


def _held(folder: Path) -> bool:
    try:
        locks.RunLock([folder]).close()
    except UserError:
        return True
    return False


def last_words(argv: Sequence[str]) -> str:
    """The last line that a run which was refused prints when it is tried once more."""
    again = subprocess.run([sys.executable, "run.py", *argv], cwd=ROOT, capture_output=True, text=True, check=False)
    return next(reversed(again.stderr.splitlines()), f"exit code {again.returncode} when tried once more")


# --- The long-lived process -----------------------------------------------------------------------------------


class Watched:
    """A training process, and samples of its memory, open files, threads and children."""

    def __init__(self, argv: Sequence[str], warm_up: float) -> None:
        self.process, self.warm_from = forked.start(argv), time.monotonic() + warm_up
        self.samples: list[tuple[float, int, int, int]] = []  # MiB, files, threads, children

    def sample(self) -> None:
        """Take a sample, once warmed up. Raises RuntimeError where the process has ended."""
        if not self.process.is_alive():
            raise RuntimeError(f"the long-lived process ended with {self.process.exitcode}")
        if time.monotonic() < self.warm_from:
            return
        here = Path(f"/proc/{self.process.pid}")
        status = dict(line.split(":", 1) for line in (here / "status").read_text().splitlines())
        memory = int(status["VmRSS"].split()[0]) / 1024
        children = (here / "task" / str(self.process.pid) / "children").read_text().split()
        self.samples.append((memory, len(os.listdir(here / "fd")), int(status["Threads"]), len(children)))

    def end(self) -> int:
        """Ask it to stop; its exit code."""
        self.process.terminate()
        self.process.join(120)
        code = self.process.exitcode
        self.process.kill()
        return -1 if code is None else code

    def figures(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """At first and at last: the median memory of a tenth of the samples, and the usual counts of a third.

        A sample may see a file that is open for a moment, a checkpoint say: of a third few do, of a tenth half may.
        """
        memory, *counts = zip(*self.samples, strict=True)
        tenth, third = (max(1, len(memory) // parts) for parts in (10, 3))
        first = (statistics.median(memory[:tenth]), *(statistics.median_low(column[:third]) for column in counts))
        last = (statistics.median(memory[-tenth:]), *(statistics.median_low(column[-third:]) for column in counts))
        return first, last


# --- The command ------------------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    """Soak as the command line says; 1 if something was not survived."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60, help="how long (default: %(default)s)")
    parser.add_argument("--name", help="write results/benchmarks/soak_NAME.md")
    parser.add_argument("--machine", default=platform.machine(), help="what to call this machine (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and damages (default: %(default)s)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        soak = Soak(base, _data(base), options.seed)
        long = tiny("diffcps", "0-2", soak.data["plain"], base / "long", "--num_epochs", "1000000000",
                    "--num_steps_per_epoch", "20", "--eval_interval", "5", "--eval_episodes", "3")  # fmt: skip
        forked.finish(tiny("bc", "0", soak.data["plain"], base / "first"))  # the fork server is up from here on
        end = time.monotonic() + 60 * options.minutes
        watched = Watched(long, warm_up=60 * options.minutes / 4)
        for algo, seeds, data in itertools.cycle(itertools.product(AGENTS, ("0", "0-2"), soak.data)):
            if time.monotonic() > end:
                break
            soak.round(algo, seeds, data)
            watched.sample()
        lines = report(soak, watched, options)
    print("\n".join(lines))
    if options.name:
        Path("results/benchmarks", f"soak_{options.name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(bool(soak.failures))


def _data(base: Path) -> dict[str, str]:
    """A small local set, and the same with rewards that overflow when they are squared."""
    os.environ["DIFFCPS_LOCAL_DIR"] = str(base / "local")
    plain = Path(local.load(TASK, size=2_000, progress=False).info["path"])
    wild = plain.with_name("wild.hdf5")
    shutil.copy(plain, wild)
    with h5py.File(wild, "a") as file:
        rewards = file["rewards"][...]
        rewards[np.random.default_rng(0).choice(len(rewards), 20, replace=False)] = 3e30
        file["rewards"][...] = rewards
    return {"plain": str(plain), "wild": str(wild)}


def report(soak: Soak, watched: Watched, options: argparse.Namespace) -> list[str]:
    """The figures as Markdown; what is not as it must be is added to `soak.failures`."""
    steps = _steps(soak.base / "long")
    first, last = watched.figures()
    code = watched.end()
    growth = last[0] / first[0] - 1
    check: list[tuple[bool, str]] = [
        (abs(growth) <= 0.05, f"memory changed by {100 * growth:.1f} %"),
        (first[1:] == last[1:], f"files, threads, children went from {first[1:]} to {last[1:]}"),
        (code == 128 + signal.SIGTERM, f"the long-lived process ended with {code} on SIGTERM"),
    ]
    soak.failures += [text for fine, text in check if not fine]
    stopped = sum(code == 1 for code, _ in soak.whole.values())
    return [
        f"# {options.minutes:g} minutes of train, kill, resume, evaluate", "",
        f"`python -m benchmarks.soak --minutes {options.minutes:g} --seed {options.seed}`; Python "
        f"{platform.python_version()}, torch {torch.__version__}; {options.machine}; {len(AGENTS)} algorithms, "
        "one and three seeds, local hopper-medium data and the same with rewards that overflow.", "",
        "| what happened | times |", "|---|---:|",
        *(f"| {name} | {number:,} |" for name, number in sorted(soak.counts.items())),
        f"| kinds of runs in which every seed stopped | {stopped} of {len(soak.whole)} |",
        f"| not survived | {len(soak.failures)} |", "",
        f"| the long-lived process (diffcps, three seeds, {steps:,} steps) | after warm-up | at the end |",
        "|---|---:|---:|",
        f"| memory (RSS), MiB | {first[0]:.1f} | {last[0]:.1f} |",
        f"| open files | {first[1]:g} | {last[1]:g} |",
        f"| threads | {first[2]:g} | {last[2]:g} |",
        f"| child processes | {first[3]:g} | {last[3]:g} |",
        *([""] if soak.failures else []), *(f"- {line}" for line in soak.failures),
    ]  # fmt: skip


def _steps(folder: Path) -> int:
    with open(next(folder.rglob("seed_0")) / "metrics.csv", newline="") as file:
        return int(list(csv.reader(file))[-1][0])
