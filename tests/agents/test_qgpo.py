"""QGPO in closed form: the contrastive loss' optimum, guidance on a Gaussian, the softmax backup, the support."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import hyperparameters
from agents import AGENTS
from agents.parts.parameters import Sizes
from agents.parts.sde import EnergyNetwork, Solver, score_init, signal_and_spread
from tests import small
from utils.data.dataset import tune_rewards
from utils.seeding import torch_generators
from utils.training.runner import Runner


def agent(
    seeds: list[int] | None = None, dims: tuple[int, int] = (1, 1), max_action: float = 1.0, **settings: Any
) -> Any:
    quick = {"hidden_dim": 16, "diffusion_steps": 3, "support_actions": 4, "critic_batch_size": 8, **settings}
    return AGENTS["qgpo"](*dims, max_action, hyperparameters.get("qgpo", "antmaze-umaze-v0", **quick), seeds or [0])


# --- The energy -------------------------------------------------------------------------------------------------------


class Table:
    """f(a_t) by bins of a_t, in the energy's place; what is learnt is one number a bin."""

    def __init__(self, edges: torch.Tensor) -> None:
        self.edges = edges
        self.values = torch.zeros(len(edges) + 1, requires_grad=True)

    def state_part(self, states: torch.Tensor) -> torch.Tensor:
        return states

    def time_part(self, times: torch.Tensor) -> torch.Tensor:
        return times.unsqueeze(-1)

    def __call__(self, actions: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        return self.values[torch.bucketize(actions[..., 0].contiguous(), self.edges)]


def fit(learner: Any, support: torch.Tensor, noise: torch.Tensor, time: float, rounds: int = 60) -> torch.Tensor:
    """Minimise the contrastive loss over a table of the diffused actions; each number less the first that occurs."""
    rows = support.shape[1]
    batch = {"states": torch.zeros(1, rows, 1), "support": support}
    draws = {"energy_times": torch.full((1, rows), time), "energy_noise": noise}
    optimizer = torch.optim.LBFGS([learner.energy.values], max_iter=rounds, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = learner.energy_loss(batch, draws)[0].sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return learner.energy.values.detach()


def test_the_optimum_of_the_contrastive_loss_is_the_energy_up_to_a_constant() -> None:
    """Four actions without noise: f(a) = beta Q(a) + constant, and the loss is then the labels' entropy."""
    q = torch.tensor([0.3, -0.5, 1.1, 0.0])
    learner = agent(beta=2.0)
    learner.critic_target = lambda states, actions: q[((actions[..., 0] + 0.4) / 0.2).round().long()].unsqueeze(1)
    time = 0.3
    signal = float(signal_and_spread(torch.tensor(time))[0])
    learner.energy = Table(torch.tensor([-0.3, -0.1, 0.1]) * signal)
    support = torch.tensor([[-0.4, -0.2, 0.0, 0.2]]).expand(1, 5, 4)
    values = fit(learner, support, torch.zeros(1, 5, 4, 1), time)
    torch.testing.assert_close(values - values[0], 2 * (q - q[0]), rtol=1e-3, atol=1e-3)
    labels = (2 * q).softmax(dim=0)
    draws = {"energy_times": torch.full((1, 5), time), "energy_noise": torch.zeros(1, 5, 4, 1)}
    loss, _ = learner.energy_loss({"states": torch.zeros(1, 5, 1), "support": support}, draws)
    torch.testing.assert_close(loss, -(labels * labels.log()).sum().view(1), rtol=1e-4, atol=1e-5)


def test_with_noise_the_optimum_is_the_expected_exponential_of_the_energy() -> None:
    """f(a_t) = log E[exp(beta Q(a)) | a_t] + constant for two actions, from many support actions, in bins of a_t."""
    g, time, rows, M = torch.Generator().manual_seed(0), 0.25, 3000, 32
    learner = agent(beta=1.5, support_actions=M)
    learner.critic_target = lambda states, actions: actions[..., 0].unsqueeze(1)  # Q(a) = a
    edges = torch.linspace(-1.0, 1.0, 9)
    learner.energy = Table(edges)
    support = torch.where(torch.rand(1, rows, M, generator=g) < 0.3, -0.8, 0.8)
    noise = torch.randn(1, rows, M, 1, generator=g)
    values = fit(learner, support, noise, time).numpy()

    signal, spread = (float(x) for x in signal_and_spread(torch.tensor(time)))
    x = np.linspace(-4, 4, 80_001)
    density = lambda a: np.exp(-0.5 * ((x - signal * a) / spread) ** 2)  # noqa: E731
    low, high, bins = 0.3 * density(-0.8), 0.7 * density(0.8), np.searchsorted(edges.numpy(), x)
    inside = lambda y: np.bincount(bins, y)  # noqa: E731
    expected = np.log((inside(low) * np.exp(-1.2) + inside(high) * np.exp(1.2)) / inside(low + high))
    got = values - values.mean()
    np.testing.assert_allclose(got, expected - expected.mean(), atol=0.06)
    assert np.ptp(expected) > 1


def test_the_energys_gradient_equals_automatic_differentiation() -> None:
    energy = EnergyNetwork(Sizes(5, 3, seeds=2), 16)
    score_init(energy.parameters, [torch.Generator().manual_seed(seed) for seed in (0, 1)])
    states, times = torch.randn(2, 4, 5), torch.rand(2, 4)
    actions = torch.randn(2, 12, 3, requires_grad=True)  # three a state
    part = energy.state_part(states) + energy.time_part(times)
    (expected,) = torch.autograd.grad(energy(actions, part).sum(), actions)
    with torch.no_grad():
        got = energy.gradient(actions, part)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert expected.abs().max() > 1e-3


def test_the_energy_network_equals_the_written_out_one() -> None:
    energy = EnergyNetwork(Sizes(5, 3, seeds=2), 16)
    score_init(energy.parameters, [torch.Generator().manual_seed(seed) for seed in (0, 1)])
    states, times, actions = torch.randn(2, 6, 5), torch.rand(2, 6), torch.randn(2, 6, 3)
    got = energy(actions, energy.state_part(states) + energy.time_part(times))
    for seed in range(2):
        p = energy.parameters.member_state(seed)
        affine = lambda name, x, p=p: torch.nn.functional.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])  # noqa: E731
        angles = times[seed][:, None] * p["embed.0.W"][None] * 2 * torch.pi
        time = affine("embed.1", torch.cat([angles.sin(), angles.cos()], dim=1))
        x = affine("qt.0", torch.cat([actions[seed], time, states[seed]], dim=1))  # the published order
        for layer in ("qt.2", "qt.4", "qt.6", "qt.8"):
            x = affine(layer, torch.nn.functional.silu(x))
        torch.testing.assert_close(got[seed], x.squeeze(1), rtol=1e-4, atol=1e-5)


