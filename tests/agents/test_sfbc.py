"""SfBC in closed form: planned returns along hand-made trajectories, the choice of actions, and what Q learns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import hyperparameters
from agents import AGENTS
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


def test_planned_returns_of_hand_made_trajectories() -> None:
    """R_n = r_n + gamma max(R_{n+1}, V(s_{n+1})), V in units of the returns that Q was trained on."""
    learner = agent(discount=0.5)
    columns = plan(learner, 0)
    mean, deviation = np.mean(MONTE_CARLO), np.std(MONTE_CARLO)
    values = {1: 100.0, 2: 0.0, 3: 1e6, 6: -50.0, 7: 40.0, 10: 20.0}  # by next state; 3 comes after a terminal

    def value(states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        assert actions.shape == (1, states.shape[1] * learner.config.plan_actions, 1)
        v = torch.tensor([values[int(s)] for s in states[0, :, 0]])
        return ((v - mean) / deviation).float().repeat_interleave(learner.config.plan_actions).unsqueeze(0)

    learner.value = value
    plan(learner, 10, columns)
    r2, r5, r4 = 4.0, 32 + 0.5 * 20, 16 + 0.5 * 40
    r1 = 2 + 0.5 * max(r2, 0.0)
    r0 = 1 + 0.5 * max(r1, 100.0)
    r3 = 8 + 0.5 * max(r4, -50.0)
    np.testing.assert_allclose(columns.views["returns"][0, :, 0], [r0, r1, r2, r3, r4, r5], rtol=1e-4)


def test_v_is_the_softmax_weighted_mean_of_q_over_candidates() -> None:
    learner, seen = agent([0, 1], discount=1.0, alpha=3.0, plan_actions=5), []
    learner.value = lambda states, actions: seen.append(torch.randn(actions.shape[:2])) or seen[-1]
    columns = Columns(learner.planned, 2, 6, "cpu")
    columns.views["returns"].copy_(torch.tensor([-1.0, 1.0] * 3).view(1, 6, 1) * 2 + 5)  # mean 5, deviation 2
    with torch.no_grad():
        rng = torch_generators([0, 1], "planning", "cpu")
        got = learner._next_values(TRAJECTORIES.to("cpu"), rng, columns.views)
    q = seen[0].view(2, 6, 5).double().numpy()
    weights = np.exp(3 * q)
    expected = ((weights * q).sum(axis=2) / weights.sum(axis=2)) * 2 + 5
    np.testing.assert_allclose(got, expected * np.array([1, 1, 0, 1, 1, 1]), rtol=1e-5, atol=1e-5)


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


def test_more_averaged_than_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match=r"actions_averaged must be at most action_candidates \(3\), not 4"):
        hyperparameters.get("sfbc", "hopper-medium-v2", action_candidates=3)
