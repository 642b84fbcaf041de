"""How many threads of a CPU a run takes: as many as are fastest for its products, which are small.

PyTorch takes every core. Products of 256 x 256 gain little from a second one and lose much by waiting for one that is
busy with something else, so a few steps are timed with 1, 2, 4 ... threads before training.
"""

from __future__ import annotations

import math
import os
import statistics
import time
import warnings
from collections.abc import Callable

import torch

from utils.errors import UserError
from utils.training.interfaces import Batches, Learner

_SECONDS = 2.0  # for all timing; what is then under way may take some tenths more
_ROWS = 16  # of the first batch; twice as many while there is time, up to a whole one
_ROUNDS = 15
_AS_FAST = 1.05  # fewer threads are taken where they need no more than so many times the least time
_HOPELESS = 2.0  # not timed again where a round took so many times the least time


def candidates() -> list[int]:
    """1, 2, 4 ... up to the cores that this process may use, or to $OMP_NUM_THREADS where that is less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    most = min(cores, int(allowed)) if allowed.isdecimal() and int(allowed) else cores
    return [2**k for k in range(most.bit_length())]


def choose(
    wanted: int | str,
    kept: int | None,
    device: torch.device,
    make: Callable[[], Learner],
    table: Batches,
    batch_size: int,
    last_step: int,
) -> tuple[int, str]:
    """Set this process' number of threads; the number and, in a few words, why.

    wanted: a number, or `auto`. kept: that of a run which goes on, which stays, since sums are rounded in an order that
    depends on it. Else, on a CPU, the fastest for steps before `last_step` of a copy of the agent, `make()`.
    """
    if wanted != "auto":
        number, why = int(wanted), "as asked"
        if kept not in (None, number):
            warnings.warn(f"the run began with --threads {kept}: with {number} sums are rounded in another order",
                          stacklevel=2)  # fmt: skip
    elif kept is not None:
        number, why = kept, "as it began"
    elif device.type != "cpu":
        number, why = torch.get_num_threads(), "PyTorch's choice"
    else:
        number, why = _fastest(make, table, batch_size, last_step)
    torch.set_num_threads(number)
    return number, why


def _fastest(make: Callable[[], Learner], table: Batches, batch_size: int, last_step: int) -> tuple[int, str]:
    numbers = candidates()
    if len(numbers) == 1:
        return 1, "one core"
    until = time.perf_counter() + _SECONDS
    agent = make()
    try:
        agent.observe(table)
    except ValueError as error:
        raise UserError(str(error)) from error
    step = max(last_step // agent.period - 1, 0) * agent.period  # of the phase in which a run spends most of its time
    turn, rows = _SECONDS / (4 * len(numbers)), min(batch_size, _ROWS)  # each number is to have three turns
    taken = min(_seconds(agent, table, rows, range(step, step + 1), 1) for _ in range(2))  # the first sets things up
    while rows < batch_size and 2 * taken <= turn:
        rows = min(2 * rows, batch_size)
        taken = _seconds(agent, table, rows, range(step, step + 1), 1)
    steps = range(step, step + max(1, min(agent.period, int(turn / taken))))
    times: dict[int, list[float]] = {number: [] for number in numbers}
    for _ in range(_ROUNDS):
        for number in list(times):
            if times[number] and time.perf_counter() + times[number][-1] > until:
                return _best(times)
            most = _HOPELESS * min((min(taken) for taken in times.values() if taken), default=math.inf)
            times[number].append(_seconds(agent, table, rows, steps, number, most))
        least = min(map(statistics.median, times.values()))
        times = {number: taken for number, taken in times.items() if statistics.median(taken) < _HOPELESS * least}
    return _best(times)


def _best(times: dict[int, list[float]]) -> tuple[int, str]:
    medians = {number: statistics.median(taken) for number, taken in times.items()}
    least = min(medians.values())
    number = min(number for number, taken in medians.items() if taken <= _AS_FAST * least)
    return number, f"the fastest of {', '.join(map(str, candidates()))}"


def _seconds(agent: Learner, table: Batches, rows: int, steps: range, threads: int, most: float = math.inf) -> float:
    """The time of these steps on `rows` transitions a seed, or where it is more than `most`, of the first of them.

    Draws from generators of its own, the same every time.
    """
    torch.set_num_threads(threads)
    rng = [torch.Generator(device=table.device).manual_seed(0) for _ in range(agent.num_seeds)]
    indices, draws = table.draw_indices(rng, rows, len(steps)), agent.draw(rng, rows, len(steps))
    planned = {n: torch.zeros(agent.num_seeds, rows, width, device=table.device) for n, width in agent.planned.items()}
    agent.step = steps.start
    start, taken = time.perf_counter(), 0.0
    for k in range(len(steps)):
        agent.update(table.gather(indices[k]) | planned, {name: value[k] for name, value in draws.items()})
        taken = time.perf_counter() - start
        if taken > most:  # two threads and a busy core: seconds a step
            break
    return taken
