"""A process and the world around it: signals that end it with its work saved, and output that nobody takes any more."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, TextIO

INTERRUPTED = 128 + signal.SIGINT  # the exit code after Ctrl-C


class Stop:
    """While entered, the first signal that asks the process to end is kept in `signal` for a loop to see.

    These are Ctrl-C, a cluster's SIGTERM, and SIGHUP of a terminal that is closed (unless nohup turned it off). A
    second one ends the process at once.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

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
            raise SystemExit(128 + number)
        self.signal = number


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
