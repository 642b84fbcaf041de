"""Experiments: which runs they are, that run.py understands them, and one of them from plan to table."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib
import json
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

import hyperparameters
import run
from agents import AGENTS
from experiments import candidates, figure3_diffusion_steps, table1, table2_diffusion_steps
from experiments.study import planned_run, speed, study
from experiments.study.data import prepare_data
from experiments.study.planned_run import How, PlannedRun, continue_run, scaled, share_done
from experiments.study.speed import Speeds, shown
from tests.report.test_report import make_run
from tests.small import d4rl_file
from utils import options
from utils.behaviour import local
from utils.data import d4rl
from utils.errors import UserError
from utils.report.build import make_report
from utils.report.runs import Labels
from utils.report.tables import Choice
from utils.runs import checkpoint
from utils.training import threads

ARTEFACTS = ("table1", "table2_diffusion_steps", "figure3_diffusion_steps", "figure4_lambda_min",
             "figure5_policy_interval", "candidates")  # fmt: skip


def given(experiment: study.Experiment, *arguments: str) -> argparse.Namespace:
    return study.build_parser(experiment, "x").parse_args(["plan", *arguments])


def test_the_grids():
    options_ = given(table1.EXPERIMENT, "--algos", "diffcps", "dtql", "--split_seeds")
    runs = table1.EXPERIMENT.runs(options_)
    assert len(runs) == 15 * 5 * 2 and {run.env_name for run in runs} == set(hyperparameters.PAPER_TASKS)
    table2 = table2_diffusion_steps.EXPERIMENT
    runs = table2.runs(given(table2))
    assert len(runs) == 15 * 3 and {run.config.diffusion_steps for run in runs} == {5, 15, 20}
    assert all(run.seeds == (0, 1, 2) for run in runs)


def test_variants_by_name(capsys):
    table2 = table2_diffusion_steps.EXPERIMENT
    names = ("diffusion_steps=15", "diffusion_steps=20")
    chosen = table2.runs(given(table2, "--tasks", "hopper-medium-v2", "--variants", *names))
    assert [run.config.diffusion_steps for run in chosen] == [15, 20]
    options_ = ["plan", "--dataset", "local", "--variants", "diffusion_steps=16"]
    assert study.main(table2, "table2_diffusion_steps", options_) == 2
    known = " ".join(f"diffusion_steps={n}" for n in (5, 15, 20))
    assert f"no such variant here, only {known}" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        study.main(table2, "table2_diffusion_steps", ["show", "--kept", "X", "--variants", "diffusion_steps=15"])
    assert "--variants goes with planned runs" in capsys.readouterr().err


def test_figure_3_shows_what_table_2_has_trained(tmp_path):
    def folders(experiment: study.Experiment) -> set[Path]:
        planned = study.Study(experiment, given(experiment, "--dir", str(tmp_path), "--dataset", "local"))
        return {folder for run in planned.runs for folder in run.folders(planned.base)}

    assert folders(figure3_diffusion_steps.EXPERIMENT) < folders(table2_diffusion_steps.EXPERIMENT)


@pytest.mark.parametrize("name", ARTEFACTS)
@pytest.mark.parametrize("scale", ["1", "0.01", "0.00001"])
def test_run_understands_every_command(tmp_path, name, scale):
    """The settings that run.py's own parser makes of each command are those that the experiment means."""
    for task in hyperparameters.PAPER_TASKS:
        (tmp_path / f"{task}.hdf5").touch()
    experiment = importlib.import_module(f"experiments.{name}").EXPERIMENT
    for algo in AGENTS:
        if any(not hasattr(hyperparameters.CONFIGS[algo](), setting) for setting in experiment.grid):
            continue
        chosen = given(experiment, "--dataset", str(tmp_path), "--scale", scale, "--algos", algo, "--threads", "1")
        for wanted in experiment.runs(chosen):
            parsed = options.parse(wanted.command(tmp_path / "base", How.of(chosen)), AGENTS)
            assert hyperparameters.get(algo, wanted.env_name, **options.overrides(parsed)) == wanted.config
            assert tuple(options.parse_seeds(parsed.seeds)) == wanted.seeds
            assert Path(parsed.dir) / algo / wanted.env_name / "seed_0" == wanted.folders(tmp_path / "base")[0]
            assert parsed.dataset == str(tmp_path / f"{wanted.env_name}.hdf5")


