"""One process per run: a lock file beside each seed's folder, which the kernel frees however its process ends."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import warnings
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from utils.errors import UserError

# A file system without locks, such as some network's.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class RunLock:
    """Holds `.<folder's name>.lock` beside each folder until `close`.

    The file stays and names the last owner's process and machine; what counts is the kernel's lock on it, so a file
    that a killed process left never stands in the way. Raises UserError, naming the owner, where another has it.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self._held = contextlib.ExitStack()
        with contextlib.ExitStack() as held:
            for folder in folders:
                _lock(folder, held)
            self._held = held.pop_all()

    def close(self) -> None:
        """Free the folders."""
        self._held.close()


def lock_of(folder: Path) -> Path:
    """A folder's lock file."""
    return folder.parent / f".{folder.name}.lock"


def _lock(folder: Path, held: contextlib.ExitStack) -> None:
    """Take one folder's lock, which `held` frees."""
    path = lock_of(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            raise UserError(f"{path} is a symbolic link, not a lock; delete it")
        owner = _owner(path)  # before, since older versions of filelock empty the file that they try
        lock = FileLock(path, timeout=0)
        held.enter_context(lock)
    except Timeout as error:
        raise UserError(f"{folder} is in use by {owner}; wait for it, or use another --dir") from error
    except (OSError, NotImplementedError) as error:
        if not isinstance(error, NotImplementedError) and error.errno not in NO_LOCKS:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        warnings.warn(f"{path}: the file system has no locks; nothing keeps another process from the same folder",
                      stacklevel=4)  # fmt: skip
        return
    if not isinstance(lock, SoftFileLock):  # a soft one, where the kernel has none, keeps its own record in the file
        with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
            _sign(path)


def _owner(path: Path) -> str:
    """Whom the lock file names."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")[:200] or "another process"
    except OSError:
        return "another process"


def _sign(path: Path) -> None:
    file = os.open(path, os.O_WRONLY | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0))
    try:
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
    finally:
        os.close(file)
