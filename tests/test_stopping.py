"""A run that is asked to stop, at whatever moment, and resumed is bit for bit the run that was not."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import run
from benchmarks.soak.soak import difference, tiny
from tests.small import d4rl_file
from tests.training.test_faults import Faulty
from utils import launch
from utils.process import Stop

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(d4rl_file(tmp_path_factory.mktemp("data") / "hopper.hdf5"))


class Asked(Stop):
    """Asked to stop when it is looked at for the AT-th time."""

    AT = 0

    def __init__(self, minutes: float | None = None) -> None:
        super().__init__(minutes)
        self.looks = 0

    def __call__(self) -> bool:
        self.looks += 1
        if self.looks == self.AT:
            self.signal = signal.SIGTERM
        return super().__call__()


def stopped_and_resumed(monkeypatch: pytest.MonkeyPatch, argv: list[str], *looks: int) -> list[int]:
    """The exit codes of a run that is stopped after so many looks, then resumed and stopped again, then ended."""
    codes = []
    for number, at in enumerate((*looks, 0)):
        monkeypatch.setattr(Asked, "AT", at)
        monkeypatch.setattr(run, "Stop", Asked)
        codes.append(run.main([*argv, *(["--resume"] if number else [])]))
    return codes


# Runs are three epochs of four steps. What is looked at: every step, and every time step of an evaluation.
@pytest.mark.parametrize("algo", ["diffcps", "sfbc"])
@pytest.mark.parametrize("beside", [(), ("--eval_async",)])
def test_stopped_at_any_moment(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch, algo: str, beside: tuple[str, ...]
) -> None:
    assert run.main(tiny(algo, "0,1", data, tmp_path / "whole")) == 0
    codes = set()
    for at in (1, 6, 9, 17):
        argv = tiny(algo, "0,1", data, tmp_path / str(at), *beside)
        codes |= set(stopped_and_resumed(monkeypatch, argv, at, at + 3))
        assert difference(tmp_path / "whole", tmp_path / str(at)) is None, at
    assert codes == {143, 0}


class Halting(Faulty):
    """Seed 1 is lost in the epoch that begins at step 4; a signal comes two steps after step HALT."""

    LOST = (1,)
    HALT = -1

    def run(self, steps: int, *until: Callable[[], bool]) -> None:
        if self.agent.step == self.HALT:
            super().run(2)
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            super().run(steps, *until)


@pytest.mark.parametrize("halt", [4, 8])
def test_a_lost_seed_stays_as_it_was(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], halt: int
) -> None:
    """Between two epochs it computes numbers that nobody is to keep, and another may be lost at the epoch's end."""
    monkeypatch.setattr(launch, "Runner", Halting)
    assert run.main(tiny("diffcps", "0,1", data, tmp_path / "whole")) == 0
    assert "seed 1, step 8: stopped" in capsys.readouterr().err
    argv = tiny("diffcps", "0,1", data, tmp_path / "cut")
    monkeypatch.setattr(Halting, "HALT", halt)
    assert run.main(argv) == 143
    state = torch.load(tmp_path / "cut/diffcps/hopper-medium-v2/seed_1/checkpoint.pt", weights_only=True)
    assert state["agent"]["step"] == halt + 2 and state["watch"]["looked"] == halt
    monkeypatch.setattr(Halting, "HALT", -1)
    assert run.main([*argv, "--resume"]) == 0
    assert difference(tmp_path / "whole", tmp_path / "cut") is None


def test_a_run_whose_time_is_over_ends_well(tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(tiny("bc", "0", data, tmp_path / "whole")) == 0
    argv = tiny("bc", "0", data, tmp_path / "part")
    assert run.main([*argv, "--max_minutes", "1e-9"]) == 0
    assert "stopped at step 0; continue with --resume" in capsys.readouterr().out
    assert run.main([*argv, "--resume", "--max_minutes", "100"]) == 0
    assert difference(tmp_path / "whole", tmp_path / "part") is None


def long_run(folder: Path, data: str) -> tuple[subprocess.Popen[str], Path]:
    """A run of epochs that never end, from its first checkpoint on, and its folder."""
    endless = ("--num_steps_per_epoch", "100000000")
    command = [sys.executable, "run.py", *tiny("bc", "0", data, folder, *endless)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    seed, deadline = folder / "bc" / "hopper-medium-v2" / "seed_0", time.monotonic() + 240
    while not (seed / "checkpoint.pt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process, seed


def test_a_signal_is_answered_and_ends_within_an_epoch(tmp_path: Path, data: str) -> None:
    process, seed = long_run(tmp_path, data)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 143
    assert err.startswith("run.py: stopping after step ") and "again to end now, losing up to " in err
    assert err.count("\n") == 1 and "continue with --resume" in out
    state = torch.load(seed / "checkpoint.pt", weights_only=True)
    assert state["agent"]["step"] == state["runner"]["unread"]
    with open(seed / "metrics.csv", newline="") as file:
        assert list(csv.DictReader(file)) == []


def test_a_second_signal_ends_at_once_as_a_kill(tmp_path: Path) -> None:
    """Whatever holds the process up: here it never looks whether it is to stop."""
    code = "import time; from utils.process import Stop\nwith Stop() as stop:\n stop.answer = lambda: 'answer'\n"
    code += " print('ready', flush=True)\n try:\n  time.sleep(60); time.sleep(60)\n finally:\n  time.sleep(60)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env=environment) as process:  # fmt: skip
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "run.py: answer\n"
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=60)[1] == "run.py: ended at once\n" and process.returncode == 143


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_before_there_is_anything_to_save(
    tmp_path: Path,
    data: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
    code: int,
) -> None:
    def asked(*_: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(1)

    monkeypatch.setattr(launch, "keep_freed_memory", asked)
    assert run.main(tiny("bc", "0", data, tmp_path)) == code
    assert capsys.readouterr().err == "run.py: interrupted\n"


# The whole file: seconds per test.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("signals_of_a_terminal")]
