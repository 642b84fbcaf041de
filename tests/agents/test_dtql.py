"""DTQL against the published code's recorded steps, and its parts against their definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import hyperparameters
from agents import AGENTS
from agents.parts.edm import EDM
from agents.parts.losses import expectile_loss
from benchmarks.plain_dtql import PlainDTQL
from tests import recordings

METRICS = ("bc_loss", "distill_loss", "q_loss", "actor_loss", "critic_loss", "gamma_loss")


def published_config(config: dict[str, Any]) -> Any:
    return hyperparameters.get(
        "dtql",
        "halfcheetah-medium-v2",
        alpha=config["alpha"],
        gamma=config["gamma"],
        expectile=config["expectile"],
        **recordings.settings(config),
    )


@pytest.mark.parametrize("seeds", [1, 2])
def test_recorded_updates_are_reproduced(seeds: int) -> None:
    config, recorded = recordings.load("parity_dtql_locomotion")
    rs = np.random.RandomState(config["seed"])
    networks = recordings.weights(config, rs)
    batches, draws = recordings.batches(config, rs), recordings.one_step_draws(config, rs)
    sizes = (config["state_dim"], config["action_dim"], config["max_action"])
    agent = AGENTS["dtql"](*sizes, published_config(config), range(seeds))
    agent.load_published(networks)
    agent.step = config["start_step"]
    for k in range(config["updates"]):
        metrics = agent.update(recordings.stacked(batches[k], seeds), recordings.stacked(draws[k], seeds))
        for seed in range(seeds):
            got = [metrics[name][seed].item() for name in METRICS]
            np.testing.assert_allclose(got, recorded["metrics"][k], rtol=1e-4)
    for state in agent.published_state():
        recordings.assert_recorded(state, recorded)


# --- Against the plain form, which shares no line with the agent ---------------------------------------------------


def batch(g: torch.Generator, states: int, actions: int, bound: float, rows: int = 32) -> dict[str, torch.Tensor]:
    return {
        "states": torch.randn(rows, states, generator=g),
        "actions": torch.tanh(torch.randn(rows, actions, generator=g)) * bound * 0.95,
        "next_states": torch.randn(rows, states, generator=g),
        "rewards": torch.randn(rows, 1, generator=g),
        "not_dones": (torch.rand(rows, 1, generator=g) > 0.1).float(),
    }


CASES = {
    "antmaze: likelihood, expectile 0.9": (29, 8, 1.0, "antmaze-large-diverse-v0", {}),
    "decaying rates": (11, 3, 1.0, "hopper-medium-v2", {"num_epochs": 1, "num_steps_per_epoch": 6}),
    "another box": (17, 6, 2.0, "halfcheetah-medium-expert-v2", {"gamma": 0.5}),
    "another box, other noise": (
        5,
        2,
        0.4,
        "pen-human-v1",
        {"sigma_data": 0.3, "sigma_max": 10.0, "clip_denoised": 0.4},
    ),
}


@pytest.mark.parametrize("case", list(CASES))
def test_the_update_matches_the_plain_form(case: str) -> None:
    """Three steps of pretraining, five of training."""
    state_dim, action_dim, max_action, task, settings = CASES[case]
    config = hyperparameters.get("dtql", task, ema_start=1, ema_interval=2, **settings)
    sizes = (state_dim, action_dim, max_action, config)
    agent, plain = AGENTS["dtql"](*sizes, [3]), PlainDTQL("dtql", *sizes, torch.device("cpu"))
    plain.load_published(agent.published_state()[0])
    g = torch.Generator().manual_seed(0)
    agent.step = plain.step = -3
    for step in range(-3, 5):
        one = batch(g, state_dim, action_dim, max_action)
        draws = agent.draw(g, 32)
        metrics = agent.update(recordings.stacked(one, 1), draws)
        expected = plain.train_step(one, {name: value[0] for name, value in draws.items()})
        for name, value in expected.items():
            assert metrics[name].item() == pytest.approx(value, rel=2e-4, abs=1e-5), (step, name)
        assert metrics["distill_loss"].isnan().all() == (step < 0)
    for network, weights in agent.published_state()[0].items():
        expected_weights = getattr(plain, network).state_dict()
        assert weights.keys() == expected_weights.keys()
        for name, value in weights.items():
            # Adam's first steps of 3e-4 hang on a gradient's sign, where the gradient itself may be rounding.
            torch.testing.assert_close(value, expected_weights[name], rtol=1e-3, atol=1.5e-4, msg=f"{network} {name}")


# --- What is due, and at which rate ------------------------------------------------------------------------------


def small(**settings: Any) -> Any:
    return AGENTS["dtql"](3, 2, 1.0, hyperparameters.get("dtql", "hopper-medium-v2", **settings), [0])


def test_pretraining_moves_only_denoiser_critics_and_value() -> None:
    agent, g = small(pretrain_epochs=2, num_steps_per_epoch=3), torch.Generator().manual_seed(0)
    assert agent.first_step == -6
    agent.step = agent.first_step
    start = {name: p.flat.clone() for name, p in agent.networks.items()}
    for _ in range(6):
        agent.update(recordings.stacked(batch(g, 3, 2, 1.0), 1), agent.draw(g, 32))
    moved = {name for name, p in agent.networks.items() if not torch.equal(p.flat, start[name])}
    assert moved == {"critic", "value", "bc"}
    assert agent.step == 0 and agent.phase(-1) != agent.phase(0) == agent.phase(10**6)
    agent.update(recordings.stacked(batch(g, 3, 2, 1.0), 1), agent.draw(g, 32))
    moved = {name for name, p in agent.networks.items() if not torch.equal(p.flat, start[name])}
    assert moved == set(agent.networks) - {"ema"}  # that average starts at ema_start


def test_lr_decay_is_torchs_cosine_stepped_every_update() -> None:
    agent = small(num_epochs=2, num_steps_per_epoch=5, lr_decay=True)
    g = torch.Generator().manual_seed(0)
    adam = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, T_max=10, eta_min=0.0)
    agent.step = -1
    for step in range(-1, 11):
        agent.update(recordings.stacked(batch(g, 3, 2, 1.0), 1), agent.draw(g, 32))
        expected = cosine.get_last_lr()[0] / 1e-4
        for name, base in (("bc", 1e-4), ("actor", 1e-4), ("critic", 3e-4), ("value", 3e-4)):
            assert agent.optimizers[name].rate.item() / base == pytest.approx(expected, abs=1e-6), step
        if step >= 0:
            adam.step()
            cosine.step()


# --- Parts -------------------------------------------------------------------------------------------------------


def test_noise_levels_are_log_logistic_between_their_bounds() -> None:
    edm = EDM(0.1, 4.0, 0.5, 1.0)
    rng = [torch.Generator().manual_seed(k) for k in range(2)]
    levels = edm.noise_levels(rng, 2, 100, (500,))
    assert levels.shape == (100, 2, 500) and levels.dtype == torch.float32
    assert levels.min() >= 0.1 * (1 - 1e-6) and levels.max() <= 4.0 * (1 + 1e-6)

    def cumulative(sigma: float) -> float:
        return 1 / (1 + (0.5 / sigma) ** 2)  # logistic of (ln sigma - ln 0.5) / 0.5

    for sigma in (0.2, 0.5, 1.0, 2.0):
        expected = (cumulative(sigma) - cumulative(0.1)) / (cumulative(4.0) - cumulative(0.1))
        assert (levels < sigma).double().mean().item() == pytest.approx(expected, abs=0.006)  # 4 standard errors


def test_a_perfect_denoiser_has_no_loss() -> None:
    """A network that returns what F must be for D = a: the preconditioning solved for F."""
    edm, g = EDM(0.002, 80.0, 0.5, 1.0), torch.Generator().manual_seed(0)
    actions = torch.rand(1, 64, 2, generator=g) * 1.8 - 0.9
    sigma, noise = edm.noise_levels(g, 1, 1, (64,))[0], torch.randn(1, 64, 2, generator=g)

    def network(scaled: torch.Tensor, states: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        s = torch.exp(4 * times).unsqueeze(-1)
        x = scaled * (s**2 + 0.25) ** 0.5
        torch.testing.assert_close(x, actions + s * noise)
        return (actions - 0.25 / (s**2 + 0.25) * x) / (s * 0.5 / (s**2 + 0.25) ** 0.5)

    assert edm.loss(network, actions, torch.zeros(1, 64, 3), sigma, noise).item() < 1e-4


def test_the_denoised_action_is_clipped() -> None:
    edm = EDM(0.002, 80.0, 0.5, 1.0)
    actions, sigma, noise = torch.zeros(1, 1, 1), torch.ones(1, 1), torch.zeros(1, 1, 1)

    def far(*_: torch.Tensor) -> torch.Tensor:
        return torch.full((1, 1, 1), 100.0)

    assert edm.loss(far, actions, torch.zeros(1, 1, 1), sigma, noise).item() == pytest.approx(1 / (0.25 / 1.25))


def test_expectiles_minimiser_is_the_expectile() -> None:
    """Of {0, 1} at expectile e, with e (1 - v) = (1 - e) v, that is v = e."""
    x, v = torch.tensor([0.0, 1.0]), torch.tensor(0.5, requires_grad=True)
    for _ in range(400):
        (slope,) = torch.autograd.grad(expectile_loss(x - v, 0.8).mean(), v)
        v = (v - 0.5 * slope).detach().requires_grad_()
    assert v.item() == pytest.approx(0.8, abs=1e-5)


def test_the_one_step_policy_starts_orthogonal_and_alike_in_company() -> None:
    config = hyperparameters.get("dtql", "hopper-medium-v2")
    alone, both = AGENTS["dtql"](3, 2, 1.0, config, [1]), AGENTS["dtql"](3, 2, 1.0, config, [0, 1])
    state = alone.published_state()[0]
    weight = state["distill_actor"]["net.2.weight"]
    torch.testing.assert_close(weight @ weight.T, torch.eye(256), rtol=0, atol=1e-5)
    assert not state["distill_actor"]["net.2.bias"].any()
    assert (state["critic"]["q1_model.1.weight"] == 1).all() and not state["critic"]["q2_model.4.bias"].any()
    for network, weights in both.published_state()[1].items():
        for name, value in weights.items():
            assert torch.equal(value, state[network][name])


def test_candidates_are_drawn_by_softmax_of_the_target_critics() -> None:
    """With two candidates a state the share of the first is the sigmoid of the difference of values."""
    agent = small(action_candidates=2)
    agent.critic_target.parameters.flat.mul_(3.0)  # values that differ
    state = torch.randn(1, 1, 3, generator=torch.Generator().manual_seed(4))
    noise = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(5))
    mean, log_std = agent.actor(state)
    candidates = agent.actor.actions(mean, log_std, noise)[0, 0]
    values = agent.critic_target(state, candidates[None]).amin(1)[0]
    many = {"noise": noise.expand(1, 4000, 2, 2), "exponential": torch.empty(1, 4000, 2)}
    many["exponential"].exponential_(generator=torch.Generator().manual_seed(6))
    chosen = agent.actions_for(state.expand(1, 4000, 3), many)[0]
    share = (chosen - candidates[0]).abs().sum(1).lt(1e-4).double().mean().item()
    expected = torch.sigmoid(values[0] - values[1]).item()
    assert 0.02 < expected < 0.98 and abs(expected - 0.5) > 0.02
    assert share == pytest.approx(expected, abs=0.03)


@pytest.mark.slow
def test_it_finds_the_better_of_two_actions_in_the_data() -> None:
    """One-step episodes, actions -0.6 and 0.6, reward 1 for the second: act near it, and not beyond the data."""
    settings = {"alpha": 1.0, "learning_rate": 1e-3, "critic_learning_rate": 1e-3, "lr_decay": False}
    config = hyperparameters.get("dtql", "hopper-medium-v2", action_candidates=8, **settings)
    agent, g = AGENTS["dtql"](2, 1, 1.0, config, [0]), torch.Generator().manual_seed(0)
    for _ in range(250):
        one = batch(g, 2, 1, 1.0)
        one["actions"] = torch.where(torch.rand(32, 1, generator=g) < 0.5, -0.6, 0.6)
        one |= {"rewards": (one["actions"] > 0).float(), "not_dones": torch.zeros(32, 1)}
        agent.update(recordings.stacked(one, 1), agent.draw(g, 32))
    actions = agent.act(torch.randn(1, 100, 2, generator=g), g)
    assert 0.3 < actions.mean() < 0.9 and actions.min() > 0
