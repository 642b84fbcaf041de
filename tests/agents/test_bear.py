"""BEAR: steps that d3rlpy 2.8.1 recorded (tests/record_d3rlpy), the discrepancy and the multiplier in closed form."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import hyperparameters
from agents import AGENTS
from agents.bear import BEAR
from agents.parts.losses import KERNELS, mmd
from tests import recordings, small


def bear(sizes: tuple[int, int, float], seeds: int = 1, **settings: Any) -> BEAR:
    return AGENTS["bear"](*sizes, hyperparameters.get("bear", "hopper-medium-v2", **settings), range(seeds))


def weights(recorded: dict[str, np.ndarray], when: str) -> dict[str, dict[str, torch.Tensor]]:
    """The recorded networks; the policy's layers of mean and deviation become one here."""
    names = ("actor", "critic", "critic_target", "vae")
    networks = {name: recordings.part(recorded, f"{when}/{name}") for name in names}
    two = networks["actor"]
    networks["actor"] = {f"net.{2 * i}.{kind}": two[f"l{i + 1}.{kind}"] for i in (0, 1) for kind in ("weight", "bias")}
    for kind in ("weight", "bias"):
        networks["actor"][f"net.4.{kind}"] = torch.cat([two[f"mean.{kind}"], two[f"log_std.{kind}"]])
    return networks


@pytest.mark.parametrize("kernel", list(KERNELS))
def test_recorded_updates_are_repeated(kernel: str) -> None:
    """Two updates of the warm-up and two after it, the multiplier held."""
    config, recorded = recordings.load(f"d3rlpy_bear_{kernel}")
    updates, log_alpha = config.pop("updates"), config.pop("log_alpha")
    agent = bear((4, 2, 1.0), seeds=2, action_candidates=10, alpha_learning_rate=1e-12, **config)
    agent.load_published({**weights(recorded, "before"), "log_alpha": torch.tensor(log_alpha)})
    for k in range(updates):
        batch, draws = (recordings.stacked(recordings.part(recorded, f"{kind}/{k}"), 2) for kind in ("batch", "draws"))
        metrics, expected = agent.update(batch, draws), recordings.part(recorded, f"metrics/{k}")
        for ours, theirs in (("vae_loss", "imitator_loss"), ("critic_loss", "critic_loss")):
            torch.testing.assert_close(metrics[ours], expected[theirs].expand(2), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(metrics["actor_loss"], expected["actor_loss"].expand(2), rtol=1e-4, atol=1e-5)
        if k >= config["warmup_steps"]:
            constraint = metrics["alpha"] * (metrics["mmd"] - config["mmd_threshold"])
            torch.testing.assert_close(constraint, expected["mmd_loss"].expand(2), rtol=1e-4, atol=1e-5)
    for state in agent.published_state():
        for network, expected in weights(recorded, "after").items():
            assert state[network].keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(state[network][name], value, rtol=1e-4, atol=1e-5, msg=f"{network} {name}")
    shown = recordings.stacked(recordings.part(recorded, "act"), 2)
    actions = agent.actions_for(shown["states"], {"noise": shown["noise"]})
    torch.testing.assert_close(actions, shown["actions"], rtol=1e-4, atol=1e-5)


# --- The discrepancy ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kernel", "distance"), [("gaussian", 9.0 + 16.0), ("laplacian", 3.0 + 4.0)])
@pytest.mark.parametrize("sigma", [0.5, 50.0])
def test_discrepancy_of_two_points(kernel: str, distance: float, sigma: float) -> None:
    x, y = torch.zeros(6, 3, 2), torch.tensor([3.0, -4.0]).expand(6, 5, 2)
    expected = math.sqrt(2 - 2 * math.exp(-distance / (2 * sigma)) + 1e-6)
    torch.testing.assert_close(mmd(x, y, kernel, sigma), torch.full((6,), expected))
    torch.testing.assert_close(mmd(y, y, kernel, sigma), torch.full((6,), 1e-3))
    with pytest.raises(KeyError):
        mmd(x, y, "cubic", sigma)


def test_discrepancy_of_two_gaussians() -> None:
    """Its expectation for N draws of N(0, 1) and N(m, 1): 2 (1/N + (1 - 1/N) c) - 2 c exp(-m^2 / (2 (sigma + 2)))."""
    draws, number, sigma, shift = 400, 60, 0.7, 1.5
    g = torch.Generator().manual_seed(0)
    x = torch.randn(draws, number, 1, generator=g, dtype=torch.float64)
    y = torch.randn(draws, number, 1, generator=g, dtype=torch.float64) + shift
    c = math.sqrt(sigma / (sigma + 2))
    expected = 2 * (1 / number + (1 - 1 / number) * c) - 2 * c * math.exp(-(shift**2) / (2 * (sigma + 2)))
    assert mmd(x, y, "gaussian", sigma).square().mean().item() == pytest.approx(expected, rel=0.03)


def test_discrepancy_keeps_its_digits_where_sigma_is_large() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 4, 3, generator=g) * 0.05, torch.randn(50, 4, 3, generator=g) * 0.05
    exact = mmd(x.double(), y.double(), "gaussian", 50.0)
    torch.testing.assert_close(mmd(x, y, "gaussian", 50.0).double(), exact, rtol=1e-5, atol=0)


