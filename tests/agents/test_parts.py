"""The verbs of the base class, and the parts that several algorithms share, against closed forms."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from agents.parts.agent import Agent
from agents.parts.critics import TwinCritic
from agents.parts.layers import MLP
from agents.parts.losses import td_target, twin_error
from agents.parts.multiplier import Multiplier
from agents.parts.parameters import Sizes, orthogonal_init
from agents.parts.policies import BoxGaussian, TanhGaussian

CONFIG = {
    "grad_norm": 0.0, "lr_decay": False, "lr_decay_full": False, "num_steps_per_epoch": 10, "num_epochs": 10,
    "eval_interval": 1,
}  # fmt: skip


class Two(Agent):
    """Two chains of layers, an average of each, a multiplier."""

    METRICS = ("a_loss", "a_grad_norm", "m", "m_grad_norm")

    def build(self) -> None:
        self.a = self.learn("a", MLP([2, 1], self.sizes), 1e-2)
        self.b = self.learn("b", MLP([2, 1], self.sizes), 1e-3, init=orthogonal_init, published="joint/b.")
        self.slow = self.average_of("slow", self.a, decay=0.75)
        self.late = self.average_of("late", self.b, decay=0.5, start=3, published="joint/late.")
        self.m = self.learn("m", Multiplier(self.sizes, 2.0), 0.1)


def two(seeds: list[int] | None = None, **settings: Any) -> Two:
    return Two(2, 1, 1.0, SimpleNamespace(**{**CONFIG, **settings}), seeds or [0, 1])


def outcome(network: MLP) -> tuple[Tensor, dict[str, Tensor]]:
    loss = network(torch.ones(2, 1, 2)).square().sum(dim=(1, 2))
    return loss, {"a_loss": loss.detach()}


def test_what_is_named_is_saved_stepped_and_initialised_in_order() -> None:
    agent = two()
    assert list(agent.networks) == ["a", "b", "slow", "late", "m"] and list(agent.optimizers) == ["a", "b", "m"]
    generators = agent.init_generators()
    for name, network in (("a", MLP([2, 1], agent.sizes)), ("b", MLP([2, 1], agent.sizes))):
        if name == "a":
            network.initialize(generators)
        else:
            orthogonal_init(network.parameters, generators)
        assert torch.equal(network.parameters.flat, agent.networks[name].flat)
    assert torch.equal(agent.slow.parameters.flat, agent.a.parameters.flat)
    assert agent.optimizers["a"].base_rate == 1e-2 and agent.m().tolist() == [2.0, 2.0]


def test_an_average_follows_by_its_weight_and_a_late_one_stands_still_before_its_step() -> None:
    agent = two()
    for network in (agent.slow, agent.late):
        network.parameters.flat.zero_()
    for network in (agent.a, agent.b):
        with torch.no_grad():
            network.parameters.flat.fill_(4.0)
    for step, expected in ((2, 0.0), (3, 2.0), (4, 3.0)):
        agent.step = step
        agent.prepare()
        agent.late.follow(agent.b)
        assert (agent.late.parameters.flat == expected).all()
    agent.slow.follow(agent.a)
    assert (agent.slow.parameters.flat == 1.0).all()


def test_descend_is_one_step_of_adam_and_gives_the_metrics_and_the_norm() -> None:
    agent = two()
    plain = agent.a.parameters.flat.clone().requires_grad_()
    loss = (plain[:, :2].sum(dim=1) + plain[:, 2]).square()
    (gradient,) = torch.autograd.grad(loss.sum(), plain)
    metrics = agent.descend("a", outcome(agent.a))
    assert set(metrics) == {"a_loss", "a_grad_norm"}
    torch.testing.assert_close(metrics["a_loss"], loss.detach())
    torch.testing.assert_close(metrics["a_grad_norm"], gradient.norm(dim=1))
    torch.testing.assert_close(agent.a.parameters.flat, plain.detach() - 1e-2 * gradient.sign())  # Adam's first step


def test_together_all_gradients_are_taken_before_any_step() -> None:
    one, other = two(), two()
    product = lambda agent: outcome(agent.a)[0] * outcome(agent.b)[0]  # noqa: E731
    one.descend_together({("a", "b"): (product(one), {})})
    losses = {"a": (product(other), {}), "b": (product(other), {})}
    assert "b_grad_norm" not in other.descend_together(losses)  # not among METRICS
    for name in ("a", "b"):
        assert torch.equal(one.networks[name].flat, other.networks[name].flat), name
    assert not torch.equal(one.a.parameters.flat, two().a.parameters.flat)


def test_published_names_follow_from_what_was_named() -> None:
    agent = two()
    states = agent.published_state()
    assert set(states[0]) == {"a", "joint", "slow", "m"}
    assert set(states[0]["joint"]) == {f"{of}.net.0.{kind}" for of in ("b", "late") for kind in ("weight", "bias")}
    fresh = two([7, 8])
    fresh.load_published({"a": states[1]["a"], "joint": states[1]["joint"], "m": torch.tensor(-3.0)})
    for name in ("a", "b", "slow", "late"):  # slow was missing: it is a copy of a
        for seed in (0, 1):
            assert torch.equal(fresh.networks[name].flat[seed], agent.networks["a" if name == "slow" else name].flat[1])
    assert fresh.m().tolist() == [-3.0, -3.0]
    with pytest.raises(ValueError, match="weights of 'joint' are missing; given: a"):
        fresh.load_published({"a": states[1]["a"]})
    with pytest.raises(ValueError, match=r"lack 'net\.0\.weight'"):
        fresh.load_published({"a": states[1]["a"], "joint": {}})


def test_update_gives_one_tensor_of_nan_for_what_is_not_due_and_counts() -> None:
    agent = two()
    agent.gradient_step = lambda batch, draws, step: {"a_loss": torch.full((2,), float(step))}
    agent.step = 5
    metrics = agent.update({}, {})
    assert tuple(metrics) == agent.METRICS and agent.step == 6
    assert metrics["a_loss"].tolist() == [5.0, 5.0]
    assert metrics["m"] is agent.not_due and agent.not_due.isnan().all()


def test_rates_that_decay_at_every_step_end_at_zero_and_the_others_stay() -> None:
    agent = two(lr_decay=True)
    agent.decay_every_step("a")
    for step, expected in ((0, 1.0), (25, 0.5 + 0.5 * math.cos(math.pi / 4)), (50, 0.5), (100, 0.0), (120, 0.0)):
        agent.step = step
        agent.prepare()
        agent.decay_rates()
        assert agent.optimizers["a"].rate.item() == pytest.approx(1e-2 * expected, abs=1e-8)
        assert agent.optimizers["b"].rate.item() == pytest.approx(1e-3)
    full = two(lr_decay_full=True)
    full.decay_every_step("a")
    full.step = 50
    full.prepare()
    full.decay_rates()
    assert full.optimizers["a"].rate.item() == pytest.approx(5e-3)
    assert full.optimizers["b"].rate.item() == pytest.approx(1e-3)


# --- The multiplier ---------------------------------------------------------------------------------------------------


def multiplier(at: float, **kind: Any) -> Multiplier:
    made = Multiplier(Sizes(1, 1, seeds=2), **kind)
    made.flat.fill_(at)
    return made


@pytest.mark.parametrize(
    ("kind", "stored", "value", "slope"),
    [
        ({}, 0.7, 0.7, 1.0),
        ({"bounds": (1.0, 3.0)}, 0.7, 1.0, 1.0),  # below its bound: used as the bound, stored winds up
        ({"log": True}, 0.7, math.exp(0.7), math.exp(0.7)),
        ({"log": True, "of_log": True}, 0.7, math.exp(0.7), 1.0),
        ({"log": True, "bounds": (0.0, 1.5)}, 0.7, 1.5, 0.0),  # the cut's derivative
        ({"log": True, "bounds": (0.0, 1.5)}, 0.1, math.exp(0.1), math.exp(0.1)),
    ],
)
def test_a_multipliers_value_and_slope(kind: dict[str, Any], stored: float, value: float, slope: float) -> None:
    made = multiplier(stored, **kind)
    torch.testing.assert_close(made(), torch.full((2,), value))
    violation = torch.tensor([2.0, -0.5])
    torch.testing.assert_close(made.gradient(violation), -(slope * violation).unsqueeze(1))


def test_a_multiplier_grows_while_its_constraint_is_violated_and_shrinks_otherwise() -> None:
    agent = two()
    metrics = agent.ascend("m", torch.tensor([3.0, -4.0]))
    torch.testing.assert_close(metrics["m"], torch.tensor([2.1, 1.9]))  # Adam's first step has the rate's size
    torch.testing.assert_close(metrics["m_grad_norm"], torch.tensor([3.0, 4.0]))


def test_what_a_multiplier_stores_is_cut_after_a_step() -> None:
    made = multiplier(9.0, log=True, stored=(-5.0, 8.0))
    made.cut()
    assert made.flat.tolist() == [[8.0], [8.0]]


# --- Losses, critics, Gaussians ---------------------------------------------------------------------------------------


def test_td_target_and_twin_error() -> None:
    batch = {"rewards": torch.tensor([[[1.0], [2.0]]]), "not_dones": torch.tensor([[[1.0], [0.0]]])}
    target = td_target(batch, 0.5, torch.tensor([[10.0, 20.0]]))
    assert target.tolist() == [[6.0, 2.0]]
    assert twin_error(torch.tensor([[[6.0, 4.0], [9.0, 2.0]]]), target).tolist() == [4 / 2 + 9 / 2]


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ({}, ["q1_model.0", "q1_model.2", "q2_model.0", "q2_model.2"]),
        ({"norm": True}, ["q1_model.0", "q1_model.3", "q1_model.1", "q2_model.0", "q2_model.3", "q2_model.1"]),
        ({"names": ("l",)}, ["l1", "l2", "l3", "l4"]),
        ({"names": ("q1", "q2"), "action_first": True}, ["q1.0", "q1.2", "q2.0", "q2.2"]),
    ],
)
def test_a_critics_published_names(kind: dict[str, Any], names: list[str]) -> None:
    made, other = (TwinCritic(Sizes(3, 2, seeds=2), [4], **kind) for _ in range(2))
    made.initialize([torch.Generator().manual_seed(seed) for seed in (0, 1)])
    state = made.seed_state(1)
    assert set(state) == {f"{name}.{part}" for name in names for part in ("weight", "bias")}
    own = made.parameters["0.weight"][2]
    expected = torch.cat([own[:, 3:], own[:, :3]], dim=1) if "action_first" in kind else own
    assert torch.equal(state[f"{names[0]}.weight"], expected)
    other.load_seed(0, state)
    assert torch.equal(other.parameters.flat[:2], made.parameters.flat[2:])


@pytest.mark.parametrize("head", [BoxGaussian, TanhGaussian])
def test_noise_with_an_axis_more_gives_so_many_actions_of_each_state(head: type[BoxGaussian | TanhGaussian]) -> None:
    policy = head(Sizes(3, 2, 0.5, seeds=2), [4])
    policy.initialize([torch.Generator().manual_seed(seed) for seed in (0, 1)])
    mean, log_std = policy(torch.randn(2, 5, 3))
    noise = torch.randn(2, 5, 7, 2)
    actions = policy.actions(mean, log_std, noise)
    assert actions.shape == (2, 5, 7, 2) and actions.abs().max() <= 0.5
    for k in range(7):
        assert torch.equal(actions[:, :, k], policy.actions(mean, log_std, noise[:, :, k]))
    torch.testing.assert_close(policy.actions(mean, log_std), policy.actions(mean, log_std, torch.zeros(2, 5, 2)))
