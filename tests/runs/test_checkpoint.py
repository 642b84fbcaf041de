"""State files: what is written comes back, a broken or hostile file is refused in one line."""

from __future__ import annotations

import hashlib
import os
import pickle
import random
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

import run
from benchmarks.soak.soak import tiny
from tests.small import d4rl_file
from utils.errors import UserError
from utils.runs import checkpoint
from utils.runs.checkpoint import Owner


def state() -> dict[str, Any]:
    return {"agent": {"flat": torch.arange(6.0).view(3, 2), "step": 5, "name": "x"}, "acting": torch.ones(3, 4).byte()}


def owned(seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A state as `save_run` writes it."""
    owner = {"algo": "bc", "env_name": "hopper-medium-v2", "seed": seed}
    return {**state(), "format": checkpoint.FORMAT, "owner": owner, "logs": {}, **changes}


def owners(folders: list[Path]) -> list[Owner]:
    return [Owner("bc", "hopper-medium-v2", int(folder.name.removeprefix("seed_"))) for folder in folders]


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


def test_a_step_that_was_saved_before_and_after_its_metrics_is_two_moments(tmp_path: Path) -> None:
    """After a signal at an epoch's end: a seed that a kill left at the first takes the others back to it."""
    folders = [tmp_path / "seed_0", tmp_path / "seed_1"]
    for folder, unread in ((folders[0], 4), (folders[0], 0), (folders[1], 4)):
        folder.mkdir(exist_ok=True)
        if (folder / checkpoint.CURRENT).exists():
            os.replace(folder / checkpoint.CURRENT, folder / checkpoint.PREVIOUS)
        content = owned(int(folder.name[-1]), runner={"unread": unread})
        checkpoint.save(folder / checkpoint.CURRENT, content)
    before, after = (5, 1), (5, 5)
    assert [checkpoint.saved_moments(folder) for folder in folders] == [{before, after}, {before}]
    states = checkpoint.load_newest_common(folders, owners(folders))
    assert states is not None and [state["runner"]["unread"] for state in states] == [4, 4]


def test_what_is_saved_comes_back_and_nothing_else_is_left(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "checkpoint.pt", owned())
    assert equal(checkpoint.load(tmp_path / "checkpoint.pt"), owned())
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, owned())

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        checkpoint.save(path, {"agent": {}, "other": 1})
    assert equal(checkpoint.load(path), owned()) and os.listdir(tmp_path) == ["checkpoint.pt"]


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


# --- Two checkpoints per seed -----------------------------------------------------------------------------------------


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
    checkpoint.save_run(
        folders, {"agent": Counter(step, len(folders))}, [{"metrics.csv": step}] * len(folders), owners(folders)
    )


def continued(folders: list[Path]) -> int | None:
    """The step that a run goes on from; None where it begins."""
    states = checkpoint.load_newest_common(folders, owners(folders))
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
            killed = killed_at(kills + 1, lambda folders=folders: continued(folders))  # type: ignore[misc]
            assert continued(folders) == 10
        if not killed:
            break
        kills += 1
    assert kills >= 6


def test_a_damaged_one_never_takes_the_place_of_a_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill came before step 30's files took their names, and seed 1's of step 20 is damaged.

    Step 30's are taken, and every seed keeps step 10's: had the damaged one moved there, the next damage would be the
    end. A kill at any moment of it changes nothing.
    """
    kills = 0
    while True:
        folders = seeds(tmp_path / str(kills))
        for step in (10, 20):
            save_at(folders, step)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "_rotate", lambda folder: None)
            save_at(folders, 30)
        damage(folders[1] / "checkpoint.pt")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            killed = killed_at(kills + 1, lambda folders=folders: continued(folders))  # type: ignore[misc]
            assert continued(folders) == 30
            damage(folders[kills % 3] / "checkpoint.pt")
            assert continued(folders) == 10
        if not killed:
            break
        kills += 1
    assert kills >= 3


def damage(path: Path) -> None:
    """One other bit."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
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


