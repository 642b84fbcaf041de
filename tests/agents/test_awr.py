"""AWR in closed form: returns along hand-made trajectories, the weights, and the policy they lead to."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import hyperparameters
from agents import AGENTS
from agents.parts.returns import backward
from utils.data.dataset import Columns, Dataset
from utils.seeding import torch_generators
from utils.training.runner import Runner


def agent(
    seeds: list[int] | None = None, dims: tuple[int, int] = (1, 1), max_action: float = 1.0, **settings: Any
) -> Any:
    config = hyperparameters.get("awr", "hopper-medium-v2", **settings)
    return AGENTS["awr"](*dims, max_action, config, seeds or [0])


def dataset(states: Any, rewards: Any, next_states: Any, not_dones: Any, actions: Any = None) -> Dataset:
    columns = [np.asarray(x, dtype=np.float32).reshape(-1, 1) for x in (states, rewards, next_states, not_dones)]
    actions = columns[0] * 0 if actions is None else np.asarray(actions, dtype=np.float32).reshape(len(columns[0]), -1)
    return Dataset(columns[0], actions, *columns[1:], "hopper-medium-v2", "x")


def plan(learner: Any, data: Dataset) -> dict[str, torch.Tensor]:
    columns = Columns(learner.planned, learner.num_seeds, data.size, "cpu")
    with torch.no_grad():
        learner.plan(data.to("cpu"), torch.Generator(), columns.views)
    return columns.views


@pytest.mark.parametrize("floored", [False, True])
def test_the_recursion_equals_a_loop_over_the_rows(floored: bool) -> None:
    rng = np.random.default_rng(0)
    a, floor = rng.standard_normal((2, 300)), rng.standard_normal((2, 300)) * 3
    b = np.broadcast_to(0.9 * (rng.random(300) > 0.03), (2, 300)).copy()
    b[:, 40:200] = 0.99  # one long trajectory
    b[:, -1] = 0
    expected, following = np.zeros_like(a), np.zeros(2)
    for i in reversed(range(300)):
        following = a[:, i] + b[:, i] * following
        if floored:
            following = np.maximum(floor[:, i], following)
        expected[:, i] = following
    got = backward(*(torch.from_numpy(x) for x in (a, b)), torch.from_numpy(floor) if floored else None)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-10, atol=1e-12)


# A terminal after three steps; a time limit after two (its last state is 7); one step that the file's end cuts.
TRAJECTORIES = dataset(
    states=[0, 1, 2, 5, 6, 9],
    rewards=[1, 2, 4, 8, 16, 32],
    next_states=[1, 2, 3, 6, 7, 10],
    not_dones=[1, 1, 0, 1, 1, 1],
)


def set_value(learner: Any, values: Any) -> None:
    """V(s) as a table: the network is replaced by a function of the only coordinate."""
    learner.value = lambda states: torch.as_tensor(values, dtype=torch.float32)[states[..., 0].long()]


VALUES = [10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110]


@pytest.mark.parametrize("td_lambda", [0.0, 0.5, 1.0])
def test_returns_and_weights_of_hand_made_trajectories(td_lambda: float) -> None:
    learner, g, lam = agent(discount=0.9, td_lambda=td_lambda, temperature=0.5, weight_max=3.0), 0.9, td_lambda
    set_value(learner, VALUES)
    columns = plan(learner, TRAJECTORIES)
    r2 = 4.0  # a terminal: nothing follows
    r1 = 2 + g * ((1 - lam) * 30 + lam * r2)
    r0 = 1 + g * ((1 - lam) * 20 + lam * r1)
    r4 = 16 + g * 80  # a time limit: the value of where it stopped
    r3 = 8 + g * ((1 - lam) * 70 + lam * r4)
    r5 = 32 + g * 110
    returns = np.array([r0, r1, r2, r3, r4, r5])
    np.testing.assert_allclose(columns["returns"][0, :, 0], returns, rtol=1e-5)
    advantages = returns - np.array([10, 20, 30, 60, 70, 100])
    advantages *= 0.1  # 1 - discount
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-5)
    expected = np.minimum(np.exp(advantages / 0.5), 3.0)
    np.testing.assert_allclose(columns["weights"][0, :, 0], expected, rtol=1e-4)
    assert (expected == 3).any() and (expected < 1).any()


def test_equal_advantages_weigh_one() -> None:
    """The circle's bandit: every action earns the same, so the policy is behaviour cloning."""
    zeros = np.zeros(50)
    weights = plan(agent(), dataset(zeros, zeros + 1, zeros, zeros))["weights"]
    torch.testing.assert_close(weights, torch.ones_like(weights), rtol=0, atol=0.01)


