"""State files: what is written comes back, a broken or hostile file is refused in one line."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from utils import checkpoint
from utils.errors import UserError


def state() -> dict[str, Any]:
    return {"agent": {"flat": torch.arange(6.0).view(3, 2), "step": 5, "name": "x"}, "acting": torch.ones(3, 4).byte()}


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return a == b


def test_split_and_join_are_inverse() -> None:
    parts = checkpoint.split(state(), 3)
    assert [p["agent"]["flat"].tolist() for p in parts] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert equal(checkpoint.join(parts), state())
    parts[1]["agent"]["step"] = 6
    with pytest.raises(UserError, match="not from the same step"):
        checkpoint.join(parts)


def test_what_is_saved_comes_back_and_nothing_else_is_left(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "checkpoint.pt", state())
    assert equal(checkpoint.load(tmp_path / "checkpoint.pt"), state())
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, state())

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        checkpoint.save(path, {"agent": {}, "other": 1})
    assert equal(checkpoint.load(path), state()) and os.listdir(tmp_path) == ["checkpoint.pt"]


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("hacked",))


def test_bad_files_are_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    good = tmp_path / "good.pt"
    checkpoint.save(good, state())
    content = good.read_bytes()
    cases = {
        "empty": b"",
        "text": b"hello",
        "cut": content[: len(content) // 2],
        "pickle": pickle.dumps({"agent": Hostile()}),
        "folder": None,
    }
    for name, data in cases.items():
        path = tmp_path / name
        if data is None:
            path.mkdir()
        else:
            path.write_bytes(data)
        with pytest.raises(UserError) as caught:
            checkpoint.load(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="damaged or none at all"):
        checkpoint.load(tmp_path / "cut")
    torch.save({"weights": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="not a checkpoint"):
        checkpoint.load(tmp_path / "other.pt")
    assert not (tmp_path / "hacked").exists()