def test_switches_are_passed_both_ways(tmp_path):
    chosen = given(table1.EXPERIMENT, "--dataset", "local", "--local_size", "500")
    for value in (True, False):
        wanted = PlannedRun("diffcps", "antmaze-umaze-v0", (0,), {"max_q_backup": value}, {})
        parsed = options.parse(wanted.command(tmp_path, How.of(chosen)), AGENTS)
        assert parsed.max_q_backup is value and (parsed.dataset, parsed.local_size) == ("local", 500)


def test_scaled_lengths():
    assert scaled("diffcps", "hopper-medium-v2", 1.0) == {}
    assert scaled("diffcps", "hopper-medium-v2", 0.01) == {
        "num_epochs": 20, "num_steps_per_epoch": 1000, "eval_interval": 2, "eval_episodes": 2,
    }  # fmt: skip
    assert scaled("dtql", "antmaze-umaze-v0", 0.1) == {
        "num_epochs": 50, "num_steps_per_epoch": 1000, "eval_interval": 5, "eval_episodes": 10, "pretrain_epochs": 5,
    }  # fmt: skip
    assert scaled("bear", "hopper-medium-v2", 0.01)["warmup_steps"] == 400
    tiny = scaled("diffcps", "hopper-medium-v2", 0.0001)
    assert (tiny["num_epochs"], tiny["num_steps_per_epoch"], tiny["eval_interval"]) == (10, 20, 1)
    for wrong in (0.0, -1.0, 2.0):
        with pytest.raises(UserError, match="--scale"):
            scaled("diffcps", "hopper-medium-v2", wrong)


def test_each_set_is_fetched_once_before_the_runs(monkeypatch):
    asked = []

    def load(env_name: str, size: int, progress: bool) -> None:
        asked.append((env_name, size))
        if env_name == "walker2d-medium-v2":
            raise UserError("no policy for it")

    monkeypatch.setattr(local, "load", load)
    monkeypatch.setattr(d4rl, "load", lambda env_name, path: asked.append((env_name, path)))
    tasks = ["hopper-medium-v2", "walker2d-medium-v2", "hopper-medium-v2"]
    assert prepare_data("local", 500, tasks) == {"walker2d-medium-v2": "no policy for it"}
    assert asked == [("hopper-medium-v2", 500), ("walker2d-medium-v2", 500)]
    asked.clear()
    prepare_data("d4rl", 500, tasks[:1])
    assert asked == [("hopper-medium-v2", None)]


# --- Continuing -----------------------------------------------------------------------------------------


def saved_at(path, step):
    """The least that is a checkpoint."""
    owner = {"algo": "diffcps", "env_name": "hopper-medium-v2", "seed": 0}
    checkpoint.save(path, {"format": checkpoint.FORMAT, "owner": owner, "agent": {"step": step}})


def test_continuing_takes_each_seed_from_where_it_is(tmp_path, monkeypatch):
    """Seeds 0 and 3 saved at one step, 1 at another, 2 has nothing to go on from, 4 is complete."""
    base, calls = tmp_path / "runs", []
    for seed, step in ((0, 20), (1, 40), (2, None), (3, 20)):
        folder = make_run(base, [1.0], seed=seed, planned=6)
        if step is not None:
            with_checkpoint(folder, step)
    with_checkpoint(make_run(base, [1.0, 2.0, 3.0], seed=4), 60)
    monkeypatch.setattr(run, "main", lambda argv: calls.append(argv) or 0)
    wanted = PlannedRun("diffcps", "hopper-medium-v2", (0, 1, 2, 3, 4), {}, {
        "num_epochs": 6, "num_steps_per_epoch": 10, "eval_interval": 2, "eval_episodes": 2,
    })  # fmt: skip
    command = wanted.command(tmp_path, How())
    command = (*command[: command.index("--dir")], "--dir", str(base), *command[command.index("--dir") + 2 :])
    assert continue_run(command) == 0
    seen = [(options.parse_seeds(p.seeds), p.resume, p.overwrite) for p in (options.parse(c, AGENTS) for c in calls)]
    assert seen == [([0, 3], True, False), ([1], True, False), ([2], False, True)]
    monkeypatch.setattr(run, "main", lambda argv: 143)
    assert continue_run(command) == 143  # and the groups that follow are not begun


