"""The toy problems: their data in closed form, the one-step environments, and run.py on them as on any task."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import hyperparameters
import run
from agents import AGENTS
from tests.small import SHORT
from utils import sources
from utils.data import bandit
from utils.errors import UserError
from utils.report.runs import Labels, read_run
from utils.training.evaluation import evaluate

CIRCLE, GAUSSIANS = "bandit-circle-v0", "bandit-gaussians-v0"


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# --- Data -----------------------------------------------------------------------------------------------


def test_the_circles_data() -> None:
    """A unit circle plus normal noise of 0.05 a coordinate: E r^2 = 1 + 2 s^2, sd of r ~ s, angles uniform."""
    data = bandit.load(CIRCLE)
    assert (data.size, data.state_dim, data.action_dim, data.source) == (5000, 1, 2, "bandit")
    assert not data.states.any() and not data.next_states.any() and not data.not_dones.any()
    assert (data.rewards == 1).all()
    x, y = data.actions.astype(np.float64).T
    radius = np.hypot(x, y)
    error = 1 / math.sqrt(5000)
    assert (radius**2).mean() == pytest.approx(1 + 2 * 0.05**2, abs=4 * 0.1 * error)
    assert radius.std() == pytest.approx(0.05, abs=4 * 0.05 * error / math.sqrt(2))
    angle = np.arctan2(y, x)
    for k in (1, 2, 3):  # the first moments of a uniform angle vanish
        assert abs(np.exp(1j * k * angle).mean()) < 4 * error
    assert np.abs(data.actions).max() < 1.2  # inside the box: nothing was clipped


def test_the_gaussians_data() -> None:
    """Diffusion-QL's: 2,500 a corner, deviation 0.05, rewards N(3, 0), N(1.5), N(5) of deviation 0.5, box [-1, 1]."""
    data = bandit.load(GAUSSIANS)
    assert data.size == 10_000 and np.abs(data.actions).max() <= 1
    for (x, y), reward in {(-1, 1): 3.0, (-1, -1): 0.0, (1, 1): 1.5, (1, -1): 5.0}.items():
        here = (np.sign(data.actions) == (x, y)).all(axis=1)
        assert here.sum() == 2500
        np.testing.assert_allclose(data.actions[here].mean(axis=0), (0.8 * x, 0.8 * y), atol=0.004)
        np.testing.assert_allclose(data.actions[here].std(axis=0), 0.05, atol=0.003)
        assert data.rewards[here].mean() == pytest.approx(reward, abs=0.04)
        assert data.rewards[here].std() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("task", bandit.ids())
def test_the_data_are_the_same_every_time_and_described(task: str) -> None:
    first, second = bandit.load(task), bandit.load(task)
    assert first.info == second.info and np.array_equal(first.actions, second.actions)
    assert len(first.info["sha256"]) == 64 and first.info["rows"] == first.size
    scores = bandit.normalized_score(task, bandit.BANDITS[task].reward(first.actions))
    assert first.info["behaviour_score"] == pytest.approx(float(scores.mean()))


def test_what_the_data_score() -> None:
    """Three deviations hold 99.73 % of a coordinate's noise and 1 - exp(-4.5) of a plane's."""
    assert bandit.load(CIRCLE).info["behaviour_score"] == pytest.approx(99.73, abs=0.3)
    expected = 100 * (1 - math.exp(-4.5)) * (3 + 0 + 1.5 + 5) / 4 / 5
    assert bandit.load(GAUSSIANS).info["behaviour_score"] == pytest.approx(expected, abs=0.3)


def test_the_tables_of_tasks_agree() -> None:
    assert hyperparameters.DOMAINS["bandit"] == bandit.ids()


# --- Environments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "action", "reward"),
    [
        (CIRCLE, (1.0, 0.0), 1.0),
        (CIRCLE, (0.6, -0.8), 1.0),
        (CIRCLE, (0.0, 1.149), 1.0),
        (CIRCLE, (0.0, 1.151), 0.0),
        (CIRCLE, (0.0, -0.849), 0.0),
        (CIRCLE, (0.0, 0.0), 0.0),  # the middle, where a unimodal policy ends
        (GAUSSIANS, (0.8, -0.8), 5.0),
        (GAUSSIANS, (0.9, -0.7), 5.0),
        (GAUSSIANS, (-0.8, 0.66), 3.0),
        (GAUSSIANS, (-0.8, 0.64), 0.0),
        (GAUSSIANS, (0.8, 0.8), 1.5),
        (GAUSSIANS, (-0.8, -0.8), 0.0),
        (GAUSSIANS, (0.0, 0.0), 0.0),
        (GAUSSIANS, (9.0, -0.8), 0.0),  # the box's edge at (1, -0.8) is farther than 0.15 from the corner's mode
    ],
)
def test_rewards(task: str, action: tuple[float, float], reward: float) -> None:
    environments = bandit.make_lockstep(task, 2)
    assert environments.reset([np.random.default_rng(0)] * 2).tolist() == [[0.0], [0.0]]
    actions = np.array([action, action], dtype=np.float32)
    states, rewards, terminated, truncated = environments.step(actions, np.array([True, False]))
    assert states.shape == (2, 1) and rewards.tolist() == [reward, 0.0]
    assert terminated.tolist() == [True, False] and not truncated.any()


