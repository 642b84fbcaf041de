"""BCQ: steps that d3rlpy 2.8.1 recorded (tests/record_d3rlpy), its parts in closed form, and what it learns."""

from __future__ import annotations

import math
from typing import Any

import torch

import hyperparameters
from agents import AGENTS
from agents.bcq import BCQ
from agents.parts.draws import candidates_best
from agents.parts.losses import soft_clipped_backup
from agents.parts.parameters import Sizes, default_init
from agents.parts.policies import Perturbation
from agents.parts.vae import VariationalAutoencoder
from tests import recordings


def bcq(sizes: tuple[int, int, float], seeds: int = 1, **settings: Any) -> BCQ:
    return AGENTS["bcq"](*sizes, hyperparameters.get("bcq", "hopper-medium-v2", **settings), range(seeds))


def test_recorded_updates_are_repeated() -> None:
    config, recorded = recordings.load("d3rlpy_bcq")
    updates = config.pop("updates")
    agent = bcq((4, 2, 1.0), seeds=2, action_candidates=10, **config)
    names = ("actor", "critic", "vae", "actor_target", "critic_target")
    agent.load_published({name: recordings.part(recorded, f"before/{name}") for name in names})
    for k in range(updates):
        batch, draws = (recordings.stacked(recordings.part(recorded, f"{kind}/{k}"), 2) for kind in ("batch", "draws"))
        metrics, expected = agent.update(batch, draws), recordings.part(recorded, f"metrics/{k}")
        for ours, theirs in (("vae_loss", "vae_loss"), ("critic_loss", "critic_loss"), ("q_loss", "actor_loss")):
            torch.testing.assert_close(metrics[ours], expected[theirs].expand(2), rtol=1e-5, atol=1e-5)
    for state in agent.published_state():
        for network in names:
            expected = recordings.part(recorded, f"after/{network}")
            assert state[network].keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(state[network][name], value, rtol=1e-4, atol=1e-5, msg=f"{network} {name}")
    shown = recordings.stacked(recordings.part(recorded, "act"), 2)
    actions = agent.actions_for(shown["states"], {"code_noise": shown["code_noise"].view(2, 8, 10, 4)})
    torch.testing.assert_close(actions, shown["actions"], rtol=1e-4, atol=1e-5)


def test_the_published_widths_are_the_default() -> None:
    """400 and 300, 750 in the autoencoder: weights that the official code saved have these shapes."""
    agent = bcq((11, 3, 1.0))
    shapes = {name: {n: s for n, s in p.shapes.items() if len(s) == 2} for name, p in agent.networks.items()}
    assert shapes["actor"] == {"l1.weight": (400, 14), "l2.weight": (300, 400), "l3.weight": (3, 300)}
    critic = {n: tuple(v.shape) for n, v in agent.published_state()[0]["critic"].items() if v.ndim == 2}
    assert critic == {f"l{k + 3 * i}.weight": s for i in (0, 1)
                      for k, s in zip((1, 2, 3), ((400, 14), (300, 400), (1, 300)), strict=True)}  # fmt: skip
    assert shapes["vae"] == {
        "e1.weight": (750, 14), "e2.weight": (750, 750), "mean.weight": (6, 750), "log_std.weight": (6, 750),
        "d1.weight": (750, 17), "d2.weight": (750, 750), "d3.weight": (3, 750),
    }  # fmt: skip


def test_soft_clipped_backup_closed_form() -> None:
    """Two states with two actions each: the mix is made per action, then the best action counts."""
    values = torch.tensor([[[1.0, 6.0, 0.0, -4.0], [5.0, 2.0, 0.0, -2.0]]])
    got = soft_clipped_backup(values, 0.75, 2)
    assert got.tolist() == [[0.75 * 2 + 0.25 * 6, 0.0]]
    assert soft_clipped_backup(values, 0.0, 2).tolist() == [[6.0, 0.0]]