# --- The multiplier and the phases --------------------------------------------------------------------------------


@pytest.mark.parametrize(("threshold", "sign"), [(0.0, 1), (9.0, -1)])
def test_the_multiplier_rises_where_the_constraint_is_broken_and_keeps_its_bounds(threshold: float, sign: int) -> None:
    """Adam's steps by -alpha (MMD - epsilon), repeated with PyTorch's Adam; then the bounds."""
    agent = bear((3, 2, 1.0), hidden_dim=8, vae_hidden_dim=8, mmd_threshold=threshold, alpha_learning_rate=0.05)
    g = torch.Generator().manual_seed(0)
    plain = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([plain], lr=0.05)
    for _ in range(5):
        metrics = agent.update(small.batch(g, 3, 2, 0.1), agent.draw(g, 16))
        optimizer.zero_grad()
        (-plain.exp() * (metrics["mmd"][0] - threshold)).backward()
        optimizer.step()
        torch.testing.assert_close(metrics["alpha"][0], plain.detach().exp(), rtol=1e-5, atol=1e-6)
    assert sign * plain.item() > 0.1
    agent.alpha.flat.fill_({1: 9.99, -1: -4.99}[sign])
    agent.update(small.batch(g, 3, 2, 0.1), agent.draw(g, 16))
    assert agent.alpha.flat.item() == {1: 10.0, -1: -5.0}[sign]


def test_the_value_counts_from_the_end_of_the_warm_up() -> None:
    """Until then the policy's step is the same whatever the critics say."""
    g = torch.Generator().manual_seed(0)
    batches = [small.batch(g, 3, 2, 0.1) for _ in range(4)]
    agents = [bear((3, 2, 1.0), hidden_dim=8, vae_hidden_dim=8, warmup_steps=3) for _ in range(2)]
    with torch.no_grad():
        agents[1].networks["critic"].flat.mul_(-3.0)
    draws = [agents[0].draw(g, 16) for _ in range(4)]
    for k in range(4):
        for agent in agents:
            agent.update(batches[k], draws[k])
        same = torch.equal(agents[0].networks["actor"].flat, agents[1].networks["actor"].flat)
        assert same == (k < 3)


def test_it_follows_the_data_and_then_the_better_side_of_it() -> None:
    """One state, actions -0.5 and 0.5 with noise, rewarded by side: the warm-up covers both, then one is preferred."""
    settings = {"hidden_dim": 32, "vae_hidden_dim": 32, "warmup_steps": 150, "action_candidates": 20}
    agent = bear((1, 1, 1.0), seeds=2, **settings, mmd_sigma=1.0, learning_rate=3e-3, critic_learning_rate=3e-3)
    good, g = torch.tensor([1.0, -1.0]).view(2, 1, 1), torch.Generator().manual_seed(0)
    for step in range(300):
        side = (torch.rand(2, 64, 1, generator=g) < 0.5).float() * 2 - 1
        batch = {"states": torch.zeros(2, 64, 1), "next_states": torch.zeros(2, 64, 1)}
        batch |= {"actions": side * 0.5 + 0.05 * torch.randn(2, 64, 1, generator=g)}
        batch |= {"rewards": side * good, "not_dones": torch.zeros(2, 64, 1)}
        metrics = agent.update(batch, agent.draw(g, 64))
        if step == 149:
            mean = torch.tanh(agent.actor(torch.zeros(2, 1, 1))[0])
            assert mean.abs().max() < 0.3 and (metrics["mmd"] < 0.5).all()
    assert (torch.tanh(agent.actor(torch.zeros(2, 1, 1))[0]) * good > 0.2).all()
    assert (agent.act(torch.zeros(2, 20, 1), g) * good > 0).all()
