"""What a run shows while it goes: a bar that a thread redraws every second, or where no terminal is, lines alone."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

EVERY = 1.0  # seconds between two drawings
_LEAST_BAR = 1  # columns of the bar itself; with fewer, what matters least is left out
_SYMBOLS = {"lambda": "λ"}  # where the terminal has such letters


@dataclass(frozen=True)
class Now:
    """How far a run is.

    evaluations: how many are still to come that the steps wait for, the one that is being played included. share: of
    its time steps that are played; None where none is being played. beside: whether the steps go on meanwhile.
    planned: rows for which numbers were made; None where none are being made.
    """

    step: int
    evaluations: int = 0
    share: float | None = None
    beside: bool = False
    planned: int | None = None

    @property
    def waits(self) -> bool:
        """Whether no steps are taken at this moment."""
        return self.planned is not None or (self.share is not None and not self.beside)


class Clock:
    """Steps per second of late, waiting left out, and the time left, evaluations counted in."""

    def __init__(self) -> None:
        self._marks: deque[tuple[float, int]] = deque(maxlen=30)  # seconds spent on steps, and how many
        self._before: tuple[float, Now] | None = None
        self._spent = self._evaluating = 0.0
        self._steps = 0
        self._per_evaluation: float | None = None

    def look(self, seconds: float, now: Now) -> None:
        """Take note of how far the run is at a time."""
        if self._before is not None:
            passed, before = seconds - self._before[0], self._before[1]
            if before.share is not None and not before.beside:
                self._evaluating += passed
                if now.share is None:
                    self._per_evaluation, self._evaluating = self._evaluating, 0.0
            if not before.waits and not now.waits:
                self._spent += passed
                self._steps += now.step - before.step
        self._before = seconds, now
        if not now.waits:
            self._marks.append((self._spent, self._steps))

    @property
    def rate(self) -> float | None:
        """Steps per second; None before there were any."""
        if len(self._marks) < 2:
            return None
        (start, first), (end, last) = self._marks[0], self._marks[-1]
        return (last - first) / (end - start) if last > first and end > start else None

    def left(self, now: Now, last: int) -> float | None:
        """Seconds to the end; None where nothing is known. Evaluations count once one has begun."""
        if self.rate is None:
            return None
        each = self._per_evaluation
        if each is None and now.share and not now.beside:
            each = self._evaluating / now.share
        evaluating = max(0.0, now.evaluations * each - self._evaluating) if each is not None else 0.0
        return (last - now.step) / self.rate + evaluating


class Bar:
    """Progress on a terminal; with `quiet`, or where stderr is none, nothing but the lines of `note`."""

    def __init__(self, quiet: bool) -> None:
        self._shown: dict[str, float] = {}
        self._doing, self._since = "", 0.0
        self._look: Callable[[], Now] | None = None
        self._first = self._last = 0
        self._clock = Clock()
        self._over = threading.Event()
        self._bar: tqdm[Any] | None = None
        if not quiet and sys.stderr is not None and sys.stderr.isatty():
            self._bar = tqdm(total=1, bar_format="{desc}", leave=False)
            self._thread = threading.Thread(target=self._redraw, name="progress", daemon=True)
            self._thread.start()

    def begin(self, first: int, last: int, look: Callable[[], Now]) -> None:
        """From now on show how far the run is between two steps."""
        self._first, self._last, self._look = first, last, look
        self.draw()

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Show this and how long it has taken."""
        self._doing, self._since = what, time.perf_counter()
        try:
            self.draw()
            yield
        finally:
            self._doing = ""

    def show(self, **numbers: float) -> None:
        """Show these numbers, the latest of each name, and none that is not finite."""
        self._shown |= numbers

    def note(self, line: str) -> None:
        """Print a line above the bar."""
        if self._bar is None:
            print(line, flush=True)
        else:
            tqdm.write(line)

    def draw(self) -> None:
        """Draw the bar as it is now, within the width of the terminal."""
        if self._bar is None:
            return
        columns = _columns() - 1
        self._bar.ncols = columns
        if self._look is None:
            self._bar.bar_format, text = "{desc}", self._now_doing() if self._doing else ""
        else:
            now = self._look()
            self._clock.look(time.perf_counter(), now)
            self._bar.bar_format = "{percentage:3.0f}%|{bar}| {desc}"
            self._bar.total, self._bar.n = self._last - self._first, now.step - self._first
            text = fitted(self._pieces(now), columns - len("100%|| ") - _LEAST_BAR)
        self._bar.set_description_str(text, refresh=False)
        self._bar.refresh()

    def close(self) -> None:
        """Take the bar away."""
        self._over.set()
        if self._bar is not None:
            self._thread.join()
            self._bar.close()

    def _pieces(self, now: Now) -> list[tuple[int, str]]:
        """What stands beside the bar, and how soon each is left out: the highest number first."""
        rate, left = self._clock.rate, self._clock.left(now, self._last)
        share = f"evaluating {now.share:.0%}" if now.share is not None else ""
        speed = f"{rate:.3g} steps/s" if rate is not None else ""
        if self._doing:
            speed = self._now_doing()
        elif now.planned is not None:
            speed = f"planning, {now.planned:,} rows"
        elif now.share is not None and not now.beside:
            speed, share = share, ""
        pieces = [(0, f"{now.step:,}/{self._last:,}"), (1, speed), (5, share)]
        symbols = _SYMBOLS if (sys.stderr.encoding or "").lower().startswith("utf") else {}
        pieces += [(3 if name == "score" else 4, f"{symbols.get(name, name)} {value:.3g}")
                   for name, value in self._shown.items() if math.isfinite(value)]  # fmt: skip
        return [*pieces, (2, f"{tqdm.format_interval(left)} left" if left is not None else "")]

    def _now_doing(self) -> str:
        return f"{self._doing} {time.perf_counter() - self._since:.0f} s"

    def _redraw(self) -> None:
        while not self._over.wait(EVERY):
            self.draw()


def fitted(pieces: list[tuple[int, str]], columns: int) -> str:
    """The pieces that are not empty, with commas between them; those of the highest numbers are left out until the rest
    fits."""
    kept = [piece for piece in pieces if piece[1]]
    while len(kept) > 1 and len(", ".join(text for _, text in kept)) > columns:
        kept.remove(max(kept))
    return ", ".join(text for _, text in kept)


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):
        return 80
