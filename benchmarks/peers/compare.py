"""Steps a second of another library's training and of ours, alternating: the same sizes, on random data.

    python -m benchmarks.peers --environment .venv-d3rlpy --threads 1 2 --name NAME

The peer is installed from PyPI into an environment of its own, in the folder given or a temporary one, and runs in a
process that waits while ours runs. Batch, layers, critics and actions per state are this project's; data are random
numbers of the task's shapes. Theirs is timed twice: the update alone, on a batch that lies ready, and their training's
loop with its sampling; ours as it trains, with rows and random numbers. Medians of the rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import hyperparameters
from agents import AGENTS
from benchmarks.peers.environment import PEERS, Peer, python_of
from benchmarks.training import random_dataset, seconds, steady_step
from utils.errors import UserError
from utils.options import resolve_device
from utils.runs.folder import processor
from utils.seeding import torch_generators
from utils.tasks import task
from utils.training.memory import keep_freed_memory
from utils.training.runner import Runner

SAMPLES = 10  # actions per state where an algorithm takes several: CQL's three kinds, BCQ's and BEAR's targets
Side = Callable[[int], dict[str, float]]  # runs so many steps; seconds per step, by what was timed


class Worker:
    """A peer's process. Raises UserError where it ends before it has answered."""

    def __init__(self, python: Path, script: Path, settings: Mapping[str, Any]) -> None:
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  # a pipe nobody reads fills up
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._said}
        self._process = subprocess.Popen([str(python), "-P", str(script)], text=True, bufsize=1, **pipes)
        self.facts = self._ask(settings)

    def _ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            return json.loads(self._process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError) as error:
            self._process.wait()
            self._said.seek(0)
            last = (self._said.read().strip().splitlines() or ["it said nothing"])[-1]
            raise UserError(f"the peer's process ended: {last}") from error

    def run(self, steps: int) -> dict[str, float]:
        """Seconds per step: of the `update`, and of the `loop`."""
        return {name: taken / steps for name, taken in self._ask({"steps": steps}).items()}

    def close(self) -> None:
        """End the process; it ends by itself when it is asked nothing more."""
        self._process.communicate()
        self._said.close()


def our_side(algo: str, options: argparse.Namespace, execution: str) -> Side:
    """Our training in this mode, past its first steps. Raises UserError where the mode cannot be had."""
    device, data = resolve_device(options.device), random_dataset(options.env_name, options.rows)
    config = hyperparameters.get(algo, options.env_name)
    agent = AGENTS[algo](data.state_dim, data.action_dim, 1.0, config, [0], device)
    table, generators = data.batches_to(device, agent.windows), torch_generators([0], "training", device)
    runner = Runner(agent, table, config.batch_size, generators, execution)
    if runner.mode != execution:
        raise UserError(f"{algo} runs in mode {runner.mode}, not {execution}")
    agent.step = steady_step(config)
    runner.run(2 * runner.block)

    def run(steps: int) -> dict[str, float]:
        steps = max(1, round(steps / agent.period)) * agent.period  # a graph is a whole period
        taken = seconds(lambda: runner.run(steps), device) / steps
        runner.metrics()
        return {"loop": taken}

    return run


