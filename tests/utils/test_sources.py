"""Each kind of source and backend is asked for what the command line names."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from utils import classic, environments, sources
from utils.behaviour import local
from utils.data import d4rl, minari
from utils.errors import UserError

TASK = "hopper-medium-v2"


def test_the_dataset_is_asked_of_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(local, "load", lambda name, size, progress: asked.append(("local", name, size, progress)))
    monkeypatch.setattr(d4rl, "load", lambda name, path: asked.append(("d4rl", name, path)))
    monkeypatch.setattr(minari, "load", lambda name: asked.append((name,)))
    sources.choose(TASK, "local", local_size=777, progress=False).load()
    sources.choose(TASK, "some.hdf5").load()
    sources.choose(TASK).load()
    sources.choose(TASK, "minari:mujoco/hopper/expert-v0").load()
    assert asked == [
        ("local", TASK, 777, False), ("d4rl", TASK, "some.hdf5"), ("d4rl", TASK, None),
        ("minari:mujoco/hopper/expert-v0",),
    ]  # fmt: skip


def test_the_backend_makes_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classic, "make_lockstep", lambda name, number: ("classic", name, number))
    monkeypatch.setattr(environments, "make_lockstep", lambda name, number: ("mujoco", name, number))
    assert sources.choose(TASK, backend="d4rl").environments(3) == ("classic", TASK, 3)
    assert sources.choose(TASK, "local").environments(4) == ("mujoco", TASK, 4)


def test_a_task_of_the_original_stack_alone_trains_without_evaluation() -> None:
    with pytest.warns(UserWarning, match="trains without evaluation"):
        assert sources.choose("pen-human-v1").environments(2) is None


def test_a_bandit_makes_its_own_data_and_environments() -> None:
    assert isinstance(sources.choose("bandit-circle-v0"), sources.Bandit)
    with pytest.raises(UserError, match="makes its own data: leave --dataset local out"):
        sources.choose("bandit-circle-v0", "local")
    with pytest.raises(UserError, match="no task of the original stack: leave --backend d4rl out"):
        sources.choose("bandit-circle-v0", backend="d4rl")


def test_scores_are_d4rls() -> None:
    scores = sources.choose(TASK).normalized_score(np.array([[-20.272305, 3234.3]]))
    np.testing.assert_allclose(scores, [[0.0, 100.0]], atol=1e-9)
