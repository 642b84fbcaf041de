"""TD3+BC: steps that d3rlpy 2.8.1 recorded (tests/record_d3rlpy), the published schedule, and the states' scaling."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

import hyperparameters
from agents import AGENTS
from agents.td3_bc import TD3BC
from tests import recordings, small
from utils.seeding import torch_generators
from utils.training.runner import Runner

LAYERS = {"actor": {"net.0": "l1", "net.2": "l2", "net.4": "l3"}}
LAYERS["critic"] = {f"q{i + 1}_model.{2 * k}": f"l{3 * i + k + 1}" for i in (0, 1) for k in range(3)}


def td3_bc(sizes: tuple[int, int, float], seeds: int = 1, **settings: Any) -> TD3BC:
    return AGENTS["td3_bc"](*sizes, hyperparameters.get("td3_bc", "hopper-medium-v2", **settings), range(seeds))


def published(recorded: dict[str, np.ndarray], when: str) -> dict[str, dict[str, torch.Tensor]]:
    """The recorded networks by their published names."""
    networks = {}
    for name in ("actor", "critic", "actor_target", "critic_target"):
        layers = LAYERS[name.removesuffix("_target")]
        own = recordings.part(recorded, f"{when}/{name}")
        networks[name] = {f"{layers[n.rsplit('.', 1)[0]]}.{n.rsplit('.', 1)[1]}": value for n, value in own.items()}
    return networks


def test_recorded_updates_are_repeated() -> None:
    config, recorded = recordings.load("d3rlpy_td3_bc")
    updates = config.pop("updates")
    agent = td3_bc((4, 2, 1.0), seeds=2, **config)
    agent.load_published(published(recorded, "before"))
    for k in range(updates):
        batch, draws = (recordings.stacked(recordings.part(recorded, f"{kind}/{k}"), 2) for kind in ("batch", "draws"))
        metrics = agent.update(batch, draws)
        expected = recordings.part(recorded, f"metrics/{k}")
        torch.testing.assert_close(metrics["critic_loss"], expected["critic_loss"].expand(2), rtol=1e-5, atol=1e-5)
        assert metrics["actor_loss"].isnan().all() == ("actor_loss" not in expected) == (k % 2 == 0)
        for name in ("actor_loss", "bc_loss"):
            if name in expected:
                torch.testing.assert_close(metrics[name], expected[name].expand(2), rtol=1e-5, atol=1e-5)
    for state in agent.published_state():
        for network, weights in published(recorded, "after").items():
            for name, value in weights.items():
                torch.testing.assert_close(state[network][name], value, rtol=1e-4, atol=1e-5, msg=f"{network} {name}")


def test_targets_and_policy_move_together_every_second_step() -> None:
    agent, g = td3_bc((3, 2, 0.5), hidden_dim=16), torch.Generator().manual_seed(0)
    batch = {
        name: torch.randn(1, 8, d, generator=g) for name, d in {"states": 3, "next_states": 3, "rewards": 1}.items()
    }
    batch |= {"actions": torch.rand(1, 8, 2, generator=g) - 0.5, "not_dones": torch.ones(1, 8, 1)}
    for step in range(6):
        before = {name: p.flat.clone() for name, p in agent.networks.items()}
        agent.update(batch, agent.draw(g, 8))
        moved = {name for name, p in agent.networks.items() if not torch.equal(before[name], p.flat)}
        assert moved == ({"critic"} if step % 2 == 0 else {"critic", "actor", "actor_target", "critic_target"})


@pytest.mark.parametrize(("noise", "shift"), [(0.3, 0.3 * 0.4 * 2), (9.0, 0.5 * 2), (-9.0, -0.5 * 2)])
def test_target_noise_is_scaled_and_clipped_by_the_action_box(noise: float, shift: float) -> None:
    """A target policy of 0 and a target Q1 = Q2 = a: the bootstrap is the noise itself."""
    agent = td3_bc((3, 1, 2.0), hidden_dim=2, discount=1.0, target_noise=0.4)
    for network in (agent.actor_target, agent.critic_target):
        network.parameters.flat.zero_()
    p = agent.critic_target.parameters
    for weights, row in ((p["0.weight"], [[0, 0, 0, 1], [0, 0, 0, -1]]), (p["2.weight"], [[1, 0], [0, 1]])):
        weights.copy_(torch.tensor(row, dtype=torch.float32))
    p["4.weight"].copy_(torch.tensor([[1.0, -1.0]]))  # relu(a) - relu(-a)
    batch = {"states": torch.zeros(1, 4, 3), "next_states": torch.zeros(1, 4, 3), "actions": torch.zeros(1, 4, 1)}
    batch |= {"rewards": torch.full((1, 4, 1), 3.0), "not_dones": torch.tensor([1.0, 1, 1, 0]).view(1, 4, 1)}
    _, metrics = agent.critic_loss(batch, {"target_noise": torch.full((1, 4, 1), noise)})
    assert metrics["q_mean"].item() == pytest.approx(3 + 0.75 * shift, rel=1e-5)


def test_states_are_scaled_by_the_datas_mean_and_deviation() -> None:
    data = small.dataset()
    states = data.states * np.linspace(0, 5, 11) + np.arange(11)  # the first column is constant
    table = dataclasses.replace(data, states=states).to("cpu")
    generators = torch_generators([0, 1], "training", "cpu")
    agent = td3_bc((11, 3, 1.0), seeds=2, hidden_dim=16)
    Runner(agent, table, 16, generators, "eager")
    batch = torch.from_numpy(states.astype(np.float32)).expand(2, -1, -1)
    seen = agent.normalized(batch)
    torch.testing.assert_close(seen.mean(dim=1), torch.zeros(2, 11), rtol=0, atol=1e-4)
    deviation = torch.from_numpy(states.std(axis=0)).float()
    torch.testing.assert_close(seen.std(dim=1, correction=0), (deviation / (deviation + 1e-3)).expand(2, -1))
    assert not seen[..., 0].any()
    # What is kept is part of a checkpoint, and acting goes through it.
    other = td3_bc((11, 3, 1.0), seeds=2, hidden_dim=16)
    other.load_state_dict(agent.state_dict())
    torch.testing.assert_close(other.act(batch, []), agent.actor(seen))
    plain = td3_bc((11, 3, 1.0), hidden_dim=16, normalize_states=False)
    Runner(plain, table, 16, generators[:1], "eager")
    assert torch.equal(plain.normalized(batch[:1]), batch[:1])
