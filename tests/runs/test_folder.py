"""What `--resume` and `--overwrite` accept, refuse and delete: nothing of value, and nothing that is not a run's."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import hyperparameters
import run
from benchmarks.soak.soak import difference, tiny
from tests.small import d4rl_file
from utils.runs import checkpoint
from utils.runs.folder import ALWAYS_WAS, processor

ROOT = Path(__file__).resolve().parents[2]
LOGS = ("metrics.csv", "evaluations.csv")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(d4rl_file(tmp_path_factory.mktemp("data") / "hopper.hdf5"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data: str) -> Path:
    """A whole run of two seeds."""
    base = tmp_path_factory.mktemp("trained")
    assert run.main(tiny("bc", "0,1", data, base)) == 0
    return base


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path


def seed_folder(base: Path, seed: int = 0) -> Path:
    return base / "bc" / "hopper-medium-v2" / f"seed_{seed}"


def contents(base: Path) -> dict[Path, bytes]:
    """All files but the locks, which name their last owner."""
    files = (path for path in base.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {path.relative_to(base): path.read_bytes() for path in files}


def refused(argv: list[str], base: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The line that refuses a command, which changed nothing."""
    before = contents(base)
    capsys.readouterr()
    assert run.main(argv) == 2
    line = capsys.readouterr().err.strip()
    assert contents(base) == before and "\n" not in line
    return line


# --- Evaluations without a checkpoint -------------------------------------------------------------------------------


def test_evaluations_without_a_checkpoint_are_never_thrown_away(
    copied: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 1):
        for name in ("checkpoint.pt", "checkpoint.previous.pt"):
            (seed_folder(copied, seed) / name).unlink()
        (seed_folder(copied, seed) / "notes.txt").write_text("mine")
    command = tiny("bc", "0,1", data, copied)
    line = refused([*command, "--resume"], copied, capsys)
    assert "has evaluations and no checkpoint" in line and "--overwrite" in line
    assert run.main([*command, "--overwrite"]) == 0
    assert all((seed_folder(copied, seed) / "notes.txt").read_text() == "mine" for seed in (0, 1))


def test_a_run_stopped_before_anything_of_value_starts_anew(trained: Path, copied: Path, data: str) -> None:
    for seed in (0, 1):
        folder = seed_folder(copied, seed)
        for path in folder.iterdir():
            if path.name not in (*LOGS, "config.json"):
                path.unlink()
        for name in LOGS:
            (folder / name).write_bytes((folder / name).read_bytes().splitlines(keepends=True)[0])
    assert run.main(tiny("bc", "0,1", data, copied, "--resume")) == 0
    assert difference(trained, copied) is None


