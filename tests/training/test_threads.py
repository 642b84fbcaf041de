"""The number of threads is measured, kept, and part of no number that a run gives."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import run
from tests import small
from tests.training.making import make_runner
from utils.runs.columns import TOOK
from utils.training import threads

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_many_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Clock:
    """Time that passes only while steps are timed: `per_row[threads]` seconds a row and step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, per_row: dict[int, float]) -> None:
        self.now, self.per_row, self.turns = 0.0, per_row, list[tuple[int, int]]()
        monkeypatch.setattr(threads, "_seconds", self.seconds)
        monkeypatch.setattr(threads.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(threads, "candidates", lambda: list(per_row))

    def seconds(self, agent: Any, table: Any, rows: int, steps: range, number: int, most: float = math.inf) -> float:
        self.turns.append((number, rows))
        step, taken = rows * self.per_row[number], 0.0
        for _ in steps:
            taken += step
            if taken > most:
                break
        self.now += taken
        return taken


def chosen(wanted: int | str, kept: int | None = None, batch_size: int = 256) -> tuple[int, str]:
    agent = make_runner("eager", [0]).agent
    table = small.dataset().to(CPU)
    return threads.choose(wanted, kept, CPU, lambda: agent, table, batch_size, 1000)


@pytest.mark.parametrize(("per_row", "number"), [
    ({1: 1e-4, 2: 5e-3}, 1),  # a busy machine: a step takes 25 ms, or more than a second
    ({1: 4e-4, 2: 2e-4, 4: 1e-4, 8: 3e-4}, 4),
    ({1: 1.0e-4, 2: 0.98e-4}, 1),  # a second core that is worth nothing
    ({1: 0.03, 2: 0.02, 4: 0.01}, 4),  # a step takes seconds: a few rows of it are timed
])  # fmt: skip
def test_the_fastest_number_is_found_within_three_seconds(
    per_row: dict[int, float], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch, per_row)
    assert chosen("auto")[0] == number == torch.get_num_threads()
    assert clock.now < 3 and {n for n, _ in clock.turns} == set(per_row)


def test_what_was_asked_for_and_what_a_run_began_with_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_fastest", None)
    assert chosen(2) == (2, "as asked") and torch.get_num_threads() == 2
    assert chosen(2, kept=2) == (2, "as asked")
    with pytest.warns(UserWarning, match="began with --threads 2: with 1 sums are rounded in another order"):
        assert chosen(1, kept=2) == (1, "as asked") and torch.get_num_threads() == 1
    assert chosen("auto", kept=2) == (2, "as it began") and torch.get_num_threads() == 2


def test_numbers_that_come_into_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert threads.candidates() == [1, 2, 4, 8]
    for allowed, numbers in (
        ("4", [1, 2, 4]),
        ("1", [1]),
        ("100", [1, 2, 4, 8]),
        ("0", [1, 2, 4, 8]),
        ("4,2", [1, 2, 4, 8]),
    ):
        monkeypatch.setenv("OMP_NUM_THREADS", allowed)
        assert threads.candidates() == numbers


@pytest.mark.parametrize("algo", ["diffcps", "dtql", "awr", "qgpo"])
def test_measuring_draws_from_no_generator_but_its_own(algo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "candidates", lambda: [1, 2])
    monkeypatch.setattr(threads, "_SECONDS", 0.2)
    run, copy = make_runner("eager", [0, 3], algo=algo), make_runner("eager", [0, 3], algo=algo).agent
    generators = [g.get_state() for g in run.generators]
    world = torch.get_rng_state(), np.random.get_state()[1].copy()
    weights = run.agent.state_dict()["networks"]
    number, why = threads.choose("auto", None, CPU, lambda: copy, run.table, 32, 1000)
    assert number in (1, 2) and why == "the fastest of 1, 2"
    assert all(torch.equal(a.get_state(), b) for a, b in zip(run.generators, generators, strict=True))
    assert torch.equal(torch.get_rng_state(), world[0]) and (np.random.get_state()[1] == world[1]).all()
    assert all(torch.equal(value, weights[name]) for name, value in run.agent.state_dict()["networks"].items())
    assert any(not torch.equal(value, weights[name]) for name, value in copy.state_dict()["networks"].items())


def test_a_run_records_its_threads_and_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = small.d4rl_file(tmp_path / "hopper.hdf5")

    def train(name: str, *more: str) -> Path:
        given = ["--env_name", "hopper-medium-v2", "--dataset", str(data), "--dir", str(tmp_path / name), *small.SHORT]
        assert run.main([*given, *more]) == 0
        return tmp_path / name / "diffcps" / "hopper-medium-v2" / "seed_0"

    def rows(folder: Path) -> list[dict[str, str]]:
        with open(folder / "metrics.csv", newline="") as file:
            return [{k: v for k, v in row.items() if k not in TOOK} for row in csv.DictReader(file)]

    monkeypatch.setattr(threads, "candidates", lambda: [1, 2])
    monkeypatch.setattr(threads, "_SECONDS", 0.2)
    monkeypatch.setattr(threads, "_best", lambda _: (1, "measured"))
    measured, asked = train("measured", "--threads", "auto"), train("asked", "--threads", "1")
    assert rows(measured) == rows(asked)
    assert (measured / "evaluations.csv").read_bytes() == (asked / "evaluations.csv").read_bytes()
    config = json.loads((measured / "config.json").read_text())
    assert config["threads"] == 1 and config["run"]["threads"] == "auto"
    (measured / "config.json").write_text(json.dumps(config | {"threads": 2}))
    monkeypatch.setattr(threads, "_fastest", None)
    train("measured", "--threads", "auto", "--resume", "--num_epochs", "6")
    assert json.loads((measured / "config.json").read_text())["threads"] == 2 == torch.get_num_threads()