def test_an_episode_is_one_step() -> None:
    environments = bandit.make_lockstep(CIRCLE, 6)

    def act(states: torch.Tensor, generators: object, active: torch.Tensor) -> torch.Tensor:
        assert states.shape == (2, 3, 1) and active.all()
        return torch.tensor([[[1.0, 0.0]] * 3, [[0.0, 1.0], [0.0, 0.0], [0.3, 0.0]]])

    episodes = evaluate(act, environments, [0, 1], [np.random.default_rng(s) for s in (0, 1)], [], "cpu")
    assert episodes.returns.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert (episodes.lengths == 1).all() and not episodes.unstable.any()
    assert bandit.normalized_score(CIRCLE, episodes.returns).mean() == pytest.approx(400 / 6)
    assert bandit.normalized_score(GAUSSIANS, np.array([1.5, 5.0])).tolist() == [30.0, 100.0]


def test_mistakes_get_one_clear_line() -> None:
    environments = bandit.make_lockstep(CIRCLE, 2)
    with pytest.raises(UserError, match="got 1 generators for 2"):
        environments.reset([np.random.default_rng(0)])
    with pytest.raises(UserError, match="NaN or infinite"):
        environments.step(np.array([[np.nan, 0], [0, 0]]), np.array([True, True]))
    with pytest.raises(UserError, match="expected"):
        environments.step(np.zeros((2, 3)), np.array([True, True]))
    with pytest.raises(UserError, match="at least one"):
        bandit.make_lockstep(CIRCLE, 0)
    with pytest.raises(UserError, match="no bandit 'bandit-x'; known: bandit-circle-v0"):
        bandit.load("bandit-x")


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--dataset", "local"), "makes its own data: leave --dataset local out"),
        (("--dataset", "some.hdf5"), "makes its own data: leave --dataset some.hdf5 out"),
        (("--dataset", "minari:a/b-v0"), "makes its own data: leave --dataset minari:a/b-v0 out"),
        (("--backend", "d4rl"), "no task of the original stack: leave --backend d4rl out"),
    ],
)
def test_other_data_and_backends_are_refused(
    flags: tuple[str, ...], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(["--env_name", CIRCLE, *flags, "--dir", str(tmp_path), *SHORT]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"run.py: {CIRCLE}") and line in error and error.count("\n") == 1


# --- Through run.py -------------------------------------------------------------------------------------


def test_the_domains_settings_hold_for_every_algorithm() -> None:
    for algo in (algo for algo in AGENTS if hyperparameters.runs_on(algo, CIRCLE)):
        config = hyperparameters.get(algo, CIRCLE)
        epochs = max(config.num_epochs, getattr(config, "pretrain_epochs", 0))  # SfBC's policy is its pretraining's
        assert epochs * config.num_steps_per_epoch == 20_000
        origins = hyperparameters.explain(algo, CIRCLE, {"batch_size": 7})
        assert origins["eval_episodes"] == (100, "domain bandit") and origins["batch_size"] == (7, "command line")
        assert hyperparameters.get(algo, "hopper-medium-v2").hidden_dim > config.hidden_dim  # elsewhere as published


def test_the_environment_gives_the_agent_its_box() -> None:
    source = sources.choose(CIRCLE)
    environments, data = source.environments(3), source.load()
    assert environments.num_envs == 3 and environments.max_action == pytest.approx(1.2)
    assert (environments.state_dim, environments.action_dim) == (data.state_dim, data.action_dim)


@pytest.mark.parametrize(("algo", "task"), [("diffusion_bc", CIRCLE), ("diffcps", GAUSSIANS)])
def test_run(algo: str, task: str, tmp_path: Path) -> None:
    short = [flag for flag in SHORT if algo != "diffusion_bc" or flag not in ("--action_candidates", "3")]
    assert run.main(["--env_name", task, "--algo", algo, "--seeds", "0,1", "--dir", str(tmp_path), *short]) == 0
    for seed in (0, 1):
        folder = tmp_path / algo / task / f"seed_{seed}"
        evaluations = rows(folder / "evaluations.csv")
        assert [(int(r["step"]), int(r["episode"])) for r in evaluations] == [(20, 0), (20, 1), (40, 0), (40, 1)]
        best = bandit.BANDITS[task].best_reward
        for row in evaluations:
            assert int(row["length"]) == 1
            assert float(row["normalized_score"]) == pytest.approx(100 * float(row["return"]) / best)
        config = json.loads((folder / "config.json").read_text())
        assert config["dataset"]["source"] == "bandit"
        assert config["dataset"]["sha256"] == bandit.load(task).info["sha256"]
        found = read_run(folder, Labels())
        assert found.label == "bandit" and found.env_name == task and found.complete
