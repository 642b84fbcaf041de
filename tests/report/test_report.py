"""Reports from synthetic runs: every protocol by hand, rliable's statistics in closed form, origins kept apart."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.text import Text
from scipy import stats

import hyperparameters
from utils.errors import UserError
from utils.report import figures, protocols
from utils.report.__main__ import main
from utils.report.export import portable
from utils.report.kept import EPISODES, RUNS
from utils.report.kept import METRICS as KEPT_METRICS
from utils.report.names import short_names
from utils.report.runs import Labels, SeedRun, find_runs, group, read_run, read_runs
from utils.report.statistics import bootstrap_interval, interquartile_mean, performance_profile, resample, t_interval
from utils.report.tables import Choice, Published, make_rows
from utils.runs.folder import describe_run, prepare_folders
from utils.runs.log import SeedLog

BROWSER_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--virtual-time-budget=3000",
)  # fmt: skip
METRICS = {"diffcps": ("kl_loss", "lambda"), "diffusion_ql": ("bc_loss",), "dtql": ("bc_loss",)}


def make_run(
    base: Path,
    scores: Sequence[float],
    losses: Sequence[float] | None = None,
    algo: str = "diffcps",
    env_name: str = "hopper-medium-v2",
    seed: int = 0,
    dataset: dict[str, Any] | None = None,
    planned: int | None = None,
    epoch: int = 10,
    run_options: dict[str, Any] | None = None,
    **overrides: Any,
) -> Path:
    """A run's folder as run.py leaves it: an evaluation of two episodes (score - 1, score + 1) every second epoch of
    `epoch` steps, and `losses[i]` as the mean of the two epochs before evaluation i."""
    overrides = {"num_epochs": planned or 2 * len(scores), "num_steps_per_epoch": epoch, "eval_interval": 2,
                 "eval_episodes": 2} | overrides  # fmt: skip
    settings = hyperparameters.explain(algo, env_name, overrides)
    options = {"algo": algo, "env_name": env_name, "dir": str(base), "dataset": None, **(run_options or {})}
    config = describe_run(settings, options, torch.device("cpu"), dataset or {"source": "d4rl", "rows": 9})
    folder = base / algo / env_name / f"seed_{seed}"
    prepare_folders([folder], [{**config, "seed": seed, "execution": "eager"}], False, False)
    log = SeedLog(folder, METRICS[algo], 0, {})
    for i, score in enumerate(scores):
        loss = 0.1 if losses is None else losses[i]
        for half, part in enumerate((loss - 0.01, loss + 0.01)):
            values = dict.fromkeys(METRICS[algo], 1.0) | {METRICS[algo][0]: part}
            log.metrics(2 * epoch * i + epoch * (half + 1), values, 100.0)
        log.evaluation(2 * epoch * (i + 1), (0.0, 0.0), (score - 1, score + 1), (5, 5), (False, False))
    log.close()
    return folder


def found(*places: Path) -> list[SeedRun]:
    runs, notes = find_runs(places, Labels())
    assert notes == []
    return runs


def file_data(path: str, **more: Any) -> dict[str, Any]:
    return {"source": path, "path": path, "sha256": "ab" * 32, "rows": 9, **more}


def report(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def scores(path: Path) -> dict[tuple[str, str, str, str], dict[str, str]]:
    with open(path / "tables" / "scores.csv", newline="") as file:
        return {(r["data"], r["task"], r["method"], r["protocol"]): r for r in csv.DictReader(file)}


# --- Protocols ------------------------------------------------------------------------------------------


def test_every_protocol_by_hand(tmp_path):
    values = [10.0, 60.0, 30.0, 40.0, 20.0, 50.0]
    make_run(tmp_path, values, [0.5, 0.6, 0.2, 0.4, 0.3, 0.9])
    frame = read_runs([tmp_path])

    def score(*choice: Any) -> float:
        (value,) = protocols.scores(frame, *choice)
        return value

    assert score("last") == pytest.approx(50)
    assert score("last5") == pytest.approx(40)
    assert np.isnan(score("last10"))  # only six evaluations were made
    assert score("best") == pytest.approx(60)
    assert protocols.evaluations(frame)["loss"].tolist() == pytest.approx([0.5, 0.6, 0.2, 0.4, 0.3, 0.9])
    assert score("offline") == pytest.approx(30)  # the least loss: 0.2
    assert score("offline", 1) == pytest.approx(20)  # the second least: 0.3
    with pytest.raises(ValueError, match="last5"):
        score("median")


def test_a_frame_of_all_episodes_is_what_a_notebook_starts_from(tmp_path):
    make_run(tmp_path / "a", [10.0, 20.0], [0.3, 0.2], seed=1)
    make_run(tmp_path / "b", [70.0], diffusion_steps=15, dataset={"source": "local", "rows": 9})
    frame = read_runs([str(tmp_path)])
    assert len(frame) == 6 and frame["score"].tolist() == [9, 11, 19, 21, 69, 71]
    assert frame.groupby(["data", "task", "algorithm", "method", "steps", "seed"])["score"].mean().to_dict() == {
        ("local", "hopper-medium-v2", "diffcps", "diffcps diffusion_steps=15", 20, 0): 70,
        ("official D4RL", "hopper-medium-v2", "diffcps", "diffcps", 40, 1): 15,
    }
    assert frame[["step", "episode", "length", "unstable"]].iloc[3].tolist() == [40, 1, 5, 0]
    assert protocols.scores(frame, "last").tolist() == [20, 70]  # by the runs' numbers
    (tmp_path / "a" / "diffcps" / "hopper-medium-v2" / "seed_1" / "config.json").write_text("{}")
    with pytest.warns(UserWarning, match=r"left out: .*seed_1/config.json is not what run.py writes"):
        assert len(read_runs([tmp_path])) == 2


def test_offline_selection_takes_the_runs_own_rank(tmp_path):
    # Diffusion-QL's settings say rank 2 for hopper-medium-v2, rank 1 for walker2d-medium-v2.
    for env_name in ("hopper-medium-v2", "walker2d-medium-v2"):
        make_run(tmp_path, [1.0, 2.0, 3.0], [0.5, 0.3, 0.4], "diffusion_ql", env_name)
    assert protocols.scores(read_runs([tmp_path]), "offline").tolist() == pytest.approx([1.0, 3.0])


def test_the_published_index_is_another_evaluation():
    losses = np.array([0.4, 0.1, 0.3, 0.2])
    for k, right in enumerate([1, 3, 2, 0]):
        assert protocols.offline_index(losses, k) == right
        where = np.argsort(losses) == k  # the published rule, as it stands in the code
        assert protocols.offline_index(losses, k, "published") == np.flatnonzero(where)[0]
    assert protocols.offline_index(losses, 0, "published") == 3
    assert protocols.offline_index(losses, 99) == 0  # cut to the last rank


def test_losses_of_the_pretraining_do_not_count(tmp_path):
    folder = make_run(tmp_path, [1.0, 2.0], [0.5, 0.4], "dtql", env_name="walker2d-medium-v2")
    lines = (folder / "metrics.csv").read_text().splitlines()
    (folder / "metrics.csv").write_text("\n".join([lines[0], "-10,99.0,1,,,,", *lines[1:]]) + "\n")
    assert protocols.evaluations(read_runs([tmp_path]))["loss"].tolist() == pytest.approx([0.5, 0.4])


# --- Statistics -----------------------------------------------------------------------------------------


def test_iqm_is_the_mean_of_the_middle_half_of_all_runs():
    # 8 runs of two tasks: the two lowest and the two highest fall away, whatever task they are of.
    assert interquartile_mean([np.array([0.0, 1, 2, 3]), np.array([10.0, 20, 30, 40])]) == pytest.approx(8.75)
    assert interquartile_mean([np.array([1.0, 5, 9])]) == pytest.approx(5)  # a quarter of three runs is none
    assert interquartile_mean([np.array([0.0, 4, 5, 6, 100])]) == pytest.approx(5)


def test_bootstrap_interval_in_closed_form():
    # Two runs, 0 and 1: the mean of a draw is 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4.
    mean = lambda drawn: drawn[0].mean(axis=-1)  # noqa: E731
    rng = np.random.default_rng(0)
    assert bootstrap_interval([np.array([0.0, 1.0])], mean, rng) == (0, 1)
    assert bootstrap_interval([np.array([0.0, 1.0])], mean, rng, level=0.4) == (0.5, 0.5)
    assert bootstrap_interval([np.array([1.0])], mean, rng) is None


def test_bootstrap_is_stratified():
    # Runs within a task agree, so draws that keep to their tasks cannot differ; draws across tasks would.
    tasks = [np.zeros(5), np.ones(5)]
    assert bootstrap_interval(tasks, interquartile_mean, np.random.default_rng(0)) == (0.5, 0.5)
    drawn = resample([np.arange(3.0), np.arange(10.0, 14)], np.random.default_rng(0), 50)
    assert [part.shape for part in drawn] == [(50, 3), (50, 4)]
    assert set(drawn[0].ravel()) == {0, 1, 2} and set(drawn[1].ravel()) == {10, 11, 12, 13}


def test_bootstrap_agrees_with_scipys():
    rng = np.random.default_rng(3)
    tasks = [rng.normal(50, 10, 6), rng.normal(80, 4, 5)]
    ours = bootstrap_interval(tasks, interquartile_mean, np.random.default_rng(0), draws=20_000)
    theirs = stats.bootstrap(
        tasks, lambda *drawn, axis: stats.trim_mean(np.concatenate(drawn, axis=axis), 0.25, axis=axis),
        method="percentile", n_resamples=20_000, vectorized=True, paired=False,
    ).confidence_interval  # fmt: skip
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.5)


def test_few_seeds_have_students_interval(tmp_path, capsys):
    values = np.array([10.0, 13.0, 19.0])
    low, high = t_interval(values)
    theirs = stats.ttest_1samp(values, 0).confidence_interval()
    assert (low, high) == pytest.approx((theirs.low, theirs.high))
    assert high - 14 == pytest.approx(4.302653 * np.std(values, ddof=1) / np.sqrt(3))
    assert t_interval(values[:1]) is None
    for seed, value in enumerate((*values, 18.0)):
        make_run(tmp_path / str(seed < 3), [value], seed=seed)
    assert "| 0-2 | 14.0 [2.6, 25.4] |" in report(capsys, tmp_path / "True")
    bootstrap = re.search(r"\| 0-3 \| 15.5 \[([\d.]+), ([\d.]+)\]", report(capsys, tmp_path))
    assert bootstrap and 10 <= float(bootstrap[1]) < 15.5 < float(bootstrap[2]) <= 19


def test_performance_profile():
    tasks = [np.array([10.0, 30.0]), np.array([20.0])]
    assert performance_profile(tasks, np.array([0.0, 10, 15, 25, 30])) == pytest.approx([1, 0.75, 0.75, 0.25, 0])


# --- Tables ---------------------------------------------------------------------------------------------


def test_scores_beside_the_papers(tmp_path, capsys):
    for seed, last in enumerate((80.0, 90.0, 100.0)):
        make_run(tmp_path / "a", [95.0, last], seed=seed, epoch=500_000)
    text = report(capsys, tmp_path / "a", "--out", tmp_path / "out")
    found = scores(tmp_path / "out")
    last = found["official D4RL", "hopper-medium-v2", "diffcps", "last"]
    assert float(last["mean"]) == pytest.approx(90)
    assert float(last["deviation"]) == pytest.approx(np.std([80, 90, 100]))
    assert float(last["difference"]) == pytest.approx(90 - 100.1)
    assert float(found["official D4RL", "hopper-medium-v2", "diffcps", "best"]["mean"]) == pytest.approx(290 / 3)
    assert "| hopper-medium-v2 | diffcps | 2,000,000 | 0-2 | 90.0 ± 8.2 |" in text
    assert "| 100.1 ± 3.5 | −10.1 | −3.4 |" in text
    assert "chosen on the test episodes" in text
    latex = (tmp_path / "out" / "tables" / "official-d4rl.tex").read_text()
    assert r"90.0 $\pm$ 8.2" in latex and r"best $\dagger$" in latex


def test_a_shorter_run_is_not_subtracted_from_the_papers_figure(tmp_path, capsys):
    make_run(tmp_path / "a", [90.0])
    text = report(capsys, tmp_path / "a", "--out", tmp_path / "out")
    assert "| 20 of 2,000,000 | 0 | 90.0 | 90.0 | 90.0 | 100.1 ± 3.5 |" in text and "− paper" not in text
    row = scores(tmp_path / "out")["official D4RL", "hopper-medium-v2", "diffcps", "last"]
    assert (row["paper"], row["difference"]) == ("100.1", "")


def test_columns_without_a_number_are_left_out(tmp_path, capsys):
    make_run(tmp_path, [float(k) for k in range(5)])
    text = report(capsys, tmp_path)
    assert "| mean of last 5 |" in text and "mean of last 10" not in text and "paper: diffcps" in text


def test_only_some_runs(tmp_path, capsys):
    for seed in (0, 1):
        make_run(tmp_path, [10.0 + seed], seed=seed)
        make_run(tmp_path / "long", [50.0 + seed, 60.0], seed=seed, diffusion_steps=7)
    assert "| 40 of 2,000,000 | 0,1 | 60.0 ± 0.0 |" in report(capsys, tmp_path, "--only", "steps=40")
    text = report(capsys, tmp_path, "--only", "diffusion_steps=5,7", "--only", "seed=1")
    assert "| 20 of 2,000,000 | 1 | 11.0 |" in text and "| 40 of 2,000,000 | 1 | 60.0 |" in text
    for wrong, message in (("shape=3", "none of the runs has 'shape'"), ("seed=9", "no run is left by --only seed=9")):
        assert main([str(tmp_path), "--only", wrong]) == 2
        assert message in capsys.readouterr().err


def test_corls_scores_stand_beside_the_same_algorithms(tmp_path):
    """The figures are those of CORL's README, on the official data; AntMaze there is v2."""
    published = Published()
    assert published.corl("hopper-medium-v2", "iql", "last") == (67.53, 3.78)
    assert published.corl("hopper-medium-v2", "iql", "best") == (80.46, 3.09)
    for none in (("antmaze-umaze-v0", "iql", "last"), ("hopper-medium-v2", "diffcps", "last")):
        assert np.isnan(published.corl(*none)).all()
    assert published.get("halfcheetah-medium-expert-v2", "idql") == pytest.approx((95.9, np.nan), nan_ok=True)  # IDQL-A
    assert published.get("hopper-medium-v2", "diffcps") == (100.1, 3.5)
    assert np.isnan(published.get("antmaze-umaze-v2", "diffcps")).all()


