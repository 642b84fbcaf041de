"""--wandb: what its package is called with, by a stand-in that keeps the calls; no number depends on it."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import run
from agents import AGENTS
from tests.small import SHORT, d4rl_file
from utils.errors import UserError
from utils.options import parse
from utils.runs.log import SeedLog
from utils.runs.tracking import Tracker


class Server:
    """The parts of the package that are used; `broken` names those that fail."""

    def __init__(self) -> None:
        self.runs: list[SimpleNamespace] = []
        self.broken: set[str] = set()

    def init(self, **given: Any) -> Any:
        one = SimpleNamespace(given=given, rows=[], ended=False)
        self._fail("init")
        self.runs.append(one)
        return SimpleNamespace(
            define_metric=lambda *_, **__: None,
            log=lambda row: (self._fail("log"), one.rows.append(row)),
            finish=lambda: (self._fail("finish"), setattr(one, "ended", True)),
        )

    def _fail(self, name: str) -> None:
        if name in self.broken:
            raise RuntimeError(f"{name}: no network\nmore lines")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    found, module = Server(), ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None)
    module.init = found.init  # type: ignore[attr-defined]
    module.Settings = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return found


def test_without_the_package_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.options.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--wandb needs the package wandb.* pip install wandb"):
        parse(["--wandb", "mine"], AGENTS)
    assert parse([], AGENTS).wandb is None


def test_every_seed_is_a_run_with_the_numbers_of_its_files(tmp_path: Path, server: Server) -> None:
    data = str(d4rl_file(tmp_path / "hopper.hdf5"))
    command = ["--env_name", "hopper-medium-v2", "--algo", "bc", "--dataset", data, "--dir", str(tmp_path), *SHORT]
    command = [word for word in command if word not in ("--action_candidates", "3")]
    command += ["--seeds", "0,1", "--wandb", "mine"]
    assert run.main([*command, "--max_steps", "20"]) == 0 and run.main([*command, "--resume"]) == 0
    first, second, *resumed = server.runs
    assert [one.given["name"] for one in server.runs] == [
        "bc hopper-medium-v2 seed_0",
        "bc hopper-medium-v2 seed_1",
    ] * 2
    assert all(one.given["project"] == "mine" and one.given["group"] == "bc hopper-medium-v2" for one in server.runs)
    assert all(one.ended for one in server.runs)
    assert [one.given["id"] for one in resumed] == [first.given["id"], second.given["id"]]  # they go on
    assert first.given["id"] != second.given["id"]
    assert first.given["config"]["batch_size"] == 16 and second.given["config"]["seed"] == 1
    assert [row["step"] for row in first.rows] == [10, 20, 20] and [row["step"] for row in resumed[0].rows] == [
        30,
        40,
        40,
    ]
    assert {"evaluation/normalized_score", "evaluation/return"} < set(first.rows[2])
    assert {"losses/bc_loss", "speed/wall_s", "speed/cpu_s"} < set(first.rows[0])
    json.dumps([one.given["config"] for one in server.runs])  # plain values only
    # A run that begins anew is another one there.
    assert run.main([*command, "--overwrite", "--max_steps", "10"]) == 0
    assert server.runs[-1].given["id"] not in (first.given["id"], second.given["id"])


def test_no_server_at_the_start_is_one_line(tmp_path: Path, server: Server) -> None:
    server.broken = {"init"}
    (tmp_path / "bc" / "hopper-medium-v2" / "seed_0").mkdir(parents=True)
    with pytest.raises(UserError, match=r"--wandb mine: init: no network; WANDB_MODE=offline .*") as error:
        Tracker("mine", tmp_path / "bc" / "hopper-medium-v2" / "seed_0", {})
    assert "\n" not in str(error.value)


def test_a_server_that_fails_later_costs_a_warning(tmp_path: Path, server: Server) -> None:
    folder = tmp_path / "bc" / "hopper-medium-v2" / "seed_0"
    folder.mkdir(parents=True)
    log = SeedLog(folder, ("bc_loss",), 0, {}, "mine")
    log.metrics(10, {"bc_loss": 1.0}, 5.0)
    server.broken = {"log"}
    with pytest.warns(UserWarning, match="no more numbers of .* to Weights & Biases: log: no network"):
        log.metrics(20, {"bc_loss": 1.0}, 5.0)
    log.metrics(30, {"bc_loss": 1.0}, 5.0)
    log.close()
    assert len((folder / "metrics.csv").read_text().splitlines()) == 4 and len(server.runs[0].rows) == 1
