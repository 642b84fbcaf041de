"""Many runs: on Ray, or in processes of this machine where Ray is not installed or not asked for.

The function that runs one command line comes in as an argument; this file knows nothing of what it trains. What it
needs of it: an exit code of 0 when done, 2 when only the user can fix it; that the same command line continues what
an earlier one left; that SIGINT or SIGTERM make it save and return. `run.py` does all three.

On a cluster all machines see the checkout and the results folder at the same path.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from utils.errors import UserError
from utils.files import first_line
from utils.process import lasting_output

Function = Callable[[Sequence[str]], int]  # a command line -> its exit code
USER_ERROR = 2
POLL_S = 0.2
SHOWN = 25  # rows of the live table


@dataclass(frozen=True)
class Job:
    """One call of the function. `log` receives what it prints; folders up to it are made."""

    name: str
    command: tuple[str, ...]
    log: Path


@dataclass(frozen=True)
class Resources:
    """What one job takes, and how many run at once on this machine (0: as many as fit with `--ray local`, else one)."""

    cpus: float = 1.0
    gpus: float = 0.0
    workers: int = 0


@dataclass
class Outcome:
    """state: waiting, running, done (also by an earlier sweep), failed or stopped; code: the last exit code, None
    where the worker died without one."""

    state: str = "waiting"
    attempts: int = 0
    code: int | None = None
    started: float = 0.0
    seconds: float = 0.0


class Executor(Protocol):
    """Where jobs run."""

    slots: int  # jobs handed over at a time

    def start(self, job: Job, attempt: int) -> None: ...
    def finished(self) -> list[tuple[Job, int | None]]: ...  # with the exit code, None for a dead worker
    def is_running(self, job: Job) -> bool: ...
    def stop(self) -> None: ...  # ask every job to save and return
    def close(self) -> None: ...


def ray_is_installed() -> bool:
    """Whether `import ray` would work."""
    from importlib.util import find_spec

    return find_spec("ray") is not None


def available(ray: str | None) -> str | None:
    """`ray` where it is installed; else None, and a line on stderr that says so."""
    if ray is None or ray_is_installed():
        return ray
    print("ray is not installed (pip install ray): running without it", file=sys.stderr)
    return None


def run_jobs(
    jobs: Sequence[Job],
    function: Function,
    progress: Callable[[Job], float],
    ray: str | None = None,
    resources: Resources | None = None,
    retries: int = 2,
) -> dict[str, Outcome]:
    """Run what is not complete; return an outcome a job.

    progress: share of a job that its files show as done, in [0, 1]; 1 is complete, and skipped. ray: None for
    processes of this machine without Ray, "local", or the address of a cluster. A job whose worker died, or that
    failed by anything but the user's doing, is started again up to `retries` times and continues from its checkpoint.
    Ctrl-C or SIGTERM ask the running jobs to save, and return what is done so far, the rest as "stopped". Raises
    UserError where two jobs have one name, or Ray cannot be reached.
    """
    if len({job.name for job in jobs}) < len(jobs):
        raise UserError("two jobs of a sweep have the same name")
    resources = resources or Resources()
    outcomes = {job.name: Outcome("done" if progress(job) >= 1 else "waiting") for job in jobs}
    open_jobs = [job for job in jobs if outcomes[job.name].state == "waiting"]
    if not open_jobs:
        return outcomes
    ray = available(ray)
    if ray is None:
        executor: Executor = Processes(function, max(1, resources.workers))
    else:
        executor = OnRay(function, ray, resources)
    sweep = _Sweep(open_jobs, outcomes, executor, progress, retries)
    try:
        with _interruptible():
            sweep.loop()
    finally:
        executor.close()
    return outcomes


# --- The loop -------------------------------------------------------------------------------------------


class _Sweep:
    """Hands jobs to the executor, starts the dead again, and shows how it goes."""

    def __init__(
        self,
        jobs: Sequence[Job],
        outcomes: dict[str, Outcome],
        executor: Executor,
        progress: Callable[[Job], float],
        retries: int,
    ) -> None:
        self.jobs, self.outcomes, self.executor = list(jobs), outcomes, executor
        self.progress, self.retries = progress, retries
        self.waiting, self.handed = list(jobs), set[str]()
        self.stopping = False
        self.console = Console(stderr=True)

    def loop(self) -> None:
        """Until every job has ended, or Ctrl-C has ended those that ran."""
        live = Live(console=self.console, refresh_per_second=2, get_renderable=self.table)
        with live if self.console.is_terminal else nullcontext():
            while self.handed or (self.waiting and not self.stopping):
                try:
                    self.step()
                    time.sleep(POLL_S)
                except KeyboardInterrupt:
                    self.interrupt()
        for job in self.waiting:
            self.outcomes[job.name].state = "stopped"

    def step(self) -> None:
        """One look at the executor."""
        while self.waiting and not self.stopping and len(self.handed) < self.executor.slots:
            job = self.waiting.pop(0)
            outcome = self.outcomes[job.name]
            outcome.attempts += 1
            self.handed.add(job.name)
            self.executor.start(job, outcome.attempts)
        for job in self.jobs:
            outcome = self.outcomes[job.name]
            if outcome.state == "waiting" and job.name in self.handed and self.executor.is_running(job):
                outcome.state, outcome.started = "running", time.monotonic()
                self.say(f"running   {job.name}" + (f" (attempt {outcome.attempts})" if outcome.attempts > 1 else ""))
        for job, code in self.executor.finished():
            self.handed.discard(job.name)
            self.end(job, code)

    def end(self, job: Job, code: int | None) -> None:
        """Decide what becomes of a job whose function has returned or whose worker is gone."""
        outcome = self.outcomes[job.name]
        outcome.code = code
        if outcome.started:
            outcome.seconds += time.monotonic() - outcome.started
            outcome.started = 0.0
        what = "its worker died" if code is None else f"exit code {code}"
        if code == 0:
            outcome.state = "done"
            self.say(f"done      {job.name} ({outcome.seconds:.0f} s)")
        elif self.stopping:
            outcome.state = "stopped"
            self.say(f"stopped   {job.name}")
        elif code == USER_ERROR or outcome.attempts > self.retries:
            outcome.state = "failed"
            self.say(f"failed    {job.name}: {what}, see {job.log}")
        else:
            outcome.state = "waiting"
            self.waiting.insert(0, job)
            self.say(f"again     {job.name}: {what}")

    def interrupt(self) -> None:
        """First Ctrl-C: ask for a checkpoint. Second: leave at once."""
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True
        self.say("stopping: every run saves and ends; the same command continues (Ctrl-C again: at once)")
        self.executor.stop()

    def say(self, line: str) -> None:
        """A line an event; above the table on a terminal."""
        self.console.print(line, highlight=False, soft_wrap=True)

    def table(self) -> Group:
        """Counts, then what runs and what failed."""
        states = [outcome.state for outcome in self.outcomes.values()]
        counts = ", ".join(f"{states.count(s)} {s}" for s in ("running", "waiting", "done", "failed", "stopped"))
        table = Table("run", "state", "progress", "attempt", "minutes", box=None)
        order = {"running": 0, "failed": 1, "waiting": 2, "stopped": 3, "done": 4}
        for job in sorted(self.jobs, key=lambda job: order[self.outcomes[job.name].state])[:SHOWN]:
            outcome = self.outcomes[job.name]
            elapsed = outcome.seconds + (time.monotonic() - outcome.started if outcome.started else 0)
            share = self.progress(job) if outcome.state == "running" else float(outcome.state == "done")
            table.add_row(job.name, outcome.state, f"{100 * share:.0f} %", str(outcome.attempts), f"{elapsed / 60:.1f}")
        return Group(counts, table)


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM, which clusters send, as Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# --- In the worker --------------------------------------------------------------------------------------


def call(function: Function, job: Job, attempt: int) -> int:
    """Run the function with its output in the job's log. An exception is a traceback there and exit code 1."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "a") as file, _output_to(file.fileno()), lasting_output():
        print(
            f"--- attempt {attempt} on {socket.gethostname()}, pid {os.getpid()}: {' '.join(job.command)}", flush=True
        )
        _mark(job).write_text(str(attempt))
        try:
            code = int(function(job.command) or 0)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except Exception:
            traceback.print_exc()
            code = 1
        print(f"--- exit code {code}", flush=True)
    return code