def measure(algo: str, python: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """An algorithm's rows: one for each of our modes and, on a GPU, each of the peer's."""
    peer, threads, device = PEERS[options.peer], options.threads[0], resolve_device(options.device)
    torch.set_num_threads(threads)
    keep_freed_memory(device)  # as run.py does
    wanted, config = task(options.env_name), hyperparameters.get(algo, options.env_name)
    settings = {**dataclasses.asdict(config), "algo": algo, "state_dim": wanted.state_dim, "samples": SAMPLES,
                "action_dim": wanted.action_dim, "rows": options.rows, "threads": threads,
                "device": str(device)}  # fmt: skip
    cuda = device.type == "cuda"
    modes = options.executions or (["graph"] if cuda else ["eager", "compile"])
    sides: dict[Any, Side] = {mode: our_side(algo, options, mode) for mode in modes}
    # d3rlpy compiles on CUDA alone: on a CPU its flag changes nothing.
    workers = {
        graph: Worker(python, peer.script, {**settings, "compile_graph": graph}) for graph in [False, True][: 1 + cuda]
    }
    sides |= {graph: worker.run for graph, worker in workers.items()}
    steps = {side: steps_in(options.seconds, run) for side, run in sides.items()}
    rounds = [{side: run(steps[side]) for side, run in sides.items()} for _ in range(options.repeats)]
    for worker in workers.values():
        worker.close()
    facts = {"algo": algo, "threads": threads, "batch_size": config.batch_size, "repeats": options.repeats,
             "device": torch.cuda.get_device_name(device) if cuda else f"a CPU ({processor()})"}  # fmt: skip
    return [
        facts | worker.facts | {"execution": mode} | compared(rounds, graph, mode)
        for graph, worker in workers.items()
        for mode in modes
    ]


def steps_in(wanted: float, run: Side) -> int:
    """How many steps take about so many seconds, after a few to warm up."""
    run(4)
    return max(2, round(wanted / run(6)["loop"]))


def compared(rounds: Sequence[Mapping[Any, Mapping[str, float]]], peer: Any, mode: str) -> dict[str, float]:
    """Steps a second of both and the medians of the rounds' ratios."""
    rate = lambda side, part: 1 / statistics.median(found[side][part] for found in rounds)  # noqa: E731
    ratio = lambda part: statistics.median(found[peer][part] / found[mode]["loop"] for found in rounds)  # noqa: E731
    return {
        "peer_update_steps_per_s": rate(peer, "update"),
        "peer_loop_steps_per_s": rate(peer, "loop"),
        "steps_per_s": rate(mode, "loop"),
        "ratio_to_update": ratio("update"),
        "ratio_to_loop": ratio("loop"),
    }


def in_own_process(algo: str, threads: int, python: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """`measure` in a process of its own, since threads and freed memory are a process' choice; [] where it fails."""
    command = [sys.executable, "-m", "benchmarks.peers", "--python", str(python), "--algos", algo]
    command += ["--threads", str(threads)]
    for name in ("peer", "env_name", "device", "rows", "seconds", "repeats"):
        command += [f"--{name}", str(getattr(options, name))]
    command += ["--executions", *options.executions] if options.executions else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
    print(f"benchmarks.peers: {algo} with {threads} threads is left out: {said}", file=sys.stderr)
    return []


def table(rows: Sequence[Mapping[str, Any]], command: str) -> str:
    """The rows as Markdown."""
    first = rows[0]
    head = ["algorithm", "threads", "batch", f"{first['peer']}, update alone", "its loop", "ours", "execution",
            "ratio to the update", "to the loop"]  # fmt: skip
    lines = [
        f"`{command}`: steps/s in float32 on random data, on {first['device']}, torch {first['torch']}; "
        f"medians of {first['repeats']} rounds, each side in turn.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for row in rows:
        rates = [f"{row[f'{side}steps_per_s']:.3g}" for side in ("peer_update_", "peer_loop_", "")]
        rates[0] += " (compiled)" if row["compiled"] else ""
        ratios = [f"{row[f'ratio_to_{part}']:.2f}" for part in ("update", "loop")]
        cells = [row["algo"], str(row["threads"]), str(row["batch_size"]), *rates, row["execution"], *ratios]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def all_rows(peer: Peer, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every algorithm with every number of threads. Raises UserError where nothing could be measured."""
    python = python_of(folder, peer, options.wheels)
    rows: list[dict[str, Any]] = []
    for threads in options.threads:
        for algo in options.algos or peer.algos:
            rows += in_own_process(algo, threads, python, options)
    if not rows:
        raise UserError("nothing was measured")
    return rows


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    flags = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.splitlines()[0])
    flags.add_argument("--peer", default="d3rlpy", choices=list(PEERS))
    flags.add_argument("--environment", type=Path, help="folder of its environment, kept (default: a temporary one)")
    flags.add_argument("--wheels", type=Path, help="install it from this folder instead of PyPI, beside this PyTorch")
    flags.add_argument("--algos", nargs="+", metavar="ALGO", help="(default: all that both have)")
    flags.add_argument("--executions", nargs="+", help="of ours (default: eager and compile, on a GPU graph)")
    flags.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="(default: 1 2)")
    flags.add_argument("--env_name", default="halfcheetah-medium-v2")
    flags.add_argument("--device", default="cpu")
    flags.add_argument("--rows", type=int, default=20_000, help="transitions in the random dataset")
    flags.add_argument("--seconds", type=float, default=2.0, help="of each side in a round (default: %(default)s)")
    flags.add_argument("--repeats", type=int, default=7, help="rounds (default: %(default)s)")
    flags.add_argument("--out", type=Path, default=Path("results/benchmarks"), help="(default: %(default)s)")
    flags.add_argument("--name", help="the machine, such as epyc2: write OUT/peers_NAME.md")
    flags.add_argument("--python", type=Path, help=argparse.SUPPRESS)  # one algorithm with this interpreter, as JSON
    return flags


def main(argv: list[str]) -> None:
    """Measure and print a table, and write it with --name."""
    options = parser().parse_args(argv)
    peer = PEERS[options.peer]
    if unknown := set(options.algos or ()) - set(peer.algos):
        raise UserError(f"{peer.name} and this project both have {', '.join(peer.algos)}, not {min(unknown)}")
    if options.python:
        print(json.dumps(measure(options.algos[0], options.python, options)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        rows = all_rows(peer, options.environment or Path(temporary) / peer.name, options)
    command = f"python -m benchmarks.peers --seconds {options.seconds:g} --repeats {options.repeats}"
    text = table(rows, command)
    if options.name:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"peers_{options.name}.md").write_text(text, encoding="utf-8")
    print(text, end="")
