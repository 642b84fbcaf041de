"""CQL against d3rlpy's recorded updates, a plain second implementation, and problems whose optimum is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform
from torch.nn import functional as F

import hyperparameters
from agents import AGENTS
from agents.cql import CQL, IMPROVING
from agents.parts.losses import conservative_gap
from tests import small
from tests.recordings import Recording

STATES, ACTIONS, ROWS, MAX_ACTION = 5, 3, 6, 0.8


def make(env_name: str = "hopper-medium-v2", seeds: tuple[int, ...] = (0,), **settings: Any) -> CQL:
    config = hyperparameters.get("cql", env_name, **{"hidden_dim": 16, "bc_steps": 0, **settings})
    return CQL(STATES, ACTIONS, MAX_ACTION, config, seeds)


def transitions(seed: int, rows: int = ROWS) -> dict[str, Tensor]:
    return small.batch(torch.Generator().manual_seed(seed), STATES, ACTIONS, MAX_ACTION, rows)


# --- Against d3rlpy -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["fixed", "lagrange"])
def test_losses_and_steps_are_those_that_d3rlpy_recorded(case: str) -> None:
    """In d3rlpy's order: multiplier, critics, entropy's weight, policy; each sees what the one before left.

    (The official code takes all gradients first.) d3rlpy's target takes the policy's mean: a sample with zero noise.
    Its multiplier sees w (gap - threshold): the same as ours with target_action_gap = w threshold.
    """
    recording = Recording("cql", case)
    c = dict(Recording("cql").config)
    updates, gap = c.pop("updates"), c.pop("target_action_gap")
    c["target_action_gap"] = gap if case == "lagrange" else -1.0
    config = hyperparameters.get("cql", "hopper-medium-v2", bc_steps=0, **c)
    agent = CQL(4, 2, 1.0, config, seeds=[0, 1])
    before = recording.networks("before")
    agent.load_published({**before, **before["temperature"], **before["multiplier"]})
    for k in range(updates):
        batch, draws = recording.group(f"batch/{k}", seeds=2), recording.group(f"draws/{k}", seeds=2)
        expected = recording.group(f"metrics/{k}", seeds=2)
        if agent.lagrange:
            agent.ascend("alpha_prime", agent.critic_loss(batch, draws)[1]["conservative_loss"] - gap)
        torch.testing.assert_close(agent.alpha_prime(), expected["alpha"], rtol=1e-5, atol=0)
        loss, metrics = outcome = agent.critic_loss(batch, draws)
        torch.testing.assert_close(loss, expected["critic_loss"], rtol=1e-4, atol=1e-5)
        penalty = agent.alpha_prime() * 2 * (metrics["conservative_loss"] - (gap if agent.lagrange else 0.0))
        torch.testing.assert_close(penalty, expected["conservative_loss"], rtol=1e-4, atol=1e-5)
        agent.descend("critic", outcome)
        entropy = agent.entropy(batch, draws)
        agent.ascend("alpha", -(entropy + 2))
        torch.testing.assert_close(agent.alpha(), expected["temp"], rtol=1e-5, atol=0)
        if k == 0:  # its weight was 1
            torch.testing.assert_close(entropy + 2, expected["temp_loss"], rtol=1e-4, atol=1e-5)
        metrics = agent.descend("actor", agent.policy_loss(batch, draws))
        torch.testing.assert_close(metrics["actor_loss"], expected["actor_loss"], rtol=1e-4, atol=1e-5)
        agent.critic_target.follow(agent.critic)
    unlike = () if agent.lagrange else ("log_alpha_prime",)
    for state in agent.published_state():  # the project has a number where d3rlpy has a module
        recording.assert_networks({"temperature": state, "multiplier": state, **state}, "after", unlike)


# --- Against a plain second implementation ------------------------------------------------------------------------


class Plain:
    """CQL(H) in torch.nn and torch.optim in the official code's order: all gradients, then all steps."""

    def __init__(self, agent: CQL) -> None:
        def chain(width: int, out: int, prefix: str, state: dict[str, Tensor]) -> nn.Sequential:
            return small.plain_chain((width, 16, 16, 16, out), prefix, state)

        state, self.c = agent.published_state()[0], agent.config
        self.pi = chain(STATES, 2 * ACTIONS, "net", state["actor"])
        self.q = [chain(STATES + ACTIONS, 1, f"q{i}_model", state["critic"]) for i in (1, 2)]
        self.q_target = [chain(STATES + ACTIONS, 1, f"q{i}_model", state["critic_target"]) for i in (1, 2)]
        self.log_alpha, self.log_alpha_prime = (nn.Parameter(torch.zeros(())) for _ in range(2))
        adam, slow, fast = torch.optim.Adam, self.c.learning_rate, self.c.critic_learning_rate
        self.pi_optimizer, self.alpha_optimizer = adam(self.pi.parameters(), slow), adam([self.log_alpha], slow)
        self.q_optimizer = adam([p for q in self.q for p in q.parameters()], fast)
        self.prime_optimizer = adam([self.log_alpha_prime], fast)

    def policy(self, states: Tensor) -> Any:
        mean, log_std = self.pi(states).chunk(2, dim=-1)
        return TransformedDistribution(Normal(mean, log_std.clamp(-5, 2).exp()), TanhTransform(cache_size=1))

    def sample(self, states: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions of the unit box and their log densities."""
        policy = self.policy(states)
        unit = policy.transforms[0](policy.base_dist.loc + policy.base_dist.scale * noise)
        return unit, policy.log_prob(unit).sum(dim=-1)

    def value(self, net: nn.Module, states: Tensor, unit: Tensor) -> Tensor:
        return net(torch.cat([states, unit * MAX_ACTION], dim=-1)).squeeze(-1)

    def step(self, batch: dict[str, Tensor], draws: dict[str, Tensor], cloning: bool) -> None:
        states, actions, next_states, rewards, not_dones = (value[0] for value in batch.values())
        noise = {name: value[0] for name, value in draws.items()}
        unit, log_pi = self.sample(states, noise["policy_noise"])
        self.alpha_optimizer.zero_grad()
        (-(self.log_alpha * (log_pi - ACTIONS).detach())).mean().backward()
        self.alpha_optimizer.step()
        improved = torch.minimum(*(self.value(q, states, unit) for q in self.q))
        if cloning:
            improved = self.policy(states).log_prob(actions / MAX_ACTION).sum(dim=-1)
        policy_loss = (self.log_alpha.exp().detach() * log_pi - improved).mean()
        policy_gradient = torch.autograd.grad(policy_loss, list(self.pi.parameters()))
        with torch.no_grad():
            repeats = len(noise["next_action_noise"]) // len(states)
            many = next_states.repeat_interleave(repeats, dim=0)
            ahead, _ = self.sample(many, noise["next_action_noise"])
            best = [self.value(q, many, ahead).view(-1, repeats).amax(dim=1) for q in self.q_target]
            target = rewards[:, 0] + self.c.discount * not_dones[:, 0] * torch.minimum(*best)
            ten = states.repeat_interleave(10, dim=0)
            kinds = [(noise["random_actions"], torch.full((len(ten),), ACTIONS * math.log(0.5)))]
            for at, name in ((ten, "current_noise"), (next_states.repeat_interleave(10, dim=0), "next_noise")):
                kinds.append(self.sample(at, noise[name]))
        losses, terms = [], []
        for q in self.q:
            data = self.value(q, states, actions / MAX_ACTION)
            weighted = [(self.value(q, ten, at) - density).view(-1, 10) for at, density in kinds]
            terms.append(
                self.c.min_q_weight * (torch.logsumexp(torch.cat(weighted, dim=1), dim=1).mean() - data.mean())
            )
            penalty = terms[-1]
            if self.c.target_action_gap >= 0:
                penalty = self.log_alpha_prime.exp() * (terms[-1] - self.c.target_action_gap)
            losses.append(F.mse_loss(data, target) + penalty)
        self.q_optimizer.zero_grad()
        self.prime_optimizer.zero_grad()
        sum(losses).backward()
        self.prime_optimizer.zero_grad()
        if self.c.target_action_gap >= 0:
            gaps = [term.detach() - self.c.target_action_gap for term in terms]
            (-0.5 * self.log_alpha_prime.exp() * sum(gaps)).backward()
            self.prime_optimizer.step()
        for parameter, gradient in zip(self.pi.parameters(), policy_gradient, strict=True):
            parameter.grad = gradient
        self.pi_optimizer.step()
        self.q_optimizer.step()
        for old, new in zip(self.q_target, self.q, strict=True):
            for a, b in zip(old.parameters(), new.parameters(), strict=True):
                a.data.mul_(1 - self.c.tau).add_(b.data, alpha=self.c.tau)


@pytest.mark.parametrize(("gap", "max_q_backup"), [(-1.0, False), (3.0, True)])
def test_the_update_equals_a_plain_one(gap: float, max_q_backup: bool) -> None:
    """Two steps of cloning, three of improvement."""
    settings = {"target_action_gap": gap, "max_q_backup": max_q_backup, "bc_steps": 2, "learning_rate": 3e-3}
    agent = make(critic_learning_rate=2e-3, tau=0.1, **settings)
    plain, rng = Plain(agent), torch.Generator().manual_seed(3)
    for k in range(5):
        batch, draws = transitions(k), agent.draw(rng, ROWS)
        agent.update(batch, draws)
        plain.step(batch, draws, cloning=k < 2)
    state = agent.published_state()[0]
    pairs = [("actor", "net", plain.pi), ("critic", "q1_model", plain.q[0]), ("critic", "q2_model", plain.q[1])]
    for name, prefix, net in [*pairs, ("critic_target", "q2_model", plain.q_target[1])]:
        for weight, value in net.state_dict().items():
            torch.testing.assert_close(state[name][f"{prefix}.{weight}"], value, rtol=1e-3, atol=2e-5)
    torch.testing.assert_close(state["log_alpha"], plain.log_alpha.data, rtol=1e-4, atol=1e-6)
    if gap >= 0:
        torch.testing.assert_close(state["log_alpha_prime"], plain.log_alpha_prime.data, rtol=1e-4, atol=0)


# --- Closed forms -------------------------------------------------------------------------------------------------


def test_the_squashed_density_is_pytorchs_and_integrates_to_one() -> None:
    agent = make(seeds=(0, 1))
    mean, log_std, noise = (torch.randn(2, 7, ACTIONS, generator=torch.Generator().manual_seed(k)) for k in range(3))
    actions, density = agent.actor.sample(mean, log_std, noise)
    plain = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform(cache_size=1))
    unit = plain.transforms[0](mean + log_std.exp() * noise)
    torch.testing.assert_close(actions, unit * MAX_ACTION)
    torch.testing.assert_close(density, plain.log_prob(unit).sum(dim=-1), rtol=1e-4, atol=1e-4)
    inside = actions.clamp(-0.9 * MAX_ACTION, 0.9 * MAX_ACTION)
    expected = plain.log_prob(inside / MAX_ACTION).sum(dim=-1)
    torch.testing.assert_close(agent.actor.log_density(mean, log_std, inside), expected, rtol=1e-4, atol=1e-4)
    grid = torch.linspace(-1, 1, 20001)[1:-1].view(1, -1, 1) * MAX_ACTION
    total = agent.actor.log_density(torch.full((1, 1, 1), 0.4), torch.full((1, 1, 1), -0.5), grid).exp().mean() * 2
    assert abs(total - 1) < 1e-3
    assert agent.actor.log_density(mean, log_std, torch.full_like(mean, MAX_ACTION)).isfinite().all()  # on the edge


def test_the_sampled_sum_estimates_the_integral_of_exp_q() -> None:
    """Q = c . a: each kind of actions, weighted by its density, estimates prod 2 sinh(c) / c; log K stays, K = 3 R."""
    agent, samples = make(), 40_000
    slopes = torch.tensor([1.5, -0.7, 0.2])
    batch = transitions(0, rows=1)
    draws = agent.draw(torch.Generator().manual_seed(1), samples)
    draws["next_action_noise"] = draws["next_action_noise"][:, :1]
    draws = {name: value[:, :samples] for name, value in draws.items()}
    agent.critic = lambda states, actions: (actions / MAX_ACTION @ slopes).unsqueeze(1).expand(-1, 2, -1)
    actions, density = agent.sampled_actions(batch, draws)
    assert actions.shape == (1, 1, 3 * samples, ACTIONS) and actions.abs().max() <= MAX_ACTION
    expected = (2 * torch.sinh(slopes) / slopes).log().sum()
    for kind in (slice(0, samples), slice(samples, 2 * samples), slice(2 * samples, 3 * samples)):
        gap = conservative_gap((actions[:, :, kind] / MAX_ACTION) @ slopes, density[:, :, kind], torch.zeros(1, 1))
        assert abs(gap.item() - math.log(samples) - expected) < 0.03
    metrics = agent.critic_loss(batch, draws)[1]
    data = (batch["actions"][0, 0] / MAX_ACTION) @ slopes
    conservative = agent.config.min_q_weight * (math.log(3 * samples) + expected - data)
    torch.testing.assert_close(metrics["conservative_loss"], conservative.view(1), rtol=1e-3, atol=0)


def test_the_conservative_term_alone_makes_q_the_log_of_the_datas_policy() -> None:
    """On a table: the minimum over Q of log sum exp Q - E_mu Q is mu's entropy, at softmax(Q) = mu."""
    mu, q = torch.tensor([0.6, 0.3, 0.1]), torch.zeros(3, requires_grad=True)
    for _ in range(2000):
        gap = mu @ conservative_gap(q.expand(3, 3), torch.zeros(3, 3), q)
        q.data -= 0.5 * torch.autograd.grad(gap, q)[0]
    torch.testing.assert_close(torch.softmax(q, dim=0), mu, rtol=0, atol=1e-4)
    assert abs(gap.item() + (mu * mu.log()).sum().item()) < 1e-5


def test_the_penalised_q_of_one_state_has_the_known_fixed_point() -> None:
    """2 mu (Q - r) + w (softmax Q - mu) = 0, and the unseen action is pushed below what it would give."""
    mu, r, w = torch.tensor([0.7, 0.3, 0.0]), torch.tensor([1.0, 2.0, 5.0]), 0.5
    q = torch.zeros(3, requires_grad=True)
    for _ in range(4000):
        gap = mu @ conservative_gap(q.expand(3, 3), torch.zeros(3, 3), q)
        loss = (mu * (q - r).square()).sum() + w * gap
        q.data -= 0.2 * torch.autograd.grad(loss, q)[0]
    residual = 2 * mu * (q - r) + w * (torch.softmax(q, dim=0) - mu)
    assert residual.abs().max() < 2e-3
    assert (mu @ q).item() > (mu @ r).item() > q[2].item()  # E_data Q rises, the unseen action's value falls


def test_the_multiplier_moves_towards_its_gap_and_stops_at_its_limit() -> None:
    agent = make(target_action_gap=2.0, seeds=(0, 1))
    violation = torch.tensor([5.0, 1.0]) - 2.0
    agent.ascend("alpha_prime", violation)
    above, below = agent.alpha_prime()
    assert above > 1 > below
    agent.alpha_prime.flat.fill_(math.log(2e6))
    assert agent.alpha_prime().tolist() == [1e6, 1e6]
    before = agent.alpha_prime.flat.clone()
    agent.optimizers["alpha_prime"].reset()
    agent.ascend("alpha_prime", violation)
    assert torch.equal(agent.alpha_prime.flat, before)  # the clamp has no slope beyond its bound


def test_the_entropys_weight_grows_where_the_entropy_is_too_small() -> None:
    agent = make(seeds=(0, 1))
    with torch.no_grad():
        agent.actor.parameters.flat.zero_()
        agent.actor.parameters["net.6.bias"][:, ACTIONS:] = torch.tensor([[-4.0], [0.0]])
    batch = {name: value.expand(2, -1, -1) for name, value in transitions(0).items()}
    metrics = agent.update(batch, agent.draw(torch.Generator().manual_seed(0), ROWS))
    assert metrics["entropy"][0] < -ACTIONS < metrics["entropy"][1]
    assert torch.equal(metrics["alpha"], agent.alpha())
    assert agent.alpha()[0] > 1 > agent.alpha()[1]


def test_cloning_then_improving() -> None:
    agent = make(bc_steps=3)
    assert [agent.phase(step) for step in (0, 2, 3, 10**6)] == [0, 0, IMPROVING, IMPROVING]


def test_bc_loss_is_the_datas_negative_log_likelihood_in_both_phases() -> None:
    agent, batch = make(), transitions(0, rows=16)
    draws = agent.draw(torch.Generator().manual_seed(0), 16)
    mean, log_std = agent.actor(batch["states"])
    plain = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform(cache_size=1))
    expected = -plain.log_prob(batch["actions"] / MAX_ACTION).sum(dim=-1).mean(dim=1)
    for loss in (agent.policy_loss, agent.cloning_loss):
        torch.testing.assert_close(loss(batch, draws)[1]["bc_loss"], expected.detach(), rtol=1e-4, atol=1e-4)


