"""A file is written whole or not at all."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest

from utils.files import atomic_write, first_line, print_any_text


def test_bytes_and_text_are_written_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content, written in ((b"\x00\xff", b"\x00\xff"), ("λ = 1", "λ = 1".encode()), ("\udcff", b"\\udcff")):
        atomic_write(path, content)
        assert path.read_bytes() == written and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_refusing_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, name, full)
    with pytest.raises(OSError, match="No space left"):
        atomic_write(path, b"after")
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["file"]


def test_a_link_where_the_temporary_file_goes_is_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"mine")
    (tmp_path / f".file.{os.getpid()}.part").symlink_to(other)
    atomic_write(tmp_path / "file", b"content")
    assert other.read_bytes() == b"mine" and (tmp_path / "file").read_bytes() == b"content"


def test_the_first_line_of_an_error() -> None:
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError"


def test_any_text_can_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(shown, encoding="ascii"))
    print_any_text()
    print("λ in /d\udcff", flush=True)
    assert shown.getvalue() == b"\\u03bb in /d\\udcff\n"
