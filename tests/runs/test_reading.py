"""The one parser of a run's files: numbers come back, and what is damaged is named with its line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from utils.errors import UserError
from utils.runs.log import SeedLog
from utils.runs.reading import read_config, read_evaluations, read_events, read_metrics, scores_by_step


def written(folder: Path) -> Path:
    log = SeedLog(folder, ("critic_loss", "q"), 0, {})
    log.metrics(10, {"critic_loss": 0.125}, 50.0)
    log.metrics(20, {"critic_loss": 0.5, "q": -3.0}, 60.0, "stopped: not finite")
    log.evaluation(10, (1.0, 3.0), (7.5, 8.5), (5, 6), (False, True))
    log.evaluation(20, (2.0, 4.0), (9.5, 10.5), (7, 8), (True, True))
    log.close()
    return folder


def test_what_was_written_is_read(tmp_path: Path) -> None:
    folder = written(tmp_path)
    evaluations = read_evaluations(folder / "evaluations.csv")
    assert {name: column.tolist() for name, column in evaluations.items()} == {
        "step": [10, 10, 20, 20],
        "episode": [0, 1, 0, 1],
        "return": [1.0, 3.0, 2.0, 4.0],
        "normalized_score": [7.5, 8.5, 9.5, 10.5],
        "length": [5, 6, 7, 8],
        "unstable": [0, 1, 1, 1],
    }
    scores = scores_by_step(folder / "evaluations.csv")
    assert {step: values.tolist() for step, values in scores.items()} == {10: [7.5, 8.5], 20: [9.5, 10.5]}
    metrics = read_metrics(folder / "metrics.csv")
    np.testing.assert_array_equal(metrics["critic_loss"], [0.125, 0.5])
    np.testing.assert_array_equal(metrics["q"], [np.nan, -3.0])
    assert metrics["step"].tolist() == [10, 20] and "event" not in metrics
    assert read_events(folder / "metrics.csv") == [(20, "stopped: not finite")]


def test_files_of_earlier_versions_and_those_just_begun(tmp_path: Path) -> None:
    (tmp_path / "old.csv").write_text("step,normalized_score\n5,1.5\n")
    assert read_evaluations(tmp_path / "old.csv")["unstable"].tolist() == [0]
    (tmp_path / "empty.csv").touch()
    assert scores_by_step(tmp_path / "empty.csv") == {}
    assert read_metrics(tmp_path / "none.csv") == {} and read_events(tmp_path / "none.csv") == []


@pytest.mark.parametrize(
    "row", ["30,0,1.0,oops,5,0", "30,0,1.0", "30,0,1.0,2.0,5,0,9", "30,0,1.0,2.\x00,5,0", "3\xff,0,1.0,2.0,5,0", '"']
)
def test_a_damaged_row_is_named_with_its_line(tmp_path: Path, row: str) -> None:
    path = written(tmp_path) / "evaluations.csv"
    path.write_bytes(path.read_bytes() + row.encode("latin-1"))
    for read in (read_evaluations, scores_by_step):
        with pytest.raises(UserError, match=r"evaluations.csv, line 6, is damaged .*; run again with --resume"):
            read(path)
    metrics = tmp_path / "metrics.csv"
    metrics.write_bytes(metrics.read_bytes() + b"x,1,2,3,\r\n")
    for read in (read_metrics, read_events):
        with pytest.raises(UserError, match=r"metrics.csv, line 4, is damaged"):
            read(metrics)


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[]", "{}", json.dumps({"settings": None, "run": {}, "dataset": {}}), "[" * 100_000]
)
def test_a_configuration_that_is_none_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config.json is not what run.py writes") as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value)