def test_the_critic_and_its_loss_are_in_units_of_the_return() -> None:
    learner = agent([0, 1], discount=0.98)
    states = torch.randn(2, 7, 1)
    batch = {"states": states, "returns": torch.randn(2, 7, 1) * 50}
    loss, metrics = learner.critic_loss(batch, {})
    errors = learner.value(states) - batch["returns"][..., 0]
    torch.testing.assert_close(loss, 0.5 * (errors * 0.02).square().mean(dim=1))
    torch.testing.assert_close(metrics["q_mean"], batch["returns"].mean(dim=(1, 2)))


def test_the_policy_loss_is_the_weighted_likelihood_up_to_a_constant() -> None:
    learner = agent([0, 1], dims=(3, 2), max_action=0.5, action_std=0.3)
    states, actions, weights = torch.randn(2, 6, 3), torch.rand(2, 6, 2) - 0.5, torch.rand(2, 6, 1) * 4
    loss, _ = learner.policy_loss({"states": states, "actions": actions, "weights": weights}, {})
    mean = learner.actor(states)
    likelihood = torch.distributions.Normal(mean, 0.3).log_prob(actions / 0.5).sum(dim=2)
    constant = 2 * (math.log(0.3) + 0.5 * math.log(2 * math.pi))
    assert mean.abs().max() < 1  # no penalty
    torch.testing.assert_close(loss, (-weights[..., 0] * (likelihood + constant)).mean(dim=1))


def test_means_outside_of_the_box_are_penalised() -> None:
    learner = agent()
    learner.actor = lambda states: torch.tensor([[[1.5], [-2.0], [0.5]]])
    batch = {"states": torch.zeros(1, 3, 1), "actions": torch.zeros(1, 3, 1), "weights": torch.zeros(1, 3, 1)}
    loss, _ = learner.policy_loss(batch, {})
    torch.testing.assert_close(loss, torch.tensor([10 * 0.5 * (0.5**2 + 1.0**2) / 3]))


def test_on_a_discrete_bandit_the_policy_learns_the_reweighted_mean() -> None:
    """mu(a) exp(A / beta) / Z over three actions; the best Gaussian with a fixed deviation has its mean."""
    rng = np.random.default_rng(0)
    actions, rewards = np.array([-0.5, 0.1, 0.6]), np.array([0.0, 1.0, 3.0])
    chosen = rng.choice(3, size=2000, p=[0.5, 0.3, 0.2])
    zeros = np.zeros(len(chosen))
    data = dataset(zeros, rewards[chosen], zeros, zeros, actions[chosen])
    learner = agent(
        [0, 1], learning_rate=3e-3, critic_learning_rate=3e-3, temperature=0.8, plan_interval=50, hidden_dim=16
    )
    run = Runner(learner, data.to("cpu"), 256, torch_generators([0, 1], "training", "cpu"), "eager")
    run.run(600)
    spread = rewards[chosen]
    advantages = (spread - spread.mean()) / (spread.std() + 1e-5)  # whatever V is: it is the same for all
    weights = np.exp(advantages / 0.8)
    expected = (weights * actions[chosen]).sum() / weights.sum()
    got = learner.act(torch.zeros(2, 1, 1), torch_generators([0, 1], "acting", "cpu"))
    torch.testing.assert_close(got, torch.full((2, 1, 1), float(expected)), rtol=0, atol=0.02)
    np.testing.assert_allclose(learner.value(torch.zeros(2, 1, 1)).detach(), spread.mean(), atol=0.15)
    assert abs(expected - actions[chosen].mean()) > 0.2


def test_samples_have_the_policys_deviation() -> None:
    learner = agent(sample_actions=True, action_std=0.1, max_action=2.0)
    with torch.no_grad():
        learner.actor.parameters.flat.zero_()
    actions = learner.act(torch.zeros(1, 20_000, 1), [torch.Generator().manual_seed(0)])
    assert abs(actions.std().item() - 0.2) < 0.004 and abs(actions.mean().item()) < 0.005


def test_when_to_plan() -> None:
    learner = agent(plan_interval=30)
    assert [learner.plan_step(step) for step in (0, 29, 30, 59, 60)] == [0, 0, 30, 30, 60]
