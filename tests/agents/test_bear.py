"""BEAR: steps that d3rlpy 2.8.1 recorded (tests/record_d3rlpy), the discrepancy and the multiplier in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

import hyperparameters
from agents import AGENTS
from agents.bear import BEAR
from agents.parts.losses import KERNELS, mmd
from tests import recordings, small


def bear(sizes: tuple[int, int, float], seeds: int = 1, **settings: Any) -> BEAR:
    return AGENTS["bear"](*sizes, hyperparameters.get("bear", "hopper-medium-v2", **settings), range(seeds))


def weights(recorded: dict[str, np.ndarray], when: str) -> dict[str, dict[str, torch.Tensor]]:
    """The recorded networks; the policy's layers of mean and deviation become one here."""
    names = ("actor", "critic", "critic_target", "vae")
    networks = {name: recordings.part(recorded, f"{when}/{name}") for name in names}
    two = networks["actor"]
    networks["actor"] = {f"net.{2 * i}.{kind}": two[f"l{i + 1}.{kind}"] for i in (0, 1) for kind in ("weight", "bias")}
    for kind in ("weight", "bias"):
        networks["actor"][f"net.4.{kind}"] = torch.cat([two[f"mean.{kind}"], two[f"log_std.{kind}"]])
    return networks


@pytest.mark.parametrize("kernel", list(KERNELS))
def test_recorded_updates_are_repeated(kernel: str) -> None:
    """Two updates of the warm-up and two after it, the multiplier held; d3rlpy's critics step before the policy's Q."""
    config, recorded = recordings.load(f"d3rlpy_bear_{kernel}")
    updates, log_alpha = config.pop("updates"), config.pop("log_alpha")
    agent = bear((4, 2, 1.0), seeds=2, action_candidates=10, alpha_learning_rate=1e-12, **config)
    agent.load_published({**weights(recorded, "before"), "log_alpha": torch.tensor(log_alpha)})
    for k in range(updates):
        batch, draws = (recordings.stacked(recordings.part(recorded, f"{kind}/{k}"), 2) for kind in ("batch", "draws"))
        agent.step = k
        agent.prepare()
        metrics, expected = {}, recordings.part(recorded, f"metrics/{k}")
        for name, loss in (("vae", agent.behaviour_loss), ("critic", agent.critic_loss), ("actor", agent.policy_loss)):
            metrics |= agent.descend(name, loss(batch, draws))
        metrics |= agent.ascend("alpha", metrics["mmd"] - config["mmd_threshold"])
        agent.critic_target.follow(agent.critic)
        for ours, theirs in (("vae_loss", "imitator_loss"), ("critic_loss", "critic_loss")):
            torch.testing.assert_close(metrics[ours], expected[theirs].expand(2), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(metrics["actor_loss"], expected["actor_loss"].expand(2), rtol=1e-4, atol=1e-5)
        if k >= config["warmup_steps"]:
            constraint = metrics["alpha"] * (metrics["mmd"] - config["mmd_threshold"])
            torch.testing.assert_close(constraint, expected["mmd_loss"].expand(2), rtol=1e-4, atol=1e-5)
    for state in agent.published_state():
        for network, expected in weights(recorded, "after").items():
            assert state[network].keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(state[network][name], value, rtol=1e-4, atol=1e-5, msg=f"{network} {name}")
    shown = recordings.stacked(recordings.part(recorded, "act"), 2)
    actions = agent.actions_for(shown["states"], {"noise": shown["noise"]})
    torch.testing.assert_close(actions, shown["actions"], rtol=1e-4, atol=1e-5)


# --- Against a plain second implementation ------------------------------------------------------------------------


class Plain:
    """BEAR in torch.nn and torch.optim in the authors' order: the policy's gradient before the critics' step."""

    def __init__(self, agent: BEAR) -> None:
        state, self.c = agent.published_state()[0], agent.config
        self.actor, self.vae = ({n: v.requires_grad_() for n, v in state[k].items()} for k in ("actor", "vae"))
        self.critic = {n: v.requires_grad_() for n, v in state["critic"].items()}
        self.target = {n: v.clone() for n, v in state["critic_target"].items()}
        self.log_alpha = torch.zeros((), requires_grad=True)
        c, adam = self.c, torch.optim.Adam
        rates = ((self.vae, c.vae_learning_rate), (self.critic, c.critic_learning_rate), (self.actor, c.learning_rate))
        self.optimizers = [adam(network.values(), rate) for network, rate in rates]
        self.optimizers.append(adam([self.log_alpha], c.alpha_learning_rate))

    @staticmethod
    def layers(p: dict[str, torch.Tensor], names: Sequence[str], x: torch.Tensor) -> torch.Tensor:
        for i, name in enumerate(names):
            x = torch.nn.functional.linear(x.relu() if i else x, p[f"{name}.weight"], p[f"{name}.bias"])
        return x

    def q(self, p: dict[str, torch.Tensor], states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        x = torch.cat([states, actions], dim=-1)
        return torch.stack([self.layers(p, names, x).squeeze(-1) for names in (("l1", "l2", "l3"), ("l4", "l5", "l6"))])

    def raw(self, states: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        mean, log_std = self.layers(self.actor, ("net.0", "net.2", "net.4"), states).chunk(2, dim=-1)
        return mean.unsqueeze(1) + log_std.clamp(-5, 2).exp().unsqueeze(1) * noise

    def step(self, batch: dict[str, torch.Tensor], draws: dict[str, torch.Tensor], value: bool) -> None:
        states, next_states = batch["states"][0], batch["next_states"][0]
        actions, noise = batch["actions"][0], {name: drawn[0] for name, drawn in draws.items()}
        vae, critic, actor, alpha = self.optimizers
        hidden = self.layers(self.vae, ("e1", "e2"), torch.cat([states, actions], dim=-1)).relu()
        mean, log_std = (self.layers(self.vae, (name,), hidden) for name in ("mean", "log_std"))
        std = log_std.clamp(-4, 15).exp()
        code = torch.cat([states, mean + std * noise["vae_noise"]], dim=-1)
        decoded = self.layers(self.vae, ("d1", "d2", "d3"), code).tanh()
        kl = -0.5 * (1 + std.square().log() - mean.square() - std.square()).mean()
        self.descend(vae, torch.nn.functional.mse_loss(decoded, actions) + 0.5 * kl)

        with torch.no_grad():
            ahead = self.raw(next_states, noise["next_action_noise"]).tanh()
            q = self.q(self.target, next_states.unsqueeze(1).expand(-1, 10, -1), ahead)
            best = (0.75 * q.amin(dim=0) + 0.25 * q.amax(dim=0)).amax(dim=1)
            target = batch["rewards"][0, :, 0] + self.c.discount * batch["not_dones"][0, :, 0] * best
            many = states.repeat_interleave(self.c.mmd_samples, dim=0)
            code = torch.cat([many, noise["code_noise"].clamp(-0.5, 0.5)], dim=-1)
            likely = self.layers(self.vae, ("d1", "d2", "d3"), code).unflatten(0, (len(states), -1))
        critic_loss = (self.q(self.critic, states, actions) - target).square().mean(dim=1).sum()
        raw = self.raw(states, noise["policy_noise"])
        violation = mmd(likely, raw, self.c.mmd_kernel, self.c.mmd_sigma).mean() - self.c.mmd_threshold
        policy_loss = self.log_alpha.exp() * violation
        if value:
            policy_loss = policy_loss - self.q(self.critic, states, raw[:, 0].tanh()).amin(dim=0).mean()
        policy_gradient = torch.autograd.grad(policy_loss, list(self.actor.values()), retain_graph=True)
        (alpha_gradient,) = torch.autograd.grad(-policy_loss, [self.log_alpha])
        self.descend(critic, critic_loss)
        for parameter, gradient in zip(self.actor.values(), policy_gradient, strict=True):
            parameter.grad = gradient
        actor.step()
        self.log_alpha.grad = alpha_gradient
        alpha.step()
        with torch.no_grad():
            for name, average in self.target.items():
                average.lerp_(self.critic[name], self.c.tau)

    @staticmethod
    def descend(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_the_update_equals_a_plain_one() -> None:
    """Two steps of the warm-up and three after it, rates large enough that the order of the steps shows."""
    rates = {"learning_rate": 1e-2, "critic_learning_rate": 3e-2, "vae_learning_rate": 1e-2}
    agent = bear((3, 2, 1.0), hidden_dim=16, vae_hidden_dim=16, warmup_steps=2, alpha_learning_rate=0.05, **rates)
    plain, g = Plain(agent), torch.Generator().manual_seed(0)
    for k in range(5):
        batch = small.batch(g, 3, 2, 0.9)
        draws = agent.draw(g, 16)
        agent.update(batch, draws)
        plain.step(batch, draws, value=k >= 2)
    state = agent.published_state()[0]
    for network in ("actor", "vae", "critic"):
        for name, value in getattr(plain, network).items():
            torch.testing.assert_close(
                state[network][name], value.detach(), rtol=1e-3, atol=1e-4, msg=f"{network} {name}"
            )
    torch.testing.assert_close(state["log_alpha"], plain.log_alpha.detach(), rtol=1e-4, atol=1e-5)


def test_d4rls_own_settings() -> None:
    """Of the authors' README for D4RL's results; else the defaults of their example."""
    for task, kernel, sigma in (
        ("hopper-medium-v2", "laplacian", 20.0),
        ("walker2d-medium-expert-v2", "laplacian", 20.0),
        ("halfcheetah-medium-replay-v2", "gaussian", 20.0),
        ("antmaze-umaze-v0", "gaussian", 50.0),
    ):
        c = hyperparameters.get("bear", task)
        assert (c.mmd_kernel, c.mmd_sigma, c.action_candidates) == (kernel, sigma, 100), task


# --- The discrepancy ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kernel", "distance"), [("gaussian", 9.0 + 16.0), ("laplacian", 3.0 + 4.0)])
@pytest.mark.parametrize("sigma", [0.5, 50.0])
def test_discrepancy_of_two_points(kernel: str, distance: float, sigma: float) -> None:
    x, y = torch.zeros(6, 3, 2), torch.tensor([3.0, -4.0]).expand(6, 5, 2)
    expected = math.sqrt(2 - 2 * math.exp(-distance / (2 * sigma)) + 1e-6)
    torch.testing.assert_close(mmd(x, y, kernel, sigma), torch.full((6,), expected))
    torch.testing.assert_close(mmd(y, y, kernel, sigma), torch.full((6,), 1e-3))
    with pytest.raises(KeyError):
        mmd(x, y, "cubic", sigma)


def test_discrepancy_of_two_gaussians() -> None:
    """Its expectation for N draws of N(0, 1) and N(m, 1): 2 (1/N + (1 - 1/N) c) - 2 c exp(-m^2 / (2 (sigma + 2)))."""
    draws, number, sigma, shift = 400, 60, 0.7, 1.5
    g = torch.Generator().manual_seed(0)
    x = torch.randn(draws, number, 1, generator=g, dtype=torch.float64)
    y = torch.randn(draws, number, 1, generator=g, dtype=torch.float64) + shift
    c = math.sqrt(sigma / (sigma + 2))
    expected = 2 * (1 / number + (1 - 1 / number) * c) - 2 * c * math.exp(-(shift**2) / (2 * (sigma + 2)))
    assert mmd(x, y, "gaussian", sigma).square().mean().item() == pytest.approx(expected, rel=0.03)


def test_discrepancy_keeps_its_digits_where_sigma_is_large() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 4, 3, generator=g) * 0.05, torch.randn(50, 4, 3, generator=g) * 0.05
    exact = mmd(x.double(), y.double(), "gaussian", 50.0)
    torch.testing.assert_close(mmd(x, y, "gaussian", 50.0).double(), exact, rtol=1e-5, atol=0)


# --- The multiplier and the phases --------------------------------------------------------------------------------


@pytest.mark.parametrize(("threshold", "sign"), [(0.0, 1), (9.0, -1)])
def test_the_multiplier_rises_where_the_constraint_is_broken_and_keeps_its_bounds(threshold: float, sign: int) -> None:
    """Adam's steps by -alpha (MMD - epsilon), repeated with PyTorch's Adam; then the bounds."""
    agent = bear((3, 2, 1.0), hidden_dim=8, vae_hidden_dim=8, mmd_threshold=threshold, alpha_learning_rate=0.05)
    g = torch.Generator().manual_seed(0)
    plain = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([plain], lr=0.05)
    for _ in range(5):
        metrics = agent.update(small.batch(g, 3, 2, 0.1), agent.draw(g, 16))
        optimizer.zero_grad()
        (-plain.exp() * (metrics["mmd"][0] - threshold)).backward()
        optimizer.step()
        torch.testing.assert_close(metrics["alpha"][0], plain.detach().exp(), rtol=1e-5, atol=1e-6)
    assert sign * plain.item() > 0.1
    agent.alpha.flat.fill_({1: 9.99, -1: -4.99}[sign])
    agent.update(small.batch(g, 3, 2, 0.1), agent.draw(g, 16))
    assert agent.alpha.flat.item() == {1: 10.0, -1: -5.0}[sign]


def test_the_value_counts_from_the_end_of_the_warm_up() -> None:
    """Until then the policy's step is the same whatever the critics say."""
    g = torch.Generator().manual_seed(0)
    batches = [small.batch(g, 3, 2, 0.1) for _ in range(4)]
    agents = [bear((3, 2, 1.0), hidden_dim=8, vae_hidden_dim=8, warmup_steps=3) for _ in range(2)]
    with torch.no_grad():
        agents[1].networks["critic"].flat.mul_(-3.0)
    draws = [agents[0].draw(g, 16) for _ in range(4)]
    for k in range(4):
        for agent in agents:
            agent.update(batches[k], draws[k])
        same = torch.equal(agents[0].networks["actor"].flat, agents[1].networks["actor"].flat)
        assert same == (k < 3)


def test_it_follows_the_data_and_then_the_better_side_of_it() -> None:
    """One state, actions -0.5 and 0.5 with noise, rewarded by side: the warm-up covers both, then one is preferred."""
    settings = {"hidden_dim": 32, "vae_hidden_dim": 32, "warmup_steps": 150, "action_candidates": 20}
    agent = bear((1, 1, 1.0), seeds=2, **settings, mmd_sigma=1.0, learning_rate=3e-3, critic_learning_rate=3e-3)
    good, g = torch.tensor([1.0, -1.0]).view(2, 1, 1), torch.Generator().manual_seed(0)
    for step in range(300):
        side = (torch.rand(2, 64, 1, generator=g) < 0.5).float() * 2 - 1
        batch = {"states": torch.zeros(2, 64, 1), "next_states": torch.zeros(2, 64, 1)}
        batch |= {"actions": side * 0.5 + 0.05 * torch.randn(2, 64, 1, generator=g)}
        batch |= {"rewards": side * good, "not_dones": torch.zeros(2, 64, 1)}
        metrics = agent.update(batch, agent.draw(g, 64))
        if step == 149:
            mean = torch.tanh(agent.actor(torch.zeros(2, 1, 1))[0])
            assert mean.abs().max() < 0.3 and (metrics["mmd"] < 0.5).all()
    assert (torch.tanh(agent.actor(torch.zeros(2, 1, 1))[0]) * good > 0.2).all()
    assert (agent.act(torch.zeros(2, 20, 1), g) * good > 0).all()