def test_methods_of_different_own_lengths_share_a_row(tmp_path, capsys):
    make_run(tmp_path, [50.0])
    make_run(tmp_path, [60.0], algo="dtql", pretrain_epochs=1)  # a rehearsal's shorter pretraining: no other method
    text = report(capsys, tmp_path)
    assert "| hopper-medium-v2 | 20 | 50.0 | 60.0 | 100.1 ± 3.5 |" in text
    assert "| hopper-medium-v2 | dtql | 20 of 1,000,000 |" in text


def test_averages_count_their_tasks_and_compare_with_the_same_ones(tmp_path):
    for env_name, level in (("hopper-medium-v2", 90.0), ("walker2d-medium-v2", 80.0), ("antmaze-umaze-v0", 10.0)):
        for seed in (0, 1):
            make_run(tmp_path, [level + 2 * seed], env_name=env_name, seed=seed)
    rows = make_rows(group(found(tmp_path)), Choice(), Published())
    averages = rows[rows["task"].str.startswith("average")].set_index("protocol")
    assert set(averages["task"]) == {"average-locomotion (2 of 9)"}  # one AntMaze task is no average
    assert averages.loc["last", ["mean", "deviation"]].tolist() == pytest.approx([86, 1])
    assert averages.loc["last", "paper"] == pytest.approx((100.1 + 90.9) / 2)


