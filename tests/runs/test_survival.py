"""A run that is killed, at any moment, continues as if it had not been; and only one process has a run at a time."""

from __future__ import annotations

import csv
import multiprocessing
import os
import random
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import run
from agents import AGENTS
from benchmarks.soak import forked
from benchmarks.soak.soak import Soak, difference, stopped_with_its_lock, tiny
from tests.small import d4rl_file
from utils.errors import UserError
from utils.runs import checkpoint
from utils.runs.checkpoint import load, save
from utils.runs.locks import RunLock

KILLS = 2  # of each algorithm and number of seeds; benchmarks.soak kills for as long as it is told to


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(d4rl_file(tmp_path_factory.mktemp("data") / "hopper.hdf5"))


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# --- SIGKILL --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seeds", ["0", "0-2"])
@pytest.mark.parametrize("algo", list(AGENTS))
def test_killed_at_random_moments_it_is_the_run_that_was_not(algo: str, seeds: str, tmp_path: Path, data: str) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, seconds = forked.finish(tiny(algo, seeds, data, whole))
    assert code == 0
    chance, kills = random.Random(f"{algo} {seeds}"), 0
    for _ in range(KILLS):
        code = forked.kill_at(tiny(algo, seeds, data, killed, "--resume"), chance.uniform(0, 0.8) * seconds)
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
    assert forked.finish(tiny(algo, seeds, data, killed, "--resume"))[0] == 0
    assert difference(whole, killed) is None


SLOW_EVALUATION = 0.05  # seconds at least, of an evaluation that lasts as long as the training between two


def slow_evaluations() -> None:
    from utils.training import evaluation

    plain = evaluation.evaluate

    def evaluate(*arguments: Any) -> evaluation.Episodes:
        time.sleep(SLOW_EVALUATION)
        return plain(*arguments)

    evaluation.evaluate = evaluate


BESIDE = ("--eval_async", "--num_epochs", "60", "--num_steps_per_epoch", "2", "--eval_interval", "3")


@pytest.mark.slow
@pytest.mark.parametrize("interval", ["0", "10"])  # minutes: after every epoch, or after evaluations alone
@pytest.mark.parametrize("seeds", ["0", "0-2"])
def test_killed_while_evaluations_never_end_before_the_next_begins(
    interval: str, seeds: str, tmp_path: Path, data: str
) -> None:
    """There is a checkpoint all the same, and the evaluation that was under way is made again."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = lambda folder: tiny("bc", seeds, data, folder, *BESIDE, "--checkpoint_interval", interval, "--resume")  # noqa: E731
    assert run.main(command(whole)) == 0
    under_way = []
    for evaluations in (4, 10, 15):
        process = forked.start(command(killed), slow_evaluations)
        folder = killed / "bc" / "hopper-medium-v2"
        while not evaluated(folder / "seed_0") >= evaluations and process.is_alive():
            time.sleep(0.005)
        process.kill()
        process.join()
        state = newest(folder / "seed_0")
        assert state["agent"]["step"] > 2 * 3 * (evaluations - 3)
        under_way.append(bool(state["evaluation"]))
    assert any(under_way)
    assert run.main(command(killed)) == 0
    assert difference(whole, killed) is None


def newest(folder: Path) -> dict[str, Any]:
    """The checkpoint that a resumed run takes; a kill between its two renames leaves the one before alone."""
    names = [name for name in (checkpoint.CURRENT, checkpoint.PREVIOUS) if (folder / name).exists()]
    return load(folder / names[0])


def evaluated(folder: Path) -> int:
    path = folder / "evaluations.csv"
    return len({row["step"] for row in rows(path)}) if path.exists() else 0


def test_seeds_of_which_one_has_an_evaluation_under_way_go_on_together(tmp_path: Path, data: str) -> None:
    """At one step, as a kill between two seeds' files, or two processes, can leave them."""
    whole, apart, under_way = tmp_path / "whole", tmp_path / "apart", tmp_path / "under_way"
    three = ("--num_epochs", "3", "--eval_interval", "2", "--eval_async")
    assert run.main(tiny("bc", "0,1", data, whole, *three)) == 0
    assert run.main(tiny("bc", "0,1", data, apart, *three, "--num_epochs", "2")) == 0
    shutil.copytree(apart, under_way)
    folder = apart / "bc" / "hopper-medium-v2" / "seed_1"
    state = load(folder / "checkpoint.pt")
    weights = state["agent"]["networks"]
    state["evaluation"] = {
        "step": state["agent"]["step"],
        "played": torch.ones(1, dtype=torch.bool),
        "networks": weights,
    }
    header = (folder / "evaluations.csv").read_bytes().splitlines(keepends=True)[0]
    state["logs"]["evaluations.csv"] = len(header)
    save(folder / "checkpoint.pt", state)
    for more in (["--eval_async"], []):
        shutil.rmtree(under_way)
        shutil.copytree(apart, under_way)
        assert run.main(tiny("bc", "0,1", data, under_way, *three[:4], *more, "--resume")) == 0
        assert difference(whole, under_way) is None