def test_cloning_brings_the_policy_to_the_data() -> None:
    agent, rng, batch = make(learning_rate=1e-2), torch.Generator().manual_seed(0), transitions(0, rows=8)

    def error() -> Tensor:
        return (agent.act(batch["states"], rng) - batch["actions"]).abs().mean() / batch["actions"].abs().mean()

    assert error() > 0.9
    for _ in range(400):
        agent.descend("actor", agent.cloning_loss(batch, agent.draw(rng, 8)))
    assert error() < 0.3


# --- Settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "learning_rate", "weight", "gap", "reward_tune"),
    [
        ("hopper-medium-v2", 1e-4, 10.0, -1.0, "no"),
        ("hopper-medium-expert-v2", 1e-4, 5.0, -1.0, "no"),
        ("antmaze-medium-play-v0", 1e-4, 5.0, 5.0, "cql_antmaze"),
        ("pen-cloned-v1", 1e-4, 1.0, -1.0, "no"),
        ("kitchen-mixed-v0", 1e-4, 5.0, -1.0, "no"),
    ],
)
def test_the_settings_are_the_published_ones(
    task: str, learning_rate: float, weight: float, gap: float, reward_tune: str
) -> None:
    c = hyperparameters.get("cql", task)
    assert (c.learning_rate, c.min_q_weight, c.target_action_gap) == (learning_rate, weight, gap)
    cloning = 0 if task == "pen-cloned-v1" else 39_999  # the published loop counts from 1 and clones below 40,000
    assert (c.reward_tune, c.bc_steps, c.critic_learning_rate, c.tau) == (reward_tune, cloning, 3e-4, 0.005)
    assert make(task).lagrange == (gap >= 0)


@pytest.mark.parametrize("algo", ["cql", "bear"])
def test_the_networks_start_as_rlkits(algo: str) -> None:
    """Hidden weights U(+-1/sqrt(out)), not 1/sqrt(in), and biases 0.1; the last layers 1e-3 and 3e-3 (rlkit's Mlp)."""
    agent = AGENTS[algo](STATES, ACTIONS, 1.0, hyperparameters.get(algo, "hopper-medium-v2", hidden_dim=64), [0, 1])
    last = {"cql": ("net.6", "6"), "bear": ("net.4", "4")}[algo]
    for network, layer, bound in zip((agent.actor, agent.critic), last, (1e-3, 3e-3), strict=True):
        for name, value in network.parameters.tensors.items():
            if name.startswith(layer):
                reach = bound
            elif name.endswith("bias"):
                assert (value == 0.1).all(), name
                continue
            else:
                reach = 1 / math.sqrt(value.shape[1])  # [members, out, in]
            assert value.abs().max() <= reach, name
            if value.numel() > 100:  # uniform: E|x| is half the bound
                assert abs(value.abs().mean() / reach - 0.5) < 0.04, name
        assert not torch.equal(network.parameters.flat[0], network.parameters.flat[-1])
