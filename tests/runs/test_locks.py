"""The run's lock: what a second process, a link and a file system without locks meet."""

from __future__ import annotations

import errno
import os
import warnings
from pathlib import Path
from typing import Any

import pytest

from utils.errors import UserError
from utils.runs.locks import RunLock


def test_a_link_is_neither_followed_nor_overwritten(tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("a text of mine")
    (tmp_path / ".seed_0.lock").symlink_to(mine)
    (tmp_path / ".seed_1.lock").symlink_to(tmp_path / "not there")
    for seed in (0, 1):
        with pytest.raises(UserError, match=rf"\.seed_{seed}\.lock is a symbolic link"):
            RunLock([tmp_path / f"seed_{seed}"])
    assert mine.read_text() == "a text of mine" and not (tmp_path / "not there").exists()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    import fcntl

    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match=r"\.seed_0\.lock: the file system has no locks"):
        RunLock([tmp_path / "seed_0"]).close()


def test_a_refused_process_leaves_the_owners_name(tmp_path: Path) -> None:
    held = RunLock([tmp_path / "seed_0"])
    for _ in range(3):
        with pytest.raises(UserError, match=f"is in use by process {os.getpid()} on "):
            RunLock([tmp_path / "seed_0"])
    held.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RunLock([tmp_path / "seed_0"]).close()


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*seed_0\.lock: ") as caught:
        RunLock([tmp_path / "file" / "below" / "seed_0"])
    assert "\n" not in str(caught.value)
