"""--kappa auto: the clone, the running mean of its loss, and kappa."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hyperparameters
from agents import AGENTS
from agents.parts.agent import Agent
from agents.parts.bound import MEMORY, CloneBound
from tests import small
from tests.agents.test_agents import ROWS, NoWaiting, batch, make, parameters, rngs, same, train


def auto(seeds: list[int], **settings: Any) -> Agent:
    return make("diffcps", seeds, kappa="auto", **settings)


def test_the_running_mean_begins_with_the_first_loss_and_remembers_the_last_tenth() -> None:
    agent = auto([0, 1], kappa_slack=0.5)
    bound: CloneBound = agent.kappa
    assert bound().tolist() == [0.0, 0.0]
    expected, losses = np.zeros(2), np.random.default_rng(0).uniform(0.1, 1.0, (12 * MEMORY, 2))
    for n, loss in enumerate(losses, start=1):
        bound.take(torch.as_tensor(loss, dtype=torch.float32))
        expected += max(10 / (9 + n), 1 / MEMORY) * (loss - expected)
        if n == 1:
            assert expected.tolist() == loss.tolist()
        if n in (1, 2, 11, 300, len(losses)):
            np.testing.assert_allclose(bound().numpy(), 1.5 * expected, rtol=1e-5)
    # Of large losses at the start nothing is left once there are ten times as many.
    forgetful: CloneBound = auto([0], kappa_slack=0.2).kappa
    for loss in (*[1.0] * 30, *[0.1] * 270):
        forgetful.take(torch.tensor([loss]))
    assert forgetful().item() == pytest.approx(1.2 * 0.1, rel=1e-3)


def test_the_slack_opens_over_its_steps() -> None:
    bound: CloneBound = auto([0], kappa_slack=1.0, kappa_opening=8).kappa  # gradient steps: 4 of the policy's
    seen = []
    for _ in range(6):
        bound.take(torch.tensor([0.5]))
        seen.append(bound().item())
    np.testing.assert_allclose(seen, [0.625, 0.75, 0.875, 1.0, 1.0, 1.0])


def test_the_clone_is_what_diffusion_bc_learns_from_the_same_batches_and_draws() -> None:
    agent, cloning = auto([0, 1], policy_interval=1, grad_norm=0.5), make("diffusion_bc", [0, 1], grad_norm=0.5)
    cloning.networks["actor"].flat.copy_(agent.networks["actor"].flat)
    generators = rngs([0, 1])
    for _ in range(20):
        one, draws = batch(agent, generators), agent.draw(generators, ROWS)
        ours, theirs = agent.update(one, draws), cloning.update(one, draws)
        assert torch.equal(ours["clone_loss"], theirs["bc_loss"])
    assert torch.equal(parameters(agent)["clone"], parameters(cloning)["actor"])
    assert not torch.equal(parameters(agent)["clone"], parameters(agent)["actor"])


def test_the_policy_starts_as_it_does_with_a_number() -> None:
    fixed, following = make("diffcps", [3, 4]), auto([3, 4])
    for name, value in parameters(fixed).items():  # lambda begins alike, but a controller keeps more than its value
        assert name == "lambda" or torch.equal(value, parameters(following)[name]), name
    assert torch.equal(fixed.lambda_(), following.lambda_())
    assert torch.equal(parameters(following)["clone"], parameters(following)["actor"])
    assert set(following.networks) - set(fixed.networks) == {"clone", "kappa"}
    assert set(following.METRICS) - set(fixed.METRICS) == {"kappa", "clone_loss", "clone_grad_norm"}
    # The critic's first step does not know of kappa.
    a, b = train(fixed, rngs([3, 4]), 1)[0], train(following, rngs([3, 4]), 1)[0]
    assert all(torch.equal(a[name], b[name]) for name in ("critic_loss", "q_mean", "kl_loss", "actor_loss"))


def test_it_resumes_bit_for_bit_and_a_seed_learns_alike_alone_and_in_company() -> None:
    whole, part = auto([0, 1]), auto([0, 1])
    train(whole, rngs([0, 1]), 11)
    generators = rngs([0, 1])
    train(part, generators, 4)
    resumed = auto([0, 1])
    resumed.load_state_dict(part.state_dict())
    train(resumed, generators, 7)
    assert same(whole.state_dict(), resumed.state_dict())
    alone = auto([1])
    train(alone, rngs([1]), 11)
    for name, value in parameters(whole).items():
        torch.testing.assert_close(value[1:2], parameters(alone)[name], rtol=1e-4, atol=5e-5, msg=name)
    assert parameters(alone)["kappa"][0, 1] == 6  # losses: steps 0, 2, ... 10


def test_published_weights_that_have_no_clone_give_the_policys() -> None:
    agent, fresh = make("diffcps", [0]), auto([5])
    train(agent, rngs([0]), 4)
    fresh.load_published({name: v for name, v in agent.published_state()[0].items() if isinstance(v, dict)})
    for name in ("actor", "clone"):
        assert torch.equal(parameters(fresh)[name], parameters(agent)["actor"])


def test_the_compiled_loss_is_what_the_update_runs() -> None:
    agent, called = auto([0, 1]), []
    assert agent.COMPILED == ("critic_loss", "policy_loss", "clone_loss")
    plain = agent.clone_loss
    agent.clone_loss = lambda *given: called.append(1) or plain(*given)
    train(agent, rngs([0, 1]), 4)
    assert len(called) == 2 and type(agent).COMPILED == ("critic_loss", "policy_loss")


def test_the_update_with_a_clone_never_waits_for_the_device() -> None:
    agent, generators = auto([0, 1], kappa_opening=100), rngs([0, 1])
    one, draws = batch(agent, generators), agent.draw(generators, ROWS)
    agent.prepare()
    with NoWaiting():
        assert "kappa" in agent.gradient_step(one, draws, 0)


def learnt(seeds: list[int], steps: int, **settings: Any) -> dict[str, Tensor]:
    """The metrics [steps of the policy, S] of a run on a thousand noisy actions that follow the state."""
    c = hyperparameters.get("diffcps", "hopper-medium-v2", hidden_dim=32, learning_rate=1e-3, **settings)
    agent, generator = AGENTS["diffcps"](5, 3, 1.0, c, seeds), torch.Generator().manual_seed(0)
    table = small.batch(generator, 5, 3, 1.0, 1000)
    table["actions"] = (0.6 * table["states"][..., :3].tanh() + 0.1 * table["actions"]).clamp(-1, 1)
    found: dict[str, list[Tensor]] = {}
    for _ in range(steps):
        rows = torch.randint(0, 1000, (128,), generator=generator)
        one = {name: value[:, rows].expand(len(seeds), -1, -1) for name, value in table.items()}
        for name, value in agent.update(one, agent.draw([generator] * len(seeds), 128)).items():
            if value is not agent.not_due:
                found.setdefault(name, []).append(value)
    return {name: torch.stack(values) for name, values in found.items()}


@pytest.mark.slow
def test_kappa_follows_the_clone_and_the_policys_loss_follows_kappa() -> None:
    seen = learnt([0], 1000, kappa="auto", kappa_slack=0.3, lambda_integral=0.1)
    mean = torch.zeros(1)
    for n, (clone, kappa) in enumerate(zip(seen["clone_loss"], seen["kappa"], strict=True), start=1):
        mean += max(10 / (9 + n), 1 / MEMORY) * (clone - mean)
        torch.testing.assert_close(kappa, 1.3 * mean, rtol=1e-4, atol=0)
    clone, kappa, loss = (seen[name][-50:].mean().item() for name in ("clone_loss", "kappa", "kl_loss"))
    assert clone < 0.05 * seen["clone_loss"][0].item()
    assert kappa == pytest.approx(1.3 * clone, rel=0.3)
    assert 0.8 < loss / kappa < 1.4, "kappa falls by a quarter in the last 100 steps, and the policy is not left behind"
    # The same data with a bound that no policy reaches: nothing is ever above it but the first steps.
    idle = learnt([0], 100, kappa=5.0)
    assert idle["lambda_violated"].sum() == 0 and (idle["lambda"].diff(dim=0) < 0).all()


def test_violation_and_bounds_are_seen() -> None:
    config = {"lambda_min": 0.3, "lambda_learning_rate": 1.0}
    for kappa, violated, at_bound in ((1e9, 0.0, 1.0), (0.0, 1.0, 0.0)):
        agent = make("diffcps", [0, 1], kappa=kappa, **config)
        metrics = train(agent, rngs([0, 1]), 1)[0]
        assert metrics["lambda_violated"].tolist() == [violated] * 2
        assert metrics["lambda_at_bound"].tolist() == [at_bound] * 2


# --- The multiplier's forms ---------------------------------------------------------------------------------------


def test_the_controller_is_its_closed_form() -> None:
    agent = make("diffcps", [0, 1], kappa=0.1, lambda_update="pi", lambda_init=0.5, lambda_min=0.05,
                 lambda_proportional=2.0, lambda_integral=0.1)  # fmt: skip
    kappa, integral, error = 0.1, np.full(2, 0.5), np.zeros(2)
    rng = np.random.default_rng(1)
    for loss in (*rng.uniform(0.05, 0.15, (20, 2)), *np.full((60, 2), 0.02), *np.full((60, 2), 7.0)):
        violation = torch.as_tensor(loss, dtype=torch.float32) - kappa
        found = agent.ascend("lambda", violation, torch.full((2,), kappa))
        v = np.minimum(loss / kappa - 1, 1.0)
        error += 0.05 * (v - error)
        integral = np.clip(integral + 0.1 * v, 0.05, 100.0)
        expected = np.clip(2.0 * error + integral, 0.05, 100.0)
        np.testing.assert_allclose(found["lambda"].numpy(), expected, rtol=1e-4)
        np.testing.assert_allclose(agent.lambda_().numpy(), expected, rtol=1e-4)
        np.testing.assert_array_equal(found["lambda_violated"].numpy(), loss > kappa)
        np.testing.assert_array_equal(found["lambda_at_bound"].numpy(), expected == 0.05)
    assert expected == pytest.approx(0.05 + 0.1 * 60 + 2.0, abs=0.3)  # it had not wound up below the bound


def test_the_controller_starts_at_lambda_init_and_takes_up_a_published_lambda() -> None:
    agent = make("diffcps", [0, 1], lambda_update="pi", lambda_init=2.5)
    assert agent.lambda_().tolist() == [2.5, 2.5] and agent.published_state()[1]["lambda"].item() == 2.5
    agent.load_published({**agent.published_state()[0], "lambda": torch.tensor(0.75)})
    assert agent.lambda_().tolist() == [0.75, 0.75]
    for _ in range(3):  # met exactly: it stays
        agent.ascend("lambda", torch.zeros(2), torch.ones(2))
    assert agent.lambda_().tolist() == [0.75, 0.75]


def test_ascent_is_adam_whatever_the_bound() -> None:
    """The published form does not know of the scale; its first step has the length of its rate."""
    for scale in (1.0, torch.full((1,), 0.05)):
        agent = make("diffcps", [0], lambda_learning_rate=0.01)
        agent.ascend("lambda", torch.tensor([0.02]), scale)
        assert agent.lambda_().item() == pytest.approx(1.01, rel=1e-5)


@pytest.mark.parametrize("update", ["ascent", "pi"])
def test_a_bound_of_zero_costs_no_number(update: str) -> None:
    agent = make("diffcps", [0], kappa=0.0, lambda_update=update)
    train(agent, rngs([0]), 6)
    assert agent.lambda_().isfinite().all() and agent.lambda_().item() > 1
