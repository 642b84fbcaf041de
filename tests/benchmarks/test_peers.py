"""`benchmarks.peers` with a stand-in for the other library: no network, no environment, speed itself is not tested."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import hyperparameters
from benchmarks.peers import compare, environment, worker_d3rlpy
from benchmarks.peers.environment import PEERS, python_of
from utils.errors import UserError

# Half a second for an update, one for a step of the loop; keeps what it was asked for.
STAND_IN = """
import json, sys
for line in sys.stdin:
    order = json.loads(line)
    open({orders!r}, "a").write(line)
    steps = order.get("steps")
    facts = {{"peer": "other 1.0", "torch": "2", "compiled": False}}
    answer = {{"update": steps / 2, "loop": steps}} if steps else facts
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def orders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in takes d3rlpy's place; the file of what it was asked for."""
    script, asked = tmp_path / "worker.py", tmp_path / "orders"
    script.write_text(STAND_IN.format(orders=str(asked)))
    monkeypatch.setitem(PEERS, "d3rlpy", replace(PEERS["d3rlpy"], script=script))
    return asked


def options(*more: str) -> argparse.Namespace:
    return compare.parser().parse_args(["--executions", "eager", "--rows", "300", "--threads", "1", "--repeats", "1",
                                        "--seconds", "0.01", *more])  # fmt: skip


def test_both_sides_have_the_same_sizes_and_their_ratio_is_reported(orders: Path) -> None:
    (row,) = compare.measure("bc", Path(sys.executable), options("--env_name", "hopper-medium-v2"))
    settings, *steps = map(json.loads, orders.read_text().splitlines())
    assert (settings["state_dim"], settings["action_dim"], settings["hidden_dim"]) == (11, 3, 256)
    assert settings["batch_size"] == row["batch_size"] == 256 and settings["compile_graph"] is False
    assert settings["threads"] == torch.get_num_threads() == 1
    assert [order["steps"] for order in steps] == [4, 6, 2]  # to warm up, to count, and a round
    assert (row["peer"], row["execution"], row["compiled"]) == ("other 1.0", "eager", False)
    assert row["peer_update_steps_per_s"] == 2 and row["peer_loop_steps_per_s"] == 1
    assert row["ratio_to_update"] == pytest.approx(0.5 * row["steps_per_s"])
    assert row["ratio_to_loop"] == pytest.approx(row["steps_per_s"])


def test_a_round_is_compared_with_itself() -> None:
    """A machine that is slow for one round spoils no ratio."""
    times = [(1.0, 2.0, 0.5), (10.0, 20.0, 5.0), (1.2, 2.4, 0.6)]
    rounds = [{False: {"update": u, "loop": a}, "eager": {"loop": o}} for u, a, o in times]
    found = compare.compared(rounds, False, "eager")
    assert found["ratio_to_update"] == 2 and found["ratio_to_loop"] == 4
    assert found["steps_per_s"] == pytest.approx(1 / 0.6)


def test_the_table_is_printed_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"algo": "bc", "threads": 1, "batch_size": 256, "repeats": 3, "device": "CPU", "peer": "other 1.0",
           "torch": "2", "compiled": True, "execution": "eager", "peer_update_steps_per_s": 200.0,
           "peer_loop_steps_per_s": 100.0, "steps_per_s": 300.0, "ratio_to_update": 1.5,
           "ratio_to_loop": 3.0}  # fmt: skip
    seen: list[tuple[str, int]] = []

    def measured(algo: str, threads: int, *_: Any) -> list[dict[str, Any]]:
        seen.append((algo, threads))
        return [{**row, "algo": algo, "threads": threads}] if algo == "bc" else []

    monkeypatch.setattr(compare, "in_own_process", measured)
    monkeypatch.setattr(compare, "python_of", lambda *_: Path(sys.executable))
    arguments = ["--algos", "bc", "iql", "--out", str(tmp_path), "--name", "here"]
    compare.main(arguments)
    assert seen == [("bc", 1), ("iql", 1), ("bc", 2), ("iql", 2)]
    written = (tmp_path / "peers_here.md").read_text()
    assert capsys.readouterr().out == written
    assert "| bc | 2 | 256 | 200 (compiled) | 100 | 300 | eager | 1.50 | 3.00 |" in written
    with pytest.raises(UserError, match="nothing was measured"):
        compare.main(["--algos", "iql"])


def test_what_cannot_be_measured_is_one_line(orders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    PEERS["d3rlpy"].script.write_text("raise SystemExit('no such library')")
    with pytest.raises(UserError, match="the peer's process ended: no such library"):
        compare.measure("bc", Path(sys.executable), options())
    with pytest.raises(UserError, match="both have bc, td3_bc, iql, cql, bcq, bear, not sfbc"):
        compare.main(["--algos", "sfbc"])


@pytest.mark.slow
def test_a_process_that_fails_leaves_the_others_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.in_own_process("bc", 1, tmp_path / "no python", options()) == []
    assert capsys.readouterr().err.startswith("benchmarks.peers: bc with 1 threads is left out: ")


def test_the_environment_gets_this_pytorch_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    ours = torch.__version__.partition("+")[0]
    found = iter(["", f"d3rlpy 2.8.1, torch {ours}", f"d3rlpy 2.8.1, torch {ours}", "", "d3rlpy 2.8.0, torch 1"])
    monkeypatch.setattr(environment, "_run", lambda command: commands.append(list(command)))
    monkeypatch.setattr(environment, "_installed", lambda *_: next(found))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    python = python_of(tmp_path, PEERS["d3rlpy"])
    assert python == tmp_path / "bin" / "python"
    assert [command[-1] for command in commands] == [str(tmp_path), f"torch=={ours}", "d3rlpy==2.8.1"]
    assert python_of(tmp_path, PEERS["d3rlpy"]) == python and len(commands) == 3  # made once
    commands.clear()
    (tmp_path / "a.whl").touch()
    (tmp_path / "lib" / "python3" / "site-packages").mkdir(parents=True)
    with pytest.raises(UserError, match=r"has d3rlpy 2\.8\.0, torch 1, not d3rlpy 2\.8\.1"):
        python_of(tmp_path, PEERS["d3rlpy"], wheels=tmp_path)
    assert commands[1][-3:] == ["--no-index", "--no-deps", str(tmp_path / "a.whl")]
    (beside,) = (tmp_path / "lib").rglob("*.pth")
    assert (Path(beside.read_text().strip()) / "torch" / "__init__.py").exists()


def test_every_algorithm_has_its_settings_on_the_other_side() -> None:
    assert tuple(worker_d3rlpy.ALGORITHMS) == PEERS["d3rlpy"].algos


@pytest.mark.parametrize("algo", PEERS["d3rlpy"].algos)
def test_d3rlpy_takes_the_settings(algo: str) -> None:
    pytest.importorskip("d3rlpy", reason="d3rlpy is not installed (it needs an environment of its own)")
    settings = asdict(hyperparameters.get(algo, "halfcheetah-medium-v2"))
    made = worker_d3rlpy.ALGORITHMS[algo]({**settings, "samples": 10, "compile_graph": False})
    assert made.batch_size == settings["batch_size"]
