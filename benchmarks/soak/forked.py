"""Runs in processes of their own that begin at once: forks of a server in which everything is imported already.

Used to kill runs by the hundred, by `benchmarks.soak` and by the tests.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess

# Imported before the forks.
_WARM = (
    "run",
    "torch._dynamo",
    "mujoco",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "utils.environments.lockstep",
    "utils.behaviour.collect",
)


def start(argv: Sequence[str], prepare: Callable[[], None] | None = None) -> BaseProcess:
    """Begin `run.py` with these arguments; what it prints goes nowhere. `prepare` is called there before."""
    process = _context().Process(target=_main, args=(list(argv), prepare), daemon=True)
    process.start()
    return process


def finish(argv: Sequence[str], prepare: Callable[[], None] | None = None, timeout: float = 300.0) -> tuple[int, float]:
    """Exit code, negative for a signal, and the seconds that it took. Raises TimeoutError."""
    began = time.monotonic()
    process = start(argv, prepare)
    return _join(process, timeout), time.monotonic() - began


def kill_at(argv: Sequence[str], seconds: float) -> int:
    """SIGKILL after so many seconds; the exit code: -9, or its own where it was faster."""
    process = start(argv)
    process.join(seconds)
    process.kill()
    return _join(process, 60.0)


def _join(process: BaseProcess, timeout: float) -> int:
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"a run did not end within {timeout} seconds")
    code = process.exitcode
    process.close()
    return code


def _context() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_WARM))
    return context


def _main(argv: list[str], prepare: Callable[[], None] | None) -> None:
    import run

    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    if prepare is not None:
        prepare()
    sys.exit(run.main(argv))
