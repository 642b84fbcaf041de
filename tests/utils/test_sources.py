"""Each kind of source and backend is asked for what the command line names."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from agents import AGENTS
from utils import classic, environments, options, sources
from utils.behaviour import local
from utils.data import d4rl


def given(*arguments: str) -> Any:
    return options.parse(["--env_name", "hopper-medium-v2", *arguments], AGENTS)


def test_the_dataset_is_asked_of_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(local, "load", lambda name, size, progress: asked.append(("local", name, size, progress)))
    monkeypatch.setattr(d4rl, "load", lambda name, path: asked.append(("d4rl", name, path)))
    sources.load(given("--dataset", "local", "--local_size", "777", "--quiet"))
    sources.load(given("--dataset", "some.hdf5"))
    sources.load(given())
    assert asked == [
        ("local", "hopper-medium-v2", 777, False),
        ("d4rl", "hopper-medium-v2", "some.hdf5"),
        ("d4rl", "hopper-medium-v2", None),
    ]


def test_the_backend_makes_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classic, "make_lockstep", lambda name, number: ("classic", name, number))
    monkeypatch.setattr(environments, "make_lockstep", lambda name, number: ("mujoco", name, number))
    assert sources.make_environments(given("--backend", "d4rl"), 3) == ("classic", "hopper-medium-v2", 3)
    assert sources.make_environments(given(), 4) == ("mujoco", "hopper-medium-v2", 4)


def test_a_task_of_the_original_stack_alone_trains_without_evaluation() -> None:
    parsed = options.parse(["--env_name", "pen-human-v1"], AGENTS)
    with pytest.warns(UserWarning, match="trains without evaluation"):
        assert sources.make_environments(parsed, 2) is None


def test_scores_are_d4rls() -> None:
    scores = sources.normalized_score(given(), np.array([[-20.272305, 3234.3]]))
    np.testing.assert_allclose(scores, [[0.0, 100.0]], atol=1e-9)