def test_a_difference_is_seen(tmp_path: Path, data: str) -> None:
    """What the test above compares: a digit, a row, or a parameter that is another is found."""
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        assert run.main(tiny("diffusion_bc", "0", data, folder)) == 0
    assert difference(one, other) is None
    seed = next(other.rglob("seed_0"))
    for name in ("metrics.csv", "evaluations.csv"):
        content = (seed / name).read_bytes()
        (seed / name).write_bytes(content.replace(b"\n4,", b"\n5,", 1))
        assert name in str(difference(one, other))
        (seed / name).write_bytes(content)
    state = torch.load(seed / "checkpoint.pt", weights_only=True)
    state["agent"]["networks"]["actor"][0, 5] += 1e-6
    torch.save(state, seed / "checkpoint.pt")
    assert "networks.actor" in str(difference(one, other))


@pytest.mark.slow
def test_the_soak_counts_what_it_does_and_notices_a_run_that_came_out_otherwise(tmp_path: Path, data: str) -> None:
    soak = Soak(tmp_path, {"plain": data}, seed=1)
    assert forked.finish(tiny("bc", "0", data, tmp_path / "first"))[0] == 0  # what follows is timed: no first run
    for _ in range(3):
        soak.round("bc", "0,1", "plain")
    assert soak.failures == [] and soak.counts["runs compared"] == 3
    done = soak.counts["SIGKILL"] + soak.counts["SIGTERM"]
    assert done >= 1 and sum(soak.counts.values()) > 3
    (path,) = (tmp_path / "whole-bc-0,1-plain").rglob("seed_1/evaluations.csv")
    path.write_bytes(path.read_bytes().replace(b"\n4,", b"\n5,", 1))
    soak.round("bc", "0,1", "plain")
    assert len(soak.failures) == 1 and "seed_1/evaluations.csv" in soak.failures[0]


@pytest.mark.slow
def test_the_soak_asks_for_a_refusal_only_where_the_first_process_has_the_lock(tmp_path: Path, data: str) -> None:
    endless = tiny("bc", "0,1", data, tmp_path / "held", "--num_epochs", "1000000")
    holder = forked.start(endless)
    wait_for(lambda: any(tmp_path.rglob("seed_1/checkpoint.pt")))
    assert stopped_with_its_lock(holder, endless) and forked.finish(endless)[0] == 2
    holder.kill()
    holder.join()
    assert not stopped_with_its_lock(holder, endless)
    # a process that has let go and not ended yet: the file still names it, and a second one may rightly begin
    leaving = multiprocessing.get_context("forkserver").Process(target=time.sleep, args=(60,), daemon=True)
    leaving.start()
    RunLock([tmp_path / "free" / "seed_0"]).close()
    (tmp_path / "free" / ".seed_0.lock").write_text(f"process {leaving.pid} on {socket.gethostname()}")
    assert not stopped_with_its_lock(leaving, ["--dir", str(tmp_path / "free")])
    leaving.kill()


# --- One process a run ----------------------------------------------------------------------------------------------


def test_a_second_process_is_refused_and_named_its_owner(
    tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    endless = tiny("diffusion_bc", "0,1", data, tmp_path, "--num_epochs", "1000000")
    process = forked.start(endless)
    folder = tmp_path / "diffusion_bc" / "hopper-medium-v2"
    wait_for(lambda: (folder / "seed_1" / "checkpoint.pt").exists())
    before = (folder / "seed_1" / "config.json").read_bytes()
    for how in ("--resume", "--overwrite"):
        assert run.main(tiny("diffusion_bc", "1", data, tmp_path, "--num_epochs", "1000000", how)) == 2
        line = capsys.readouterr().err.strip()
        assert f"seed_1 is in use by process {process.pid} on {socket.gethostname()}" in line and "\n" not in line
    assert (folder / "seed_1" / "config.json").read_bytes() == before
    process.kill()
    process.join()
    assert (folder / ".seed_1.lock").read_text() == f"process {process.pid} on {socket.gethostname()}"
    assert run.main(tiny("diffusion_bc", "1", data, tmp_path, "--overwrite")) == 0  # a stale lock is no lock


def test_a_lock_is_given_back_also_when_another_is_refused(tmp_path: Path) -> None:
    one, two = tmp_path / "seed_0", tmp_path / "seed_1"
    held = RunLock([two])
    with pytest.raises(UserError, match=f"seed_1 is in use by process {os.getpid()}"):
        RunLock([one, two])
    RunLock([one]).close()
    held.close()
    RunLock([one, two]).close()


def wait_for(condition: Any, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


pytestmark = pytest.mark.slow  # the whole file: seconds per test