def test_a_run_has_a_checkpoint_before_its_first_evaluation(
    trained: Path, tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a kill between an evaluation and its checkpoint is not the case above."""

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("utils.training.evaluation.Evaluator.begin", killed)
    assert run.main(tiny("bc", "0,1", data, tmp_path)) == 130
    monkeypatch.undo()
    assert checkpoint.saved_moments(seed_folder(tmp_path)) == {(0, 0)}
    assert run.main(tiny("bc", "0,1", data, tmp_path, "--resume")) == 0
    assert difference(trained, tmp_path) is None


def test_overwriting_deletes_what_a_run_left_and_nothing_else(copied: Path, data: str) -> None:
    folder = seed_folder(copied)
    mine = {"notes.txt": b"mine", "actor_4.pth.bak": b"x", "old/config.json": b"{}", "other_4.pth": b"not sealed"}
    for name, content in mine.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    ours = ["actor_99.pth", "checkpoint.pt.tmp", ".config.json.7.part", "events.out.tfevents.1.host", "played.csv"]
    checkpoint.save(folder / "actor_99.pth", {"weight": torch.ones(1)})
    for name in ours[1:]:
        (folder / name).write_bytes(b"old")
    assert run.main(tiny("bc", "0", data, copied, "--overwrite")) == 0
    assert {name: (folder / name).read_bytes() for name in mine} == mine
    assert not any((folder / name).exists() for name in ours)


# --- Logs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "logs",
    [
        {"../../../../mine.txt": 0},
        {"metrics.csv": 10, "evaluations.csv": 10, "../../../../mine.txt": 0},
        {"metrics.csv": 10},
        {"metrics.csv": -1, "evaluations.csv": 10},
        {"metrics.csv": 0, "evaluations.csv": 0},
        {"metrics.csv": 10**9, "evaluations.csv": 10},
        {"metrics.csv": "10", "evaluations.csv": 10},
        {"metrics.csv": 100, "evaluations.csv": 60},
        {},
        None,
    ],
)
def test_a_checkpoint_never_says_which_file_is_cut(
    copied: Path, data: str, capsys: pytest.CaptureFixture[str], logs: object
) -> None:
    """A crafted one names another file, or lengths that its logs never had."""
    (copied / "mine.txt").write_text("a text of mine")
    folder = seed_folder(copied)
    (folder / "checkpoint.previous.pt").unlink()
    checkpoint.save(folder / "checkpoint.pt", {**checkpoint.load(folder / "checkpoint.pt"), "logs": logs})
    assert str(folder) in refused(tiny("bc", "0", data, copied, "--resume"), copied, capsys)


def test_no_log_is_cut_before_all_are_checked(copied: Path, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    with open(seed_folder(copied, 0) / "metrics.csv", "ab") as file:
        file.write(b"12,0.3")  # beyond the checkpoint: would be cut
    (seed_folder(copied, 1) / "evaluations.csv").write_bytes(b"")
    line = refused(tiny("bc", "0,1", data, copied, "--resume"), copied, capsys)
    assert "seed_1/evaluations.csv is shorter than when its checkpoint was written; use --overwrite" in line


@pytest.mark.parametrize("name", LOGS)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[: len(content) // 2] + bytes(len(content) - len(content) // 2), "no row that ends"),
        (lambda content: bytes(len(content)), "begins with other columns than a run's"),
        (lambda content: b"time" + content[4:], "begins with other columns than a run's"),
        (lambda content: content.replace(b",", b";"), "begins with other columns than a run's"),
        (lambda content: content.replace(b"\n4,", b"\nx,", 1), "is damaged"),
        (lambda content: content.replace(b"\n4,", b"\n4\x00", 1), "is damaged"),
    ],
)
def test_a_damaged_log_is_not_continued(
    copied: Path,
    data: str,
    capsys: pytest.CaptureFixture[str],
    name: str,
    damage: Callable[[bytes], bytes],
    message: str,
) -> None:
    path = seed_folder(copied) / name
    content = path.read_bytes()
    path.write_bytes(damage(content))
    assert len(path.read_bytes()) == len(content) and path.read_bytes() != content
    line = refused(tiny("bc", "0", data, copied, "--resume"), copied, capsys)
    assert str(path) in line and message in line and "--overwrite" in line


def test_what_a_kill_left_beyond_the_checkpoint_is_cut_whatever_it_is(trained: Path, copied: Path, data: str) -> None:
    for name in LOGS:
        with open(seed_folder(copied) / name, "ab") as file:
            file.write(b"12,0.31" + bytes(100))
    for seeds in ("0", "1"):
        assert run.main(tiny("bc", seeds, data, copied, "--resume")) == 0
    assert difference(trained, copied) is None


# --- Other runs' checkpoints ------------------------------------------------------------------------------------------


def test_another_seeds_checkpoint_is_refused(copied: Path, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(seed_folder(copied, 1) / "checkpoint.pt", seed_folder(copied) / "checkpoint.pt")
    line = refused(tiny("bc", "0", data, copied, "--resume"), copied, capsys)
    assert "seed_0/checkpoint.pt is of another run (bc on hopper-medium-v2, seed 1), not of bc on" in line


def test_a_checkpoint_without_its_seal_is_refused(copied: Path, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = seed_folder(copied)
    (folder / "checkpoint.previous.pt").unlink()
    torch.save(torch.load(folder / "checkpoint.pt", weights_only=True), folder / "checkpoint.pt")
    line = refused(tiny("bc", "0", data, copied, "--resume"), copied, capsys)
    assert "checkpoint.pt has lost the SHA-256 that it was written with" in line


# --- A place that cannot be written ---------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["runs", "runs/bc", "runs/bc/hopper-medium-v2", "runs/bc/hopper-medium-v2/seed_0"])
@pytest.mark.parametrize("how", [(), ("--resume",), ("--overwrite",)])
def test_a_part_of_the_path_that_is_a_file(
    tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str], part: str, how: tuple[str, ...]
) -> None:
    (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / part).write_text("mine")
    assert "cannot write" in refused(tiny("bc", "0", data, tmp_path / "runs", *how), tmp_path, capsys)


@pytest.mark.parametrize("name", ["config.json", "metrics.csv", "evaluations.csv", "checkpoint.pt"])
def test_a_folder_with_a_files_name(tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (seed_folder(tmp_path) / name).mkdir(parents=True)
    for how in ("--resume", "--overwrite"):
        assert "seed_0" in refused(tiny("bc", "0", data, tmp_path, how), tmp_path, capsys)


# --- Names that cannot be written as text -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_path_that_is_no_utf8_where_the_locale_is_ascii(tmp_path: Path, data: str) -> None:
    """All is written but TensorBoard's events, which costs a warning; what cannot be shown is escaped."""
    base = Path(os.fsdecode(os.fsencode(tmp_path) + b"/d\xff\xc3\xa9"))
    command = [sys.executable, "run.py", *tiny("bc", "0", data, base)]
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([os.fsencode(word) for word in command], env=environment, cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(b"warning: no more TensorBoard events of ") and b"/d\\udcff\\udcc3\\udca9/" in line
    assert b"results in " in done.stdout and b"/d\\udcff\\udcc3\\udca9/" in done.stdout
    names = {path.name for path in (base / "bc" / "hopper-medium-v2").rglob("*")}
    assert {"curve.png", "config.json", *LOGS, "checkpoint.pt"} <= names
    assert not any(name.endswith(".part") for name in names)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("processor\t: 0\nmodel name\t: AMD EPYC-Milan Processor\nmodel name\t: another\n", "AMD EPYC-Milan Processor"),
        ("model name\t: \nflags\t: fpu\n", None),
        (None, None),
    ],
)
def test_a_processor_has_a_name(tmp_path: Path, text: str | None, name: str | None) -> None:
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    found = processor(tmp_path / "cpuinfo")
    assert found == (name or platform.processor() or platform.machine())
    assert found and found != "unknown"


def test_the_device_is_named(trained: Path) -> None:
    device = json.loads((seed_folder(trained) / "config.json").read_text())["device"]
    assert device == f"cpu ({processor()})" and device != "cpu ()"


def test_what_runs_always_were_is_what_a_new_one_is_by_default() -> None:
    """So that one of before goes on."""
    defaults = vars(hyperparameters.DiffCPSConfig())
    known = {name: value for name, value in ALWAYS_WAS.items() if name in defaults}
    assert len(known) == 5 and all(defaults[name] == value for name, value in known.items())
