"""A program at a pseudo-terminal: what a person would be sent."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def start(code: str, *arguments: str, columns: int = 80) -> tuple[subprocess.Popen[bytes], int]:
    """Starts a Python program on a terminal so wide; returns it and the descriptor of our end, to be closed."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-c", code, *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    return process, ours


def pieces(terminal: int, patience: float = 120) -> Iterator[bytes]:
    """What the terminal is sent, as it comes, until the program ends or says nothing for so many seconds."""
    while select.select([terminal], [], [], patience)[0]:
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # Linux' end of file
            return
        if not piece:
            return
        yield piece