def test_a_seed_that_is_set_back_is_said(tmp_path: Path) -> None:
    """Seeds 0 and 2 were trained on without seed 1; all have step 10."""
    folders = seeds(tmp_path)
    save_at(folders, 10)
    save_at([folders[0]], 20)
    save_at([folders[2]], 30)
    with pytest.warns(UserWarning) as seen:
        assert continued(folders) == 10
    assert [str(warning.message) for warning in seen] == [
        "seed_0 goes back from step 20; seed_2 goes back from step 30; continuing from step 10"
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert continued(folders) == 10


def test_another_agents_checkpoint_is_one_line(tmp_path: Path) -> None:
    folders = seeds(tmp_path)
    save_at(folders, 10)
    states = checkpoint.load_newest_common(folders, owners(folders))
    for part in ("runner", "agent"):
        broken = Counter(seeds=2 if part == "agent" else 3)
        broken.load_state_dict = lambda saved: saved["nothing"]  # type: ignore[method-assign]
        with pytest.raises(UserError, match="does not fit this run") as caught:
            checkpoint.restore({part: broken}, states)
        assert "\n" not in str(caught.value)


# --- Whose it is, and of which format -------------------------------------------------------------------------------


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    folders = seeds(tmp_path, 2)
    save_at(folders, 10)
    content = (folders[1] / "checkpoint.pt").read_bytes()
    (folders[0] / "checkpoint.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"seed_0/checkpoint.pt is of another run \(bc on hopper-medium-v2, seed 1\)"):
        continued(folders)
    with pytest.raises(UserError, match=r"is of another run .*, not of cql on hopper-medium-v2, seed 1"):
        checkpoint.load_newest_common(folders[1:], [Owner("cql", "hopper-medium-v2", 1)])
    with pytest.raises(UserError, match=r"is of another run .*, not of bc on walker2d-medium-v2, seed 1"):
        checkpoint.load_newest_common(folders[1:], [Owner("bc", "walker2d-medium-v2", 1)])


def test_other_formats_are_refused_in_one_line(tmp_path: Path) -> None:
    """What earlier versions wrote, what nobody's version writes, and a file without checksums."""
    (folder,) = seeds(tmp_path, 1)
    for content, message in (
        (state(), r"was written by another version of this project \(format 1, here 2\); .*--overwrite"),
        (owned(format=3), r"another version of this project \(format 3, here 2\)"),
        (owned(owner=None), "is not a checkpoint of this project"),
        (owned(owner={"algo": "bc"}), "is not a checkpoint of this project"),
        (owned(agent=torch.ones(1)), "is not a checkpoint of this project"),
    ):
        checkpoint.save(folder / "checkpoint.pt", content)
        with pytest.raises(UserError, match=message) as caught:
            continued([folder])
        assert "\n" not in str(caught.value)
    torch.save(owned(), folder / "checkpoint.pt")
    assert equal(checkpoint.load_weights(folder / "checkpoint.pt"), owned())
    with pytest.raises(UserError, match=r"has lost the SHA-256 that it was written with"):
        continued([folder])


# --- Damage -----------------------------------------------------------------------------------------------------------


def test_the_seal_is_the_archives_comment_and_pytorch_reads_on(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a.pt", owned())
    assert equal(torch.load(tmp_path / "a.pt", weights_only=True), owned())
    content = (tmp_path / "a.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert archive.testzip() is None
        assert archive.comment == b"sha256:" + hashlib.sha256(content[: -len(archive.comment)]).hexdigest().encode()


def test_a_bit_that_the_archives_own_checksums_miss(tmp_path: Path) -> None:
    """Why there is a seal: with the folder bit of a record's entry set, PyTorch reads what was in memory."""
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, owned())
    content = bytearray(path.read_bytes())
    listed = content.index(b"PK\x01\x02", content.rindex(b"PK\x03\x04"))
    entry = content.rindex(b"PK\x01\x02", listed, content.index(b"archive/data/0", listed))
    content[entry + 38] |= 0x10
    path.write_bytes(bytes(content))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.load(path)


SEALED = checkpoint._sealed(owned())


def survives(content: bytes, path: Path, original: Any) -> bool:
    """Whether a file with this content loads, as what it was; if not, that is an error of one line."""
    path.write_bytes(content)
    try:
        assert equal(checkpoint.load(path), original)
        return True
    except UserError as error:
        assert "\n" not in str(error)
        return False


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(SEALED) - 1), st.integers(1, 255), st.booleans())
def test_no_damage_goes_unnoticed(place: int, change: int, cut: bool) -> None:
    """Any byte changed, or the file cut anywhere."""
    content = SEALED[:place] if cut else SEALED[:place] + bytes([SEALED[place] ^ change]) + SEALED[place + 1 :]
    path = Path(tempfile.gettempdir()) / f"damage-{os.getpid()}.pt"
    assert not survives(content, path, owned())
    path.unlink()


def test_300_flipped_bits_of_a_runs_checkpoint(tmp_path: Path) -> None:
    data = d4rl_file(tmp_path / "hopper.hdf5")
    assert run.main(tiny("diffcps", "0", str(data), tmp_path / "runs")) == 0
    (path,) = tmp_path.rglob("checkpoint.pt")
    whole, original, chance = path.read_bytes(), checkpoint.load(path), random.Random(0)
    for _ in range(300):
        content = bytearray(whole)
        content[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        assert not survives(bytes(content), path, original)
    assert survives(whole, path, original)


# --- Published weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        [torch.ones(2)],
        torch.ones(2),
        {0: torch.ones(2)},
        {"weight": torch.ones(2, device="meta")},
        {"weight": torch.eye(2).to_sparse()},
        {"weight": torch.ones(2, dtype=torch.complex64)},
        {"weight": {"nested": torch.ones(2)}},
        {"weight": "text"},
        3.0,
    ],
)
def test_published_weights_of_another_form_are_one_line(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "actor.pth")
    pair = f"actor={tmp_path / 'actor.pth'}"
    with pytest.raises(UserError, match=r"--load_published actor=.*: the file does not hold weights by name"):
        checkpoint.load_named([pair], {"actor": {"weight": torch.ones(2)}})


def test_a_published_number(tmp_path: Path) -> None:
    known = {"lambda": torch.ones(1)}
    pair = f"lambda={tmp_path / 'lambda.pth'}"
    for content in (2.0, torch.tensor(2.0), torch.tensor([2.0])):
        torch.save(content, tmp_path / "lambda.pth")
        assert float(checkpoint.load_named([pair], known)["lambda"]) == 2.0
    for other in ({"weight": torch.ones(1)}, torch.ones(2), torch.ones(1, device="meta"), "2"):
        torch.save(other, tmp_path / "lambda.pth")
        with pytest.raises(UserError, match="does not hold a number"):
            checkpoint.load_named([pair], known)
