"""Behaviour cloning: the loss and its steps against PyTorch's own Gaussian, and what one mode can and cannot show."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

import hyperparameters
from agents import AGENTS
from agents.bc import BC


def bc(sizes: tuple[int, int, float], seeds: int = 1, **settings: Any) -> BC:
    return AGENTS["bc"](*sizes, hyperparameters.get("bc", "hopper-medium-v2", **settings), range(seeds))


class Plain(nn.Module):
    """The same policy from PyTorch's modules, one seed."""

    def __init__(self, state_dim: int, action_dim: int, max_action: float, hidden_dim: int) -> None:
        super().__init__()
        hidden = [nn.Linear(state_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, hidden_dim), nn.ReLU()]
        self.net, self.max_action = nn.Sequential(*hidden, nn.Linear(hidden_dim, 2 * action_dim)), max_action

    def distribution(self, states: torch.Tensor) -> torch.distributions.Normal:
        mean, log_std = self.net(states).chunk(2, dim=-1)
        return torch.distributions.Normal(torch.tanh(mean), log_std.clamp(-5, 2).exp())


def test_a_few_steps_equal_the_plain_ones() -> None:
    agent, plain = bc((5, 3, 0.7), hidden_dim=32, learning_rate=1e-2), Plain(5, 3, 0.7, 32)
    plain.load_state_dict(agent.published_state()[0]["actor"])
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-2)
    g = torch.Generator().manual_seed(0)
    for _ in range(8):
        states, actions = torch.randn(40, 5, generator=g), 0.7 * torch.tanh(torch.randn(40, 3, generator=g))
        expected = -plain.distribution(states).log_prob(actions / 0.7).sum(dim=1).mean()
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        metrics = agent.update({"states": states[None], "actions": actions[None]}, {})
        torch.testing.assert_close(metrics["bc_loss"][0], expected.detach(), rtol=1e-5, atol=1e-5)
    for name, value in agent.published_state()[0]["actor"].items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-4, atol=1e-6)
    shown, distribution = agent.act(states[None], g)[0], plain.distribution(states)
    torch.testing.assert_close(shown, 0.7 * distribution.mean, rtol=1e-4, atol=1e-5)


def test_samples_have_the_policys_mean_and_deviation_and_keep_to_the_box() -> None:
    agent = bc((1, 2, 2.0), sample_actions=True)
    with torch.no_grad():
        agent.networks["actor"].flat.zero_()
        agent.networks["actor"]["net.4.bias"][0] = torch.tensor([0.0, 0.5, math.log(0.2), math.log(0.9)])
    actions = agent.act(torch.zeros(1, 20000, 1), torch.Generator().manual_seed(0))[0]
    assert abs(actions[:, 0].mean()) < 0.01 and abs(actions[:, 0].std() - 0.4) < 0.01
    share = 0.5 * math.erfc((1 - math.tanh(0.5)) / 0.9 / math.sqrt(2))  # of the normal above the box
    assert actions.max() == 2 and abs((actions[:, 1] == 2).float().mean() - share) < 0.015


def test_on_a_ring_it_collapses_into_the_middle() -> None:
    """Actions on a circle: the most likely Gaussian sits at the centre with deviation r / sqrt 2 a dimension."""
    agent, g = bc((1, 2, 1.0), seeds=2, hidden_dim=32, learning_rate=3e-3, sample_actions=True), torch.Generator()
    angles = torch.rand(2, 2000, generator=g.manual_seed(0)) * 2 * math.pi
    ring = 0.8 * torch.stack([angles.cos(), angles.sin()], dim=-1)
    one = {"states": torch.zeros(2, 2000, 1), "actions": ring}
    for _ in range(300):
        metrics = agent.update(one, {})
    mean, log_std = agent.actor(torch.zeros(2, 1, 1))
    assert mean.abs().max() < 0.05
    torch.testing.assert_close(log_std.exp(), torch.full((2, 1, 2), 0.8 / math.sqrt(2)), rtol=0.05, atol=0)
    entropy = math.log(2 * math.pi * math.e) + 2 * math.log(0.8 / math.sqrt(2))  # of that Gaussian
    torch.testing.assert_close(metrics["bc_loss"], torch.full((2,), entropy), rtol=0.02, atol=0)
    radii = agent.act(torch.zeros(2, 2000, 1), g).norm(dim=-1)
    assert ((radii - 0.8).abs() < 0.15).float().mean() < 0.4  # few samples lie on the ring
