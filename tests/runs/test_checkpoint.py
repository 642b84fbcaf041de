"""State files: what is written comes back, a broken or hostile file is refused in one line."""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.errors import UserError
from utils.runs import checkpoint


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


# --- Two checkpoints a seed -------------------------------------------------------------------------------------------


class Counter:
    """The least that a run keeps: its step, and numbers that follow from it."""

    def __init__(self, step: int = 0, seeds: int = 3) -> None:
        self.step, self.seeds = step, seeds

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "flat": torch.full((self.seeds, 2), float(self.step))}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        assert torch.equal(saved["flat"], torch.full((self.seeds, 2), float(saved["step"])))
        self.step = saved["step"]


def seeds(base: Path, number: int = 3) -> list[Path]:
    folders = [base / f"seed_{k}" for k in range(number)]
    for folder in folders:
        folder.mkdir(exist_ok=True, parents=True)
    return folders


def save_at(folders: list[Path], step: int) -> None:
    checkpoint.save_run(folders, {"agent": Counter(step, len(folders))}, [{"metrics.csv": step}] * len(folders))


def continued(folders: list[Path]) -> int | None:
    """The step that a run goes on from; None where it begins."""
    states = checkpoint.load_newest_common(folders)
    if states is None:
        return None
    agent = Counter(seeds=len(folders))
    checkpoint.restore({"agent": agent}, states)
    assert all(state["logs"] == {"metrics.csv": agent.step} for state in states)
    return agent.step


def killed_at(number: int, function: Callable[[], None]) -> bool:
    """Run in a fork that is killed before its `number`-th write, flush, rename or deletion; whether that came."""
    if (pid := os.fork()) == 0:
        left = [number]

        def counted(plain: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return plain(*args, **kwargs)

            return call

        for name in ("fsync", "replace"):
            setattr(os, name, counted(getattr(os, name)))
        Path.unlink = counted(Path.unlink)  # type: ignore[method-assign]
        checkpoint._sealed = counted(checkpoint._sealed)
        function()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


@pytest.mark.slow
@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_kill_at_any_write_of_a_checkpoint_costs_no_more_than_it(tmp_path: Path, before: int) -> None:
    """Three seeds; `before` checkpoints were written. Then every seed goes on from one step, old or new."""
    kills, steps = 0, []
    while True:
        folders = seeds(tmp_path / str(kills))
        for step in range(10, 10 * before + 1, 10):
            save_at(folders, step)
        if not killed_at(kills + 1, lambda folders=folders: save_at(folders, 100)):  # type: ignore[misc]
            break
        steps.append(continued(folders))
        assert steps[-1] in (10 * before or None, 100)
        save_at(folders, 200)
        assert continued(folders) == 200
        assert {path.name for path in folders[0].iterdir()} <= {"checkpoint.pt", "checkpoint.previous.pt"}
        kills += 1
    assert kills >= 9 and steps == sorted(steps, key=lambda step: step or 0) and 100 in steps
    assert continued(folders) == 100


def test_a_kill_while_going_back_costs_nothing(tmp_path: Path) -> None:
    """Seed 1's newest is damaged, so all go back a step; a kill at any moment of that leaves the same to do."""
    kills = 0
    while True:
        folders = seeds(tmp_path / str(kills))
        for step in (10, 20):
            save_at(folders, step)
        damage(folders[1] / "checkpoint.pt")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            killed = killed_at(kills + 1, lambda folders=folders: checkpoint.load_newest_common(folders))  # type: ignore[misc]
            assert continued(folders) == 10
        if not killed:
            break
        kills += 1
    assert kills >= 6


def damage(path: Path, at: float = 0.5) -> None:
    """One other bit, at a share of the file's length."""
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1
    path.write_bytes(bytes(content))


def test_a_damaged_newest_one_costs_a_warning_and_the_steps_since(tmp_path: Path) -> None:
    folders = seeds(tmp_path)
    for step in (10, 20, 30):
        save_at(folders, step)
    assert continued(folders) == 30
    damage(folders[2] / "checkpoint.pt")
    with pytest.warns(
        UserWarning, match=r"seed_2/checkpoint.pt is damaged.*SHA-256.*; continuing from step 20"
    ) as seen:
        assert continued(folders) == 20
    assert len(seen) == 1 and "\n" not in str(seen[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert continued(folders) == 20  # settled: the others' newer ones are gone
    damage(folders[0] / "checkpoint.pt")
    with pytest.raises(UserError, match=r"no checkpoint to continue from in .*seed_0"):
        continued(folders)


def test_seeds_of_different_runs_are_not_mixed(tmp_path: Path) -> None:
    folders = seeds(tmp_path, 2)
    save_at(folders[:1], 10)
    with pytest.raises(UserError, match=r"no checkpoint to continue from in .*seed_1; resume the other seeds"):
        continued(folders)
    save_at(folders[1:], 20)
    with pytest.raises(UserError, match=r"seed_0 at 10, seed_1 at 20"):
        continued(folders)


def test_another_agents_checkpoint_is_one_line(tmp_path: Path) -> None:
    folders = seeds(tmp_path)
    save_at(folders, 10)
    states = checkpoint.load_newest_common(folders)
    for part in ("runner", "agent"):
        broken = Counter(seeds=2 if part == "agent" else 3)
        broken.load_state_dict = lambda saved: saved["nothing"]  # type: ignore[method-assign]
        with pytest.raises(UserError, match="does not fit this run") as caught:
            checkpoint.restore({part: broken}, states)
        assert "\n" not in str(caught.value)


def test_the_seal_is_the_archives_comment_and_pytorch_reads_on(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a.pt", state())
    assert equal(torch.load(tmp_path / "a.pt", weights_only=True), state())
    content = (tmp_path / "a.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert archive.testzip() is None
        assert archive.comment == b"sha256:" + hashlib.sha256(content[: -len(archive.comment)]).hexdigest().encode()
    torch.save(state(), tmp_path / "plain.pt")  # as earlier versions wrote them
    assert equal(checkpoint.load(tmp_path / "plain.pt"), state())


SEALED = checkpoint._sealed(state())


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(SEALED) - 1), st.integers(1, 255), st.booleans())
def test_no_damage_goes_unnoticed(place: int, change: int, cut: bool) -> None:
    """Any byte changed, or the file cut anywhere: an error of one line, or the content is what it was."""
    content = SEALED[:place] if cut else SEALED[:place] + bytes([SEALED[place] ^ change]) + SEALED[place + 1 :]
    path = Path(tempfile.gettempdir()) / f"damage-{os.getpid()}.pt"
    path.write_bytes(content)
    try:
        assert equal(checkpoint.load(path), state())
        assert place >= len(SEALED) - 71  # only the seal itself was hurt
    except UserError as error:
        assert "\n" not in str(error)
    finally:
        path.unlink()
