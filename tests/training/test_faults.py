"""Numbers that are not finite end a seed and cost the others nothing; values that run away are announced."""

from __future__ import annotations

import csv
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import run
from agents import AGENTS
from benchmarks.soak.soak import difference, tiny
from tests.small import d4rl_file
from tests.training.making import make_runner
from utils import launch
from utils.report.__main__ import main as report
from utils.runs import checkpoint
from utils.runs.checkpoint import split
from utils.runs.columns import TOOK
from utils.runs.summary import summary_table
from utils.training.faults import Watch, value_bound
from utils.training.runner import Runner

STEPS = 4  # an epoch


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(d4rl_file(tmp_path_factory.mktemp("data") / "hopper.hdf5"))


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def spoil(agent: object, seed: int, value: float = math.nan) -> None:
    """One weight of one seed's first network."""
    name = next(iter(agent.networks))  # type: ignore[attr-defined]
    agent.networks[name].flat.view(agent.num_seeds, -1)[seed, 3] = value  # type: ignore[attr-defined]


# --- The seeds are independent ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("algo", list(AGENTS))
def test_a_lost_seed_costs_the_others_no_bit_and_keeps_its_last_finite_state(algo: str) -> None:
    ends, metrics, kept = [], [], None
    for fault in (False, True):
        part = make_runner("eager", [0, 1, 2], algo=algo, hidden_dim=16)
        watch, seen = Watch(part.agent, math.inf), []
        for epoch in range(4):
            if fault and epoch == 2:
                kept = split(part.agent.state_dict(), 3)[1]
                spoil(part.agent, 1)
            part.run(STEPS)
            means = {name: value.numpy() for name, value in part.metrics().items()}
            with warnings.catch_warnings():
                warnings.simplefilter("error" if epoch != 2 or not fault else "ignore")
                events = watch.look(means)
            assert [bool(event) for event in events] == [False, fault and epoch == 2, False]
            seen.append({name: value[[0, 2]] for name, value in means.items()})
        ends.append(split(part.agent.state_dict(), 3))
        metrics.append(seen)
        assert watch.running.tolist() == [True, not fault, True]
    for a, b in zip(*metrics, strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in a)
    for seed in (0, 2):
        assert tensors(ends[0][seed]).keys() == tensors(ends[1][seed]).keys()
        assert all(torch.equal(value, tensors(ends[1][seed])[name]) for name, value in tensors(ends[0][seed]).items())
    assert all(torch.equal(value, tensors(ends[1][1])[name]) for name, value in tensors(kept).items())


def tensors(state: object, name: str = "") -> dict[str, Tensor]:
    if isinstance(state, dict):
        return {k: v for key, value in state.items() for k, v in tensors(value, f"{name}.{key}").items()}
    return {name: state} if isinstance(state, Tensor) else {}