def test_data_of_different_origin_never_share_a_table(tmp_path, capsys):
    make_run(tmp_path / "official", [90.0])
    make_run(tmp_path / "local", [50.0], dataset={"source": "local", "rows": 9})
    make_run(tmp_path / "rebuilt", [70.0], dataset=file_data("/data/rebuilt/hopper-medium.hdf5"))
    make_run(tmp_path / "other", [60.0], dataset=file_data("/data/other/hopper-medium.hdf5", sha256="cd" * 32))
    text = report(capsys, tmp_path, "--label", "rebuilt=/data/rebuilt")
    tables = dict(re.findall(r"### All protocols, data: (.*)\n\n((?:\|.*\n)+)", text))
    assert sorted(tables) == ["files in /data/other", "local", "official D4RL", "rebuilt"]
    for label, score in (("rebuilt", "70.0"), ("local", "50.0"), ("official D4RL", "90.0")):
        shown = [row.split(" | ")[4] for row in tables[label].splitlines()[2:]]
        assert shown == [score]
    by_digest = report(capsys, tmp_path / "other", "--label", "mine=" + "cd" * 6)
    assert "data: mine" in by_digest
    assert main([str(tmp_path), "--label", "official=/data"]) == 2
    assert "kept for" in capsys.readouterr().err


def test_a_label_may_name_a_folder_as_it_is_seen_from_here(tmp_path, monkeypatch):
    (tmp_path / "sets").mkdir()
    monkeypatch.chdir(tmp_path)
    dataset = file_data(str(tmp_path.resolve() / "sets" / "hopper-medium.hdf5"))
    assert Labels.parse(["rebuilt=sets"]).of(dataset) == "rebuilt"
    assert Labels.parse(["rebuilt=/elsewhere/sets"]).of(dataset) == f"files in {tmp_path.resolve()}/sets"
    for wrong in ("rebuilt", "=sets", "local=sets"):
        with pytest.raises(UserError, match="--label"):
            Labels.parse([wrong])


def test_changed_settings_are_another_method(tmp_path):
    make_run(tmp_path / "a", [50.0])
    make_run(tmp_path / "b", [60.0], diffusion_steps=15)
    make_run(tmp_path / "c", [70.0], diffusion_steps=5, seed=1)  # named, but the task's own: the same as a
    make_run(tmp_path / "d", [80.0], run_options={"eval_seeds": "fresh"})
    runs = found(tmp_path)
    cells = {cell.method: cell.seeds for cell in group(runs)}
    assert cells == {"diffcps": [0, 1], "diffcps diffusion_steps=15": [0], "diffcps eval_seeds=fresh": [0]}
    named = [
        cell.method for cell in group([run for run in runs if "eval_seeds" not in run.changed], ["diffusion_steps"])
    ]
    assert named == ["diffcps diffusion_steps=5", "diffcps diffusion_steps=15"]
    rows = make_rows(group(runs), Choice(), Published())
    # The paper's figure is for its own settings.
    assert rows[rows["protocol"] == "last"]["paper"].tolist() == pytest.approx([100.1, np.nan, np.nan], nan_ok=True)


def test_runs_of_other_lengths_are_not_averaged(tmp_path):
    make_run(tmp_path / "a", [50.0, 60.0])
    make_run(tmp_path / "b", [70.0], seed=1)
    cells = group(found(tmp_path))
    assert [(cell.total_steps, cell.seeds) for cell in cells] == [(20, [1]), (40, [0])]


