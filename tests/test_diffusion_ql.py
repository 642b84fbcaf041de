"""Diffusion-QL and diffusion behaviour cloning against the published code's recorded steps and closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import hyperparameters
from agents import AGENTS
from agents.diffusion import beta_schedule
from tests import parity

METRICS = ("bc_loss", "actor_loss", "critic_loss", "q_loss")


def published_config(config: dict[str, Any]) -> Any:
    return hyperparameters.get(
        "diffusion_ql",
        "halfcheetah-medium-v2",
        learning_rate=config["lr"],
        critic_learning_rate=config["critic_lr"],
        eta=config["eta"],
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
    config, recorded = parity.load("parity_dql_locomotion")
    rs = np.random.RandomState(config["seed"])
    networks = parity.weights(config, rs)
    batches, draws = parity.batches(config, rs), parity.chain_draws(config, rs)
    sizes = (config["state_dim"], config["action_dim"], config["max_action"])
    agent = AGENTS["diffusion_ql"](*sizes, published_config(config), range(seeds))
    agent.load_published(networks)
    agent.step = config["start_step"]
    for k in range(config["updates"]):
        metrics = agent.update(parity.stacked(batches[k], seeds), parity.stacked(draws[k], seeds))
        for seed in range(seeds):
            got = [metrics[name][seed].item() for name in METRICS]
            np.testing.assert_allclose(got, recorded["metrics"][k], rtol=1e-4, atol=1e-5)
    for state in agent.published_state():
        parity.assert_recorded(state, recorded)


# --- Max-Q backup, Adam and clipping, the averages: each from its own definition -------------------------------------


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


def published_critic(state: dict[str, torch.Tensor], prefix: str, rows: torch.Tensor) -> torch.Tensor:
    """One critic written with torch's own layers."""
    for layer in (0, 2, 4, 6):
        rows = torch.nn.functional.linear(rows, state[f"{prefix}.{layer}.weight"], state[f"{prefix}.{layer}.bias"])
        rows = torch.nn.functional.mish(rows) if layer < 6 else rows
    return rows.squeeze(-1)


def test_max_q_backup_takes_each_critics_best_of_ten() -> None:
    agent, batch = small_agent(max_q_backup=True), small_batch()
    draws = agent.draw(torch.Generator().manual_seed(1), 8)
    assert draws["next_action_noise"].shape == (1, 5, 80, 2)
    _, metrics = agent.critic_loss(batch, draws)
    next_states = batch["next_states"][0]
    best = torch.full((2, 8), -torch.inf)
    target, current = agent.published_state()[0]["critic_target"], agent.published_state()[0]["critic"]
    for k in range(10):
        noise = draws["next_action_noise"][:, :, k::10]
        actions = agent.diffusion.sample(agent.ema, batch["next_states"], noise)[0]
        for i, name in enumerate(("q1_model", "q2_model")):
            value = published_critic(target, name, torch.cat([next_states, actions], 1))
            best[i] = torch.maximum(best[i], value)
    goal = batch["rewards"][0, :, 0] + 0.99 * batch["not_dones"][0, :, 0] * best.amin(0)
    rows = torch.cat([batch["states"][0], batch["actions"][0]], 1)
    expected = sum(((published_critic(current, n, rows) - goal) ** 2).mean() for n in ("q1_model", "q2_model"))
    torch.testing.assert_close(metrics["critic_loss"][0], expected.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(metrics["q_mean"][0], goal.mean(), rtol=1e-4, atol=1e-6)


def test_eta_weighs_the_value_term() -> None:
    batch = small_batch()
    losses = {}
    for eta in (0.0, 2.5):
        agent = small_agent(eta=eta)
        _, losses[eta] = agent.policy_loss(batch, agent.draw(torch.Generator().manual_seed(1), 8))
    assert losses[0.0]["actor_loss"] == losses[0.0]["bc_loss"]
    expected = losses[2.5]["bc_loss"] + 2.5 * losses[2.5]["q_loss"]
    torch.testing.assert_close(losses[2.5]["actor_loss"], expected)


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


def test_behaviour_cloning_is_adam_on_the_denoising_loss() -> None:
    """Ten updates against the same network in torch's own layers under torch's own Adam."""
    agent, batch = small_agent("diffusion_bc"), small_batch(16)
    weights = {n: v.clone().requires_grad_() for n, v in agent.published_state()[0]["actor"].items()}
    adam = torch.optim.Adam(weights.values(), lr=3e-4)
    alpha_bar = torch.cumprod(1 - beta_schedule("vp", 5).float(), 0)
    rng = torch.Generator().manual_seed(3)
    for _ in range(10):
        draws = agent.draw(rng, 16)
        i, noise = draws["timesteps"][0], draws["noise"][0]
        level = alpha_bar[i].unsqueeze(1)
        diffused = level.sqrt() * batch["actions"][0] + (1 - level).sqrt() * noise
        loss = (plain_noise(weights, diffused, i, batch["states"][0]) - noise).square().mean()
        metrics = agent.update(batch, draws)
        torch.testing.assert_close(metrics["bc_loss"][0], loss.detach(), rtol=1e-5, atol=1e-6)
        adam.zero_grad()
        loss.backward()
        adam.step()
    for name, value in agent.published_state()[0]["actor"].items():
        torch.testing.assert_close(value, weights[name].detach(), rtol=1e-4, atol=1e-5)


def plain_noise(p: dict[str, torch.Tensor], x: torch.Tensor, i: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """The published noise network with torch's own layers."""
    F = torch.nn.functional
    angles = i[:, None] * torch.exp(torch.arange(8) * (-np.log(10000) / 7))
    time = torch.cat([angles.sin(), angles.cos()], 1).float()
    time = F.mish(F.linear(time, p["model.time_mlp.1.weight"], p["model.time_mlp.1.bias"]))
    time = F.linear(time, p["model.time_mlp.3.weight"], p["model.time_mlp.3.bias"])
    hidden = torch.cat([x, time, states], 1)
    for layer in (0, 2, 4):
        name = f"model.mid_layer.{layer}"
        hidden = F.mish(F.linear(hidden, p[f"{name}.weight"], p[f"{name}.bias"]))
    return F.linear(hidden, p["model.final_layer.weight"], p["model.final_layer.bias"])


def test_behaviour_cloning_finds_the_data() -> None:
    """With one action for all states the chain must come to return that action."""
    agent = small_agent("diffusion_bc", learning_rate=1e-3)
    rng, batch = torch.Generator().manual_seed(0), small_batch(64)
    batch["actions"] = torch.tensor([0.5, -0.25]).expand(1, 64, 2)
    for _ in range(400):
        agent.update(batch, agent.draw(rng, 64))
    actions = agent.act(batch["states"], rng)
    assert (actions.mean(1) - torch.tensor([[0.5, -0.25]])).abs().max() < 0.05
    assert actions.std(1).max() < 0.2


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