def test_seeds_with_a_step_in_common_go_on_together(tmp_path, monkeypatch):
    """Seed 1 was not saved any more when a kill came: seed 0 goes back to the step before, not on by itself."""
    base, calls = tmp_path / "runs", []
    for seed, saved in ((0, {"checkpoint.pt": 40, "checkpoint.previous.pt": 20}), (1, {"checkpoint.pt": 20})):
        folder = make_run(base, [1.0], seed=seed, planned=6)
        for name, step in saved.items():
            saved_at(folder / name, step)
    monkeypatch.setattr(run, "main", lambda argv: calls.append(argv) or 0)
    assert continue_run(["--env_name", "hopper-medium-v2", "--dir", str(base), "--seeds", "0,1"]) == 0
    (parsed,) = (options.parse(command, AGENTS) for command in calls)
    assert options.parse_seeds(parsed.seeds) == [0, 1] and parsed.resume


def test_ray_that_is_not_installed_is_said_before_any_set_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("utils.sweep.ray_is_installed", lambda: False)

    def collected(*_):
        assert "ray is not installed" in capsys.readouterr().err
        raise UserError("as planned")

    monkeypatch.setattr(study, "prepare_data", collected)
    chosen = given(table1.EXPERIMENT, "--dir", str(tmp_path), "--dataset", "local", "--ray", "local")
    with pytest.raises(UserError, match="as planned"):
        study.Study(table1.EXPERIMENT, chosen).run()


def with_checkpoint(folder: Path, step: int) -> Path:
    saved_at(folder / "checkpoint.pt", step)
    return folder


def test_share_done(tmp_path):
    assert share_done(tmp_path / "nothing", 60) == 0
    assert share_done(make_run(tmp_path, [1.0, 2.0], seed=0, planned=6), 60) == pytest.approx(40 / 60)
    assert share_done(with_checkpoint(make_run(tmp_path, [1.0, 2.0, 3.0], seed=1), 60), 60) == 1
    folder = with_checkpoint(make_run(tmp_path, [1.0, 2.0, 3.0], seed=2, planned=6), 60)
    lines = (folder / "evaluations.csv").read_text().splitlines()
    (folder / "evaluations.csv").write_text("\n".join(lines[:-2]) + "\n")
    assert share_done(folder, 60) == 0.99  # trained to the end, but killed before the last evaluation
    with open(folder / "evaluations.csv", "a") as file:
        file.write("60,0,")  # half a row, as a reader may find it
    assert share_done(folder, 60) == 0
    shorter = with_checkpoint(make_run(tmp_path, [1.0, 2.0, 3.0], seed=3), 60)
    assert share_done(shorter, 120) == 0.5  # to be prolonged


def test_a_run_killed_between_its_last_evaluation_and_its_last_checkpoint_is_not_done(tmp_path, monkeypatch):
    folder, calls = make_run(tmp_path, [1.0, 2.0, 3.0]), []
    assert share_done(folder, 60) == 0.99
    with_checkpoint(folder, 40)  # older weights than those that were evaluated
    assert share_done(folder, 60) == 0.99 and planned_run.is_evaluated(folder, 60)
    monkeypatch.setattr(run, "main", lambda argv: calls.append(argv) or 0)
    length = ("--num_epochs", "6", "--num_steps_per_epoch", "10")
    command = ["--env_name", "hopper-medium-v2", "--dir", str(tmp_path), *length]
    assert continue_run(command) == 0 and calls == [[*command, "--resume"]]
    with_checkpoint(folder, 60)
    assert share_done(folder, 60) == 1 and continue_run(command) == 0 and len(calls) == 1


# --- Speeds ---------------------------------------------------------------------------------------------


def test_speeds_come_from_earlier_runs_of_the_same_kind(tmp_path):
    folder = make_run(tmp_path, [1.0, 2.0], run_options={"seeds": "0-1", "seed": 0})
    header, *rows = (folder / "metrics.csv").read_text().splitlines()
    rates = (1.0, 30.0, 50.0, 40.0)  # the first includes the warm-up
    rows = [f"{row.rsplit(',', 5)[0]},{rate},,,," for row, rate in zip(rows, rates, strict=True)]
    (folder / "metrics.csv").write_text("\n".join([header, *rows]) + "\n")
    speeds = Speeds(tmp_path, "cpu", measure=False)
    config = hyperparameters.get("diffcps", "hopper-medium-v2")
    assert speeds.get("diffcps", "hopper-medium-v2", config, 2) == (40, "earlier runs")
    assert speeds.get("diffcps", "hopper-medium-v2", config, 1) == (None, "–")
    assert speeds.get("diffcps", "walker2d-medium-v2", config, 2) == (None, "–")
    other = dataclasses.replace(config, diffusion_steps=15)
    assert speeds.get("diffcps", "hopper-medium-v2", other, 2) == (None, "–")