# --- Guidance ---------------------------------------------------------------------------------------------------------

MEAN, DEVIATION, CENTRE, STEEPNESS = -0.1, 0.3, 0.5, 6.0  # of mu, and of beta Q(a) = -STEEPNESS (a - CENTRE)^2 / 2


class ExactNoise:
    """What the behaviour network of N(MEAN, DEVIATION^2) would say; a part is the time itself."""

    def state_part(self, states: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*states.shape[:2], 1, dtype=torch.float64)

    def time_part(self, times: torch.Tensor) -> torch.Tensor:
        return times.unsqueeze(-1).double()

    def noise(self, x: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        signal, spread = signal_and_spread(part)
        return spread * (x - signal * MEAN) / (signal**2 * DEVIATION**2 + spread**2)


class ExactEnergy(ExactNoise):
    """The gradient of log E[exp(beta Q(a)) | a_t]: a given a_t is normal, and exp(beta Q) a Gaussian in a."""

    def gradient(self, x: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        signal, spread = signal_and_spread(part)
        variance = 1 / (1 / DEVIATION**2 + (signal / spread) ** 2)
        mean = variance * (MEAN / DEVIATION**2 + signal * x / spread**2)
        return -STEEPNESS * (mean - CENTRE) / (1 + STEEPNESS * variance) * variance * signal / spread**2


@pytest.mark.parametrize(("scale", "steps"), [(1.0, 15), (1.0, 480), (0.0, 480)])
def test_energy_guidance_of_a_gaussian_gives_the_tilted_gaussian(scale: float, steps: int) -> None:
    """N(m, s^2) exp(-k (a - c)^2 / 2) has precision 1 / s^2 + k and mean (m / s^2 + k c) / precision."""
    learner = agent(diffusion_steps=steps, guidance_scale=scale, max_action=100.0)
    learner.actor, learner.energy = ExactNoise(), ExactEnergy()
    k = STEEPNESS * scale
    precision = 1 / DEVIATION**2 + k
    expected = ((MEAN / DEVIATION**2 + k * CENTRE) / precision, precision**-0.5)
    start = torch.tensor([0.0, 1.0], dtype=torch.float64).view(1, 2, 1)  # the flow is affine
    low, high = learner.actions_for(torch.zeros(1, 2, 1), {"noise": start}).flatten().tolist()
    assert abs(low - expected[0]) < 0.002
    # The published 15 steps leave samples too narrow, guided or not: tests/agents/test_sde.py.
    assert (-0.07 < high - low - expected[1] < -0.05) if steps == 15 else abs(high - low - expected[1]) < 0.002


# --- Q ----------------------------------------------------------------------------------------------------------------


def test_the_target_is_the_softmax_weighted_value_of_the_next_support() -> None:
    learner = agent([0, 1], dims=(5, 2), discount=0.9, beta_q=3.0)
    batch = {
        "states": torch.randn(2, 6, 5),
        "next_states": torch.randn(2, 6, 5),
        "actions": torch.rand(2, 6, 2),
        "rewards": torch.randn(2, 6, 1),
        "not_dones": (torch.rand(2, 6, 1) > 0.4).float(),
        "next_support": torch.rand(2, 6, 8),
    }
    with torch.no_grad():
        learner.critic_target.parameters.flat.mul_(1.5)
    loss, metrics = learner.critic_loss(batch, {})
    targets = torch.empty(2, 6)
    for seed in range(2):
        for row in range(6):
            actions = batch["next_support"][seed, row].view(4, 2)
            states = batch["next_states"].new_zeros(2, 4, 5) + batch["next_states"][seed, row]
            values = learner.critic_target(states, actions.expand(2, 4, 2))[seed].amin(dim=0)
            v = (torch.softmax(3 * values, 0) * values).sum()
            targets[seed, row] = batch["rewards"][seed, row, 0] + 0.9 * batch["not_dones"][seed, row, 0] * v
    errors = learner.critic(batch["states"], batch["actions"]) - targets.unsqueeze(1)
    torch.testing.assert_close(loss, errors.square().mean(dim=(1, 2)), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(metrics["q_mean"], targets.mean(dim=1), rtol=1e-4, atol=1e-6)


def test_when_the_networks_learn() -> None:
    learner = agent(dims=(11, 3), num_steps_per_epoch=4, pretrain_epochs=1, critic_epochs=2)
    assert learner.first_step == -4
    learner.step = -4
    run = Runner(learner, small.dataset(40).to("cpu"), 16, torch_generators([0], "training", "cpu"), "eager")
    moved = []
    for steps in (4, 8, 4):
        before = {name: p.flat.clone() for name, p in learner.networks.items()}
        run.run(steps)
        moved.append({name for name, p in learner.networks.items() if not torch.equal(p.flat, before[name])})
    assert moved == [{"actor"}, {"critic", "critic_target", "energy"}, {"energy"}]


def test_q_and_the_energy_read_the_first_rows_of_a_batch() -> None:
    ends = []
    for spoil in (False, True):
        learner = agent(dims=(11, 3))
        run = Runner(learner, small.dataset(40).to("cpu"), 16, torch_generators([0], "training", "cpu"), "eager")
        run.run(1)
        batch, draws = run.batch(run._indices[1]), {name: value[1] for name, value in run._draws.items()}
        if spoil:
            for value in batch.values():
                value[:, 8:] = float("nan")
        learner.gradient_step(batch, draws, 1)
        ends.append(torch.cat([p.flat.flatten() for p in learner.networks.values()]))
    assert torch.equal(ends[0], ends[1])


@pytest.mark.parametrize(("task", "tune"), [("hopper-medium-v2", "return_range"), ("antmaze-umaze-v0", "iql_antmaze")])
def test_rewards_are_scaled_as_published(task: str, tune: str) -> None:
    """Episodes end at a terminal or after 1,000 rows: returns 6 and 3000 here."""
    assert hyperparameters.get("qgpo", task).reward_tune == tune
    rewards, not_dones = np.full((1005, 1), 3.0, np.float32), np.ones((1005, 1), np.float32)
    not_dones[[1, 1001]] = 0  # rows 0-1; rows 2-1001, a terminal just as the count is full; the rest is left out
    expected = rewards / (3000 - 6) * 1000 if tune == "return_range" else rewards - 1
    np.testing.assert_allclose(tune_rewards(tune, rewards, not_dones), expected, rtol=1e-6)


# --- The support ------------------------------------------------------------------------------------------------------


def start(seeds: list[int], batch_size: int = 8) -> Runner:
    learner = agent(seeds, dims=(11, 3), num_steps_per_epoch=10, pretrain_epochs=1)
    learner.step = -10
    generators = torch_generators(seeds, "training", "cpu")
    return Runner(learner, small.dataset(60).to("cpu"), batch_size, generators, "eager")


def test_the_support_samples_the_behaviour_model_at_both_states() -> None:
    run = start([0, 3])
    run.run(11)
    learner, views, data = run.agent, run._plan.columns.views, small.dataset(60)
    rngs = torch_generators([0, 3], "planning", "cpu")
    for name, states in (("support", data.states), ("next_support", data.next_states)):
        noise = torch.stack([torch.randn(1, 60, 4, 3, generator=g)[0] for g in rngs])
        states = torch.tensor(states).expand(2, -1, -1).repeat_interleave(4, dim=1)
        with torch.no_grad():
            expected = Solver(3, 2, data=True).actions(learner.actor, states, noise.flatten(1, 2))
        torch.testing.assert_close(views[name], expected.view(2, 60, 12), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("at", [5, 10, 11, 20])
def test_a_run_continues_bit_for_bit_without_the_support_in_its_checkpoint(at: int) -> None:
    whole, first, second = start([0, 3]), start([0, 3]), start([0, 3])
    whole.run(25)
    first.run(at)
    saved = first.state_dict()
    assert set(saved["plan"]) == {"generators"}
    second.agent.load_state_dict(first.agent.state_dict())
    second.load_state_dict(saved)
    second.run(25 - at)
    assert torch.equal(whole._plan.columns.rows, second._plan.columns.rows)
    for name, p in whole.agent.networks.items():
        assert torch.equal(p.flat, second.agent.networks[name].flat), name


# --- Published names --------------------------------------------------------------------------------------------------


def test_the_published_critic_reads_the_action_first() -> None:
    learner = agent([0, 1], dims=(5, 2))
    state = learner.published_state()[1]["critic"]
    states, actions = torch.randn(2, 6, 5), torch.randn(2, 6, 2)
    expected = learner.critic(states, actions)[1]
    for i in (1, 2):
        x = torch.cat([actions[1], states[1]], dim=1)
        for layer in (0, 2, 4, 6):
            x = torch.nn.functional.linear(x if layer == 0 else x.relu(), state[f"q0.q{i}.{layer}.weight"],
                                           state[f"q0.q{i}.{layer}.bias"])  # fmt: skip
        torch.testing.assert_close(x.squeeze(1), expected[i - 1], rtol=1e-4, atol=1e-5)
    assert {"q0_target.q2.6.bias", "qt.embed.0.W", "qt.qt.8.weight"} <= set(state)
    with pytest.raises(ValueError, match=r"the weights lack 'embed.1.bias'"):
        short = {name: value for name, value in state.items() if name != "qt.embed.1.bias"}
        learner.load_published({"actor": learner.published_state()[0]["actor"], "critic": short})