def _mark(job: Job) -> Path:
    """File in which a worker says which attempt it has begun."""
    return job.log.with_suffix(".attempt")


@contextmanager
def _output_to(descriptor: int) -> Iterator[None]:
    """Send stdout and stderr there, also what native code writes."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, old in zip((1, 2), kept, strict=True):
            os.dup2(old, number)
            os.close(old)


# --- On this machine ------------------------------------------------------------------------------------


class Processes:
    """A process of its own for every job, so that one that crashes takes nothing with it; `slots` of them at once."""

    def __init__(self, function: Function, slots: int = 1) -> None:
        self.function, self.slots = function, slots
        self.context = multiprocessing.get_context("spawn")
        self.running: list[tuple[Job, Any]] = []

    def start(self, job: Job, attempt: int) -> None:
        process = self.context.Process(target=_child, args=(self.function, job, attempt))
        process.start()
        self.running.append((job, process))

    def finished(self) -> list[tuple[Job, int | None]]:
        ended = [(job, process) for job, process in self.running if not process.is_alive()]
        self.running = [one for one in self.running if one not in ended]
        return [(job, process.exitcode if process.exitcode >= 0 else None) for job, process in ended]

    def is_running(self, job: Job) -> bool:
        return any(job is one for one, _ in self.running)

    def stop(self) -> None:
        for _, process in self.running:
            process.terminate()

    def close(self) -> None:
        """Ends what a second Ctrl-C has left."""
        self.stop()
        for _, process in self.running:
            process.join()


def _child(function: Function, job: Job, attempt: int) -> None:
    # Its own session: Ctrl-C reaches the sweep alone, which then asks once, with SIGTERM.
    os.setsid()
    parent = multiprocessing.parent_process()
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    sys.exit(call(function, job, attempt))


def _follow(parent: Any) -> None:
    """If the sweep is gone, save and end: two processes must never write one folder."""
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


# --- On Ray ---------------------------------------------------------------------------------------------


class OnRay:
    """A Ray task for every job, each in a worker process that ends with it, so that a GPU's memory is given back."""

    def __init__(self, function: Function, address: str, resources: Resources) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Without this a job that asks for no GPU would still see all of them.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
        import ray

        _check_address(address)
        self.ray, self.owned = ray, not ray.is_initialized()
        self.slots = sys.maxsize  # Ray keeps the queue
        root = str(Path(__file__).resolve().parents[1])
        environment = {"env_vars": {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}}
        local = {"num_cpus": resources.workers * resources.cpus} if resources.workers else {}
        try:
            ray.init(address=None if address == "local" else address, runtime_env=environment, log_to_driver=False,
                     ignore_reinit_error=True, **({"include_dashboard": False, **local} if address == "local" else {}),
                     )  # fmt: skip
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(
                f"cannot use Ray at {address!r}: {first_line(error)}; use --ray local or a running cluster"
            ) from error
        self._check(resources)
        task = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_calls=1, max_retries=0)
        self.task = task(_remote_call)
        self.function, self.root = function, root
        self.jobs: dict[Any, Job] = {}

    def _check(self, resources: Resources) -> None:
        """Raises UserError where no job would ever fit."""
        there = self.ray.cluster_resources()
        for name, wanted in (("CPU", resources.cpus), ("GPU", resources.gpus)):
            if wanted > there.get(name, 0):
                self.close()
                raise UserError(f"a run wants {wanted:g} {name}, the Ray cluster has {there.get(name, 0):g}")

    def start(self, job: Job, attempt: int) -> None:
        _mark(job).unlink(missing_ok=True)
        self.jobs[self.task.remote(self.function, job, attempt, self.root)] = job

    def finished(self) -> list[tuple[Job, int | None]]:
        ready, _ = self.ray.wait(list(self.jobs), num_returns=len(self.jobs), timeout=0) if self.jobs else ([], [])
        ended = []
        for reference in ready:
            job = self.jobs.pop(reference)
            try:
                ended.append((job, self.ray.get(reference)))
            except self.ray.exceptions.RayError:  # killed, out of memory, its machine lost, or cancelled
                ended.append((job, None))
        return ended

    def is_running(self, job: Job) -> bool:
        return _mark(job).exists()

    def stop(self) -> None:
        """A cancelled task that waits never starts; one that runs gets Python's SIGINT, and saves."""
        for reference in self.jobs:
            self.ray.cancel(reference, force=False)

    def close(self) -> None:
        if self.owned:
            self.ray.shutdown()


def _check_address(address: str) -> None:
    """Raises UserError where nothing listens: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"no Ray cluster answers at {address} ({error}); use --ray local or a running one") from error


def _remote_call(function: Function, job: Job, attempt: int, root: str) -> int:
    os.chdir(root)
    return call(function, job, attempt)
