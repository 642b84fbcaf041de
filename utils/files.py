"""Files written whole or not at all, text shown wherever it goes, an error's first line: what every room needs."""

from __future__ import annotations

import contextlib
import glob
import os
import sys
import time
from pathlib import Path

STALE_S = 60.0
"""How long a temporary file must lie untouched before it may be a killed process's."""


def atomic_write(path: Path, content: bytes | memoryview | str) -> None:
    """Write a file that a reader sees as it was or whole, whatever moment a kill or a full disk comes at.

    Text is written as UTF-8. On failure no temporary file is left. Raises OSError where the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    write_to_disk(temporary, content)
    try:
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_stale_parts(path: Path) -> None:
    """Delete what killed processes left of their `atomic_write` of `path`: of no process here, untouched for a while.

    (Another machine that shares the folder may be writing: its process is not seen here, but its file is touched.)
    """
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        pid = part.suffixes[-2][1:]
        with contextlib.suppress(OSError):
            if pid.isdigit() and time.time() - part.stat().st_mtime > STALE_S and not _is_alive(int(pid)):
                part.unlink()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def write_to_disk(path: Path, content: bytes | memoryview | str) -> None:
    """Write a new file, never through a link that stands there, and return when it is on the disk.

    On failure the file is gone. Raises OSError.
    """
    # A path that is no UTF-8 has letters that cannot be written as such.
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    try:
        path.unlink(missing_ok=True)
        with open(path, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def print_any_text() -> None:
    """Let stdout and stderr show what their encoding cannot: a path that is no UTF-8, a λ where the locale is ASCII."""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):  # a test's or a notebook's stream has none
            reconfigure(errors="backslashreplace")


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
