"""Diffuser and Decision Diffuser as agents: data, phases, averages, resume, cost, and what they refuse."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hyperparameters
import play
import run
from agents import AGENTS
from agents.parts.windows import Windows
from tests import small
from tests.training.making import make_runner, parameters
from utils import tasks
from utils.errors import UserError
from utils.seeding import torch_generators
from utils.training.runner import Runner

PLANNERS = ("diffuser", "decision_diffuser")
planners = pytest.mark.parametrize("algo", PLANNERS)
SHORT = ["--num_epochs", "2", "--num_steps_per_epoch", "10", "--eval_interval", "2", "--eval_episodes", "1",
         "--horizon", "4", "--hidden_dim", "32", "--dim_mults", "1,4", "--diffusion_steps", "2", "--device", "cpu",
         "--quiet", "--threads", "1", "--batch_size", "8"]  # fmt: skip


def agent_of(runner: Runner) -> Any:
    return runner.agent


# --- Data -------------------------------------------------------------------------------------------------------------


@planners
def test_windows_come_normalised_and_actions_go_back(algo: str) -> None:
    runner = make_runner("eager", [0, 1], algo=algo)
    agent, rows = agent_of(runner), small.episodes(400, 11, 3)
    batch = runner.batch(torch.arange(runner.table.size).expand(2, -1))
    inside = batch["observations"][0, :, 0]
    assert inside.abs().max() <= 1.0001 if algo == "decision_diffuser" else abs(float(inside.std()) - 1) < 0.05
    back = agent.action_normalizer.inverse(batch["actions"])[0, :46, 0]
    torch.testing.assert_close(back, torch.from_numpy(rows.actions[:46]), rtol=1e-4, atol=1e-5)
    zero = agent.action_normalizer(torch.zeros(3))
    torch.testing.assert_close(batch["actions"][0, 48, -1], zero)  # the window at step 48 of 50 runs into the padding
    low, high = rows.actions.min(0), rows.actions.max(0)
    acted = agent.act(torch.randn(2, 40, 11), torch_generators([0, 1], "acting", "cpu"))
    if algo == "decision_diffuser":
        assert (acted >= torch.from_numpy(low) - 1e-5).all() and (acted <= torch.from_numpy(high) + 1e-5).all()


def test_returns_are_scaled_by_the_largest_unless_a_scale_is_given() -> None:
    runner = make_runner("eager", [0], algo="decision_diffuser")
    largest = float(runner.table.returns.max())
    assert float(agent_of(runner).returns_scale) == pytest.approx(largest / 0.9)
    assert float(agent_of(make_runner("eager", [0], algo="decision_diffuser", returns_scale=5.0)).returns_scale) == 5
    assert hyperparameters.get("decision_diffuser", "hopper-medium-expert-v2").returns_scale == 400
    assert hyperparameters.get("decision_diffuser", "walker2d-medium-v2").returns_scale == 0
    runner.table.returns.fill_(-1.0)
    with pytest.raises(ValueError, match="the largest return is -1, which gives no scale; set returns_scale"):
        agent_of(runner).observe(runner.table)


# --- Phases and averages ----------------------------------------------------------------------------------------------


def test_diffusers_values_are_learnt_first_and_then_stand_still() -> None:
    runner = make_runner("eager", [0], algo="diffuser", value_steps=12)
    agent = agent_of(runner)
    runner.run(12)
    before = {name: weights.flat.clone() for name, weights in agent.networks.items()}
    assert {"critic_loss", "value_grad_norm"} <= runner.metrics().keys()
    runner.run(12)
    assert not {"critic_loss", "value_grad_norm"} & runner.metrics().keys()
    moved = {name for name, weights in agent.networks.items() if not torch.equal(before[name], weights.flat)}
    assert moved == {"diffusion", "diffusion_ema"}


@planners
def test_averages_are_copies_at_first_and_move_at_every_tenth_step(algo: str) -> None:
    runner = make_runner("eager", [0], algo=algo, ema_start=20)
    agent = agent_of(runner)
    online, average = agent.networks["diffusion"].flat, agent.networks["diffusion_ema"].flat
    runner.run(11)  # steps 0 to 10
    assert torch.equal(online, average)
    runner.run(1)
    copied = average.clone()
    assert not torch.equal(online, average)
    runner.run(8)
    assert torch.equal(average, copied)
    runner.run(1)  # step 20
    torch.testing.assert_close(average, 0.995 * copied + 0.005 * online)


# --- Resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@planners
@pytest.mark.parametrize("at", [7, 25])
def test_a_resumed_run_is_the_same_run(algo: str, at: int) -> None:
    """Within a block and a period, in either phase; what is made of the data is made again."""
    phases = {"value_steps": 20} if algo == "diffuser" else {}
    whole, part = (make_runner("eager", [0, 3], algo=algo, **phases) for _ in range(2))
    whole.run(45)
    part.run(at)
    resumed = make_runner("eager", [0, 3], algo=algo, **phases)
    agent_of(resumed).load_state_dict(agent_of(part).state_dict())
    resumed.load_state_dict(part.state_dict())
    resumed.run(45 - at)
    assert torch.equal(parameters(whole), parameters(resumed))
    states = torch.randn(2, 3, 11)
    acted = [agent_of(r).act(states, torch_generators([0, 3], "acting", "cpu")) for r in (whole, resumed)]
    assert torch.equal(*acted)


# --- Published files and cost -----------------------------------------------------------------------------------------


@planners
def test_the_published_trainers_file_is_read(algo: str) -> None:
    agent = agent_of(make_runner("eager", [0], algo=algo))
    state = agent.published_state()[0]
    files = {
        name: {
            "step": 7,
            "model": {**{k: v + 1 for k, v in state[name].items()}, **agent.process.buffers},
            "ema": {k: v + 2 for k, v in state[name].items()},
        }
        for name in state
        if not name.endswith("_ema")
    }
    agent.load_published(files)
    after = agent.published_state()[0]
    for name, weights in state.items():
        added = 2 if name.endswith("_ema") else 1
        assert all(torch.equal(after[name][key], value + added) for key, value in weights.items() if name in files)
    files["diffusion"]["model"]["betas"] = torch.rand(3)
    with pytest.raises(ValueError, match="another noise schedule"):
        agent.load_published(files)


@pytest.mark.parametrize(
    ("algo", "task", "dims", "settings", "gflop"),
    [
        ("diffuser", "hopper-medium-v2", (11, 3), {"guide_stop": 0}, 156),  # as the published code counts
        ("diffuser", "halfcheetah-medium-v2", (17, 6), {"guide_stop": 0}, 38),
        ("diffuser", "hopper-medium-v2", (11, 3), {}, 146),
        ("decision_diffuser", "hopper-medium-v2", (11, 3), {}, 1286),
    ],
)
def test_cost_of_an_acted_step(algo: str, task: str, dims: Any, settings: Any, gflop: float) -> None:
    config = hyperparameters.get(algo, task, **settings)
    line = AGENTS[algo].cost(config, *dims)
    assert float(line.split()[1].replace(",", "")) == pytest.approx(gflop, rel=0.03)
    assert "\n" not in line and ("1,286" in line if algo == "decision_diffuser" else "156" in line)


@planners
@pytest.mark.parametrize("task", hyperparameters.DOMAINS["locomotion"])
def test_both_sizes_fit_every_task(algo: str, task: str) -> None:
    """The sizes of layers, windows and steps: `cost` builds the networks, without memory."""
    wanted = tasks.task(task)
    for size in ("published", "small"):
        config = hyperparameters.get(algo, task, size=size)
        assert AGENTS[algo].cost(config, wanted.state_dim, wanted.action_dim).startswith("cost: ")


def test_print_config_says_what_acting_costs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--algo", "diffuser", "--env_name", "hopper-medium-v2", "--print_config"]) == 0
    assert "\ncost: 146 GFLOP per acted step" in capsys.readouterr().out


# --- Runs -------------------------------------------------------------------------------------------------------------


def start(folder: Path, algo: str, env_name: str = "hopper-medium-v2", *more: str, **file: Any) -> int:
    path = small.d4rl_file(folder / "set.hdf5", "hopper-medium-v2", **file)
    command = ["--algo", algo, "--env_name", env_name, "--dataset", str(path), "--dir", str(folder / "runs")]
    return run.main([*command, *SHORT, *more])


def whole_episodes(rows: int = 300) -> dict[str, Any]:
    """Terminals and timeouts that never fall on one row."""
    timeouts = np.arange(1, rows + 1) % 100 == 0
    return {"terminals": (np.arange(1, rows + 1) % 70 == 0) & ~timeouts, "timeouts": timeouts, "rows": rows}


@pytest.mark.slow
@planners
def test_a_run_trains_evaluates_and_resumes(algo: str, tmp_path: Path) -> None:
    assert start(tmp_path, algo, **whole_episodes()) == 0
    folder = tmp_path / "runs" / algo / "hopper-medium-v2" / "seed_0"
    assert len((folder / "evaluations.csv").read_text().splitlines()) == 2
    assert start(tmp_path, algo, "hopper-medium-v2", "--resume", **whole_episodes()) == 0


@pytest.mark.slow
@planners
def test_a_trained_planner_plays_as_it_was_evaluated(
    algo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Decision Diffuser acts by its data, which is not in a checkpoint: it is read again, the same file or none."""
    assert start(tmp_path, algo, **whole_episodes()) == 0
    folder = tmp_path / "runs" / algo / "hopper-medium-v2" / "seed_0"
    logged = (folder / "evaluations.csv").read_text().splitlines()[1].split(",")[2]
    assert play.main([str(folder), "--episodes", "1", "--eval_seeds", "published", "--quiet"]) == 0
    played = next(folder.glob("play*.csv")).read_text().splitlines()
    assert logged in played[1].split(",")
    if algo == "decision_diffuser":
        small.d4rl_file(tmp_path / "set.hdf5", **whole_episodes(400))
        capsys.readouterr()
        assert play.main([str(folder), "--episodes", "1", "--quiet"]) == 2
        assert "is not the file that" in capsys.readouterr().err


