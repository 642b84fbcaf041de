"""A process and the world around it: signals that end it with its work saved, and output that nobody takes any more."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, TextIO

INTERRUPTED = 128 + signal.SIGINT  # the exit code after Ctrl-C


class Abandoned(Exception):
    """Something long was left before its end, since the process is to stop."""


def never() -> bool:
    """For what is never to stop."""
    return False


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to end before there was anything to save. `code`: the exit code."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.code = 128 + number


class Stop:
    """While entered, a call says whether the process is to end: after a signal, or when its time is over.

    Signals are Ctrl-C, a cluster's SIGTERM, and SIGHUP of a terminal that is closed (unless nohup turned it off). The
    first is kept in `signal`, and answered on stderr at once; before there is something to save, `answer`, it raises
    Interrupted. A second one ends the process as a kill does. minutes: of the process' time, from now on.
    """

    def __init__(self, minutes: float | None = None) -> None:
        self.signal = 0
        self.answer: Callable[[], str] | None = None
        self._deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        return bool(self.signal) or time.monotonic() >= self._deadline

    def __enter__(self) -> Stop:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._take) for number in numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            _say("ended at once")
            os._exit(128 + number)  # nothing else: any file that is being written stays as a kill would leave it
        self.signal = number
        if self.answer is None:
            raise Interrupted(number)
        _say(self.answer())


def _say(line: str) -> None:
    """A line on stderr, below a progress bar, from within a signal's handler: Python's own streams may be in use."""
    with contextlib.suppress(OSError):
        os.write(2, f"{chr(10) if os.isatty(2) else ''}run.py: {line}\n".encode())


class _Lasting:
    """A text stream that, once it cannot be written to, takes everything and leaves it nowhere."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name = stream, name

    def write(self, text: str) -> int:
        try:
            written = self._stream.write(text)
            if "\n" in text:
                self._stream.flush()  # an error now, not at a moment at which nobody waits for it
            return written
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        if self._name == "stdout":
            print(f"warning: stdout cannot be written to ({error.strerror}); going on without", file=sys.stderr)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_output() -> Iterator[None]:
    """A reader of stdout or stderr that has gone, or a disk that is full, ends nothing: what is printed is lost."""
    before: tuple[Any, Any] = sys.stdout, sys.stderr
    if any(stream is None or isinstance(stream, _Lasting) for stream in before):  # closed from the start, or done
        yield
        return
    sys.stdout, sys.stderr = _Lasting(before[0], "stdout"), _Lasting(before[1], "stderr")
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
