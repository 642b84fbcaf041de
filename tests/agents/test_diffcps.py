"""DiffCPS against the published code's recorded steps, and against what its parts must compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import hyperparameters
from agents import AGENTS
from agents.parts.adam import learning_rate_factor
from tests import recordings


def published_config(config: dict[str, Any]) -> Any:
    return hyperparameters.get(
        "diffcps",
        "halfcheetah-medium-v2",
        lambda_learning_rate=config["lambda_lr"],
        lambda_init=config["LA"],
        lambda_min=config["LA_min"],
        lambda_max=config["lambda_max"],
        kappa=config["target_kl"],
        policy_interval=config["policy_freq"],
        **recordings.chain_settings(config),
    )


@pytest.mark.parametrize("seeds", [1, 2])
def test_recorded_updates_are_reproduced(seeds: int) -> None:
    config, recorded = recordings.load("parity_diffcps_locomotion")
    rs = np.random.RandomState(config["seed"])
    networks = recordings.weights(config, rs)
    batches, draws = recordings.batches(config, rs), recordings.chain_draws(config, rs)
    agent = AGENTS["diffcps"](
        config["state_dim"],
        config["action_dim"],
        config["max_action"],
        published_config(config),
        range(seeds),
    )
    agent.load_published(networks)
    agent.step = config["start_step"]
    for k in range(config["updates"]):
        metrics = agent.update(recordings.stacked(batches[k], seeds), recordings.stacked(draws[k], seeds))
        expected = recorded["metrics"][k]
        names = ("kl_loss", "actor_loss", "critic_loss", "lambda")
        if np.isfinite(expected).all():
            for seed in range(seeds):
                got = [metrics[name][seed].item() for name in names]
                np.testing.assert_allclose(got, expected, rtol=1e-4)
        else:
            assert metrics["kl_loss"].isnan().all() and metrics["critic_loss"].isfinite().all()
    multiplier = recorded.pop("after/lambda")[0]
    for state in agent.published_state():
        np.testing.assert_allclose(state.pop("lambda").item(), multiplier, rtol=1e-6)
        recordings.assert_recorded(state, recorded)


def test_the_multiplier_goes_out_and_comes_in_with_the_weights() -> None:
    config = hyperparameters.get("diffcps", "hopper-medium-v2", lambda_init=2.5)
    first, second = (AGENTS["diffcps"](11, 3, 1.0, config, [seed]) for seed in (0, 1))
    first.lambda_.flat.fill_(-0.75)  # wound up below lambda_min
    second.load_published(first.published_state()[0])
    assert second.published_state()[0]["lambda"].item() == -0.75
    without = {k: v for k, v in first.published_state()[0].items() if k != "lambda"}
    third = AGENTS["diffcps"](11, 3, 1.0, config, [2])
    third.load_published(without)
    assert third.published_state()[0]["lambda"].item() == 2.5


def test_anti_windup_clamps_what_is_stored() -> None:
    for anti_windup, expected in ((False, -1.0), (True, 0.3)):
        config = hyperparameters.get(
            "diffcps", "hopper-medium-v2", lambda_min=0.3, lambda_anti_windup=anti_windup, lambda_learning_rate=1.0
        )
        agent = AGENTS["diffcps"](11, 3, 1.0, config, [0])
        agent.lambda_.flat.fill_(0.0)
        agent.ascend("lambda", torch.tensor([-agent.config.kappa]))  # one step of Adam, of size 1, downwards
        assert agent.lambda_.flat.item() == pytest.approx(expected, abs=1e-3)
        assert agent.lambda_().item() == pytest.approx(0.3)


def test_the_published_decay_hardly_decays_and_the_full_one_does() -> None:
    def factor(step: int, **flags: bool) -> float:
        return learning_rate_factor(hyperparameters.get("diffcps", "hopper-medium-v2", **flags), step)

    assert factor(1_999_999) == 1.0
    assert factor(49_999, lr_decay=True) == 1.0  # stepped once in 50 epochs
    assert factor(2_000_000, lr_decay=True) == pytest.approx(0.5 * (1 + np.cos(np.pi * 40 / 2000)))
    assert factor(1_000_000, lr_decay_full=True) == pytest.approx(0.5)
    assert factor(2_000_000, lr_decay_full=True) == pytest.approx(0.0, abs=1e-12)
    config = hyperparameters.get("diffcps", "hopper-medium-v2", lr_decay_full=True)
    agent = AGENTS["diffcps"](11, 3, 1.0, config, [0])
    agent.step = 1_000_000
    agent.prepare()
    for name, rate in (("actor", 3e-4), ("critic", 3e-4), ("lambda", 3e-5)):
        assert agent.optimizers[name].rate.item() == pytest.approx(rate / 2, rel=1e-5)
