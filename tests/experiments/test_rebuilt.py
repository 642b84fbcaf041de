"""The table on rebuilt sets: which runs it has, that they go on, and what is shown of known ones."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import run
from agents import AGENTS
from experiments import rebuilt, table1
from experiments.study import study
from experiments.study.planned_run import How, continue_run, is_complete, share_done, shortened
from tests.experiments.test_experiments import with_checkpoint
from tests.report.test_report import make_run
from tests.small import d4rl_file
from utils import options
from utils.errors import UserError
from utils.report.__main__ import main as report
from utils.report.build import make_report
from utils.report.figures import _spread
from utils.report.kept import PLAYED
from utils.report.overview import AGAIN, UNCHOSEN, overview
from utils.report.runs import Labels
from utils.report.tables import Choice, Table
from utils.runs.columns import PLAYED_COLUMNS, PLAYED_HOW
from utils.runs.played import played_rows, played_scores, save_played

ROWS = {"hopper-medium-v2": 1_000_000, "walker2d-medium-v2": 250_000}


def given(protocol: str, *arguments: str) -> argparse.Namespace:
    return study.build_parser(rebuilt.PROTOCOLS[protocol], "x").parse_args(["plan", "--dataset", "X", *arguments])


def test_the_runs_of_each_protocol():
    main, antmaze, long = (rebuilt.PROTOCOLS[name].runs(given(name)) for name in ("main", "antmaze", "long"))
    assert [run.env_name for run in main] == [
        *7 * ["hopper-medium-v2"], *7 * ["walker2d-medium-v2"], *7 * ["halfcheetah-medium-expert-v2"],
    ]  # fmt: skip
    assert [run.algo for run in main] == 3 * list(rebuilt.ALGORITHMS)
    assert all(run.steps == 100_000 and run.seeds == (0, 1, 2) for run in main)
    assert {(run.config.eval_interval, run.config.eval_episodes) for run in main} == {(10, 10)}
    assert {run.config.num_epochs for run in main if run.algo == "diffcps"} == {2000}  # the schedule is not squeezed
    assert [run.updates for run in main if run.algo == "dtql"] == 3 * [150_000]  # with its pretraining
    assert [(run.algo, run.steps, run.config.eval_episodes) for run in antmaze] == [
        (algo, 50_000, 50) for algo in ("diffusion_bc", "iql", "diffcps", "diffusion_ql")
    ]
    assert [(run.algo, run.seeds, run.steps, run.steps // 1000 // run.config.eval_interval) for run in long] == [
        ("diffcps", (0,), 1_000_000, 20)
    ]


@pytest.mark.parametrize("scale", ["1", "0.01", "0.001"])
@pytest.mark.parametrize("protocol", rebuilt.PROTOCOLS)
def test_run_understands_every_command(tmp_path, protocol, scale):
    experiment = rebuilt.PROTOCOLS[protocol]
    for task in experiment.tasks:
        (tmp_path / f"{task}.hdf5").touch()
    chosen = given(protocol, "--scale", scale, "--threads", "1", "--precision", "bfloat16")
    chosen.dataset = str(tmp_path)
    for wanted in experiment.runs(chosen):
        parsed = options.parse(wanted.command(tmp_path / "base", How.of(chosen)), AGENTS)
        config, _ = options.resolve_settings(parsed)
        assert config == wanted.config and options.steps_to_train(parsed, config) == wanted.steps
        assert (parsed.precision, parsed.threads) == ("bfloat16", 1)
        share = float(scale)
        assert wanted.steps == share * experiment.max_steps
        assert wanted.steps / config.num_steps_per_epoch / config.eval_interval == {"antmaze": 5, "long": 20}.get(
            protocol, 10
        )


def test_other_experiments_keep_their_length():
    runs = table1.EXPERIMENT.runs(study.build_parser(table1.EXPERIMENT, "x").parse_args(["plan"]))
    assert all(not run.length and run.max_steps is None for run in runs)
    shorter = study.build_parser(table1.EXPERIMENT, "x").parse_args(["plan", "--max_steps", "3000"])
    (first, *_) = table1.EXPERIMENT.runs(shorter)
    assert (first.steps, first.config.eval_interval) == (3000, 50)


def test_lengths_in_numbers():
    every = {"eval_interval": 10, "eval_episodes": 10}
    assert shortened("bc", "hopper-medium-v2", 1, 100_000, every) == (every, 100_000)
    assert shortened("bear", "hopper-medium-v2", 0.01, 100_000, every) == (
        {"eval_interval": 10, "eval_episodes": 2, "num_steps_per_epoch": 10, "warmup_steps": 400}, 1000,
    )  # fmt: skip
    for wrong, match in ((0, "multiple of"), (1500, "multiple of num_steps_per_epoch, 1000"), (-1000, "multiple")):
        with pytest.raises(UserError, match=match):
            shortened("bc", "hopper-medium-v2", 1, wrong, {})
    with pytest.raises(UserError, match="--scale"):
        shortened("bc", "hopper-medium-v2", 2, 1000, {})


# --- Going on -------------------------------------------------------------------------------------------


def test_a_finished_run_is_not_finished_for_more_steps(tmp_path, monkeypatch):
    folder = make_run(tmp_path, [1.0, 2.0, 3.0], planned=10, run_options={"max_steps": 60})
    with_checkpoint(folder, 60)
    assert is_complete(folder, 60) and not is_complete(folder, 80) and share_done(folder, 80) == 0.75
    calls: list[Sequence[str]] = []
    monkeypatch.setattr(run, "main", lambda argv: calls.append(argv) or 0)
    command = ["--env_name", "hopper-medium-v2", "--dir", str(tmp_path), "--num_epochs", "10",
               "--num_steps_per_epoch", "10", "--max_steps"]  # fmt: skip
    assert continue_run([*command, "60"]) == 0 and calls == []
    assert continue_run([*command, "80"]) == 0 and calls == [[*command, "80", "--resume"]]


def test_a_run_that_is_to_go_further_is_complete_for_fewer_steps(tmp_path):
    folder = make_run(tmp_path, [1.0, 2.0], planned=10, run_options={"max_steps": 80})
    with_checkpoint(folder, 40)
    assert is_complete(folder, 40) and share_done(folder, 40) == 1 and not is_complete(folder, 80)


@pytest.mark.slow
def test_runs_go_on_as_if_they_had_never_ended(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    d4rl_file(tmp_path / "data" / "hopper-medium-v2.hdf5", rows=300)

    def act(action: str, where: str, steps: int, *more: str) -> str:
        arguments = ["--dataset", str(tmp_path / "data"), "--scale", "0.001", "--seeds", "0-1", "--device", "cpu",
                     "--threads", "1", "--execution", "eager", "--dir", str(tmp_path / where), "--tasks",
                     "hopper-medium-v2", "--algos", "iql", "--max_steps", str(steps)]  # fmt: skip
        assert rebuilt.command([action, *arguments, *more]) == 0
        return capsys.readouterr().out

    def rows(where: str, seed: int) -> list[dict[str, str]]:
        (path,) = (tmp_path / where).rglob(f"own/iql/hopper-medium-v2/seed_{seed}/evaluations.csv")
        with open(path, newline="") as file:
            return list(csv.DictReader(file))

    assert "1 of 1 runs done" in act("run", "parts", 20_000)
    assert {int(row["step"]) for row in rows("parts", 0)} == {10, 20}
    assert "  done  " in act("plan", "parts", 20_000) and "  50 %  " in act("plan", "parts", 40_000)
    assert "1 of 1 runs done" in act("run", "parts", 40_000)
    assert "  done  " in act("plan", "parts", 20_000)  # the shorter length, which it has passed
    act("run", "whole", 40_000)
    for seed in (0, 1):  # IQL's rate decays: its schedule is as long in both
        assert rows("parts", seed) == rows("whole", seed)
        assert {int(row["step"]) for row in rows("parts", seed)} == {10, 20, 30, 40}
    shown = act("show", "parts", 40_000, "--out", str(tmp_path / "out"))
    assert "### Overview, data: rebuilt" in shown and "| hopper-medium-v2 | 300 | 40 | last |" in shown
    assert (tmp_path / "out" / "figures" / "rebuilt-learning_curves.png").exists()


def test_the_command_line(tmp_path, capsys):
    assert rebuilt.command(["plan", "--protocol", "long", "--dataset", str(tmp_path), "--dir", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "own/diffcps/hopper-medium-v2/seeds_0  1,000,000" in text and f"{tmp_path}/rebuilt_long" in text
    with pytest.raises(SystemExit, match="2"):
        rebuilt.command(["plan"])
    assert "--dataset" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        rebuilt.command(["plan", "--protocol", "short"])
    assert rebuilt.command(["plan", "--dataset", str(tmp_path), "--max_steps", "1500"]) == 2
    assert "multiple of num_steps_per_epoch" in capsys.readouterr().err


# --- What is shown --------------------------------------------------------------------------------------


def known_run(
    base: Path,
    scores: Sequence[float],
    algo: str,
    seed: int,
    env_name: str = "hopper-medium-v2",
    steps: int = 0,
    precision: str = "float32",
) -> Path:
    path = f"/sets/{env_name}.hdf5"
    dataset = {"source": path, "path": path, "rows": ROWS[env_name], "behaviour_score": 51.56}
    return make_run(base, scores, algo=algo, seed=seed, env_name=env_name, dataset=dataset, num_epochs=2000,
                    run_options={"max_steps": steps or 20 * len(scores), "precision": precision})  # fmt: skip


def shown(base: Path, partial: bool = False) -> tuple[list[str], Table]:
    labels = rebuilt.labels([base, *sorted(path.parent for path in base.rglob("config.json"))])
    report = make_report([base], Labels.parse(labels), Choice(), partial=partial, extra=rebuilt.tables)
    return report.labels, report.tables("rebuilt, full size")[-1]


def test_the_table_of_known_runs(tmp_path):
    for seed, scores in enumerate(([10, 20, 30, 40, 50, 60], [10, 80, 30, 40, 50, 40])):
        known_run(tmp_path, scores, "diffcps", seed)
        known_run(tmp_path, [score + 1 for score in scores], "dtql", seed)
    labels, table = shown(tmp_path)
    assert labels == ["rebuilt, full size"]
    assert table.columns == ["set", "rows", "gradient steps", "score", "diffcps", "dtql", "the data"]
    # Means of last 5: 40 and 48. The paper's Table 1 has no DTQL.
    assert [list(row) for row in table.rows] == [
        ["hopper-medium-v2", "1,000,000", "120", "last", "50.0 ± 10.0", "51.0 ± 10.0", "51.6"],
        ["", "", "", "mean of last 5", "44.0 ± 4.0", "45.0 ± 4.0", ""],
        ["", "", "", "best †", "70.0 ± 10.0", "71.0 ± 10.0", ""],
        ["", "", "", "paper", "100.1 ± 3.5", "", ""],
    ]
    assert table.faint == [3]
    last = table.markdown().splitlines()[7]
    assert last == "|  |  |  | <sub>paper</sub> | <sub>100.1 ± 3.5</sub> |  |  |"
    assert r"\color{gray}100.1 $\pm$ 3.5" in table.latex()
    assert "Seeds: 0, 1." in table.notes and any("overstates" in note for note in table.notes)


def test_a_method_that_went_further_is_compared_where_the_others_are(tmp_path):
    for seed in (0, 1):
        known_run(tmp_path, [10, 20, 30, 40, 50], "dtql", seed)
        known_run(tmp_path, [11, 21, 31, 41, 51, 61, 71], "diffcps", seed)
    _, table = shown(tmp_path)
    by_line = {(row[2], row[3]): list(row[4:]) for row in table.rows if row[2]}
    assert by_line == {
        ("100", "last"): ["51.0 ± 0.0", "50.0 ± 0.0", "51.6"],
        ("140", "last"): ["71.0 ± 0.0", "", "51.6"],
    }
    assert list(table.rows[1][4:6]) == ["31.0 ± 0.0", "30.0 ± 0.0"]  # of the five at or before step 100


def test_an_unfinished_method_says_how_far_it_is(tmp_path):
    known_run(tmp_path, [10, 20, 30], "dtql", 0)
    known_run(tmp_path, [10, 20], "diffcps", 0, steps=60)
    _, table = shown(tmp_path)
    assert list(table.columns[4:]) == ["dtql", "the data"]
    _, table = shown(tmp_path, partial=True)
    assert list(table.rows[0][2:]) == ["60", "last", "20.0 (at 40)", "30.0", "51.6"]
    assert list(table.rows[1][3:]) == ["mean of last 5", "–", "–", ""]


def played(folder: Path, step: int, scores: Sequence[float], **differs: object) -> None:
    settings = json.loads((folder / "config.json").read_text())["settings"]
    usual = {"eval_seeds": "fresh", "backend": "mujoco", "execution": "eager"}
    how = {"episodes": len(scores), "action_candidates": settings.get("action_candidates", ""), **usual, **differs}
    assert set(how) == set(PLAYED_HOW)
    save_played(folder, how, [
        {"step": step, "episode": e, "return": 0.0, "normalized_score": score, "length": 5, "unstable": 0}
        for e, score in enumerate(scores)
    ])  # fmt: skip


def test_episodes_played_again_stand_beside_the_scores(tmp_path):
    folders = [known_run(tmp_path / "runs", [10, 20], algo, seed) for algo in ("diffcps", "dtql") for seed in (0, 1)]
    assert played_rows(folders[0]) == []
    for folder, scores in zip(folders[:3], ([30, 40], [50, 60], [70, 80]), strict=True):
        played(folder, 40, scores)
        played(folder, 40, [0.0, 0.0, 0.0], eval_seeds="published")  # not new ones
        played(folder, 40, [1.0, 2.0, scores[0]], action_candidates=1)  # not chosen by Q: a line of their own
        played(folder, 40, [0.0, 0.0, 0.0], action_candidates=7)  # chosen otherwise than the run's
        played(folder, 40, [0.0, 0.0, 0.0], backend="d4rl")  # elsewhere
        played(folder, 20, [0.0, 0.0, 0.0])  # other weights
    played(folders[0], 40, [90.0])  # fewer episodes
    own = {"eval_seeds": "fresh", "action_candidates": 50, "backend": "mujoco"}
    rows = played_rows(folders[0])
    assert played_scores([], 40, {}) is None and played_scores(rows, 30, {}) is None
    assert played_scores(rows, 40, own).tolist() == [30, 40]
    assert played_scores(rows, 40, {"eval_seeds": "fresh", "action_candidates": 50}).tolist() == [0, 0, 0]
    assert played_scores(rows, 40, {"execution": "eager", "episodes": 1}).tolist() == [90]
    _, table = shown(tmp_path / "runs")
    (row,) = (row for row in table.rows if row[3] == AGAIN)
    assert list(row[4:6]) == ["45.0 ± 10.0", "75.0 (seed 0)"]
    (row,) = (row for row in table.rows if row[3] == UNCHOSEN)
    assert list(row[4:6]) == ["14.3 ± 3.3", "24.3 (seed 0)"]
    notes = [note for note in table.notes if "episodes per seed" in note]
    assert [note[0] for note in notes] == ["‡", "§"] and "2 episodes" in notes[0] and "3 episodes" in notes[1]
    kept = tmp_path / "kept"
    assert report([str(tmp_path / "runs"), "--label", "rebuilt, full size=/sets", "--export", str(kept)]) == 0
    assert report([str(kept), "--export", str(tmp_path / "again")]) == 0
    assert (kept / PLAYED).read_bytes() == (tmp_path / "again" / PLAYED).read_bytes()
    copied = make_report([kept], Labels(), Choice(), extra=rebuilt.tables).tables("rebuilt, full size")[-1]
    assert copied == table  # an export has the replays, too
    for text, fault in (("step\n1\n", "other columns"), (f"{','.join(PLAYED_COLUMNS)}\n1,2\n", "too few fields")):
        (folders[1] / "played.csv").write_text(text)
        with pytest.raises(UserError, match=fault):
            shown(tmp_path / "runs")


def test_a_run_that_never_chose_by_q_has_one_line(tmp_path):
    folder = known_run(tmp_path, [10, 20], "diffcps", 0)
    config = json.loads((folder / "config.json").read_text())
    config["settings"]["action_candidates"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    played(folder, 40, [30.0, 40.0])
    _, table = shown(tmp_path)
    assert [row[3] for row in table.rows if row[3] in (AGAIN, UNCHOSEN)] == [AGAIN]
    assert [row[4] for row in table.rows if row[3] == AGAIN] == ["35.0"]


def test_sets_of_d4rls_size_and_smaller_ones_never_share_a_table(tmp_path):
    known_run(tmp_path, [10], "diffcps", 0)
    known_run(tmp_path, [10], "diffcps", 0, "walker2d-medium-v2")
    labels, table = shown(tmp_path)
    assert labels == ["rebuilt", "rebuilt, full size"] and {row[0] for row in table.rows} == {"hopper-medium-v2", ""}


def test_one_precision_is_a_note_and_two_are_columns(tmp_path):
    plain = Table("t", ["dtql precision=tf32"], [["a precision=tf32"]], ["dtql precision=tf32: stopped"])
    plain = plain.without(" precision=tf32", "Precision: tf32.")
    assert (plain.columns, plain.rows, plain.notes) == (["dtql"], [["a"]], ["dtql: stopped", "Precision: tf32."])
    known_run(tmp_path / "a", [10], "diffcps", 0, precision="bfloat16")
    known_run(tmp_path / "a", [10], "dtql", 0, precision="bfloat16")
    _, table = shown(tmp_path)
    assert table.columns[4:6] == ["diffcps", "dtql"] and "Precision: bfloat16." in table.notes
    assert ["paper", "100.1 ± 3.5"] in [list(row[3:5]) for row in table.rows]
    report = make_report([tmp_path], Labels.parse(rebuilt.labels([*tmp_path.rglob("seed_0")])), Choice())
    tables = report.tables("rebuilt, full size")
    assert len(tables) == 3 and all("Precision: bfloat16." in table.notes for table in tables)
    assert "paper: diffcps" in tables[0].columns
    assert not any("precision" in cell for table in tables for row in (table.columns, *table.rows) for cell in row)
    known_run(tmp_path / "b", [10], "diffcps", 0)
    _, table = shown(tmp_path)
    assert table.columns[4:7] == ["diffcps", "diffcps precision=bfloat16", "dtql precision=bfloat16"]
    assert not any(note.startswith("Precision") for note in table.notes)


def test_nothing_is_made_of_nothing():
    assert overview([], "x") == []


def test_labels_keep_apart_and_near_their_lines():
    assert _spread([], 0.1) == []
    assert _spread([0.2, 0.5], 0.1) == [0.2, 0.5]
    assert _spread([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
    assert _spread([0.0, 0.02, 0.9], 0.1) == pytest.approx([0.0, 0.1, 0.9])
    assert _spread([0.98, 0.99, 1.0], 0.1) == pytest.approx([0.8, 0.9, 1.0])
    rng = np.random.default_rng(0)
    for _ in range(20):
        heights = np.sort(rng.random(8))
        placed = np.array(_spread(heights.tolist(), 0.075))
        assert np.diff(placed).min() >= 0.075 - 1e-9 and placed.min() >= 0 and placed.max() <= 1
