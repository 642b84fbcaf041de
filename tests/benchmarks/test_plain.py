"""The plain form, written apart from `agents`: it reproduces the recordings, and agrees with ours where none exist."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import hyperparameters
from agents import AGENTS
from benchmarks.plain import HostSampler, PlainDiffusionLearner
from tests import recordings


def case(**changes: Any) -> dict[str, Any]:
    """A recorded case's configuration with other settings: inputs come from the same rule."""
    config, _ = recordings.load("parity_diffcps_locomotion")
    return {**config, "updates": 12, "start_step": 994, "batch_size": 16, **changes}


def settings(config: dict[str, Any], algo: str, **more: Any) -> Any:
    return hyperparameters.get(
        algo,
        "halfcheetah-medium-v2",
        grad_norm=config["grad_norm"],
        max_q_backup=config["max_q_backup"],
        diffusion_steps=config["T"],
        learning_rate=config["lr"],
        **more,
    )


CASES = [
    ("diffcps", {}, {"kappa": 0.2, "lambda_init": 3.0, "lambda_min": 0.3, "policy_interval": 4}),
    ("diffcps", {"max_q_backup": True, "max_action": 2.0, "grad_norm": 0.5}, {"policy_interval": 1}),
    ("diffcps", {"T": 3, "lr": 1e-3}, {"lambda_init": 0.1, "lambda_min": 0.3, "ema_start": 0}),
    ("diffusion_ql", {"T": 1, "grad_norm": 0.0}, {"eta": 0.3}),
]


@pytest.mark.parametrize(("algo", "changes", "more"), CASES)
def test_plain_and_ours_agree(algo: str, changes: dict[str, Any], more: dict[str, Any]) -> None:
    config = case(**changes)
    rs = np.random.RandomState(3)
    networks, batches = recordings.weights(config, rs), recordings.batches(config, rs)
    draws = recordings.chain_draws(config, rs)
    chosen = settings(config, algo, **more)
    dims = (config["state_dim"], config["action_dim"], config["max_action"], chosen)
    agent = AGENTS[algo](*dims, seeds=[0])
    plain = PlainDiffusionLearner(algo, *dims, device=torch.device("cpu"))
    agent.load_published(networks)
    plain.load_published(networks)
    agent.step = plain.step = config["start_step"]
    for batch, drawn in zip(batches, draws, strict=True):
        ours = agent.update(recordings.stacked(batch, 1), recordings.stacked(drawn, 1))
        theirs = plain.train_step(batch, drawn)
        for name, value in theirs.items():
            assert ours[name].item() == pytest.approx(value, rel=1e-4, abs=1e-6), name
    state = agent.published_state()[0]
    for network in ("actor", "critic", "ema", "critic_target"):
        expected = getattr(plain, network).state_dict()
        for name, value in state[network].items():
            # Adam's first steps are sign-like: an entry whose gradient is nearly zero may step the other way.
            assert (value - expected[name]).norm() <= 1e-4 * expected[name].norm(), name


def test_plain_reproduces_the_recording() -> None:
    config, recorded = recordings.load("parity_diffcps_locomotion")
    rs = np.random.RandomState(config["seed"])
    networks, batches = recordings.weights(config, rs), recordings.batches(config, rs)
    draws = recordings.chain_draws(config, rs)
    chosen = settings(config, "diffcps", kappa=config["target_kl"])
    plain = PlainDiffusionLearner("diffcps", 17, 6, 1.0, chosen, torch.device("cpu"))
    plain.load_published(networks)
    plain.step = config["start_step"]
    for k in range(8):
        metrics = plain.train_step(batches[k], draws[k])
        if k % 2 == 0:
            got = [metrics[name] for name in ("kl_loss", "actor_loss", "critic_loss", "lambda")]
            np.testing.assert_allclose(got, recorded["metrics"][k], rtol=1e-4)


def test_host_sampler_returns_rows_of_the_data() -> None:
    columns = {"states": np.arange(12.0).reshape(6, 2), "rewards": np.arange(6.0).reshape(6, 1)}
    torch.manual_seed(0)
    batch = HostSampler(columns, torch.device("cpu")).sample(100)
    assert torch.equal(batch["states"][:, 0], 2 * batch["rewards"][:, 0]) and len(batch["rewards"].unique()) == 6


def test_plain_acts_within_the_box() -> None:
    chosen = hyperparameters.get("diffcps", "hopper-medium-v2", action_candidates=7)
    plain = PlainDiffusionLearner("diffcps", 11, 3, 0.5, chosen, torch.device("cpu"))
    assert plain.act(np.ones(11)).shape == (3,) and np.abs(plain.act(np.ones(11))).max() <= 0.5