def test_best_candidates_takes_each_states_best() -> None:
    values = torch.tensor([[[0.0, 2.0, 1.0], [5.0, -1.0, 4.0]]])
    actions = torch.arange(12.0).view(1, 2, 3, 2)
    assert candidates_best(values, actions).tolist() == [[[2.0, 3.0], [6.0, 7.0]]]


def test_a_perturbation_stays_within_phi_and_the_box() -> None:
    network = Perturbation(Sizes(3, 2, 2.0), [8, 6], 0.1)
    states, actions = torch.randn(1, 5, 3), (torch.rand(1, 20, 2) * 2 - 1) * 2
    assert torch.equal(network(states, actions), actions)  # all weights 0
    with torch.no_grad():
        network.parameters["l3.bias"].copy_(torch.tensor([[50.0, -0.3]]))
    shift = 0.1 * 2 * torch.tensor([1.0, math.tanh(-0.3)])
    torch.testing.assert_close(network(states, actions), (actions + shift).clamp(-2, 2))


def test_the_autoencoders_loss_in_closed_form() -> None:
    """Weights 0: the code has the mean and deviation of the biases, the decoded action the bias of the last layer."""
    vae = VariationalAutoencoder(Sizes(3, 2, 2.0), 8)
    with torch.no_grad():
        vae.parameters["mean.bias"].copy_(torch.tensor([[0.5, 0.0, -1.0, 2.0]]))
        vae.parameters["log_std.bias"].copy_(torch.tensor([[-1.0, 0.0, 0.3, -9.0]]))  # the last is cut at -4
        vae.parameters["d3.bias"].copy_(torch.tensor([[0.2, -0.4]]))
    actions = torch.tensor([[[0.1, 1.9], [-1.5, 0.0]]])
    decoded = 2 * torch.tanh(torch.tensor([0.2, -0.4]))
    normal = torch.distributions.Normal
    code = normal(torch.tensor([0.5, 0.0, -1.0, 2.0]), torch.tensor([-1.0, 0.0, 0.3, -4.0]).exp())
    kl = torch.distributions.kl_divergence(code, normal(torch.zeros(4), torch.ones(4))).mean()
    expected = (decoded - actions).square().mean() + 0.5 * kl
    got = vae.loss(torch.randn(1, 2, 3), actions, torch.randn(1, 2, 4))
    torch.testing.assert_close(got[0], expected)
    noise = torch.full((1, 4, 4), 3.0)
    default_init(vae.parameters, [torch.Generator().manual_seed(0)])
    states = torch.randn(1, 2, 3)
    assert torch.equal(vae.sample(states, noise), vae.decode(states, torch.full((1, 4, 4), 0.5)))


def test_it_finds_the_better_of_two_actions_in_the_data_and_stays_near_it() -> None:
    """One state, actions -0.6 and 0.6 with noise; one seed's reward is their side, the other's the reverse."""
    settings = {"hidden_dim": 32, "vae_hidden_dim": 32, "action_candidates": 20}
    agent, g = bcq((1, 1, 1.0), seeds=2, **settings), torch.Generator().manual_seed(0)
    good = torch.tensor([1.0, -1.0]).view(2, 1, 1)
    for _ in range(300):
        side = (torch.rand(2, 64, 1, generator=g) < 0.5).float() * 2 - 1
        actions = side * 0.6 + 0.03 * torch.randn(2, 64, 1, generator=g)
        batch = {"states": torch.zeros(2, 64, 1), "next_states": torch.zeros(2, 64, 1), "actions": actions}
        batch |= {"rewards": side * good, "not_dones": torch.zeros(2, 64, 1)}
        metrics = agent.update(batch, agent.draw(g, 64))
    assert (metrics["critic_loss"] < 0.1).all()
    shown = agent.act(torch.zeros(2, 50, 1), g)
    assert (shown * good > 0.2).all() and shown.abs().max() < 0.75
