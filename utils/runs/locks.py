"""One process a run: a lock file beside each seed's folder, which the kernel frees however its process ends."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from utils.errors import UserError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

__all__ = ["RunLock"]


class RunLock:
    """Holds `.<folder's name>.lock` beside each folder until `close`.

    The file stays and names the last owner's process and machine; what counts is the kernel's lock on it, so a file
    that a killed process left never stands in the way. Raises UserError, naming the owner, where another has it.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self._files: list[int] = []
        try:
            for folder in folders:
                self._files.append(_locked(folder))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Free the folders."""
        for file in self._files:
            os.close(file)
        self._files = []


def _locked(folder: Path) -> int:
    """The descriptor of the lock file, which is locked until that is closed."""
    path = folder.parent / f".{folder.name}.lock"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    except BlockingIOError as error:
        owner = os.pread(file, 200, 0).decode(errors="replace") or "another process"
        os.close(file)
        raise UserError(f"{folder} is in use by {owner}; wait for it, or use another --dir") from error
    except OSError as error:  # a full disk, or a network's file system without locks
        warnings.warn(f"{path}: {error.strerror}; nothing keeps another process from the same folder", stacklevel=3)
    return file