def test_an_unknown_speed_can_be_timed(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.study.speed.SECONDS", 0.01)
    config = dataclasses.replace(hyperparameters.get("diffusion_bc", "hopper-medium-v2"), batch_size=8)
    rate, source = Speeds(tmp_path / "none", "cpu", measure=True).get("diffusion_bc", "hopper-medium-v2", config, 2)
    assert source == "timed now" and 1 < rate < 1e6


# --- From plan to table ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    d4rl_file(folder / "hopper-medium.hdf5")
    return folder


@pytest.mark.slow
def test_one_experiment_from_plan_to_table(tmp_path, data, capsys):
    arguments = ["--dataset", str(data), "--scale", "0.000001", "--seeds", "0-1", "--device", "cpu", "--threads", "1",
                 "--dir", str(tmp_path), "--tasks", "hopper-medium-v2", "walker2d-medium-v2"]  # fmt: skip

    def act(action: str, *more: str) -> tuple[int, str]:
        code = study.main(table1.EXPERIMENT, "table1", [action, *arguments, *more])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    code, text = act("show")
    assert code == 2 and "nothing was run yet" in text and text.count("\n") == 1
    code, text = act("plan")
    assert (
        code == 0 and "no data for walker2d-medium-v2" in text and "1 runs of unknown speed" in text and " ? " in text
    )
    code, text = act("run")
    assert code == 0 and "1 of 1 runs done" in text and "left out: no data for walker2d-medium-v2" in text
    (log,) = tmp_path.rglob("logs/*.txt")
    assert "exit code 0" in log.read_text()
    before = log.read_text()
    assert act("run")[0] == 0 and log.read_text() == before  # nothing was begun again
    code, text = act("plan")
    assert "0.00 hours of training left" in text and " done " in text and "earlier runs" in text
    assert "took" in text and "times their training" in text
    code, text = act(
        "show", "--label", f"toy={data}", "--out", str(tmp_path / "out"), "--html", str(tmp_path / "r.html")
    )
    assert (
        code == 0
        and "All protocols, data: toy" in text
        and "| hopper-medium-v2 | diffcps | 10 of 2,000,000 | 0,1 |" in text
    )
    assert (tmp_path / "r.html").read_text().count("<img ") == 2  # of fewer than four runs no profile
    assert (tmp_path / "out" / "figures" / "toy-learning_curves.pdf").exists()
    assert study.main(table1.EXPERIMENT, "table1", ["plan", "--tasks", "hopper-v9"]) == 2
    assert "unknown task 'hopper-v9'" in capsys.readouterr().err


def test_slow_steps_and_evaluations_are_planned_honestly(tmp_path, monkeypatch):
    assert [shown(rate) for rate in (0.031, 0.96, 9.4, 76.2, 1234.5)] == ["0.031", "0.96", "9.4", "76", "1234"]
    length = {"num_epochs": 5, "num_steps_per_epoch": 10, "eval_interval": 2, "eval_episodes": 2}
    run = PlannedRun("bc", "hopper-medium-v2", (0, 1), {}, length)
    assert run.evaluations == 3
    speeds = Speeds(tmp_path, "cpu", measure=True)
    monkeypatch.setattr(speed, "SECONDS", 0.05)
    assert 0 < speeds.evaluation("bc", "hopper-medium-v2", run.config, 2) < 1000
    assert speeds.evaluation("bc", "pen-human-v1", run.config, 2) is None  # no environment here
    assert Speeds(tmp_path, "cpu", measure=False).evaluation("bc", "hopper-medium-v2", run.config, 2) is None


def test_workers_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with study.cores_shared(4):
        assert os.environ["OMP_NUM_THREADS"] == "1" and threads.candidates() == [1]
    with study.cores_shared(2):
        assert threads.candidates() == [1, 2]
    with study.cores_shared(0):
        assert "OMP_NUM_THREADS" not in os.environ
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    with study.cores_shared(2):
        assert os.environ["OMP_NUM_THREADS"] == "5"


def test_candidates_are_compared_on_the_same_trained_policy(tmp_path, data, capsys):
    """With the trained run's own number of candidates its last evaluation comes out again, bit for bit."""
    command = ["--env_name", "hopper-medium-v2", "--dataset", str(data / "hopper-medium.hdf5"), "--dir",
               str(tmp_path / "own"), "--num_epochs", "1", "--num_steps_per_epoch", "10", "--eval_interval", "1",
               "--eval_episodes", "3", "--batch_size", "16", "--device", "cpu", "--quiet"]  # fmt: skip
    assert candidates.train_and_evaluate(command) == 0
    tail = Path("diffcps") / "hopper-medium-v2" / "seed_0"
    found = {n: tmp_path / f"action_candidates={n}" / tail for n in candidates.CANDIDATES}
    assert candidates.EXPERIMENT.evaluated(tmp_path / "own" / tail) == list(found.values())

    def rows(folder: Path) -> list[dict[str, str]]:
        with open(folder / "evaluations.csv", newline="") as file:
            return list(csv.DictReader(file))

    assert rows(found[50]) == rows(tmp_path / "own" / tail)
    assert all(len(rows(folder)) == 3 and planned_run.is_evaluated(folder, 10) for folder in found.values())
    assert len({json.dumps(rows(folder)) for folder in found.values()}) == 4
    times = [folder.stat().st_mtime_ns for folder in found.values()]
    assert candidates.train_and_evaluate(command) == 0
    assert [folder.stat().st_mtime_ns for folder in found.values()] == times  # nothing was evaluated again


def test_what_is_compared_for_each_algorithm():
    assert [v["guidance_scale"] for v in candidates.variants("qgpo", "hopper-medium-v2")] == [0, 1, 2, 3, 5, 8, 10]
    assert [v["guidance_scale"] for v in candidates.variants("qgpo", "antmaze-umaze-v0")] == [1, 1.5, 2, 2.5, 3, 4]
    assert candidates.variants("idql", "hopper-medium-v2")[-2:] == [
        {"action_candidates": 256},
        {"greedy_action": False},
    ]
    assert candidates.variants("dtql", "hopper-medium-v2") == [{"action_candidates": n} for n in (1, 10, 50, 200)]
    with pytest.raises(UserError, match="td3_bc has one way of acting"):
        study.Study(candidates.EXPERIMENT, given(candidates.EXPERIMENT, "--algos", "td3_bc"))


def test_a_setting_is_chosen_on_one_half_of_the_episodes_and_scored_on_the_other():
    """Three settings, two seeds, four episodes: the first wins on even, the second on odd, the third on all."""
    first, second, third = [10, 0, 10, 0], [0, 10, 0, 10], [6, 6, 6, 8]
    episodes = np.array([[first, first], [second, second], [third, [5, 6, 6, 8]]], dtype=float)
    best, picked, held_out = candidates.choose(episodes)
    assert best == 2 and picked == [0, 1]
    assert held_out.tolist() == [0, 0]  # each choice has nothing on the half that it did not see
    best, picked, held_out = candidates.choose(episodes[1:])
    assert (best, picked) == (1, [1, 0]) and held_out.tolist() == [(7 + 0) / 2, (7 + 0) / 2]


@pytest.mark.slow
def test_finished_runs_are_scored_with_every_setting(tmp_path, data, capsys):
    command = ["--algo", "idql", "--env_name", "hopper-medium-v2", "--dataset", str(data / "hopper-medium.hdf5"),
               "--num_epochs", "1", "--num_steps_per_epoch", "4", "--eval_interval", "1", "--eval_episodes", "4",
               "--batch_size", "16", "--hidden_dim", "16", "--device", "cpu", "--quiet"]  # fmt: skip
    assert run.main([*command, "--dir", str(tmp_path / "a"), "--seeds", "0,1"]) == 0
    scored = ["score", str(tmp_path / "a"), "--to", str(tmp_path / "scored"), "--device", "cpu", "--label",
              f"small={data}", "--html", str(tmp_path / "page.html")]  # fmt: skip
    capsys.readouterr()
    assert candidates.command(scored) == 0
    shown = capsys.readouterr().out
    tail = Path("idql") / "hopper-medium-v2" / "seed_1" / "evaluations.csv"
    found = {path.parents[3].name: path for path in (tmp_path / "scored").rglob("seed_1/evaluations.csv")}
    returns = {name: np.loadtxt(path, delimiter=",", skiprows=1, usecols=2) for name, path in found.items()}
    own = np.loadtxt(tmp_path / "a" / tail, delimiter=",", skiprows=1, usecols=2)  # there both seeds act at once
    assert len(found) == 7 and returns["action_candidates=64"] == pytest.approx(own, rel=1e-4)
    assert returns["greedy_action=False"].tolist() != returns["action_candidates=64"].tolist()
    assert returns["action_candidates=1"].tolist() != returns["action_candidates=64"].tolist()
    assert "Settings of acting chosen by task, data: small" in shown and "action_candidates=256" in shown
    page = (tmp_path / "page.html").read_text()
    assert "greedy_action=False" in page
    assert candidates.command(["compare", str(tmp_path / "scored"), "--label", f"small={data}"]) == 0
    assert capsys.readouterr().out.strip() == shown.strip().removesuffix(f"wrote {tmp_path / 'page.html'}").strip()
    assert candidates.command(["compare", str(tmp_path / "scored"), "--out", str(tmp_path / "out")]) == 0
    assert "Settings of acting chosen" in next((tmp_path / "out" / "tables").glob("files*.md")).read_text()
    more = [*scored[:4], "--device", "cpu", "--eval_episodes", "2"]
    assert candidates.command(more) == 0
    assert len((tmp_path / "scored" / "action_candidates=16" / tail).read_text().splitlines()) == 1 + 2
    assert run.main([*command, "--dir", str(tmp_path / "b" / "c")]) == 0
    capsys.readouterr()
    assert candidates.command(["score", str(tmp_path), "--to", str(tmp_path / "scored"), "--device", "cpu"]) == 2
    assert "are one method, task and seed" in capsys.readouterr().err
    assert candidates.command(["score", str(tmp_path / "nowhere"), "--to", str(tmp_path), "--device", "cpu"]) == 2
    assert "no checkpoint.pt below" in capsys.readouterr().err


def test_the_guidance_scale_is_set_at_evaluation(tmp_path, data):
    command = ["--algo", "qgpo", "--env_name", "hopper-medium-v2", "--dataset", str(data / "hopper-medium.hdf5"),
               "--num_epochs", "1", "--num_steps_per_epoch", "4", "--pretrain_epochs", "1", "--eval_interval", "1",
               "--eval_episodes", "2", "--batch_size", "16", "--hidden_dim", "16", "--support_actions", "2",
               "--diffusion_steps", "3", "--device", "cpu", "--quiet", "--dir", str(tmp_path / "own")]  # fmt: skip
    assert candidates.train_and_evaluate(command) == 0
    tail = Path("qgpo") / "hopper-medium-v2" / "seed_0"
    found = {folder.parents[2].name: (folder / "evaluations.csv").read_text()
             for folder in candidates.EXPERIMENT.evaluated(tmp_path / "own" / tail)}  # fmt: skip
    assert found["guidance_scale=1"] == (tmp_path / "own" / tail / "evaluations.csv").read_text()
    assert len(set(found.values())) == 7


def test_table_2_is_set_beside_the_papers(tmp_path):
    for steps in (5, 15):
        for env_name, score in (("hopper-medium-v2", 80.0 + steps), ("walker2d-medium-v2", 90.0)):
            make_run(tmp_path / str(steps), [score], env_name=env_name, diffusion_steps=steps)
    report = make_report([tmp_path], Labels(), Choice(), ("diffusion_steps",), extra=table2_diffusion_steps.averages)
    table = report.tables("official D4RL")[-1]
    assert [list(row) for row in table.rows] == [
        ["average-locomotion (2 of 9)", "diffcps", "5", "87.5", "92.0", "−4.5"],
        ["average-locomotion (2 of 9)", "diffcps", "15", "92.5", "87.5", "+5.0"],
    ]
    drawn = {name: figure for name, _, figure in report.figures("official D4RL")}
    lines = [container.lines[0].get_ydata().tolist() for container in drawn["sensitivity"].axes[0].containers]
    assert lines == [[85, 95], [90, 90]]
    for figure in drawn.values():
        plt.close(figure)
