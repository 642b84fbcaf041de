"""SfBC in closed form: planned returns along hand-made trajectories, the choice of actions, and what Q learns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import hyperparameters
from agents import AGENTS
from agents.parts.sde import END, signal_and_spread
from tests import small
from utils.data.dataset import Columns, Dataset
from utils.seeding import torch_generators
from utils.training.runner import Runner


def agent(seeds: list[int] | None = None, dims: tuple[int, int] = (1, 1), **settings: Any) -> Any:
    quick = {"hidden_dim": 16, "diffusion_steps": 3, "plan_interval": 10, "pretrain_epochs": 1, **settings}
    return AGENTS["sfbc"](*dims, 1.0, hyperparameters.get("sfbc", "antmaze-umaze-v0", **quick), seeds or [0])


def dataset(states: Any, rewards: Any, next_states: Any, not_dones: Any) -> Dataset:
    columns = [np.asarray(x, dtype=np.float32).reshape(-1, 1) for x in (states, rewards, next_states, not_dones)]
    return Dataset(columns[0], columns[0] * 0, *columns[1:], "hopper-medium-v2", "x")


# A terminal after three steps; a time limit after two (its last state is 7); one step that the file's end cuts.
TRAJECTORIES = dataset(
    states=[0, 1, 2, 5, 6, 9],
    rewards=[1, 2, 4, 8, 16, 32],
    next_states=[1, 2, 3, 6, 7, 10],
    not_dones=[1, 1, 0, 1, 1, 1],
)
MONTE_CARLO = [1 + 0.5 * (2 + 0.5 * 4), 2 + 0.5 * 4, 4, 8 + 0.5 * 16, 16, 32]


def plan(learner: Any, step: int, columns: Columns | None = None, data: Dataset = TRAJECTORIES) -> Columns:
    columns = columns or Columns(learner.planned, learner.num_seeds, data.size, "cpu")
    learner.step = step
    with torch.no_grad():
        learner.plan(data.to("cpu"), torch_generators(learner.seeds, "planning", "cpu"), columns.views)
    return columns


def test_the_first_returns_are_the_datas_own() -> None:
    columns = plan(agent(discount=0.5), 0).views
    np.testing.assert_allclose(columns["returns"][0, :, 0], MONTE_CARLO, rtol=1e-6)
    expected = (np.array(MONTE_CARLO) - np.mean(MONTE_CARLO)) / np.std(MONTE_CARLO)
    np.testing.assert_allclose(columns["targets"][0, :, 0], expected, rtol=1e-5)


@pytest.mark.parametrize("paper", [False, True])
def test_planned_returns_of_hand_made_trajectories(paper: bool) -> None:
    """max(r_n + gamma R_{n+1}, V(s_n)) as the code has it, or r_n + gamma max(R_{n+1}, V(s_{n+1})) as the paper says.

    V in units of the returns that Q was trained on.
    """
    learner = agent(discount=0.5, paper_planning=paper)
    columns = plan(learner, 0)
    mean, deviation = np.mean(MONTE_CARLO), np.std(MONTE_CARLO)
    # By state; 3 comes after a terminal, 7 and 10 after a time limit and the file's end.
    values = {0: 3.0, 1: 100.0, 2: 0.0, 3: 1e6, 5: 50.0, 6: -50.0, 7: 40.0, 9: 33.0, 10: 20.0}

    def value(states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        assert actions.shape == (1, states.shape[1] * learner.config.plan_actions, 1)
        v = torch.tensor([values[int(s)] for s in states[0, :, 0]])
        return ((v - mean) / deviation).float().repeat_interleave(learner.config.plan_actions).unsqueeze(0)

    learner.value = value
    plan(learner, 10, columns)
    if paper:
        r2, r5, r4 = 4.0, 32 + 0.5 * 20, 16 + 0.5 * 40
        r1 = 2 + 0.5 * max(r2, 0.0)
        r0 = 1 + 0.5 * max(r1, 100.0)
        r3 = 8 + 0.5 * max(r4, -50.0)
    else:
        r2, r4, r5 = max(4.0, 0.0), max(16.0, -50.0), max(32.0, 33.0)  # after a time limit comes 0
        r1 = max(2 + 0.5 * r2, 100.0)
        r0 = max(1 + 0.5 * r1, 3.0)
        r3 = max(8 + 0.5 * r4, 50.0)
    np.testing.assert_allclose(columns.views["returns"][0, :, 0], [r0, r1, r2, r3, r4, r5], rtol=1e-4)


def test_v_is_the_softmax_weighted_mean_of_q_over_candidates() -> None:
    learner, seen = agent([0, 1], discount=1.0, alpha=3.0, plan_actions=5), []
    learner.value = lambda states, actions: seen.append(torch.randn(actions.shape[:2])) or seen[-1]
    columns = Columns(learner.planned, 2, 6, "cpu")
    columns.views["returns"].copy_(torch.tensor([-1.0, 1.0] * 3).view(1, 6, 1) * 2 + 5)  # mean 5, deviation 2
    with torch.no_grad():
        rng = torch_generators([0, 1], "planning", "cpu")
        got = learner._values(TRAJECTORIES.to("cpu"), "states", rng, columns.views)
    q = seen[0].view(2, 6, 5).double().numpy()
    weights = np.exp(3 * q)
    expected = ((weights * q).sum(axis=2) / weights.sum(axis=2)) * 2 + 5
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_a_planning_starts_q_anew() -> None:
    learner, fresh = agent([0, 1]), agent([0, 1])
    run = Runner(learner, TRAJECTORIES.to("cpu"), 8, torch_generators([0, 1], "training", "cpu"), "eager")
    run.run(10)
    moved = learner.critic.parameters.flat.clone()
    assert not torch.equal(moved, fresh.critic.parameters.flat)
    assert learner.optimizers["critic"].state_dict()["steps"] == 10
    behaviour = learner.actor.parameters.flat.clone()
    plan(learner, 10, run._plan.columns)
    assert torch.equal(learner.critic.parameters.flat, fresh.critic.parameters.flat)
    assert torch.equal(learner.actor.parameters.flat, behaviour)
    state = learner.optimizers["critic"].state_dict()
    assert state["steps"] == 0 and not state["exp_avg"].any() and not state["exp_avg_sq"].any()


def test_the_behaviour_model_is_trained_first_and_then_stands_still() -> None:
    learner = agent(num_steps_per_epoch=5)
    assert learner.first_step == -5
    learner.step = -5
    run = Runner(learner, TRAJECTORIES.to("cpu"), 8, torch_generators([0], "training", "cpu"), "eager")
    start = {name: p.flat.clone() for name, p in learner.networks.items()}
    run.run(5)
    trained = learner.actor.parameters.flat.clone()
    assert set(run.metrics()) == {"bc_loss", "actor_grad_norm"}
    assert torch.equal(learner.critic.parameters.flat, start["critic"]) and not torch.equal(trained, start["actor"])
    run.run(5)
    assert set(run.metrics()) == {"critic_loss", "q_mean", "critic_grad_norm"}
    assert torch.equal(learner.actor.parameters.flat, trained)
    assert not torch.equal(learner.critic.parameters.flat, start["critic"])


@pytest.mark.parametrize("at", [7, 15, 25, 30, 31])
def test_a_run_through_plannings_continues_bit_for_bit(at: int) -> None:
    """Across the pretraining (10 steps), the data's returns, and two plannings with a new Q."""

    def start() -> Runner:
        learner = agent([0, 3], dims=(11, 3), num_steps_per_epoch=10)
        learner.step = -10
        return Runner(learner, small.dataset(60).to("cpu"), 8, torch_generators([0, 3], "training", "cpu"), "eager")

    whole, first, second = start(), start(), start()
    whole.run(35)
    first.run(at)
    second.agent.load_state_dict(first.agent.state_dict())
    second.load_state_dict(first.state_dict())
    second.run(35 - at)
    for name, p in whole.agent.networks.items():
        assert torch.equal(p.flat, second.agent.networks[name].flat), name


