"""Data that are another task's or mark no end are taken, with a warning; a folder gives the task's file."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

from tests.small import d4rl_file
from utils.data import d4rl
from utils.data.doubts import doubts
from utils.data.rows import read_rows
from utils.errors import UserError
from utils.tasks import task

SIZE = 300
NO_END = {"terminals": np.zeros(SIZE, bool), "timeouts": np.zeros(SIZE, bool)}


def said(path: Path, env_name: str) -> str:
    return " | ".join(doubts(read_rows(path), task(env_name)))


def heights(value: float) -> np.ndarray:
    states = np.random.default_rng(0).standard_normal((SIZE, 17)).astype(np.float32)
    states[:, 0] = value
    return states


@pytest.mark.parametrize(
    ("env_name", "changes", "words"),
    [
        ("hopper-medium-v2", {}, ""),
        ("hopper-medium-v2", NO_END, "no row ends an episode"),
        ("hopper-medium-v2", {"terminals": np.zeros(SIZE, bool), "timeouts": None}, "no row ends an episode"),
        ("halfcheetah-medium-v2", {"terminals": np.zeros(SIZE, bool)}, ""),
        ("halfcheetah-medium-v2", {"terminals": np.arange(SIZE) == 7}, "1 rows are terminal; HalfCheetah's"),
        ("walker2d-medium-v2", {"observations": heights(1.2)}, ""),
        ("walker2d-medium-v2", {"observations": heights(-0.1)}, "in 100% of the rows the torso is not between 0.8 and"),
        ("antmaze-umaze-v0", {"rewards": np.arange(SIZE) % 2.0}, ""),
        ("antmaze-umaze-v0", {"rewards": np.full(SIZE, 0.5)}, "rewards other than 0 and 1"),
    ],
)
def test_what_speaks_against_a_set(tmp_path: Path, env_name: str, changes: dict, words: str) -> None:
    found = said(d4rl_file(tmp_path / "any.hdf5", env_name, SIZE, **changes), env_name)
    assert found == "" if words == "" else words in found


@pytest.mark.parametrize(
    ("name", "env_name", "other"),
    [
        ("hopper-expert-v2.hdf5", "hopper-medium-v2", "hopper-expert-v2"),
        ("hopper_medium_expert-v2.hdf5", "hopper-medium-v2", "hopper-medium-expert-v2"),
        ("hopper-medium.hdf5", "hopper-medium-v2", None),
        ("mine.hdf5", "hopper-medium-v2", None),
    ],
)
def test_a_files_name_is_another_tasks(tmp_path: Path, name: str, env_name: str, other: str | None) -> None:
    path = d4rl_file(tmp_path / name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        d4rl.load(env_name, path=path)
    texts = [str(warning.message) for warning in caught]
    assert texts == ([] if other is None else [f"{path}: by its name it is data of {other}, not of {env_name}"])


def test_a_folder_gives_the_tasks_file_under_three_names(tmp_path: Path) -> None:
    for name in ("hopper_medium-v2.hdf5", "hopper-medium.hdf5", "hopper-medium-v2.hdf5"):
        d4rl_file(tmp_path / name)
        assert d4rl.find_file(tmp_path, "hopper-medium-v2").name == name
    dataset = d4rl.load("hopper-medium-v2", path=tmp_path)
    assert dataset.source == dataset.info["path"] == str((tmp_path / "hopper-medium-v2.hdf5").resolve())
    with pytest.raises(UserError, match="no data for antmaze-umaze-v0 in"):
        d4rl.load("antmaze-umaze-v0", path=tmp_path)
