"""DiffCPS against the published code's recorded steps, and against what its parts must compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import hyperparameters
from agents import AGENTS
from tests import parity


def published_config(config: dict[str, Any]) -> Any:
    return hyperparameters.get(
        "diffcps",
        "halfcheetah-medium-v2",
        learning_rate=config["lr"],
        critic_learning_rate=config["critic_lr"],
        lambda_learning_rate=config["lambda_lr"],
        lambda_init=config["LA"],
        lambda_min=config["LA_min"],
        lambda_max=config["lambda_max"],
        kappa=config["target_kl"],
        policy_interval=config["policy_freq"],
        grad_norm=config["grad_norm"],
        max_q_backup=config["max_q_backup"],
        diffusion_steps=config["T"],
        discount=config["discount"],
        tau=config["tau"],
        ema_decay=config["ema_decay"],
        ema_start=config["ema_start"],
        ema_interval=config["ema_every"],
        batch_size=config["batch_size"],
    )


@pytest.mark.parametrize("seeds", [1, 2])
def test_recorded_updates_are_reproduced(seeds: int) -> None:
    config, recorded = parity.load("parity_diffcps_locomotion")
    rs = np.random.RandomState(config["seed"])
    networks = parity.weights(config, rs)
    batches, draws = parity.batches(config, rs), parity.chain_draws(config, rs)
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
        metrics = agent.update(parity.stacked(batches[k], seeds), parity.stacked(draws[k], seeds))
        expected = recorded["metrics"][k]
        names = ("kl_loss", "actor_loss", "critic_loss", "lambda")
        if np.isfinite(expected).all():
            for seed in range(seeds):
                got = [metrics[name][seed].item() for name in names]
                np.testing.assert_allclose(got, expected, rtol=1e-4)
        else:
            assert metrics["kl_loss"].isnan().all() and metrics["critic_loss"].isfinite().all()
    for state in agent.published_state():
        np.testing.assert_allclose(state["lambda"].item(), recorded["after/lambda"][0], rtol=1e-6)
        for network in ("actor", "critic", "ema", "critic_target"):
            for name, value in state[network].items():
                expected = recorded[f"after/{network}/{name}"]
                scale = expected[2]  # the largest entry: a relative bound on near-zero entries says nothing
                np.testing.assert_allclose(parity.summary(value), expected, rtol=1e-4, atol=1e-4 * scale)
