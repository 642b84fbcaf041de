"""Sweeps of a toy run that counts to N, saves as it goes and obeys signals, as run.py does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from utils import sweep
from utils.errors import UserError
from utils.sweep import Job, Resources, run_jobs

ROOT = Path(__file__).resolve().parents[2]


def count(command: Sequence[str]) -> int:
    """FOLDER N SECONDS: append 1 .. N to FOLDER/numbers, going on from what stands there. `FOLDER fix` returns 2,
    `FOLDER crash` raises, `FOLDER die` kills its own process the first time."""
    folder, what = Path(command[0]), command[1]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "starts", "a") as file:
        file.write(f"{os.getpid()}\n")
    if what == "fix":
        return 2
    if what == "crash":
        raise RuntimeError("as planned")
    if what == "die":
        if len((folder / "starts").read_text().split()) < 2:
            os.kill(os.getpid(), signal.SIGKILL)
        what = "1"
    stopped: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stopped.append(number))
    for k in range(len(numbers(folder)) + 1, int(what) + 1):
        if stopped:
            return 128 + stopped[0]
        with open(folder / "numbers", "a") as file:
            file.write(f"{k}\n")
        time.sleep(float(command[2]) if len(command) > 2 else 0)
    return 0


def numbers(folder: Path) -> list[int]:
    path = folder / "numbers"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def pids(folder: Path) -> list[int]:
    path = folder / "starts"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def job(base: Path, name: str, *command: str) -> Job:
    return Job(name, (str(base / name), *command), base / name / "log.txt")


def progress(job: Job) -> float:
    until = int(job.command[1]) if job.command[1].isdecimal() else 1
    return len(numbers(Path(job.command[0]))) / until


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.mark.slow
def test_one_after_the_other_retries_the_dead_and_skips_the_complete(tmp_path):
    (tmp_path / "complete").mkdir()
    (tmp_path / "complete" / "numbers").write_text("1\n2\n")
    jobs = [job(tmp_path, "complete", "2"), job(tmp_path, "plain", "3"), job(tmp_path, "dies", "die"),
            job(tmp_path, "fix", "fix"), job(tmp_path, "crash", "crash")]  # fmt: skip
    outcomes = run_jobs(jobs, count, progress, retries=1)
    states = {name: (o.state, o.attempts, o.code) for name, o in outcomes.items()}
    assert states == {
        "complete": ("done", 0, None),
        "plain": ("done", 1, 0),
        "dies": ("done", 2, 0),
        "fix": ("failed", 1, 2),  # trying again would not help
        "crash": ("failed", 2, 1),
    }
    assert not (tmp_path / "complete" / "starts").exists()
    assert numbers(tmp_path / "plain") == [1, 2, 3]
    assert "RuntimeError: as planned" in (tmp_path / "crash" / "log.txt").read_text()
    assert len(set(pids(tmp_path / "dies"))) == 2  # a process of its own each time


def test_the_same_name_twice_is_refused(tmp_path):
    with pytest.raises(UserError, match="same name"):
        run_jobs([job(tmp_path, "a", "1"), job(tmp_path, "a", "2")], count, progress)


def test_without_ray_it_says_so_and_works(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "ray_is_installed", lambda: False)
    outcomes = run_jobs([job(tmp_path, "a", "2")], count, progress, ray="local")
    assert outcomes["a"].state == "done"
    assert "ray is not installed" in capsys.readouterr().err


SCRIPT = """
import sys
from pathlib import Path
from tests.utils.test_sweep import count, job, progress
from utils.sweep import run_jobs
if __name__ == "__main__":
    base = Path(sys.argv[1])
    jobs = [job(base, "a", "1000", "0.02"), job(base, "b", "1")]
    print({name: outcome.state for name, outcome in run_jobs(jobs, count, progress).items()})