@planners
@pytest.mark.parametrize(
    ("env_name", "more", "file", "message"),
    [
        ("antmaze-umaze-v0", (), {}, "does not run on antmaze-umaze-v0: its settings were published for locomotion"),
        ("kitchen-mixed-v0", (), {}, "does not run on kitchen-mixed-v0"),
        ("hopper-medium-v2", (), {"timeouts": None}, "has no 'timeouts'"),
        ("hopper-medium-v2", ("--horizon", "5"), {}, "horizon 5 cannot be halved 1 times"),
        ("hopper-medium-v2", ("--dim_mults", "2,4"), {}, "dim_mults must be positive integers that begin with 1"),
        ("hopper-medium-v2", ("--reward_tune", "normalize"), {}, "leave reward_tune at no"),
        (
            "hopper-medium-v2",
            (),
            {"rows": 1100, "timeouts": np.zeros(1100, bool), "terminals": np.arange(1100) == 1099},
            "episode 0 has 1,100 steps, the table of windows takes 1,000",
        ),
    ],
)
def test_what_no_plan_can_be_made_of_is_one_line(
    algo: str, env_name: str, more: Any, file: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(tmp_path, algo, env_name, *more, **{**whole_episodes(), **file}) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_single_transitions_are_refused() -> None:
    dataset = dataclasses.replace(small.dataset(), raw=None)
    with pytest.raises(UserError, match="single transitions only"):
        dataset.batches_to("cpu", Windows(4, 0.99, 0.0))


pytestmark = pytest.mark.slow  # the whole file: seconds per test
