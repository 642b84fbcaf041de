"""The command line from end to end: what a run leaves, how it resumes, and what a mistake gets."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from importlib import metadata
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import hyperparameters
import run
from agents import AGENTS
from benchmarks.soak.soak import tiny
from tests.small import SHORT, d4rl_file
from utils import options, sources
from utils.errors import UserError
from utils.report.runs import Labels, find_runs, read_run
from utils.runs.columns import OLD_METRICS_END, TOOK
from utils.runs.locks import RunLock
from utils.runs.summary import all_seeds
from utils.training import capture
from utils.training.runner import Runner

ROOT = Path(__file__).resolve().parent.parent
TASK = ["--env_name", "hopper-medium-v2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(d4rl_file(tmp_path_factory.mktemp("data") / "hopper.hdf5"))


def train(folder: Path, data: str, *more: str) -> Path:
    assert run.main([*TASK, "--dataset", data, "--dir", str(folder), *SHORT, *more]) == 0
    return folder / "diffcps" / "hopper-medium-v2"


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def without_speed(path: Path) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k not in TOOK} for row in rows(path)]


def test_what_a_run_leaves(tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train(tmp_path, data, "--seeds", "0,2", "--save_best_model")
    shown = capsys.readouterr().out
    assert "mean of last 5" in shown and "chosen on test episodes" in shown and "mean of the episodes" in shown
    assert "for these data there is --kappa auto" in shown and "κ = 0.05 was not met: the loss was" in shown
    assert (folder / "curve.png").stat().st_size > 5000
    for seed in (0, 2):
        here = folder / f"seed_{seed}"
        config = json.loads((here / "config.json").read_text())
        assert config["seed"] == seed and config["settings"]["num_epochs"] == 4
        assert (
            config["origins"]["kappa"] == "task hopper-medium-v2" and config["origins"]["num_epochs"] == "command line"
        )
        assert len(config["dataset"]["sha256"]) == 64 and config["dataset"]["bytes"] == os.path.getsize(data)
        assert config["versions"]["torch"] == metadata.version("torch")
        metrics = rows(here / "metrics.csv")
        assert [int(row["step"]) for row in metrics] == [10, 20, 30, 40]
        assert all(float(row["critic_loss"]) > 0 and float(row["lambda"]) > 0 for row in metrics)
        evaluations = rows(here / "evaluations.csv")
        assert [(int(r["step"]), int(r["episode"])) for r in evaluations] == [(20, 0), (20, 1), (40, 0), (40, 1)]
        for row in evaluations:
            score = 100 * (float(row["return"]) + 20.272305) / (3234.3 + 20.272305)
            assert float(row["normalized_score"]) == pytest.approx(score) and int(row["length"]) > 0
        assert list(here.glob("events.out.tfevents.*"))
        state = torch.load(here / "checkpoint.pt", weights_only=True)
        assert state["agent"]["step"] == 40
        actor = torch.load(here / "actor_4.pth", weights_only=True)
        assert actor["model.final_layer.weight"].shape == (3, 256)


def test_one_seed_is_one_result_and_company_changes_no_batches(tmp_path: Path, data: str) -> None:
    first, again = train(tmp_path / "a", data), train(tmp_path / "b", data)
    company = train(tmp_path / "c", data, "--seeds", "0,1")
    a, b = first / "seed_0", again / "seed_0"
    assert without_speed(a / "metrics.csv") == without_speed(b / "metrics.csv")
    assert (a / "evaluations.csv").read_bytes() == (b / "evaluations.csv").read_bytes()
    for alone, together in zip(rows(a / "metrics.csv"), rows(company / "seed_0" / "metrics.csv"), strict=True):
        for name in ("kl_loss", "critic_loss", "lambda"):
            assert float(alone[name]) == pytest.approx(float(together[name]), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("fresh", [[], ["--eval_seeds", "fresh"]])
def test_evaluating_beside_training_changes_nothing(tmp_path: Path, data: str, fresh: list[str]) -> None:
    waiting = train(tmp_path / "waiting", data, "--seeds", "0,1", *fresh)
    beside = train(tmp_path / "beside", data, "--seeds", "0,1", "--eval_async", *fresh)
    for seed in (0, 1):
        a, b = waiting / f"seed_{seed}", beside / f"seed_{seed}"
        assert (a / "evaluations.csv").read_bytes() == (b / "evaluations.csv").read_bytes()
        assert without_speed(a / "metrics.csv") == without_speed(b / "metrics.csv")
        episodes = {row["step"]: row["return"] for row in rows(a / "evaluations.csv")}
        assert (len(set(episodes.values())) == 2) and len(episodes) == 2
    train(tmp_path / "beside", data, "--seeds", "0,1", "--eval_async", "--resume", "--num_epochs", "6", *fresh)
    steps = [row["step"] for row in rows(beside / "seed_0" / "evaluations.csv")]
    assert steps == ["20", "20", "40", "40", "60", "60"]


@pytest.mark.parametrize("seeds", ["0", "0,4,5"])
def test_a_run_cut_short_and_resumed_is_the_run_that_was_not(tmp_path: Path, data: str, seeds: str) -> None:
    whole = train(tmp_path / "whole", data, "--seeds", seeds)
    train(tmp_path / "cut", data, "--seeds", seeds, "--num_epochs", "2")
    cut = train(tmp_path / "cut", data, "--seeds", seeds, "--resume")
    for seed in seeds.split(","):
        a, b = whole / f"seed_{seed}", cut / f"seed_{seed}"
        assert without_speed(a / "metrics.csv") == without_speed(b / "metrics.csv")
        assert (a / "evaluations.csv").read_bytes() == (b / "evaluations.csv").read_bytes()
        states = [torch.load(x / "checkpoint.pt", weights_only=True)["agent"]["networks"] for x in (a, b)]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_run_says_what_it_took(tmp_path: Path, data: str) -> None:
    started = time.perf_counter()
    metrics = rows(train(tmp_path, data) / "seed_0" / "metrics.csv")
    passed = time.perf_counter() - started
    assert list(metrics[0])[-5:] == [*TOOK, "event"] == ["steps_per_s", "wall_s", "cpu_s", "gpu_memory_mib", "event"]
    assert 0 < sum(float(row["wall_s"]) for row in metrics) < passed
    assert all(float(row["cpu_s"]) >= 0 and row["gpu_memory_mib"] == "" for row in metrics)


def test_a_run_with_the_columns_of_before_is_read_and_goes_on(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tmp_path / "whole", data) / "seed_0"
    with monkeypatch.context() as patched:
        patched.setattr("utils.runs.log.METRICS_END", OLD_METRICS_END)
        part = train(tmp_path / "part", data, "--max_steps", "20") / "seed_0"
    assert "wall_s" not in rows(part / "metrics.csv")[0]
    assert read_run(part, Labels()).metrics["steps_per_s"].shape == (2,)
    train(tmp_path / "part", data, "--resume")
    assert "wall_s" not in rows(part / "metrics.csv")[-1]
    assert without_speed(whole / "metrics.csv") == without_speed(part / "metrics.csv")


def test_a_run_with_a_clone_resumes_bit_for_bit(tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    auto = ["--kappa", "auto", "--seeds", "0,4", "--hidden_dim", "32"]
    whole = train(tmp_path / "whole", data, *auto)
    shown = capsys.readouterr().out
    assert "(auto)" in shown and "there is --kappa auto" not in shown
    train(tmp_path / "cut", data, *auto, "--num_epochs", "2")
    cut = train(tmp_path / "cut", data, *auto, "--resume")
    for seed in ("seed_0", "seed_4"):
        a, b = without_speed(whole / seed / "metrics.csv"), without_speed(cut / seed / "metrics.csv")
        assert a == b and all(float(row["kappa"]) > 0 and float(row["clone_loss"]) > 0 for row in a)
        states = [torch.load(x / seed / "checkpoint.pt", weights_only=True)["agent"]["networks"] for x in (whole, cut)]
        assert states[0].keys() == states[1].keys() >= {"clone", "kappa"}
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        assert states[0]["kappa"].flatten()[1] == 20  # losses, at every second of 40 steps


def test_a_run_may_end_before_its_schedule_and_go_on(
    tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """--max_steps leaves a decaying learning rate the length of its schedule, which --num_epochs does not."""
    whole = train(tmp_path / "whole", data, "--lr_decay_full") / "seed_0"
    part = train(tmp_path / "part", data, "--lr_decay_full", "--max_steps", "20") / "seed_0"
    assert "normalised score" in capsys.readouterr().out
    assert [row["step"] for row in rows(part / "metrics.csv")] == ["10", "20"]
    assert read_run(part, Labels()).complete
    train(tmp_path / "part", data, "--lr_decay_full", "--resume")
    assert without_speed(whole / "metrics.csv") == without_speed(part / "metrics.csv")
    assert (whole / "evaluations.csv").read_bytes() == (part / "evaluations.csv").read_bytes()
    arguments = [*TASK, "--dataset", data, "--dir", str(tmp_path / "other"), *SHORT]
    assert "must be a multiple of num_steps_per_epoch, 10, not 15" in fails(capsys, *arguments, "--max_steps", "15")
    assert "must be at least 1, not 0" in fails(capsys, *arguments, "--max_steps", "0")


def execution_of(folder: Path) -> str:
    return json.loads((folder / "seed_0" / "config.json").read_text())["execution"]


def test_a_resumed_run_keeps_its_execution(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where `auto` would take another for the length that is asked for now."""
    monkeypatch.setattr(capture, "COMPILE_PAYS_FROM", 25)
    compiled: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
    folder = train(tmp_path, data, "--num_epochs", "2")
    assert execution_of(folder) == "eager"
    train(tmp_path, data, "--num_epochs", "3", "--resume")
    train(tmp_path, data, "--resume", "--execution", "compile")
    assert execution_of(folder) == "eager" and not compiled and "eager (as it began)" in capsys.readouterr().out
    other = train(tmp_path / "other", data, "--num_epochs", "3")
    compiled.clear()
    train(tmp_path / "other", data, "--num_epochs", "4", "--resume", "--execution", "eager")
    assert execution_of(other) == "compile" and compiled


