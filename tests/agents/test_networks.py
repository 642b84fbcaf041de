"""Networks against PyTorch's own layers, one seed at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

import hyperparameters
from agents import AGENTS
from agents.parts import critics
from agents.parts.critics import TwinCritic
from agents.parts.diffusion import NoiseNetwork
from agents.parts.layers import linear, mish, sinusoidal_embedding
from agents.parts.parameters import Parameters, Sizes, default_init, gradients


def test_mish_and_its_derivative_equal_the_library_in_double_precision() -> None:
    x = torch.cat([torch.linspace(-30, 30, 2001), torch.tensor([-100.0, -1e4, 0.0, 90.0, 1e4])]).double()
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.testing.assert_close(mish(a), F.mish(b), rtol=1e-12, atol=1e-14)
    upstream = torch.linspace(-2, 3, len(x)).double()
    mish(a).backward(upstream)
    F.mish(b).backward(upstream)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(mish, (torch.linspace(-5, 5, 41).double().requires_grad_(),))


def test_mish_keeps_its_digits_for_negative_inputs_in_single_precision() -> None:
    x = torch.linspace(-60, 20, 4001)
    exact = F.mish(x.double())
    assert ((mish(x).double() - exact) / exact.abs().clamp(min=1e-30)).abs().max() < 1e-5


def test_linear_is_each_members_affine_map() -> None:
    x, w, b = torch.randn(3, 5, 4), torch.randn(3, 2, 4), torch.randn(3, 2)
    for k in range(3):
        torch.testing.assert_close(linear(x, w, b)[k], F.linear(x[k], w[k], b[k]))
        torch.testing.assert_close(linear(x, w)[k], F.linear(x[k], w[k]))


def test_embedding_closed_form() -> None:
    e = sinusoidal_embedding(torch.tensor([0.0, 3.0]))
    assert e.shape == (2, 16)
    torch.testing.assert_close(e[0], torch.tensor([0.0] * 8 + [1.0] * 8))
    frequencies = [10000 ** (-k / 7) for k in range(8)]
    expected = [math.sin(3 * f) for f in frequencies] + [math.cos(3 * f) for f in frequencies]
    torch.testing.assert_close(e[1], torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_parameters_are_slices_of_one_buffer() -> None:
    p = Parameters({"a.weight": (2, 3), "a.bias": (2,), "scale": ()}, members=2, device="cpu")
    assert p.flat.shape == (2, 9)
    with torch.no_grad():
        p.flat.copy_(torch.arange(18.0).view(2, 9))
    assert p["a.weight"][1].tolist() == [[9, 10, 11], [12, 13, 14]]
    assert p["scale"].tolist() == [8, 17]
    loss = (p["a.weight"].square().sum(dim=(1, 2)) + 3 * p["a.bias"].sum(dim=1)) * torch.tensor([1.0, 2.0])
    gradient = gradients(loss + p["scale"], [p])[0]
    assert gradient[0].tolist() == [0, 2, 4, 6, 8, 10, 3, 3, 1]
    assert gradient[1].tolist() == [36, 40, 44, 48, 52, 56, 6, 6, 1]


def test_loading_names_what_is_missing_or_misshapen() -> None:
    p = Parameters({"a.weight": (2, 3)}, members=1, device="cpu")
    with pytest.raises(ValueError, match=r"lack 'a.weight'"):
        p.load_member(0, {"b": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"\(3, 2\), this network needs \(2, 3\)"):
        p.load_member(0, {"a.weight": torch.zeros(3, 2)})


def test_initial_weights_depend_on_the_own_seed_alone_and_keep_to_the_bound() -> None:
    def start(seeds: list[int]) -> TwinCritic:
        critic = TwinCritic(Sizes(11, 3, seeds=len(seeds)), [256] * 3)
        default_init(critic.parameters, [torch.Generator().manual_seed(s) for s in seeds])
        return critic

    alone, company = start([7]), start([3, 7])
    assert torch.equal(alone.parameters.flat, company.parameters.flat[2:])
    w = alone.parameters["2.weight"]
    assert w.abs().max() <= 1 / 16 and w.abs().max() > 0.99 / 16 and w.mean().abs() < 1e-3
    assert not torch.equal(w[0], w[1])


def test_twin_critic_equals_the_written_out_network() -> None:
    critic = TwinCritic(Sizes(5, 2, seeds=2), [256] * 3)
    default_init(critic.parameters, [torch.Generator().manual_seed(s) for s in (0, 1)])
    states, actions = torch.randn(2, 4, 5), torch.randn(2, 12, 2)  # three actions per state
    values = critic(states, actions)
    choice = torch.tensor([1, 0])
    for seed in range(2):
        p = critic.seed_state(seed)
        x = torch.cat([states[seed].repeat_interleave(3, dim=0), actions[seed]], dim=1)
        for i, q in enumerate(("q1_model", "q2_model")):
            h = x
            for layer in (0, 2, 4):
                h = F.mish(F.linear(h, p[f"{q}.{layer}.weight"], p[f"{q}.{layer}.bias"]))
            expected = F.linear(h, p[f"{q}.6.weight"], p[f"{q}.6.bias"]).squeeze(1)
            torch.testing.assert_close(values[seed, i], expected, rtol=1e-5, atol=1e-6)
    one = critic.one(choice, states, actions)
    torch.testing.assert_close(one, torch.stack([values[0, 1], values[1, 0]]), rtol=1e-5, atol=1e-6)


def test_the_chosen_critic_gives_gradients_to_the_actions_only() -> None:
    critic = TwinCritic(Sizes(5, 2), [256] * 3)
    default_init(critic.parameters, [torch.Generator().manual_seed(0)])
    actions = torch.randn(1, 4, 2, requires_grad=True)
    value = critic.one(torch.tensor([0]), torch.randn(1, 4, 5), actions).sum()
    value.backward()
    assert actions.grad.abs().sum() > 0
    assert all(t.grad is None for t in critic.parameters.tensors.values())


def test_noise_network_equals_the_written_out_network() -> None:
    network = NoiseNetwork(Sizes(5, 2, seeds=2), 4, 256)
    default_init(network.parameters, [torch.Generator().manual_seed(s) for s in (0, 1)])
    states, actions, step = torch.randn(2, 6, 5), torch.randn(2, 6, 2), 3
    condition = network.state_part(states) + network.time_part()[:, step : step + 1]
    got = network.noise(actions, condition)
    for seed in range(2):
        p = network.parameters.member_state(seed)
        t = sinusoidal_embedding(torch.full((6,), float(step)))
        t = F.mish(F.linear(t, p["model.time_mlp.1.weight"], p["model.time_mlp.1.bias"]))
        t = F.linear(t, p["model.time_mlp.3.weight"], p["model.time_mlp.3.bias"])
        h = torch.cat([actions[seed], t, states[seed]], dim=1)
        for layer in (0, 2, 4):
            h = F.mish(F.linear(h, p[f"model.mid_layer.{layer}.weight"], p[f"model.mid_layer.{layer}.bias"]))
        expected = F.linear(h, p["model.final_layer.weight"], p["model.final_layer.bias"])
        torch.testing.assert_close(got[seed], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("algo", list(AGENTS))
def test_hidden_dim_is_the_width_of_every_hidden_layer(algo: str) -> None:
    time = {"time_frequencies": 8} if algo == "idql" else {}  # the width of its time layers is its own, 256
    if algo == "decision_diffuser":  # so is the width of its inverse dynamics
        time = {"inverse_dim": 24, "diffusion_steps": 2, "horizon": 4}
    config = hyperparameters.get(algo, "hopper-medium-v2", hidden_dim=24, **time)
    agent = AGENTS[algo](11, 3, 1.0, config, seeds=[0])
    matrices = [s for p in agent.networks.values() for s in p.shapes.values() if len(s) == 2]
    assert any(24 in shape for shape in matrices) and all(256 not in shape for shape in matrices)
    assert agent.act(torch.zeros(1, 2, 11), torch.Generator()).shape == (1, 2, 3)


def test_a_critic_takes_many_actions_per_state_some_states_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same values and gradients; a state's actions stay together, whatever the number of states."""
    generator = torch.Generator().manual_seed(0)
    critic = TwinCritic(Sizes(5, 2, seeds=2), [16] * 2, torch.relu)
    critic.initialize([generator, generator])
    for states, repeats, rows, pieces in ((7, 3, 9, 3), (7, 3, 21, 1), (4, 3, 2, 4), (7, 1, 2, 1)):
        s = torch.randn(2, states, 5, generator=generator)
        a = torch.randn(2, states * repeats, 2, generator=generator)
        weights = torch.randn(2, 2, states * repeats, generator=generator)
        outcomes = []
        for at_once in (10**9, rows):
            monkeypatch.setattr(critics, "ROWS", at_once)
            assert len(critics._pieces(s, a)) == (pieces if at_once == rows else 1)
            with torch.no_grad():
                assert len(critics._pieces(s, a)) == 1
            values = critic(s, a)
            outcomes.append((values, *gradients((values * weights).sum(dim=(1, 2)), [critic.parameters])))
        torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seeds", [1, 2])
def test_the_first_critic_alone_gives_the_numbers_of_the_pair(seeds: int) -> None:
    critic = TwinCritic(Sizes(5, 2, seeds=seeds), [32] * 2, torch.relu)
    critic.initialize([torch.Generator().manual_seed(0)] * seeds)
    states, actions = torch.randn(seeds, 20, 5), torch.randn(seeds, 60, 2, requires_grad=True)
    pair, alone = critic(states, actions)[:, 0], critic.first(states, actions)
    assert torch.equal(pair, alone)
    slopes = [torch.autograd.grad(values.sum(), actions)[0] for values in (pair, alone)]
    assert torch.equal(*slopes)