@pytest.mark.parametrize("where", ["parameter", "moment", "metric"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_every_number_that_is_not_finite_is_found(where: str, value: float) -> None:
    agent = make_runner("eager", [4, 7], hidden_dim=16).agent
    watch, means = Watch(agent, math.inf), {"critic_loss": np.array([1.0, 2.0])}
    assert watch.look(means) == ["", ""]
    if where == "parameter":
        spoil(agent, 1, value)
    elif where == "moment":
        agent.optimizers["critic"].mean.view(2, -1)[1, 5] = value
    else:
        means["critic_loss"][1] = value
    with pytest.warns(UserWarning, match="seed 7, step 0: stopped: not finite: "):
        events = watch.look(means)
    name = {"parameter": "networks.actor", "moment": "optimizers.critic.exp_avg", "metric": "critic_loss"}[where]
    assert events == ["", f"stopped: not finite: {name}"]


def test_values_beyond_what_rewards_allow_are_announced_once() -> None:
    rewards = np.array([[0.5], [-2.0]], np.float32)
    assert value_bound(rewards, 0.99) == pytest.approx(10 * 2 / 0.01)
    assert value_bound(np.zeros((3, 1)), 0.99) == 1 and math.isinf(value_bound(rewards, None))
    assert math.isinf(value_bound(rewards, 1.0))
    agent = make_runner("eager", [0, 1], hidden_dim=16).agent
    watch = Watch(agent, 2000.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert watch.look({"q_mean": np.array([1999.0, -1999.0])}) == ["", ""]
    with pytest.warns(UserWarning, match=r"seed 1, step 0: runaway: q_mean -2.01e\+03 beyond 2e\+03"):
        assert watch.look({"q_mean": np.array([0.0, -2010.0])})[1].startswith("runaway")
    later = Watch(agent, 2000.0)
    later.load_state_dict(watch.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert later.look({"q_mean": np.array([0.0, -1e9])}) == ["", ""]


# --- A whole run ------------------------------------------------------------------------------------------------------


class Faulty(Runner):
    """Loses the seeds in LOST in the epoch that begins at step 4."""

    LOST: tuple[int, ...] = ()

    def run(self, steps: int, *until: Callable[[], bool]) -> None:
        if self.agent.step == STEPS:
            for seed in self.LOST:
                spoil(self.agent, seed)
        super().run(steps, *until)


@pytest.fixture
def losing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def lose(*seeds: int) -> None:
        monkeypatch.setattr(Faulty, "LOST", seeds)
        monkeypatch.setattr(launch, "Runner", Faulty)

    return lose


@pytest.mark.slow
def test_a_run_goes_on_without_the_seed_and_says_so(
    tmp_path: Path, data: str, losing: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    whole, hurt = tmp_path / "whole", tmp_path / "hurt"
    assert run.main(tiny("diffcps", "0-2", data, whole)) == 0
    losing(1)
    capsys.readouterr()
    assert run.main(tiny("diffcps", "0-2", data, hurt)) == 0
    shown = capsys.readouterr()
    assert shown.err.count("stopped: not finite") == 1 and "warning: seed 1, step 8: stopped" in shown.err
    assert "stopped at 8: numbers not finite; in no mean" in shown.out
    folder = hurt / "diffcps" / "hopper-medium-v2"
    events = [row["event"] for row in rows(folder / "seed_1" / "metrics.csv")]
    assert len(events) == 2 and events[0] == "" and events[1].startswith("stopped: not finite: ")
    assert [row["step"] for row in rows(folder / "seed_1" / "evaluations.csv")] == ["4"]
    state = torch.load(folder / "seed_1" / "checkpoint.pt", weights_only=True)
    assert all(value.isfinite().all() for value in state["agent"]["networks"].values())
    for seed in ("seed_0", "seed_2"):
        a, b = (rows(base / "diffcps" / "hopper-medium-v2" / seed / "metrics.csv") for base in (whole, hurt))
        assert [row | dict.fromkeys(TOOK) for row in a] == [row | dict.fromkeys(TOOK) for row in b]
        a, b = (rows(base / "diffcps" / "hopper-medium-v2" / seed / "evaluations.csv") for base in (whole, hurt))
        assert [row["step"] for row in a] == [row["step"] for row in b] == ["4", "8", "12"]

    # Resumed and prolonged, the seed stays where it is.
    more = ("--resume", "--num_epochs", "4")
    assert run.main(tiny("diffcps", "0-2", data, hurt, *more)) == 0
    assert len(rows(folder / "seed_1" / "metrics.csv")) == 2 and len(rows(folder / "seed_2" / "metrics.csv")) == 4
    again = torch.load(folder / "seed_1" / "checkpoint.pt", weights_only=True)
    assert all(torch.equal(v, again["agent"]["networks"][k]) for k, v in state["agent"]["networks"].items())

    # The report counts it, and has it in no mean.
    capsys.readouterr()
    assert report([str(hurt), "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    assert "left out" in shown.out + shown.err and "its numbers were no longer finite: step 8" in shown.out + shown.err
    tables = "".join(path.read_text() for path in (tmp_path / "out" / "tables").glob("*.md"))
    assert "1 of 3 seeds stopped, their numbers not finite (seed 1): in no mean" in tables


@pytest.mark.parametrize("beside", [[], ["--eval_async"]])
def test_when_no_seed_is_left_the_run_ends_with_code_1(
    tmp_path: Path, data: str, losing: Callable[..., None], capsys: pytest.CaptureFixture[str], beside: list[str]
) -> None:
    losing(0, 1)
    for _ in range(2):  # and again when it is resumed
        assert run.main(tiny("diffcps", "0,1", data, tmp_path, "--resume", *beside)) == 1
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("run.py: no seed is left, their numbers are not finite")
        assert len(rows(tmp_path / "diffcps" / "hopper-medium-v2" / "seed_0" / "metrics.csv")) == 2
    assert "stopped at 8" in summary_table([tmp_path / "diffcps" / "hopper-medium-v2" / "seed_0"])


def test_values_that_run_away_are_in_the_log_once_and_counted(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "value_bound", lambda rewards, discount: 1e-9)
    assert run.main(tiny("td3_bc", "0,1", data, tmp_path, "--num_epochs", "1")) == 0
    assert capsys.readouterr().err.count("runaway: q_mean") == 2
    assert run.main(tiny("td3_bc", "0,1", data, tmp_path, "--resume")) == 0
    assert "runaway" not in capsys.readouterr().err
    for path in tmp_path.rglob("metrics.csv"):
        first, *later = [row["event"] for row in rows(path)]
        assert first.startswith("runaway: q_mean ") and first.endswith(" beyond 1e-09") and later == ["", ""]
    assert report([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    tables = "".join(path.read_text() for path in (tmp_path / "out" / "tables").glob("*.md"))
    assert "2 of 2 seeds had Q values that ran away (seed 0, 1)" in tables


def test_a_checkpoint_of_an_earlier_version_is_refused_in_one_line(
    tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(tiny("bc", "0", data, tmp_path, "--num_epochs", "1")) == 0
    paths = list(tmp_path.rglob("checkpoint*.pt"))
    for path in paths:
        state = torch.load(path, weights_only=True)
        checkpoint.save(path, {name: part for name, part in state.items() if name not in ("format", "owner")})
    before = [path.read_bytes() for path in paths]
    capsys.readouterr()
    assert len(paths) == 2 and run.main(tiny("bc", "0", data, tmp_path, "--resume")) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and "was written by another version of this project" in line and "--overwrite" in line
    assert [path.read_bytes() for path in paths] == before


def test_rewards_that_overflow_stop_seeds_and_resuming_changes_nothing(tmp_path: Path) -> None:
    """Finite in the file, too large to square: no set is refused for it, and no NaN is trained on."""
    rewards = np.random.default_rng(0).random(300).astype(np.float32)
    rewards[[20, 50, 90]] = 3e30
    wild = str(d4rl_file(tmp_path / "wild.hdf5", rewards=rewards))
    codes = [run.main(tiny("td3_bc", "0-2", wild, tmp_path / "whole", "--reward_tune", "no"))]
    codes.append(run.main(tiny("td3_bc", "0-2", wild, tmp_path / "cut", "--reward_tune", "no", "--num_epochs", "1")))
    codes.append(run.main(tiny("td3_bc", "0-2", wild, tmp_path / "cut", "--reward_tune", "no", "--resume")))
    events = [row["event"] for path in tmp_path.glob("whole/*/*/seed_*/metrics.csv") for row in rows(path)]
    assert any(event.startswith("stopped") for event in events) and set(codes) <= {0, 1}
    assert difference(tmp_path / "whole", tmp_path / "cut") is None