"""


def start_script(tmp_path: Path) -> subprocess.Popen[str]:
    (tmp_path / "script.py").write_text(SCRIPT)
    return subprocess.Popen([sys.executable, str(tmp_path / "script.py"), str(tmp_path)], cwd=ROOT, text=True,
                            env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, start_new_session=True)  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("signals_of_a_terminal")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_saves_and_leaves_everything_resumable(tmp_path, number):
    process = start_script(tmp_path)
    wait_for(lambda: len(numbers(tmp_path / "a")) > 3)
    os.killpg(process.pid, number)  # what a terminal does on Ctrl-C
    out, err = process.communicate(timeout=60)
    assert "{'a': 'stopped', 'b': 'stopped'}" in out, err
    assert "exit code 143" in (tmp_path / "a" / "log.txt").read_text()  # asked once, and ended in its own time
    reached = len(numbers(tmp_path / "a"))
    outcomes = run_jobs([job(tmp_path, "a", str(reached + 2)), job(tmp_path, "b", "1")], count, progress)
    assert [o.state for o in outcomes.values()] == ["done", "done"]
    assert numbers(tmp_path / "a") == list(range(1, reached + 3))


@pytest.mark.slow
def test_a_run_does_not_outlive_its_sweep(tmp_path):
    process = start_script(tmp_path)
    wait_for(lambda: len(numbers(tmp_path / "a")) > 3)
    process.kill()
    process.communicate(timeout=60)
    (pid,) = pids(tmp_path / "a")

    def gone() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
        except OSError:
            return True

    if not Path("/proc/self/stat").exists():
        pytest.skip("no /proc here to see whether a process lives")
    wait_for(gone)
    assert len(numbers(tmp_path / "a")) < 1000


@pytest.mark.slow
@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:99999"])
def test_an_address_where_nothing_listens_is_one_line(tmp_path, address):
    pytest.importorskip("ray", reason="ray is not installed")
    with pytest.raises(UserError, match="no Ray cluster answers"):
        run_jobs([job(tmp_path, "a", "1")], count, progress, ray=address)


@pytest.mark.slow
def test_on_two_ray_workers_with_one_killed_in_the_middle(tmp_path):
    pytest.importorskip("ray", reason="ray is not installed")
    jobs = [job(tmp_path, "victim", "40", "0.1"), job(tmp_path, "other", "10", "0.1")]
    reached: list[int] = []

    def kill() -> None:
        folder = tmp_path / "victim"
        wait_for(lambda: len(numbers(folder)) >= 5)
        os.kill(pids(folder)[0], signal.SIGKILL)
        reached.append(len(numbers(folder)))

    killer = threading.Thread(target=kill)
    killer.start()
    outcomes = run_jobs(jobs, count, progress, ray="local", resources=Resources(cpus=1, workers=2))
    killer.join()
    assert {name: (o.state, o.attempts) for name, o in outcomes.items()} == {
        "victim": ("done", 2), "other": ("done", 1),
    }  # fmt: skip
    assert 5 <= reached[0] < 40
    assert numbers(tmp_path / "victim") == list(range(1, 41))  # it went on from where it was killed
    assert len(set(pids(tmp_path / "victim") + pids(tmp_path / "other"))) == 3
    assert "attempt 2" in (tmp_path / "victim" / "log.txt").read_text()


@pytest.mark.slow
def test_interrupting_on_ray_saves_and_asking_for_too_much_is_one_line(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="ray is not installed")
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False,
             runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})  # fmt: skip
    try:
        jobs = [job(tmp_path, name, "2000", "0.02") for name in ("a", "waits")]
        monkeypatch.setattr(sweep.time, "sleep", _interrupt_when(lambda: len(numbers(tmp_path / "a")) > 3))
        outcomes = run_jobs(jobs, count, progress, ray="local")
        monkeypatch.undo()
        assert [(o.state, o.attempts) for o in outcomes.values()] == [("stopped", 1)] * 2
        assert "exit code 130" in (tmp_path / "a" / "log.txt").read_text()
        assert 3 < len(numbers(tmp_path / "a")) < 2000
        assert not numbers(tmp_path / "waits")
        with pytest.raises(UserError, match="wants 64 GPU"):
            run_jobs(jobs, count, progress, ray="local", resources=Resources(gpus=64))
        assert ray.is_initialized()  # what was there before stays
    finally:
        ray.shutdown()


def _interrupt_when(condition):
    """A `sleep` that raises KeyboardInterrupt once, as Ctrl-C in the loop would."""
    real, done = time.sleep, []

    def sleep(seconds: float) -> None:
        real(seconds)
        if not done and threading.current_thread() is threading.main_thread() and condition():
            done.append(True)
            raise KeyboardInterrupt

    return sleep