def test_candidates_are_drawn_by_softmax_without_replacement() -> None:
    """Three candidates with known Q: frequencies of the pairs that are averaged."""
    rows = 40_000
    learner = agent(action_candidates=3, actions_averaged=2, select_alpha=2.0)
    learner.actor.sample = lambda states, start: torch.tensor([0.1, 0.2, 0.6]).repeat(rows).view(1, -1, 1)
    learner.value = lambda states, actions: actions[..., 0]
    draws = {
        "noise": torch.zeros(1, rows, 3, 1),
        "exponential": learner.act_draws([torch.Generator().manual_seed(0)], rows)["exponential"],
    }
    actions = learner.actions_for(torch.zeros(1, rows, 1), draws).flatten()
    p = np.exp(2 * np.array([0.1, 0.2, 0.6]))
    p /= p.sum()
    for i, j in ((0, 1), (0, 2), (1, 2)):
        share = (actions - (0.1, 0.2, 0.6)[i] / 2 - (0.1, 0.2, 0.6)[j] / 2).abs().lt(1e-4).float().mean().item()
        expected = p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j])
        assert abs(share - expected) < 0.01


def test_q_is_evaluated_beside_its_own_state() -> None:
    learner = agent([0, 1], dims=(4, 2))
    states, actions = torch.randn(2, 3, 4), torch.randn(2, 6, 2)
    got = learner.value(states, actions)
    for seed in range(2):
        p = learner.critic.parameters.member_state(seed)
        for row in range(6):
            x = torch.cat([states[seed, row // 2], actions[seed, row]])
            for layer in (0, 2):
                x = torch.nn.functional.silu(p[f"sort.{layer}.weight"] @ x + p[f"sort.{layer}.bias"])
            expected = (p["sort.4.weight"] @ x + p["sort.4.bias"]).squeeze()
            torch.testing.assert_close(got[seed, row], expected, rtol=1e-4, atol=1e-5)


# --- Sampling ---------------------------------------------------------------------------------------------------------

MEAN, DEVIATION = 0.4, 0.3  # of Gaussian data


class ExactActor:
    """In the behaviour model's place: the noise that data N(MEAN, DEVIATION^2) have in them; a part is the time."""

    def __init__(self, learner: Any, wrong_at_start: float = 0.0) -> None:
        self.solver, self.wrong = learner.actor.solver, wrong_at_start

    def state_part(self, states: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*states.shape[:2], 1, dtype=torch.float64)

    def time_part(self, times: torch.Tensor) -> torch.Tensor:
        return times.double().unsqueeze(-1)

    def noise(self, x: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        signal, spread = signal_and_spread(part)
        exact = spread * (x - signal * MEAN) / (signal**2 * DEVIATION**2 + spread**2)
        return exact + self.wrong * (part == 1)

    def sample(self, start: torch.Tensor) -> torch.Tensor:
        """From normals [N] to samples [N]."""
        return self.solver.actions(self, torch.zeros(1, len(start), 1), start.view(1, -1, 1)).flatten()


def test_it_samples_by_the_predicted_noise_at_15_steps_as_published() -> None:
    """Against the flow of Gaussian data, x_0 = alpha_0 m + (x_1 - alpha_1 m) sqrt(var_0 / var_1).

    So few steps leave samples too narrow, which at two deviations is an error of 0.10, by the predicted action 0.13.
    """
    signal, spread = signal_and_spread(torch.tensor([1.0, END], dtype=torch.float64))
    variance = signal**2 * DEVIATION**2 + spread**2
    start = torch.linspace(-2, 2, 9, dtype=torch.float64)
    exact = signal[1] * MEAN + (start - signal[0] * MEAN) * (variance[1] / variance[0]).sqrt()
    for settings, error in (({}, 0.0975), ({"predict_data": True}, 0.127)):
        config = hyperparameters.get("sfbc", "hopper-medium-v2", hidden_dim=16, **settings)
        assert config.diffusion_steps == 15
        samples = ExactActor(AGENTS["sfbc"](1, 1, 1.0, config, [0])).sample(start)
        assert abs(samples.mean().item() - MEAN) < 1e-3
        assert (samples - exact).abs().max().item() == pytest.approx(error, rel=0.01)


def test_with_few_steps_only_the_predicted_action_stands_an_error() -> None:
    """5 steps, a network that is wrong by 0.01 at t = 1 alone: samples move by 5.5, or by 0.008."""
    start, moved = torch.zeros(1, dtype=torch.float64), []
    for predict_data in (False, True):
        learner = agent(diffusion_steps=5, predict_data=predict_data)
        moved.append((ExactActor(learner, 0.01).sample(start) - ExactActor(learner).sample(start)).abs().item())
    assert moved[0] > 5 and moved[1] < 0.01
    assert hyperparameters.get("sfbc", "bandit-circle-v0").predict_data


def test_antmaze_larges_critic_is_wider_first() -> None:
    """512-256-256, the code's `MUlQnet`; elsewhere 256-256."""
    for task, expected in (("antmaze-large-play-v0", [512, 256, 256, 1]), ("antmaze-umaze-v0", [256, 256, 1])):
        learner = AGENTS["sfbc"](29, 8, 1.0, hyperparameters.get("sfbc", task), [0])
        shapes = learner.critic.parameters.shapes
        assert [shape[0] for name, shape in shapes.items() if name.endswith("weight")] == expected


def test_more_averaged_than_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match=r"actions_averaged must be at most action_candidates \(3\), not 4"):
        hyperparameters.get("sfbc", "hopper-medium-v2", action_candidates=3)