def test_unfinished_runs_are_left_out_or_cut_to_what_all_seeds_have(tmp_path, capsys):
    make_run(tmp_path, [10.0, 20.0, 30.0], seed=0)
    make_run(tmp_path, [40.0, 60.0], seed=1, planned=6)
    assert main([str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "left out: diffcps hopper-medium-v2 seed 1 (official D4RL): at step 40 of 60" in err
    assert "| 60 of 2,000,000 | 0 | 30.0 |" in out
    assert "| 40 of 2,000,000 | 0,1 | 40.0 ± 20.0 |" in report(capsys, tmp_path, "--partial")


def test_a_minari_set_is_a_task_of_its_own(tmp_path, capsys):
    make_run(tmp_path / "a", [50.0], dataset={"source": "minari:mujoco/hopper/medium-v0"})
    make_run(tmp_path / "b", [float("nan")], dataset={"source": "minari:mujoco/ant/medium-v0"})
    assert main([str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "data: Minari" in out and "| mujoco/hopper/medium-v0 | diffcps |" in out and "100.1" not in out
    assert "left out: diffcps mujoco/ant/medium-v0 seed 0 (Minari): its set has no reference scores" in err


def test_model_selection_decides_the_comparison(tmp_path, capsys):
    make_run(tmp_path, [10.0, 60.0, 30.0], [0.1, 0.3, 0.2])
    for selection, value in (("none", "30.0"), ("online", "60.0"), ("offline", "10.0")):
        table = report(capsys, tmp_path, "--model_selection", selection).split("###")[1]
        assert f"| hopper-medium-v2 | 60 | {value} |" in table
        assert ("chosen on the test episodes" in table) == (selection == "online")
    # argsort(losses) is [0, 2, 1]: rank 1 is evaluation 2, but the published index finds evaluation 2 by where(= 1).
    wrong = report(capsys, tmp_path, "--model_selection", "offline", "--top_k", "2", "--published_index")
    assert "| hopper-medium-v2 | 60 | 60.0 |" in wrong and "published code's index" in wrong


def test_seeds_that_differ_are_remarked(tmp_path, capsys):
    data = {"source": "local", "rows": 9}
    make_run(tmp_path, [10.0], seed=0, dataset={**data, "sha256": "11" * 32})
    make_run(tmp_path, [20.0], seed=1, dataset={**data, "sha256": "22" * 32}, eval_episodes=3)
    text = report(capsys, tmp_path)
    assert "seeds differ in eval_episodes: 2, 3" in text
    assert "seeds differ in data (SHA-256): 111111111111, 222222222222" in text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "evaluations.csv").write_text("step,normalized_score\n20,9.5\n40,\n"), "line 3, is damaged"),
        (lambda f: shutil.copytree(f, f.parents[3] / "b" / "seed_0"), "name one of them"),
        (lambda f: shutil.rmtree(f), "no run below"),
    ],
)
def test_one_line_for_what_cannot_be_read(tmp_path, capsys, damage, message):
    damage(make_run(tmp_path / "a", [10.0]))
    assert main([str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def in_config(**parts: Any) -> Callable[[Path], object]:
    """Put values into a part of config.json (a dictionary is merged with what is there)."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        for part, value in parts.items():
            config[part] = {**config[part], **value} if isinstance(value, dict) else value
        (folder / "config.json").write_text(json.dumps(config))

    return change


def as_folder(name: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


MALFORMED = {
    "no JSON": lambda f: (f / "config.json").write_text("{"),
    "nothing in it": lambda f: (f / "config.json").write_text("{}"),
    "bytes": lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"),
    "nested": lambda f: (f / "config.json").write_text('{"settings": ' + "[" * 100_000),
    "nested, whole": lambda f: (f / "config.json").write_text("[" * 100_000 + "]" * 100_000),
    "nested in a part": in_config(versions={"torch": json.loads("[" * 300 + "]" * 300)}),
    "a folder": as_folder("config.json"),
    "a folder of evaluations": as_folder("evaluations.csv"),
    "a folder of metrics": as_folder("metrics.csv"),
    "a pipe": lambda f: ((f / "config.json").unlink(), os.mkfifo(f / "config.json")),
    "settings null": in_config(settings=None),
    "run a list": in_config(run=[]),
    "dataset a text": in_config(dataset="d4rl"),
    "origins a list": in_config(origins=["default"]),
    "algo a number": in_config(run={"algo": 5}),
    "task a list": in_config(run={"env_name": ["hopper-medium-v2"]}),
    "task without end": in_config(run={"env_name": "x" * 100_000}),
    "half a character": in_config(run={"env_name": "\ud800"}),
    "lines in a name": in_config(dataset={"source": "x", "label": "a\n| b |"}),
    "seed null": in_config(seed=None),
    "epochs a text": in_config(settings={"num_epochs": "2"}),
    "epochs without end": in_config(settings={"num_epochs": 10**30}),
    "a setting of settings": in_config(settings={"kappa": {"a": 1}}),
    "kappa a text": in_config(settings={"kappa": "0.05"}),
    "rank a text": in_config(settings={"top_k": "first"}),
    "weights a number": in_config(run={"load_published": [5]}),
    "no number": lambda f: (f / "metrics.csv").write_text("step,kl_loss\n20,oops\n"),
    "no step": lambda f: (f / "metrics.csv").write_text("kl_loss\n1\n"),
    "step without end": lambda f: (f / "evaluations.csv").write_text(f"step,normalized_score\n{10**25},1\n"),
    "score without end": lambda f: (f / "evaluations.csv").write_text("step,normalized_score\n20,1e300\n"),
    "no score": lambda f: (f / "evaluations.csv").write_text("step,normalized_score\n20,inf\n"),
    "no row": lambda f: (f / "evaluations.csv").write_text("step,normalized_score\n"),
    "nothing at all": lambda f: (f / "evaluations.csv").write_text(""),
}  # fmt: skip


@pytest.mark.parametrize("damage", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_folder_costs_a_warning_and_not_the_report(tmp_path, capsys, damage):
    make_run(tmp_path / "good", [10.0])
    damage(make_run(tmp_path / "bad", [50.0], env_name="walker2d-medium-v2"))
    assert main([str(tmp_path), "--export", str(tmp_path / "kept")]) == 0
    out, err = capsys.readouterr()
    (warning,) = err.splitlines()
    assert warning.startswith("note: left out: ") and len(warning) < 1000
    assert "| hopper-medium-v2 | diffcps | 20 of 2,000,000 | 0 | 10.0 |" in out and "walker2d" not in out
    assert "exported 1 runs" in out


ODD = {
    "a formula": in_config(dataset={"source": "x", "label": r"$\frac{1$"}, run={"algo": r"a$\frac{1$$"}),
    "a formula for a setting": in_config(settings={"beta_schedule": r"$\frac{1$", "diffusion_steps": "x"}),
    "a spreadsheet's formula": in_config(dataset={"source": "x", "label": '=HYPERLINK("http://x","y")'},
                                         run={"algo": "+1+cmd|' /C calc'!A0", "env_name": "@SUM(1+1)"}),
    "hidden names": in_config(run={"algo": "_x", "env_name": "_y"}),
    "long names": in_config(run={"algo": "x" * 300, "env_name": "y" * 300},
                            dataset={"source": "x", "label": "é" * 300}),
    "no kappa": in_config(run={"algo": "unknown"}, settings={"kappa": 0}),
    "endless kappa": in_config(settings={"kappa": float("inf"), "diffusion_steps": float("nan")}),
    "weights a path": in_config(run={"load_published": ["actor=/x/y.pth"]}, dataset={"path": 5, "source": 6}),
    "a step twice": lambda f: (f / "metrics.csv").write_text("step,kl_loss,lambda\n10,1,1\n10,2,2\n20,inf,1e308\n"),
    "no metrics": lambda f: (f / "metrics.csv").unlink(),
    "negative loss": lambda f: (f / "metrics.csv").write_text("step,kl_loss,lambda\n10,-1,-1\n20,-2,0\n"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("change", ODD.values(), ids=ODD.keys())
def test_odd_names_and_numbers_are_shown_as_they_are(tmp_path, capsys, change):
    for seed in (0, 1):
        make_run(tmp_path / "good", [10.0], seed=seed)
        change(make_run(tmp_path / "bad", [50.0 + seed], env_name="walker2d-medium-v2", seed=seed))
    wanted = ["--out", tmp_path / "out", "--html", tmp_path / "page.html", "--export", tmp_path / "kept"]
    out = report(capsys, tmp_path / "good", tmp_path / "bad", "--by", "diffusion_steps", *wanted)
    assert "10.5 ±" not in out and "50.5 ± 0.5" in out and "exported 4 runs" in out
    assert "exported 4 runs" in report(capsys, tmp_path / "kept", "--export", tmp_path / "again")
    assert (tmp_path / "kept" / EPISODES).read_bytes() == (tmp_path / "again" / EPISODES).read_bytes()


def test_no_cell_of_any_table_begins_a_spreadsheets_formula(tmp_path, capsys):
    folder = make_run(tmp_path / "a", [-5.0], dataset=file_data("/data/x.hdf5"))
    ODD["a spreadsheet's formula"](folder)
    wanted = ["--out", tmp_path / "out", "--html", tmp_path / "page.html", "--export", tmp_path / "kept"]
    text = report(capsys, tmp_path / "a", *wanted)
    assert "| '@SUM(1+1) | '+1+cmd\\|' /C calc'!A0 " in text and "| −5.0 |" in text
    with open(tmp_path / "out" / "tables" / "scores.csv", newline="") as file:
        header, line, *_ = csv.reader(file)
    assert line[:3] == ['\'=HYPERLINK("http://x","y")', "'@SUM(1+1)", "'" + line[2][1:]]
    assert float(line[header.index("mean")]) == -5  # numbers stay numbers
    latex = next((tmp_path / "out" / "tables").glob("*.tex")).read_text()
    assert "\n'@SUM(1+1) & '+1+cmd" in latex
    page = (tmp_path / "page.html").read_text()
    assert '<td class="name">&#39;@SUM(1+1)</td>' in page and not re.search("<t[dh][^>]*>[=+@-]", page)
    rows = csv.reader(gzip.decompress((tmp_path / "kept" / EPISODES).read_bytes()).decode().splitlines())
    assert [row[1:4] for row in rows][1] == [line[0], "'+1+cmd|' /C calc'!A0", "'@SUM(1+1)"]
    assert report(capsys, tmp_path / "kept") == text.split("wrote")[0] + "\n"  # and an export says the same


def test_a_damaged_line_of_an_export_costs_a_warning(tmp_path, capsys):
    for seed in range(3):
        make_run(tmp_path / "a", [10.0], seed=seed)
    kept = tmp_path / "kept"
    report(capsys, tmp_path / "a", "--export", kept)
    lines = (kept / RUNS).read_text().splitlines()
    (kept / RUNS).write_text("\n".join([lines[0], "[" * 100_000, lines[2]]) + "\n")
    assert main([str(kept)]) == 0
    out, err = capsys.readouterr()
    assert f"note: left out: {kept / RUNS}, line 2: " in err and "| 0,2 | 10.0 ± 0.0 |" in out
    for name in (KEPT_METRICS, EPISODES):
        whole = (kept / name).read_bytes()
        for damaged in (whole[:-9], gzip.compress(gzip.decompress(whole).replace(b"\n1,", b"\nx,"))):
            (kept / name).write_bytes(damaged)
            assert main([str(kept)]) == 2
            assert "is not what --export writes" in capsys.readouterr().err
        (kept / name).write_bytes(whole)
    assert main([str(kept)]) == 0


@pytest.mark.slow
def test_a_closed_pipe_and_a_refusing_disk_end_quietly(tmp_path, capsys):
    make_run(tmp_path / "a", [10.0])
    command = [sys.executable, "-m", "utils.report", str(tmp_path / "a"), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               cwd=Path(__file__).resolve().parents[2])  # fmt: skip
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 0
    assert (tmp_path / "out" / "tables" / "scores.csv").exists()
    (tmp_path / "file").touch()
    assert main([str(tmp_path / "a"), "--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.startswith("utils.report: cannot write ")


# --- Side by side ---------------------------------------------------------------------------------------


def test_two_runs_are_compared(tmp_path, capsys):
    for seed, (own, other) in enumerate([(10.0, 15.0), (20.0, 23.0), (30.0, 40.0)]):
        make_run(tmp_path / "a", [own] * 5, seed=seed)
        make_run(tmp_path / "b", [other] * 5, seed=seed, kappa=0.04, batch_size=128)
    make_run(tmp_path / "b", [0.0] * 5, seed=7, kappa=0.04, batch_size=128)
    text = report(capsys, tmp_path / "a", tmp_path / "b" / "diffcps" / "hopper-medium-v2")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    low, high = stats.ttest_rel([15, 23, 40], [10, 20, 30]).confidence_interval()
    interval = f"6.0 [{low:.1f}, {high:.1f}]".replace("-", "−")
    assert f"batch_size=128 kappa=0.04 − own settings 0,1,2 {interval} {interval}" in lines
    assert "own settings 0-2 100 20.0 ± 8.2 20.0 ± 8.2 20.0 ± 8.2 10.0, 20.0, 30.0" in lines
    assert {"kappa 0.05 0.04", "batch_size 256 128"} <= set(lines)
    assert "chosen on the test episodes" in text and str(tmp_path) not in text and "| " not in text


def test_one_setting_names_both_runs(tmp_path, capsys):
    make_run(tmp_path / "a", [10.0])
    make_run(tmp_path / "b", [12.0], kappa=0.04)
    text = report(capsys, tmp_path / "a", tmp_path / "b")
    assert "kappa=0.04 − kappa=0.05 0 2.0 –" in " ".join(text.split())
    assert "no interval, for one seed in common says nothing" in text


def test_runs_of_two_precisions_are_two_methods_and_both_are_the_tasks_own(tmp_path, capsys):
    make_run(tmp_path / "a", [10.0])
    make_run(tmp_path / "b", [12.0], seed=1, run_options={"precision": "bfloat16"})
    text = report(capsys, tmp_path / "a", tmp_path / "b")
    assert "precision=float32" in text and "precision=bfloat16" in text and "no seed in common" in text
    cells = group(found(tmp_path))
    assert [cell.published for cell in cells] == [True, True]
    make_run(tmp_path / "c", [12.0], kappa=0.04, run_options={"precision": "bfloat16"})
    (other,) = group(found(tmp_path / "c"))
    assert not other.published and other.method == "diffcps kappa=0.04 precision=bfloat16"


def test_why_there_is_no_interval(tmp_path, capsys):
    for seed in (0, 1):
        make_run(tmp_path / "a", [10.0], seed=seed)
        make_run(tmp_path / "b", [12.0], seed=seed, kappa=0.04)
        make_run(tmp_path / "c", [12.0 + seed], seed=seed + 5, kappa=0.04)
        make_run(tmp_path / "d", [12.0], seed=seed, kappa=0.04, dataset={"source": "local", "rows": 9})
    assert "no interval, for the differences are all the same" in report(capsys, tmp_path / "a", tmp_path / "b")
    text = report(capsys, tmp_path / "a", tmp_path / "c")
    assert "no interval, for they have no seed in common" in text and "[" not in text
    text = report(capsys, tmp_path / "a", tmp_path / "d")
    assert "No difference is taken between runs on data of different origin." in text and "Paired" not in text


def test_the_same_seeds_below_two_places_are_two_runs(tmp_path, capsys):
    for seed, other in ((0, 12.0), (1, 15.0)):
        make_run(tmp_path / "a", [10.0], seed=seed)
        make_run(tmp_path / "b", [other], seed=seed)
    text = report(capsys, tmp_path / "a", tmp_path / "b", "--html", tmp_path / "page.html")
    assert "diffcps (2) − diffcps" in text and "  none" in text
    assert "diffcps (2)" in (tmp_path / "page.html").read_text()
    folder = tmp_path / "a" / "diffcps" / "hopper-medium-v2"
    # Seeds that are named one by one are one run's.
    assert "0,1" in report(capsys, folder / "seed_0", folder / "seed_1")


def test_short_names(tmp_path):
    many = {"batch_size": 64, "hidden_dim": 64, "diffusion_steps": 7, "learning_rate": 1e-3}
    make_run(tmp_path / "1", [1.0], kappa=0.1, **many)
    make_run(tmp_path / "2", [1.0], kappa=0.2, **many)
    make_run(tmp_path / "3", [1.0], algo="dtql", batch_size=64, run_options={"load_published": ["actor=/x/a.pth"]})
    make_run(tmp_path / "4", [1.0, 2.0], algo="diffusion_ql")
    make_run(tmp_path / "5", [1.0], algo="diffusion_ql")
    assert sorted(short_names(group(found(tmp_path)))) == [
        "diffcps kappa=0.1 +4", "diffcps kappa=0.2 +4", "diffusion_ql (20 steps)", "diffusion_ql (40 steps)",
        "dtql batch_size=64 load_published=a.pth",
    ]  # fmt: skip


def test_a_short_name_tells_what_fewest_have(tmp_path):
    variants = ({}, {"kappa_slack": 0.1}, {"kappa_slack": 0.1, "kappa_opening": 50}, {"lambda_min": 0.0, "tau": 0.1})
    for k, variant in enumerate(variants):
        make_run(tmp_path / str(k), [1.0], kappa="auto", **variant)
    make_run(tmp_path / "published", [1.0])
    assert sorted(short_names(group(found(tmp_path)))) == [
        "diffcps kappa_opening=50 kappa_slack=0.1 +1", "diffcps lambda_min=0 tau=0.1 +1", "kappa=auto",
        "kappa=auto kappa_slack=0.1", "own settings",
    ]  # fmt: skip


# --- Export ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_export_says_the_same_and_keeps_no_path(tmp_path, capsys):
    data = file_data("/secret/place/hopper-medium.hdf5")
    for seed in range(3):
        make_run(tmp_path / "a", [90.0 + seed / 3, 80.0], [0.5, 0.3 + seed], seed=seed, dataset=data)
    make_run(tmp_path / "a", [1.0, 2.0], [0.1, 0.2], "diffusion_ql", dataset={"source": "d4rl", "rows": 9})
    kept = tmp_path / "kept"
    before = report(capsys, tmp_path / "a", "--label", "rebuilt=/secret", "--export", kept, "--out", tmp_path / "1")
    after = report(capsys, kept, "--out", tmp_path / "2", "--export", tmp_path / "again")
    assert before.split("wrote")[0] == after.split("wrote")[0] and "All protocols, data: rebuilt" in after
    for name in ("scores.csv", "runs.md", "rebuilt.tex", "official-d4rl.md"):
        assert (tmp_path / "1" / "tables" / name).read_text() == (tmp_path / "2" / "tables" / name).read_text()
    text, table = (kept / RUNS).read_text(), gzip.decompress((kept / EPISODES).read_bytes()).decode()
    assert sorted(path.name for path in kept.iterdir()) == [EPISODES, KEPT_METRICS, RUNS]
    assert len(text.splitlines()) == 4 and "ab" * 32 in text
    everything = text + table + gzip.decompress((kept / KEPT_METRICS).read_bytes()).decode()
    assert "secret" not in everything and str(tmp_path) not in everything
    assert table.splitlines()[1] == "0,official D4RL,diffusion_ql,hopper-medium-v2,0,20,0,0.0,0.0,5,0,0.1"
    for name in (RUNS, EPISODES, KEPT_METRICS):  # the same bytes, also of a copy
        assert (kept / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert main([str(kept), "--export", str(kept)]) == 2
    assert "holds an export already" in capsys.readouterr().err


def test_an_export_keeps_every_epoch(tmp_path):
    make_run(tmp_path / "a", [90.0, 80.0], [0.1, 1 / 3])
    make_run(tmp_path / "a", [1.0, 2.0, 3.0], [0.1, 0.2, float("nan")], "diffusion_ql", seed=2)
    assert main([str(tmp_path / "a"), "--export", str(tmp_path / "kept")]) == 0
    table = gzip.decompress((tmp_path / "kept" / KEPT_METRICS).read_bytes()).decode().splitlines()
    assert table[0].startswith("run,step,") and {line.split(",")[0] for line in table[1:]} == {"0", "1"}
    before, after = found(tmp_path / "a"), found(tmp_path / "kept")
    assert [run.algo for run in before] == [run.algo for run in after] == ["diffcps", "diffusion_ql"]
    for own, copy in zip(before, after, strict=True):
        known = {name: values for name, values in own.metrics.items() if not np.isnan(values).all()}
        assert len(known["step"]) >= 2 and set(copy.metrics) == set(known)
        for name, values in known.items():  # to the last bit
            np.testing.assert_array_equal(copy.metrics[name], values)
    (tmp_path / "kept" / KEPT_METRICS).unlink()  # as exports of earlier versions are
    assert [dict(run.metrics) for run in found(tmp_path / "kept")] == [{}, {}]


def test_an_export_beside_runs_is_read_as_itself(tmp_path):
    make_run(tmp_path / "a", [90.0])
    assert main([str(tmp_path / "a"), "--export", str(tmp_path / "kept")]) == 0
    make_run(tmp_path / "kept" / "runs", [10.0], seed=1)
    assert [run.seed for run in found(tmp_path / "kept")] == [0]
    assert [run.seed for run in found(tmp_path / "kept" / "runs")] == [1]
    assert [run.seed for run in found(tmp_path / "kept", tmp_path / "kept" / "runs")] == [0, 1]
    assert len(found(tmp_path)) == 3  # of a folder above both, everything


def test_an_export_names_files_of_weights_without_their_folders(tmp_path):
    run = read_run(make_run(tmp_path, [1.0], run_options={"load_published": ["actor=/x/actor_50.pth"]}), Labels())
    assert portable(run.config, run.label)["run"]["load_published"] == ["actor=actor_50.pth"]


# --- Figures and the page -------------------------------------------------------------------------------


def test_long_names_stay_inside_the_figure_and_leave_the_panels_their_room(tmp_path):
    for number in range(8):
        long = {"batch_size": 32 + number, "hidden_dim": 64, "diffusion_steps": 7, "learning_rate": 1e-3, "kappa": 0.1}
        for candidates in (1, 10):
            make_run(tmp_path / f"{number}-{candidates}", [50.0], action_candidates=candidates, **long)
    cells = group(found(tmp_path), ("action_candidates",))
    for _, _, figure in figures.figures(cells, Choice(), ("action_candidates",)):
        figure.canvas.draw()
        inside, (legend,) = figure.bbox, figure.legends
        box = legend.get_window_extent()
        assert inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0
        assert all(axes.get_window_extent().height > figure.dpi for axes in figure.axes)  # an inch at least
        plt.close(figure)


def test_every_method_has_a_look_of_its_own():
    looks = [figures.style(algo) for algo in hyperparameters.CONFIGS]
    for part in ("color", "marker"):
        assert len({look[part] for look in looks}) == len(looks) == 16
    variants = [figures.style("diffcps", k) for k in range(10)]
    assert len({(str(look["linestyle"]), look["fillstyle"]) for look in variants}) == 10
    assert {(look["color"], look["marker"]) for look in variants} == {("#000000", "o")}


def test_no_two_lines_of_a_report_look_alike():
    def kinds(looks: Sequence[dict[str, Any]]) -> set[tuple[str, ...]]:
        return {tuple(str(look[part]) for part in ("color", "marker", "linestyle", "fillstyle")) for look in looks}

    few = figures.distinct({"own": "diffcps", "kappa=0.04": "diffcps", "dtql": "dtql"})
    assert few["own"] == figures.style("diffcps") and few["dtql"] == figures.style("dtql")
    assert len({look["color"] for look in few.values()}) == 3  # where there are enough of them
    many = {f"{algo} {k}": algo for k in range(12) for algo in [*hyperparameters.CONFIGS, "unknown"]}
    looks = figures.distinct(many)
    assert len(kinds(list(looks.values()))) == len(many)
    assert all(looks[f"{algo} 0"] == figures.style(algo) for algo in hyperparameters.CONFIGS)


def test_a_method_looks_the_same_in_every_figure_of_a_report(tmp_path):
    for env_name in ("hopper-medium-v2", "walker2d-medium-v2"):
        for kappa in (0.03, 0.04) if env_name.startswith("hopper") else (0.04,):
            make_run(tmp_path / str(kappa), [10.0, 20.0], env_name=env_name, kappa=kappa)
        make_run(tmp_path, [10.0, 20.0], [0.3, 0.2], "dtql", env_name)
    cells = group(found(tmp_path))
    legend = figures.Legend(cells)
    drawn = {name: figure for name, _, figure in figures.figures(cells, Choice(), legend=legend, each_task=True)}
    assert sorted(drawn) == ["task-hopper-medium-v2", "task-walker2d-medium-v2"]  # one seed each: no profile
    shown = [{line.get_label(): (line.get_color(), line.get_marker()) for line in figure.axes[0].lines}
             for figure in drawn.values()]  # fmt: skip
    assert sorted(shown[0]) == ["diffcps kappa=0.03", "diffcps kappa=0.04", "dtql"]
    assert shown[1].items() < shown[0].items() and len(set(shown[0].values())) == 3
    for figure in drawn.values():
        assert all(axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes)
        plt.close(figure)


def test_a_few_short_names_stand_beside_their_lines_and_apart(tmp_path):
    for number, algo in enumerate(("diffcps", "diffusion_ql", "dtql")):
        make_run(tmp_path, [10.0, 20.0 + number / 10], algo=algo)
    figure = figures.learning_curves(group(found(tmp_path)), "title")
    figure.canvas.draw()
    labels = {text.get_text(): Text.get_window_extent(text) for text in figure.axes[0].texts}  # without the threads
    assert sorted(labels) == ["diffcps", "diffusion_ql", "dtql"] and not figure.legends
    boxes = sorted(labels.values(), key=lambda box: box.y0)
    assert all(one.y1 <= other.y0 for one, other in itertools.pairwise(boxes))
    panel = figure.axes[0].get_window_extent()
    assert all(panel.x1 < box.x0 and box.x1 <= figure.bbox.x1 for box in boxes) and panel.width > 2 * figure.dpi
    plt.close(figure)


def test_profiles_compare_methods_on_the_tasks_that_all_have(tmp_path):
    for seed in (0, 1):
        for env_name, algos in (("hopper-medium-v2", ("diffcps", "dtql")), ("walker2d-medium-v2", ("diffcps",))):
            for algo in algos:
                make_run(tmp_path, [10.0 if env_name.startswith("hopper") else 90.0], algo=algo, env_name=env_name,
                         seed=seed)  # fmt: skip
    cells = group(found(tmp_path))
    figure = figures.performance_profiles(cells, Choice(), "data")
    for line in figure.axes[0].lines:  # walker2d's 90 % are in neither
        assert np.interp([5, 50], *line.get_xydata().T).tolist() == [1, 0]
    assert figure.axes[0].get_title() == "data, 1 task"
    apart = [cell for cell in cells if (cell.algo, cell.env_name) != ("diffcps", "hopper-medium-v2")]
    assert figures.performance_profiles(apart, Choice(), "data") is None
    plt.close(figure)


def test_figures_show_the_numbers(tmp_path):
    for seed in range(3):
        make_run(tmp_path, [10.0 + seed, 20.0 + seed], [0.3, 0.2], seed=seed)
    drawn = {name: figure for name, _, figure in figures.figures(group(found(tmp_path)), Choice())}
    assert sorted(drawn) == ["constraint", "learning_curves", "performance_profiles"]
    mean, *seeds = drawn["learning_curves"].axes[0].lines
    np.testing.assert_allclose(mean.get_xydata(), [[20, 11], [40, 21]])
    assert sorted(line.get_ydata().tolist() for line in seeds) == [[10, 20], [11, 21], [12, 22]]
    assert not drawn["learning_curves"].axes[0].collections  # a band over three would be the least and the largest
    above, below = drawn["constraint"].axes
    np.testing.assert_allclose(above.lines[0].get_ydata(), 1)
    np.testing.assert_allclose(below.lines[0].get_ydata(), [0.29, 0.31, 0.19, 0.21])
    np.testing.assert_allclose(below.lines[1].get_ydata(), 0.05)  # kappa of hopper-medium-v2
    profile = drawn["performance_profiles"].axes[0].lines[0]
    assert np.interp([19.5, 20.4, 23], profile.get_xdata(), profile.get_ydata()) == pytest.approx([1, 2 / 3, 0])
    for figure in drawn.values():
        plt.close(figure)


@pytest.mark.parametrize(
    ("largest", "linear"),
    [
        ([10, 12, 1000], 14.4),
        ([10, 12, 61], 14.4),
        ([10, 12, 59], None),
        ([10, 12, 50], None),
        ([10, 12, np.inf], None),
        ([0, 0, 5], None),
        ([], None),
    ],
)
def test_a_curve_that_runs_away_leaves_the_others_half_of_the_axis(largest, linear):
    figure, axes = plt.subplots()
    for height in largest:
        axes.plot([0, 1, 2], [1, -height, np.nan])
    figures._make_room(axes)
    assert axes.get_yscale() == ("symlog" if linear else "linear")
    if linear:
        zero, bend, top = axes.transData.transform([[0, y] for y in (0, linear, max(largest))])[:, 1]
        assert axes.yaxis.get_transform().linthresh == pytest.approx(linear)
        assert bend - zero == pytest.approx(top - bend)
    plt.close(figure)


@pytest.mark.parametrize(("start", "scale"), [(5.1, "symlog"), (4.9, "linear")])
def test_a_lambda_that_begins_far_above_the_others_leaves_them_half_of_the_axis(tmp_path, start, scale):
    for kappa in (0.03, 0.05, 0.07):
        folder = make_run(tmp_path / str(kappa), [10.0, 20.0], kappa=kappa)
    metrics = pd.read_csv(folder / "metrics.csv")
    assert set(metrics["lambda"]) == {1}
    metrics.assign(**{"lambda": [start, *metrics["lambda"][1:]]}).to_csv(folder / "metrics.csv", index=False)
    drawn = {name: figure for name, _, figure in figures.figures(group(found(tmp_path)), Choice())}
    assert drawn["constraint"].axes[0].get_yscale() == scale
    for figure in drawn.values():
        plt.close(figure)


def test_four_seeds_have_a_band_and_three_are_shown_one_by_one(tmp_path):
    for seed in range(4):
        make_run(tmp_path, [10.0 + seed], seed=seed)
    figure = figures.learning_curves(group(found(tmp_path)), "title")
    (line,), (band,) = figure.axes[0].lines, figure.axes[0].collections
    assert line.get_ydata().tolist() == [11.5]
    heights = band.get_paths()[0].vertices[:, 1]
    assert 10 < heights.min() < 11.5 < heights.max() < 13
    plt.close(figure)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    tmp_path = tmp_path_factory.mktemp("page")
    for env_name in ("hopper-medium-v2", "walker2d-medium-v2"):
        for seed in range(2):
            make_run(tmp_path / "a", [10.0, 20.0 + seed], env_name=env_name, seed=seed)
    make_run(tmp_path / "b", [5.0], dataset=file_data("/data/x.hdf5", label="<script>alert(1)</script>"))
    assert main([str(tmp_path), "--html", str(tmp_path / "page" / "report.html")]) == 0
    return tmp_path / "page" / "report.html"


def test_the_page_stands_alone(page):
    text = page.read_text()
    assert not re.search(r'(src|href)="(?!data:image/png;base64,|#)', text)
    assert "<script" not in text and "&lt;script&gt;alert(1)" in text
    assert "url(" not in text and "@import" not in text
    assert text.count("<img ") == 4  # a figure for each task and a profile; of the single local run no profile
    assert text.index("Normalised scores, data") < text.index("<img ") < text.index("All protocols")
    assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC, commit \w+", text) and "python -m utils.report " in text
    assert "prefers-color-scheme: dark" in text and "max-width: 1000px" in text
    assert "average-locomotion (2 of 9)" in text and "seed_1" in text


def test_the_page_opens_in_a_browser(page, tmp_path):
    found = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    browser = next((path for path in found if path), None)
    if browser is None:
        pytest.skip("no chromium here")
    probe = (
        "<script>document.title = [...document.images].map(i => Math.min(i.naturalWidth, i.naturalHeight) > 100)"
        ".concat(document.querySelectorAll('table').length, document.documentElement.scrollWidth <= innerWidth).join()"
        "</script></body>"
    )
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text().replace("</body>", probe))
    command = [
        browser,
        *BROWSER_FLAGS,
        "--window-size=1200,800",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
        probed.as_uri(),
    ]
    shown = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": str(tmp_path)}
    )
    title = re.search("<title>(.*?)</title>", shown.stdout)
    assert title, shown.stderr[-2000:]
    # Every picture was decoded; four tables for each of two origins and the list of runs; no sideways scrolling.
    assert title[1] == "true,true,true,true,9,true"
