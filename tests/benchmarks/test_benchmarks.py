"""The benchmarks run and print what other programs read; speed itself is not tested here."""

from __future__ import annotations

import argparse
import csv
import json
import platform
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import evaluation, memory, profile, scaling, table, training

SHORT = ["--device", "cpu", "--execution", "eager", "--rows", "500", "--steps", "20", "--plain_steps", "2",
         "--repeats", "2", "--batch_size", "8"]  # fmt: skip


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def event(*way: str) -> SimpleNamespace:
    """A profiler's event and what it was called by, the event first."""
    return SimpleNamespace(name=way[0], cpu_parent=event(*way[1:]) if len(way) > 1 else None)


def test_what_an_operation_belongs_to() -> None:
    mish, adam = "agents/parts/layers.py(44): mish", "agents/parts/adam.py(48): step"
    assert profile.kind(event("aten::baddbmm", mish)) == "matrix products"
    assert profile.kind(event("aten::sigmoid", "built-in", mish)) == "Mish"
    assert profile.kind(event("aten::mul", "_MishBackward", "built-in")) == "Mish"
    assert profile.kind(event("aten::linalg_vector_norm", adam)) == "clipping and Adam"
    assert profile.kind(event("aten::index_select", "utils/data/dataset.py(239): gather")) == "gathers"
    assert profile.kind(event("aten::copy_", "aten::_to_copy", "aten::to")) == "casts"
    assert profile.kind(event("aten::sub", "agents/diffcps.py(75): critic_loss")) == profile.REST
    assert profile.kind(event("aten::expand", mish)) == profile.kind(event(mish)) == profile.PYTHON


@pytest.mark.slow
def test_parts_of_a_step_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    profile.main(["--algo", "bc", "--blocks", "1"])
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.endswith("% |")]
    times = {row[1].strip(): float(row[2]) for row in rows}
    assert {"matrix products", profile.PYTHON} <= times.keys()
    assert times.pop("a step") == pytest.approx(sum(times.values()), abs=0.1)


@pytest.mark.slow
def test_training_is_timed_for_those_that_learn_from_windows(capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--env_name", "halfcheetah-medium-v2", "--no-plain", "--steps", "1", "--repeats", "1", "--json"]
    training.main([*SHORT, "--algo", "diffuser", *few])
    assert printed(capsys)["gflop_per_seed_step"] > 0.1


@pytest.mark.slow
def test_training_prints_the_agreed_keys(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    training.main([*SHORT, "--seeds", "2", "--json"])
    result = printed(capsys)
    keys = {"algo", "env_name", "device", "seeds", "execution", "plain_steps_per_s", "steps_per_s", "seed_steps_per_s"}
    assert keys <= result.keys() and result["ratio"] > 0
    assert result["seed_steps_per_s"] == pytest.approx(2 * result["steps_per_s"])
    (tmp_path / "training_x_here.json").write_text(json.dumps(result))
    table.main([str(tmp_path), "here"])
    assert "| diffcps | halfcheetah-medium-v2 | 2 |" in (tmp_path / "training_here.md").read_text()


@pytest.mark.slow
def test_operations_of_a_step_are_counted() -> None:
    """Matrix products of one DiffCPS step at batch 8, by hand, in multiply-adds of the 256 x 256 layers alone."""
    counted = training.measure(training.parser().parse_args([*SHORT, "--no-plain"]))["gflop_per_seed_step"] * 1e9
    layer = 2 * 8 * 256 * 256
    chain, loss = 5, 1
    critic_step = chain * 2 + 2 * 2 + 3 * 2 * 2  # target chain; target critics; critics forward and twice backward
    # Every second step: loss and chain forward and twice backward; one critic forward twice and backward to the action.
    policy_step = 3 * 2 * (chain + loss) + 2 * 2 + 2
    by_hand = layer * (critic_step + policy_step / 2)
    assert 1.0 < counted / by_hand < 1.25  # the narrow first and last layers make up the rest


def test_evaluation_prints_the_agreed_keys(capsys: pytest.CaptureFixture[str]) -> None:
    evaluation.main(["--device", "cpu", "--execution", "eager", "--episodes", "2", "--max_steps", "5", "--repeats", "1",
                     "--plain_episodes", "1", "--env_name", "hopper-medium-v2", "--json"])  # fmt: skip
    result = printed(capsys)
    assert result["environment_steps"] == 10
    assert result["one_at_a_time_s"] > 0 and result["seconds"] > 0 and result["ratio"] > 0


@pytest.mark.slow
def test_scaling_writes_a_table_and_a_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "QUICK", {"seeds": (1, 2), "T": (2,), "batch_size": (8,)})
    monkeypatch.setattr(scaling, "BASE", {"seeds": 1, "T": 2, "batch_size": 8})
    scaling.main(["--device", "cpu", "--execution", "eager", "--steps", "20", "--repeats", "1", "--quick",
                  "--rows", "500", "--out", str(tmp_path), "--name", "here"])  # fmt: skip
    with open(tmp_path / "scaling_here.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["axis"], r["value"]) for r in rows] == [("seeds", "1"), ("seeds", "2"), ("T", "2"), ("batch_size", "8")]
    assert (tmp_path / "scaling_here.png").stat().st_size > 5000


def test_scaling_measures_the_shared_point_once_and_ends_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int, int]] = []
    clock = [0.0]

    def measured(options: argparse.Namespace) -> dict[str, object]:
        seen.append((options.seeds, options.T, options.batch_size))
        clock[0] += 50
        return dict.fromkeys(scaling.COLUMNS[2:], 1.0)

    monkeypatch.setattr(training, "measure", measured)
    monkeypatch.setattr(scaling.time, "monotonic", lambda: clock[0])
    scaling.main(["--minutes", "4", "--quick", "--out", str(tmp_path), "--name", "here"])
    assert seen == [(1, 5, 256), (2, 5, 256), (4, 5, 256), (1, 10, 256), (1, 5, 64)]
    clock[0] = 0.0
    scaling.main(["--minutes", "1", "--quick", "--out", str(tmp_path), "--name", "short"])
    with open(tmp_path / "scaling_short.csv", newline="") as file:
        assert [(r["axis"], r["value"]) for r in csv.DictReader(file)] == [("seeds", "1"), ("seeds", "2")]
    assert (tmp_path / "scaling_short.png").exists()


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the GNU C library's allocator")
def test_memory_compares_two_processes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    memory.main(["--algos", "bc", "--seeds", "1", "--seconds", "0.05", "--repeats", "1", "--env_name",
                 "hopper-medium-v2", "--out", str(tmp_path), "--name", "here"])  # fmt: skip
    *_, row = capsys.readouterr().out.strip().splitlines()
    written = (tmp_path / "memory_here.md").read_text()
    assert written.endswith(f"{row}\n") and "hopper-medium-v2" in written.splitlines()[0]
    algo, seeds, *numbers = [cell.strip().replace(",", "") for cell in row.strip("|").split("|")]
    assert (algo, seeds) == ("bc", "1") and len(numbers) == 7
    default, kept, *_, ratio = map(float, numbers)
    assert ratio == pytest.approx(kept / default, rel=0.02)  # one repeat; both are printed rounded
