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


# --- A second implementation, in torch's own layers and optimisers -----------------------------------------------

F = torch.nn.functional


class Plain:
    """The published update written plainly for one seed: it shares no line with the agent but the noise variances."""

    def __init__(self, config: Any, state: dict[str, dict[str, torch.Tensor]], max_action: float) -> None:
        self.c, self.max_action = config, max_action
        online = ("critic", "actor")
        self.p = {n: {k: v.clone().requires_grad_(n in online) for k, v in w.items()} for n, w in state.items()}
        rates = {"critic": config.critic_learning_rate, "actor": config.learning_rate}
        self.adam = {n: torch.optim.Adam(self.p[n].values(), lr=rate) for n, rate in rates.items()}
        self.beta = beta_schedule(config.beta_schedule, config.diffusion_steps).float()
        self.bar = torch.cumprod(1 - self.beta, 0)
        self.before = torch.cat([torch.ones(1), self.bar[:-1]])

    def q(self, name: str, states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        values = []
        for twin in ("q1_model", "q2_model"):
            x = torch.cat([states, actions], 1)
            for layer in (0, 2, 4, 6):
                x = F.linear(x, self.p[name][f"{twin}.{layer}.weight"], self.p[name][f"{twin}.{layer}.bias"])
                x = F.mish(x) if layer < 6 else x
            values.append(x[:, 0])
        return torch.stack(values)

    def sample(self, name: str, states: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        x, bound = noise[0], self.max_action
        for k, i in enumerate(reversed(range(self.c.diffusion_steps)), start=1):
            predicted = plain_noise(self.p[name], x, torch.full((len(x),), i), states)
            clean = ((x - (1 - self.bar[i]).sqrt() * predicted) / self.bar[i].sqrt()).clamp(-bound, bound)
            remaining = 1 - self.bar[i]
            mean = self.before[i].sqrt() * self.beta[i] / remaining * clean
            mean = mean + (1 - self.beta[i]).sqrt() * (1 - self.before[i]) / remaining * x
            variance = self.beta[i] * (1 - self.before[i]) / remaining
            x = mean + variance.sqrt() * noise[k] if i > 0 else mean
        return x.clamp(-bound, bound)

    def step(self, name: str, loss: torch.Tensor) -> None:
        self.adam[name].zero_grad()
        loss.backward()
        if self.c.grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.p[name].values(), self.c.grad_norm)
        self.adam[name].step()

    def update(self, b: dict[str, torch.Tensor], d: dict[str, torch.Tensor], step: int) -> dict[str, float]:
        c, states, actions = self.c, b["states"], b["actions"]
        with torch.no_grad():
            repeats = 10 if c.max_q_backup else 1
            next_states = b["next_states"].repeat_interleave(repeats, 0)
            values = self.q("critic_target", next_states, self.sample("ema", next_states, d["next_action_noise"]))
            best = values.view(2, -1, repeats).amax(2).amin(0)
            target = b["rewards"][:, 0] + c.discount * b["not_dones"][:, 0] * best
        critic_loss = sum(F.mse_loss(q, target) for q in self.q("critic", states, actions))
        self.step("critic", critic_loss)
        level = self.bar[d["timesteps"]][:, None]
        diffused = level.sqrt() * actions + (1 - level).sqrt() * d["noise"]
        bc_loss = F.mse_loss(plain_noise(self.p["actor"], diffused, d["timesteps"], states), d["noise"])
        values = self.q("critic", states, self.sample("actor", states, d["policy_noise"]))
        chosen = int(d["critic_choice"])
        q_loss = -values[chosen].mean() / values[1 - chosen].abs().mean().detach()
        loss = bc_loss + c.eta * q_loss
        self.step("actor", loss)
        with torch.no_grad():
            if step % c.ema_interval == 0 and step >= c.ema_start:
                for name, value in self.p["ema"].items():
                    value.copy_(c.ema_decay * value + (1 - c.ema_decay) * self.p["actor"][name])
            for name, value in self.p["critic_target"].items():
                value.copy_(c.tau * self.p["critic"][name] + (1 - c.tau) * value)
        parts = {"critic_loss": critic_loss, "bc_loss": bc_loss, "q_loss": q_loss, "actor_loss": loss}
        return {name: value.item() for name, value in parts.items()}


SIZE = {"updates": 1, "batch_size": 32}
CASES = {
    "antmaze with max-Q backup": (29, 8, 1.0, "antmaze-large-play-v0", {}),
    "another box, chain, schedule": (11, 3, 2.0, "hopper-medium-v2", {"diffusion_steps": 9, "beta_schedule": "linear"}),
    "cosine, no clipping": (17, 6, 1.0, "walker2d-medium-v2", {"beta_schedule": "cosine", "grad_norm": 0.0}),
    "clipping that bites": (5, 2, 1.0, "hopper-medium-v2", {"grad_norm": 0.05, "eta": 3.0}),
}


@pytest.mark.parametrize("case", list(CASES))
def test_the_update_matches_a_plain_one(case: str) -> None:
    state_dim, action_dim, max_action, task, settings = CASES[case]
    config = hyperparameters.get("diffusion_ql", task, ema_start=1002, **settings)
    agent = AGENTS["diffusion_ql"](state_dim, action_dim, max_action, config, [3])
    plain = Plain(config, agent.published_state()[0], max_action)
    agent.step = 998
    g = torch.Generator().manual_seed(0)
    for step in range(998, 1006):
        batch = parity.batches({**SIZE, "state_dim": state_dim, "action_dim": action_dim, "max_action": max_action},
                               np.random.RandomState(step))[0]  # fmt: skip
        draws = agent.draw(g, SIZE["batch_size"])
        metrics = agent.update(parity.stacked(batch, 1), draws)
        expected = plain.update(batch, {name: value[0] for name, value in draws.items()}, step)
        for name, value in expected.items():
            assert metrics[name].item() == pytest.approx(value, rel=2e-4, abs=2e-5), (step, name)
    for network, weights in agent.published_state()[0].items():
        for name, value in weights.items():
            torch.testing.assert_close(
                value, plain.p[network][name].detach(), rtol=1e-3, atol=2e-5, msg=f"{network} {name}"
            )


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
