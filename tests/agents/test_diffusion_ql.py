"""Diffusion-QL and diffusion behaviour cloning against the published code's recorded steps and closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import hyperparameters
from agents import AGENTS
from agents.parts.diffusion import beta_schedule
from benchmarks.plain import PlainDiffusionLearner
from tests import recordings

METRICS = ("bc_loss", "actor_loss", "critic_loss", "q_loss")


def published_config(config: dict[str, Any]) -> Any:
    return hyperparameters.get(
        "diffusion_ql",
        "halfcheetah-medium-v2",
        eta=config["eta"],
        **recordings.chain_settings(config),
    )


@pytest.mark.parametrize("seeds", [1, 2])
def test_recorded_updates_are_reproduced(seeds: int) -> None:
    config, recorded = recordings.load("parity_dql_locomotion")
    rs = np.random.RandomState(config["seed"])
    networks = recordings.weights(config, rs)
    batches, draws = recordings.batches(config, rs), recordings.chain_draws(config, rs)
    sizes = (config["state_dim"], config["action_dim"], config["max_action"])
    agent = AGENTS["diffusion_ql"](*sizes, published_config(config), range(seeds))
    agent.load_published(networks)
    agent.step = config["start_step"]
    for k in range(config["updates"]):
        metrics = agent.update(recordings.stacked(batches[k], seeds), recordings.stacked(draws[k], seeds))
        for seed in range(seeds):
            got = [metrics[name][seed].item() for name in METRICS]
            np.testing.assert_allclose(got, recorded["metrics"][k], rtol=1e-4, atol=1e-5)
    for state in agent.published_state():
        recordings.assert_recorded(state, recorded)


# --- Against the plain form, which shares no line with the agent ---------------------------------------------------

SIZE = {"updates": 8, "batch_size": 32, "start_step": 998}
CASES = {
    "antmaze with max-Q backup": ("diffusion_ql", 29, 8, 1.0, "antmaze-large-play-v0", {}),
    "another box and chain": ("diffusion_ql", 11, 3, 2.0, "hopper-medium-v2", {"diffusion_steps": 9}),
    "no clipping": ("diffusion_ql", 17, 6, 1.0, "walker2d-medium-v2", {"grad_norm": 0.0}),
    "clipping that bites": ("diffusion_ql", 5, 2, 1.0, "hopper-medium-v2", {"grad_norm": 0.05, "eta": 3.0}),
    "cloning": ("diffusion_bc", 17, 6, 1.0, "walker2d-medium-v2", {}),
    "cloning, another rate and box": ("diffusion_bc", 45, 24, 0.5, "pen-human-v1", {"diffusion_steps": 3}),
}


@pytest.mark.parametrize("case", list(CASES))
def test_the_update_matches_the_plain_form(case: str) -> None:
    algo, state_dim, action_dim, max_action, task, settings = CASES[case]
    settings = settings if algo == "diffusion_bc" else {"ema_start": 1002, **settings}
    chosen = hyperparameters.get(algo, task, **settings)
    agent = AGENTS[algo](state_dim, action_dim, max_action, chosen, [3])
    plain = PlainDiffusionLearner(algo, state_dim, action_dim, max_action, chosen, torch.device("cpu"))
    plain.load_published(agent.published_state()[0])
    agent.step = plain.step = SIZE["start_step"]
    sizes = {**SIZE, "state_dim": state_dim, "action_dim": action_dim, "max_action": max_action}
    g = torch.Generator().manual_seed(0)
    for batch in recordings.batches(sizes, np.random.RandomState(0)):
        draws = agent.draw(g, SIZE["batch_size"])
        metrics = agent.update(recordings.stacked(batch, 1), draws)
        for name, value in plain.train_step(batch, {name: value[0] for name, value in draws.items()}).items():
            assert metrics[name].item() == pytest.approx(value, rel=2e-4, abs=2e-5), name
    for network, weights in agent.published_state()[0].items():
        for name, value in weights.items():
            expected = getattr(plain, network).state_dict()[name]
            torch.testing.assert_close(value, expected, rtol=1e-3, atol=2e-5, msg=f"{network} {name}")


def test_lr_decay_is_torchs_cosine_stepped_once_an_evaluation_interval() -> None:
    agent = small_agent(num_epochs=8, num_steps_per_epoch=2, eval_interval=2, lr_decay=True)
    adam = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, T_max=8, eta_min=0.0)
    batch, rng = small_batch(), torch.Generator().manual_seed(1)
    for step in range(16):
        if step and step % 4 == 0:
            adam.step()
            cosine.step()
        agent.update(batch, agent.draw(rng, 8))
        for name in ("actor", "critic"):
            assert agent.optimizers[name].rate.item() / 3e-4 == pytest.approx(cosine.get_last_lr()[0], rel=1e-5)


def small_agent(algo: str = "diffusion_ql", **settings: Any) -> Any:
    config = hyperparameters.get(algo, "hopper-medium-v2", **settings)
    return AGENTS[algo](3, 2, 1.0, config, [0])


def small_batch(rows: int = 8) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    return {
        "states": torch.randn(1, rows, 3, generator=g),
        "actions": torch.rand(1, rows, 2, generator=g) * 2 - 1,
        "next_states": torch.randn(1, rows, 3, generator=g),
        "rewards": torch.randn(1, rows, 1, generator=g),
        "not_dones": (torch.rand(1, rows, 1, generator=g) > 0.3).float(),
    }


def test_the_average_starts_at_ema_start_and_moves_every_ema_interval() -> None:
    agent, batch = small_agent(ema_start=4, ema_interval=2), small_batch()
    draws = agent.draw(torch.Generator().manual_seed(1), 8)
    moved = []
    for _ in range(8):
        before = agent.ema.parameters.flat.clone()
        agent.update(batch, draws)
        moved.append(not torch.equal(before, agent.ema.parameters.flat))
    assert moved == [False, False, False, False, True, False, True, False]


# --- Behaviour cloning ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_cloning_keeps_both_actions_of_the_data_and_diffusion_ql_the_better_one() -> None:
    """One-step episodes, actions -0.6 and 0.6 alike often, reward 1 for the second."""
    share = {}
    for algo in ("diffusion_bc", "diffusion_ql"):
        quick = {"action_candidates": 1, "critic_learning_rate": 1e-3, "ema_start": 0} if algo == "diffusion_ql" else {}
        agent, g = small_agent(algo, learning_rate=1e-3, **quick), torch.Generator().manual_seed(0)
        for _ in range(250):
            batch = {name: torch.randn(1, 32, 3, generator=g) for name in ("states", "next_states")}
            batch["actions"] = torch.where(torch.rand(1, 32, 1, generator=g) < 0.5, -0.6, 0.6).expand(1, 32, 2)
            batch |= {"rewards": (batch["actions"][..., :1] > 0).float(), "not_dones": torch.zeros(1, 32, 1)}
            agent.update(batch, agent.draw(g, 32))
        actions = agent.act(torch.randn(1, 400, 3, generator=g), g)
        share[algo] = (actions.mean(2) > 0).double().mean().item()
    assert 0.3 < share["diffusion_bc"] < 0.7 and share["diffusion_ql"] > 0.9


# --- Published files ------------------------------------------------------------------------------------------------


def saved_actor(agent: Any, schedule: str = "vp", steps: int = 5) -> dict[str, torch.Tensor]:
    """An actor's state as the published module saves it: the schedule's buffers, then the weights."""
    betas = beta_schedule(schedule, steps).float()
    alpha_bar = torch.cumprod(1 - betas, 0)
    buffers = {"betas": betas, "alphas_cumprod": alpha_bar, "sqrt_alphas_cumprod": alpha_bar.sqrt()}
    return {**buffers, **agent.published_state()[0]["actor"]}


@pytest.mark.parametrize("algo", ["diffcps", "diffusion_ql", "diffusion_bc"])
def test_published_files_load_with_their_buffers(algo: str) -> None:
    config = hyperparameters.get(algo, "hopper-medium-v2")
    trained, fresh = (AGENTS[algo](3, 2, 1.0, config, [seed]) for seed in (1, 2))
    networks = {**trained.published_state()[0], "actor": saved_actor(trained)}
    fresh.load_published({k: v for k, v in networks.items() if k in ("actor", "critic")})
    for name, value in fresh.published_state()[0]["actor"].items():
        assert torch.equal(value, networks["actor"][name])
    with pytest.raises(ValueError, match="10 diffusion steps, this agent has 5"):
        fresh.load_published({**networks, "actor": saved_actor(trained, steps=10)})
    with pytest.raises(ValueError, match="another noise schedule"):
        fresh.load_published({**networks, "actor": saved_actor(trained, schedule="linear")})
