"""The papers' numbers as copied: complete, and consistent with the averages printed beside them."""

import csv
import statistics
from pathlib import Path

import pytest

from utils import tasks

FOLDER = Path(__file__).resolve().parents[2] / "results" / "published"
TASKS = {
    *(
        f"{body}-{kind}-v2"
        for body in ("hopper", "halfcheetah", "walker2d")
        for kind in ("medium", "medium-replay", "medium-expert")
    ),
    *(f"antmaze-{maze}-v0" for maze in ("umaze", "umaze-diverse", "medium-play", "medium-diverse")),
    *(f"antmaze-{maze}-v0" for maze in ("large-play", "large-diverse")),
}


def read(name: str) -> list[dict[str, str]]:
    with open(FOLDER / name, newline="") as file:
        return list(csv.DictReader(file))


def test_table1_has_every_task_and_the_papers_scores():
    rows = {row["env_name"]: row for row in read("table1.csv")}
    assert set(rows) - {"average-locomotion", "average-antmaze", "diffusion-steps"} == TASKS
    assert (rows["hopper-medium-v2"]["DiffCPS"], rows["hopper-medium-v2"]["DiffCPS_std"]) == ("100.1", "3.5")
    assert rows["antmaze-umaze-v0"]["DD"] == ""


@pytest.mark.parametrize(("group", "ending"), [("average-locomotion", "-v2"), ("average-antmaze", "-v0")])
def test_table1_columns_agree_with_the_printed_averages(group, ending):
    rows = read("table1.csv")
    printed = next(row for row in rows if row["env_name"] == group)
    methods = [name for name in printed if name not in ("env_name", "DiffCPS_std") and printed[name]]
    assert len(methods) == (9 if ending == "-v2" else 7)
    for method in methods:
        mean = statistics.mean(float(row[method]) for row in rows if row["env_name"].endswith(ending))
        assert mean == pytest.approx(float(printed[method]), abs=0.1), method


def test_tables_2_and_3_and_corl_are_complete():
    assert {(row["tasks"], row["algorithm"]) for row in read("table2.csv")} == {
        (f"average-{group}", algorithm) for group in ("locomotion", "antmaze") for algorithm in ("DiffCPS", "SfBC")
    }
    table3 = read("table3.csv")
    assert {row["env_name"] for row in table3} == TASKS
    assert sorted({float(row["kappa"]) for row in table3}) == [0.03, 0.04, 0.05, 0.06, 0.09, 0.2, 0.3]
    corl = read("corl.csv")
    assert {row["score"] for row in corl} == {"last", "best"}
    assert all(row["env_name"] in tasks.TASKS and float(row["std"]) >= 0 for row in corl)