def test_a_resumed_run_keeps_its_backend(tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train(tmp_path, data, "--num_epochs", "2")
    path = folder / "seed_0" / "config.json"
    path.write_text(path.read_text().replace('"backend": "mujoco"', '"backend": "d4rl"'))
    capsys.readouterr()
    line = fails(capsys, *TASK, "--dataset", data, "--dir", str(tmp_path), *SHORT, "--resume")
    assert "backend was 'd4rl', now 'mujoco'" in line


def test_the_execution_that_is_recorded_is_the_one_used(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it changes while the run goes on."""
    step = Runner.run

    def changing(self: Runner, steps: int, *until: object) -> None:
        step(self, steps, *until)
        self.mode = "compile"

    monkeypatch.setattr(Runner, "run", changing)
    config = json.loads((train(tmp_path, data) / "seed_0" / "config.json").read_text())
    assert config["execution"] == "compile" and config["run"]["execution"] == "auto" and config["seed"] == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:this CPU has no bfloat16 products")  # a line of its own, before the refusal's
def test_the_precision_is_recorded_and_stays(tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train(tmp_path, data, "--precision", "bfloat16", "--num_epochs", "2") / "seed_0"
    config = json.loads((folder / "config.json").read_text())
    assert config["run"]["precision"] == "bfloat16"
    exact = train(tmp_path / "exact", data, "--num_epochs", "2") / "seed_0"
    assert without_speed(exact / "metrics.csv") != without_speed(folder / "metrics.csv")
    train(tmp_path, data, "--precision", "bfloat16", "--resume")
    whole = train(tmp_path / "whole", data, "--precision", "bfloat16") / "seed_0"
    assert without_speed(folder / "metrics.csv") == without_speed(whole / "metrics.csv")
    arguments = [*TASK, "--dataset", data, "--dir", str(tmp_path), *SHORT, "--resume"]
    assert "precision was 'bfloat16', now 'float32'" in fails(capsys, *arguments)
    del config["run"]["precision"]  # as runs had it that were made before there was a choice
    (folder / "config.json").write_text(json.dumps(config))
    assert "precision was 'float32', now 'bfloat16'" in fails(capsys, *arguments, "--precision", "bfloat16")
    other = [*TASK, "--dataset", data, "--dir", str(tmp_path / "other"), *SHORT]
    assert "needs a CUDA device" in fails(capsys, *other, "--precision", "tf32")


def test_a_run_whose_rate_decays_cannot_be_lengthened(
    tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, data, "--lr_decay_full", "--num_epochs", "2")
    capsys.readouterr()
    arguments = [*TASK, "--dataset", data, "--dir", str(tmp_path), *SHORT, "--lr_decay_full", "--resume"]
    assert "num_epochs was 2, now 4" in fails(capsys, *arguments)


@pytest.mark.slow
def test_a_seed_that_lost_its_checkpoints_is_not_begun_anew_in_silence(
    tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train(tmp_path, data, "--seeds", "0,1")
    expected = (folder / "seed_0" / "evaluations.csv").read_bytes()
    arguments = [*TASK, "--dataset", data, "--dir", str(tmp_path), *SHORT, "--seeds", "0,1"]
    for seed in ("seed_1", "seed_0"):  # never half a run, never none
        for name in ("checkpoint.pt", "checkpoint.previous.pt"):
            (folder / seed / name).unlink()
        capsys.readouterr()
        line = fails(capsys, *arguments, "--resume")
        assert seed in line and "--overwrite" in line
    train(tmp_path, data, "--seeds", "0,1", "--overwrite")
    assert (folder / "seed_0" / "evaluations.csv").read_bytes() == expected
    assert [int(row["step"]) for row in rows(folder / "seed_1" / "metrics.csv")] == [10, 20, 30, 40]


@pytest.mark.slow
def test_sigterm_leaves_a_checkpoint_and_code_143(tmp_path: Path, data: str) -> None:
    command = [sys.executable, "run.py", *TASK, "--dataset", data, "--dir", str(tmp_path), *SHORT]
    endless = ["--num_epochs", "100000", "--execution", "eager"]
    process = subprocess.Popen([*command, *endless], cwd=ROOT, stdout=subprocess.DEVNULL)
    metrics = tmp_path / "diffcps" / "hopper-medium-v2" / "seed_0" / "metrics.csv"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 3) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=240) == 143
    state = torch.load(metrics.parent / "checkpoint.pt", weights_only=True)
    assert state["agent"]["step"] - state["runner"]["unread"] == int(rows(metrics)[-1]["step"])


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a bad command line; the one line on stderr."""
    try:
        code = run.main(list(arguments))
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and len(error) == 1, (code, error)
    return error[0]


def test_mistakes_on_the_command_line_are_one_line_and_code_2(
    tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    here = ["--dir", str(tmp_path), *SHORT]
    assert "unknown task 'hoper-medium-v2'" in fails(capsys, "--env_name", "hoper-medium-v2")
    assert "--frobnicate" in fails(capsys, *TASK, "--frobnicate", "1")
    assert "invalid float value" in fails(capsys, *TASK, "--tau", "small")
    assert "takes a number or auto, not 'small'" in fails(capsys, *TASK, "--kappa", "small")
    assert "--algo" in fails(capsys, *TASK, "--algo", "ppo")
    assert "tau must be at most 1" in fails(capsys, *TASK, "--tau", "3")
    assert "must be a number, not NaN" in fails(capsys, *TASK, "--kappa", "nan")
    assert "lambda_min must be at most lambda_max" in fails(capsys, *TASK, "--lambda_min", "5", "--lambda_max", "2")
    assert "exclude each other" in fails(capsys, *TASK, "--lr_decay", "--lr_decay_full")
    assert "--seeds" in fails(capsys, *TASK, "--dataset", data, *here, "--seeds", "3-1")
    assert "--seed must be at least 0" in fails(capsys, *TASK, "--dataset", data, *here, "--seed", "-1")
    assert "at least 0 minutes" in fails(capsys, *TASK, "--checkpoint_interval", "-1")
    assert "does not exist" in fails(capsys, *TASK, "--dataset", data, *here, "--device", "cuda:0")
    assert "not 'tpu'" in fails(capsys, *TASK, "--dataset", data, *here, "--device", "tpu")
    assert "no dataset file" in fails(capsys, *TASK, "--dataset", str(tmp_path / "none.hdf5"), *here)
    assert "unknown beta_schedule" in fails(capsys, *TASK, "--dataset", data, *here, "--beta_schedule", "x")
    assert "unknown reward_tune" in fails(capsys, *TASK, "--dataset", data, *here, "--reward_tune", "x")
    assert "unknown execution" in fails(capsys, *TASK, "--dataset", data, *here, "--execution", "x")
    assert "NAME=FILE" in fails(capsys, *TASK, "--dataset", data, *here, "--load_published", "actor.pth")
    assert not list(tmp_path.rglob("config.json"))


def test_a_misspelt_word_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean hopper-medium-v2?" in fails(capsys, "--env_name", "hoper-medium-v2")
    assert "did you mean diffusion_ql?" in fails(capsys, "--algo", "difusion_ql")
    assert "did you mean --kappa?" in fails(capsys, "--kapa", "1")
    assert "did you mean --resume?" in fails(capsys, "--resum")
    assert "--expectile is a setting of dtql, iql, idql; diffcps has none" in fails(capsys, "--expectile", "0.9")
    assert "--no-max_q_backup is a setting of" in fails(capsys, "--algo", "bc", "--no-max_q_backup")
    assert "--name takes one word" in fails(capsys, "--name", "a/b")
    assert "--name takes one word" in fails(capsys, "--name", "bcq")
    assert "--max_minutes must be above 0" in fails(capsys, "--max_minutes", "0")


def test_the_tasks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run.main(["--tasks"])
    assert stop.value.code == 0
    listed = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert tuple(listed) == hyperparameters.known_tasks()


def test_help_and_mistakes_import_no_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for words, code in ((["--help"], 0), (["--tasks"], 0), (["--kapa", "1"], 2), (["--seeds", "1"], 1)):
        command = [sys.executable, "run.py", *words]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert (done.returncode, "torch was imported" in done.stderr) == (code, code == 1), (words, done.stderr)


def test_folders_are_checked_before_data_are_read(
    tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = train(tmp_path, data, "--seeds", "0,1", "--num_epochs", "1")
    capsys.readouterr()
    monkeypatch.setattr(sources.D4RL, "load", None)
    here = [*TASK, "--dataset", data, *SHORT, "--dir"]
    assert "holds a run already; use --resume" in fails(capsys, *here, str(tmp_path))
    line = fails(capsys, *here, str(tmp_path), "--seeds", "0-3")
    assert "seed_0, seed_1 already; add the other seeds with --seeds 2,3" in line and "--overwrite" not in line
    line = fails(capsys, *here, str(tmp_path), "--seeds", "0-3", "--resume")
    assert "begin the other seeds apart, with --seeds 2,3 and without --resume" in line and "--overwrite" not in line
    assert "cannot write" in fails(capsys, *here, data)
    assert "cannot write" in fails(capsys, *here, str(tmp_path / ("x" * 300)))
    with closing(RunLock([folder / "seed_0"])):
        assert "is in use by process" in fails(capsys, *here, str(tmp_path), "--resume")
    assert not (folder / "seed_2").exists()


def test_two_settings_of_one_algorithm_lie_side_by_side(
    tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, data, "--num_epochs", "2")
    train(tmp_path, data, "--num_epochs", "2", "--name", "tight", "--kappa", "0.01")
    beside = tmp_path / "tight" / "diffcps" / "hopper-medium-v2"
    assert read_run(beside / "seed_0", Labels()).settings["kappa"] == 0.01
    assert (beside / "curve.png").exists()
    found, _ = find_runs([tmp_path], Labels())
    assert sorted(run.settings["kappa"] for run in found) == [0.01, 0.05]


def test_the_curve_shows_all_seeds_of_the_same_settings(tmp_path: Path, data: str) -> None:
    folder = tmp_path / "bc" / TASK[1]
    for seed, more in ((10, []), (9, []), (1, ["--learning_rate", "0.01"]), (2, [])):
        assert run.main([*tiny("bc", str(seed), data, tmp_path), *more]) == 0
    (folder / "seed_3").mkdir()
    assert [path.name for path in all_seeds([folder / "seed_2"])] == ["seed_2", "seed_9", "seed_10"]
    assert [path.name for path in all_seeds([folder / "seed_1"])] == ["seed_1"]


def test_bad_files_are_one_line_and_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def message(path: Path) -> str:
        return fails(capsys, *TASK, "--dataset", str(path), "--dir", str(tmp_path / "out"), *SHORT)

    good = d4rl_file(tmp_path / "good.hdf5")
    (tmp_path / "cut.hdf5").write_bytes(good.read_bytes()[:5000])
    assert "cut.hdf5" in message(tmp_path / "cut.hdf5")
    assert "rewards" in message(d4rl_file(tmp_path / "missing.hdf5", rewards=None))
    bad = np.full(300, 1.0)
    bad[17] = np.nan
    assert "rewards" in message(d4rl_file(tmp_path / "nan.hdf5", rewards=bad))
    assert "observations" in message(d4rl_file(tmp_path / "dims.hdf5", observations=np.zeros((300, 5), np.float32)))


def test_a_missing_d4rl_file_says_where_it_was_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nothing listens there: no network
    monkeypatch.setattr("urllib.request._opener", None)  # it is made once, with the proxies of that moment
    line = fails(capsys, *TASK, "--dir", str(tmp_path), *SHORT)
    assert str(tmp_path / "cache" / "hopper_medium-v2.hdf5") in line and "--dataset" in line


def test_an_earlier_run_is_never_overwritten_unasked(
    tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train(tmp_path, data)
    before = (folder / "seed_0" / "metrics.csv").read_bytes()
    capsys.readouterr()
    arguments = [*TASK, "--dataset", data, "--dir", str(tmp_path), *SHORT]
    assert "holds a run already" in fails(capsys, *arguments)
    line = fails(capsys, *arguments, "--resume", "--tau", "0.01")
    assert "tau was 0.005, now 0.01" in line
    assert (folder / "seed_0" / "metrics.csv").read_bytes() == before
    train(tmp_path, data, "--overwrite", "--num_epochs", "2")
    assert len(rows(folder / "seed_0" / "metrics.csv")) == 2


def test_a_bare_device_number_falls_back_to_the_cpu_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.warns(UserWarning, match="no CUDA device here"):
        assert options.resolve_device("0") == torch.device("cpu")
    assert options.resolve_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [options.resolve_device(t).index for t in ("auto", "1", "cuda:1", "cuda")] == [0, 1, 1, 0]
    with pytest.raises(UserError, match="devices 0 to 1"):
        options.resolve_device("2")


def test_every_published_flag_means_what_it_meant(capsys: pytest.CaptureFixture[str]) -> None:
    published = (
        "--env_name antmaze-umaze-v0 --device 0 --dir out --seed 3 --num_steps_per_epoch 500 --batch_size 128 "
        "--lr_decay --save_best_model --discount 0.9 --tau 0.01 --T 7 --beta_schedule linear "
        "--lambda_max 50 --lambda_min 0.7"
    )
    given = options.parse(published.split(), AGENTS)
    config = hyperparameters.get(given.algo, given.env_name, **options.overrides(given))
    chain = (config.diffusion_steps, config.beta_schedule, config.lambda_max, config.lambda_min)
    assert chain == (
        7,
        "linear",
        50,
        0.7,
    )
    assert (config.num_steps_per_epoch, config.batch_size, config.lr_decay) == (500, 128, True)
    assert (config.discount, config.tau, config.lambda_init) == (0.9, 0.01, 3.0)
    assert (given.seed, given.dir, given.save_best_model, given.device) == (3, "out", True, "0")
    assert run.main(["--env_name", "antmaze-umaze-v2", "--print_config", "--kappa", "0.5"]) == 0
    shown = {line.split()[0]: line.split(maxsplit=2)[1:] for line in capsys.readouterr().out.splitlines()}
    assert shown["kappa"] == ["0.5", "command line"] and shown["lambda_init"] == ["3.0", "task antmaze-umaze-v2"]
    assert shown["eval_episodes"] == ["100", "domain antmaze"] and shown["tau"] == ["0.005", "default"]


@pytest.mark.parametrize("algo", list(AGENTS))
def test_help_explains_every_setting_of_every_algorithm(algo: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run.main(["--algo", algo, "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and "what to run" in shown and f"settings of {algo}" in shown
    for name in hyperparameters.explain(algo, "hopper-medium-v2"):
        assert f"--{name}" in shown


def test_published_weights_can_be_the_start(tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    first = train(tmp_path / "first", data, "--save_best_model") / "seed_0"
    files = [f"{name}={first / f'{name}_4.pth'}" for name in ("actor", "critic")]
    second = train(tmp_path / "second", data, "--load_published", *files, "--num_epochs", "1") / "seed_0"
    assert rows(second / "metrics.csv")[0]["kl_loss"] != rows(first / "metrics.csv")[0]["kl_loss"]
    line = fails(capsys, *TASK, "--dataset", data, "--dir", str(tmp_path / "x"), *SHORT, "--load_published", files[0])
    assert "critic" in line


def test_the_dataset_of_another_task_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = d4rl_file(tmp_path / "cheetah.hdf5", "halfcheetah-medium-v2")
    with h5py.File(path) as file:
        assert file["observations"].shape[1] == 17
    assert "11" in fails(capsys, *TASK, "--dataset", str(path), "--dir", str(tmp_path), *SHORT)
