"""Ctrl-C at any moment, closed terminals, pipes and disks that are full: a line, and nothing lost."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import run
from benchmarks.soak.soak import difference, tiny
from experiments import table1
from experiments.study import study
from tests.small import d4rl_file
from utils import sources
from utils.behaviour import local
from utils.options import command_line
from utils.process import Stop

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(d4rl_file(tmp_path_factory.mktemp("data") / "hopper.hdf5"))


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


# --- Ctrl-C -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["run.py"], ["-m", "experiments.table1", "plan"]])
def test_while_importing(command: Sequence[str], tmp_path: Path) -> None:
    """Where Python is made to import something for ever, as soon as the first third party is asked for."""
    (tmp_path / "torch.py").write_text("import time\nopen('begun', 'w').close()\ntime.sleep(60)\n")
    program = [str(ROOT / command[0]) if command[0] == "run.py" else command[0], *command[1:]]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    process = subprocess.Popen(
        [sys.executable, *program], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    wait_for(tmp_path / "begun")
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "interrupted\n" and process.returncode == 130


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_while_loading(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sources.D4RL, "load", interrupted)
    assert run.main(tiny("bc", "0", data, tmp_path)) == 130
    assert capsys.readouterr().err == "run.py: interrupted\n"


def test_while_an_experiment_collects_or_a_second_time_in_its_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", "--dataset", "local", "--dir", str(tmp_path), "--tasks", "hopper-medium-v2"]
    monkeypatch.setattr(local, "load", interrupted)
    assert study.main(table1.EXPERIMENT, "table1", command) == 130
    assert capsys.readouterr().err == "experiments.table1: interrupted\n"
    monkeypatch.setattr(study, "prepare_data", lambda *_: {})
    monkeypatch.setattr(study, "run_jobs", interrupted)  # as it does after a second Ctrl-C
    assert study.main(table1.EXPERIMENT, "table1", command) == 130
    assert capsys.readouterr().err == "experiments.table1: interrupted\n"


# --- Signals ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_closed_terminal_leaves_a_checkpoint(tmp_path: Path, data: str) -> None:
    argv = tiny("bc", "0", data, tmp_path, "--num_epochs", "100000", "--eval_interval", "100000")
    process = subprocess.Popen([sys.executable, "run.py", *argv], cwd=ROOT, stdout=subprocess.DEVNULL)
    metrics = tmp_path / "bc" / "hopper-medium-v2" / "seed_0" / "metrics.csv"
    wait_for(metrics)
    while len(metrics.read_text().splitlines()) < 3:
        time.sleep(0.02)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=120) == 128 + signal.SIGHUP
    with open(metrics, newline="") as file:
        last = list(csv.DictReader(file))[-1]
    state = torch.load(metrics.parent / "checkpoint.pt", weights_only=True)
    assert state["agent"]["step"] - state["runner"]["unread"] == int(last["step"])


def test_nohup_stays_in_force() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop() as stop:
            stop.answer = lambda: "answer"
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signal == 0 and not stop()
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signal == signal.SIGTERM and stop()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# --- Output that nobody takes -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("where", ["closed pipe", "/dev/full"])
def test_a_run_goes_on_without_its_output(where: str, tmp_path: Path, data: str) -> None:
    whole, silent = tmp_path / "whole", tmp_path / "silent"
    assert run.main(tiny("bc", "0", data, whole)) == 0
    if where == "closed pipe":
        reading, writing = os.pipe()
        os.close(reading)
    else:
        writing = os.open(where, os.O_WRONLY)
    command = [sys.executable, "run.py", *tiny("bc", "0", data, silent)]
    done = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=240)
    os.close(writing)
    assert done.returncode == 0 and difference(whole, silent) is None
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("warning: stdout cannot be written to")


def test_a_report_ends_quietly_where_its_reader_has_gone() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    code = "import sys\nfrom utils.options import command_line\nsys.exit(command_line('x', lambda: print('y' * 10**6)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, timeout=120)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_command_without_any_output_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # as `>&-` leaves it
    assert command_line("x", lambda: print("lost")) == 0


# The whole file: seconds per test.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("signals_of_a_terminal")]
