"""IQL against d3rlpy's recorded updates, a plain second implementation, and small problems whose optimum is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hyperparameters
from agents.iql import IQL
from agents.parts.losses import advantage_weights, expectile_loss
from agents.parts.parameters import gradients
from tests import small
from tests.recordings import Recording

STATES, ACTIONS, ROWS, MAX_ACTION = 5, 3, 12, 0.8


def make(env_name: str = "hopper-medium-v2", seeds: tuple[int, ...] = (0,), **settings: Any) -> IQL:
    config = hyperparameters.get("iql", env_name, **{"hidden_dim": 16, **settings})
    return IQL(STATES, ACTIONS, MAX_ACTION, config, seeds)


def transitions(seed: int, rows: int = ROWS) -> dict[str, Tensor]:
    return small.batch(torch.Generator().manual_seed(seed), STATES, ACTIONS, MAX_ACTION, rows)


# --- Against d3rlpy -----------------------------------------------------------------------------------------------


def test_losses_and_steps_are_those_that_d3rlpy_recorded() -> None:
    """In d3rlpy's order: Q and V from the same V, then the policy from the new V (the official code: V, policy, Q).

    Not comparable: the deviation's parameter, which d3rlpy bounds by a sigmoid; it is set to the recorded one.
    """
    case = Recording("iql")
    c = dict(case.config)
    updates = c.pop("updates")
    config = hyperparameters.get("iql", "hopper-medium-v2", lr_decay=False, **c)
    agent = IQL(4, 2, 1.0, config, seeds=[0, 1])
    agent.load_published(case.networks("before"))
    for k in range(updates):
        batch, expected = case.group(f"batch/{k}", seeds=2), case.group(f"metrics/{k}")
        with torch.no_grad():
            agent.actor.parameters["log_std"].copy_(case.group(f"log_std/{k}")[""])
        critic_loss, _ = agent.critic_loss(batch, {})
        value_loss, _ = agent.value_loss(batch, {})
        torch.testing.assert_close(critic_loss, expected["q_loss"].expand(2), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(value_loss, expected["v_loss"].expand(2), rtol=1e-4, atol=1e-6)
        agent.descend("critic", (critic_loss, {}))
        agent.descend("value", (value_loss, {}))
        actor_loss, _ = agent.policy_loss(batch, {})
        torch.testing.assert_close(actor_loss, expected["actor_loss"].expand(2), rtol=1e-4, atol=1e-6)
        agent.descend("actor", (actor_loss, {}))
        agent.critic_target.follow(agent.critic)
    for state in agent.published_state():
        case.assert_networks(state, "after", unlike=("log_std",))


# --- Against a plain second implementation ------------------------------------------------------------------------


class Plain:
    """Implicit Q-learning in torch.nn and torch.optim, in the official code's order: V, policy, Q, average."""

    def __init__(self, agent: IQL) -> None:
        def chain(width: int, out: int, prefix: str, state: dict[str, Tensor]) -> nn.Sequential:
            return small.plain_chain((width, 16, 16, out), prefix, state)

        state, self.c = agent.published_state()[0], agent.config
        pairs = [("critic", f"q{i}_model") for i in (1, 2)] + [("critic_target", f"q{i}_model") for i in (1, 2)]
        *self.q, self.q1_target, self.q2_target = (chain(STATES + ACTIONS, 1, p, state[n]) for n, p in pairs)
        self.v = chain(STATES, 1, "v_model", state["critic"])
        self.pi = chain(STATES, ACTIONS, "net", state["actor"])
        self.log_std = nn.Parameter(state["actor"]["log_std"].clone())
        self.pi_optimizer = torch.optim.Adam([*self.pi.parameters(), self.log_std], lr=self.c.learning_rate)
        last = self.c.num_epochs * self.c.num_steps_per_epoch
        self.decay = torch.optim.lr_scheduler.CosineAnnealingLR(self.pi_optimizer, last)
        self.q_optimizer = torch.optim.Adam([p for q in self.q for p in q.parameters()], self.c.critic_learning_rate)
        self.v_optimizer = torch.optim.Adam(self.v.parameters(), self.c.critic_learning_rate)

    def step(self, batch: dict[str, Tensor], kept: Tensor) -> None:
        states, actions, next_states, rewards, not_dones = (value[0] for value in batch.values())
        x = torch.cat([states, actions], dim=1)
        with torch.no_grad():
            q = torch.minimum(self.q1_target(x), self.q2_target(x))
        u = q - self.v(states)
        self.minimise(self.v_optimizer, (torch.abs(self.c.expectile - (u < 0).float()) * u**2).mean())
        with torch.no_grad():
            weights = torch.exp(self.c.beta * (q - self.v(states))).clamp(max=100.0)[:, 0]
        h = F.relu(self.pi[0](states)) * kept[0, :, :16] / (1 - self.c.dropout)
        h = F.relu(self.pi[2](h)) * kept[0, :, 16:] / (1 - self.c.dropout)
        policy = torch.distributions.Normal(torch.tanh(self.pi[4](h)), self.log_std.clamp(-5, 2).exp())
        self.minimise(self.pi_optimizer, -(weights * policy.log_prob(actions / MAX_ACTION).sum(dim=1)).mean())
        self.decay.step()
        with torch.no_grad():
            target = rewards + self.c.discount * not_dones * self.v(next_states)
        self.minimise(self.q_optimizer, sum(F.mse_loss(q(x), target) for q in self.q))
        for target_net, net in ((self.q1_target, self.q[0]), (self.q2_target, self.q[1])):
            for a, b in zip(target_net.parameters(), net.parameters(), strict=True):
                a.data.mul_(1 - self.c.tau).add_(b.data, alpha=self.c.tau)

    def minimise(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_the_update_equals_a_plain_one_with_dropout_and_decay() -> None:
    agent = make("kitchen-mixed-v0", learning_rate=1e-2, num_epochs=1, num_steps_per_epoch=8)
    plain, rng = Plain(agent), torch.Generator().manual_seed(3)
    for k in range(6):
        batch, draws = transitions(k), agent.draw(rng, ROWS)
        agent.update(batch, draws)
        plain.step(batch, draws["kept"])
    state = agent.published_state()[0]
    pairs = [("actor", "net", plain.pi), ("critic", "v_model", plain.v), ("critic", "q2_model", plain.q[1])]
    for name, prefix, net in [*pairs, ("critic_target", "q1_model", plain.q1_target)]:
        for weight, value in net.state_dict().items():
            torch.testing.assert_close(state[name][f"{prefix}.{weight}"], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state["actor"]["log_std"], plain.log_std.data, rtol=1e-4, atol=1e-5)


def test_the_policy_stands_still_when_its_rate_has_ended() -> None:
    agent = make(num_epochs=2, num_steps_per_epoch=5)
    agent.step = 10
    before = {name: p.flat.clone() for name, p in agent.networks.items()}
    agent.update(transitions(0), {})
    assert torch.equal(agent.actor.parameters.flat, before["actor"])
    assert not torch.equal(agent.critic.parameters.flat, before["critic"])


def test_dropout_keeps_the_share_that_it_says() -> None:
    agent = make("pen-human-v1", seeds=(0, 1))
    kept = agent.draw([torch.Generator().manual_seed(s) for s in (0, 1)], 512)["kept"]
    assert kept.shape == (2, 512, 32) and kept.dtype == torch.bool
    assert abs(kept.float().mean() - 0.9) < 0.01
    states, actions = (transitions(0, rows=512)[k].expand(2, -1, -1) for k in ("states", "actions"))
    plain = agent.actor.log_density(*agent.actor(states), actions)
    all_kept = agent.actor.log_density(*agent.actor(states, torch.ones_like(kept)), actions)
    assert not torch.allclose(plain, all_kept)  # what is kept is scaled up, to the same mean


# --- Where the optimum is known -----------------------------------------------------------------------------------


@pytest.mark.parametrize("expectile", [0.5, 0.7, 0.9])
def test_v_converges_to_the_expectile_of_two_values(expectile: float) -> None:
    """Of 1 with probability p, else 0: tau p (1 - v) = (1 - tau) (1 - p) v."""
    p, rows = 0.25, 8
    agent = make(expectile=expectile, critic_learning_rate=0.02)
    batch = {name: value[:, :1].expand(-1, rows, -1) for name, value in transitions(1).items()}
    agent.critic_target = lambda states, actions: torch.tensor([1.0, 1.0] + [0.0] * 6).expand(1, 2, rows)
    for _ in range(250):
        loss, _ = agent.value_loss(batch, {})
        agent.descend("value", (loss, {}))
    expected = expectile * p / (expectile * p + (1 - expectile) * (1 - p))
    torch.testing.assert_close(agent.value(batch["states"]), torch.full((1, rows), expected), rtol=0, atol=2e-3)


def test_v_and_q_converge_to_the_values_of_a_two_step_chain() -> None:
    """s0 -> s1 -> end, rewards 1 and 2, one action each: every expectile of one number is that number."""
    agent = make(critic_learning_rate=5e-3, tau=0.1, discount=0.9)
    states = torch.tensor([[1.0, 0, 0, 0, 0], [0, 1.0, 0, 0, 0]]).unsqueeze(0)
    batch = {
        "states": states,
        "actions": torch.zeros(1, 2, ACTIONS),
        "next_states": states.flip(1),
        "rewards": torch.tensor([[[1.0], [2.0]]]),
        "not_dones": torch.tensor([[[1.0], [0.0]]]),
    }
    for _ in range(600):
        agent.update(batch, {})
    torch.testing.assert_close(agent.value(states), torch.tensor([[2.8, 2.0]]), rtol=0, atol=0.03)


def test_the_policys_optimum_is_the_weighted_mean_and_deviation() -> None:
    """One state: the gradient vanishes at the weighted mean and deviation of the actions, and only there."""
    agent = make(beta=2.0)
    batch = transitions(4, rows=64)
    batch["states"] = batch["states"][:, :1].expand(-1, 64, -1)
    advantages = torch.linspace(-1, 3, 64)
    agent.critic_target = lambda states, actions: advantages.expand(1, 2, 64)
    agent.value = lambda states: torch.zeros(1, 64)
    weights = torch.exp(2.0 * advantages).clamp(max=100.0)  # some are cut
    unit = batch["actions"][0] / MAX_ACTION
    mean = (weights.unsqueeze(1) * unit).sum(0) / weights.sum()
    deviation = ((weights.unsqueeze(1) * (unit - mean) ** 2).sum(0) / weights.sum()).sqrt()
    p = agent.actor.parameters
    with torch.no_grad():
        p.flat.zero_()
        p["net.4.bias"].copy_(torch.atanh(mean))
        p["log_std"].copy_(deviation.log())
    slope = gradients(agent.policy_loss(batch, {})[0], [p])[0]
    torch.testing.assert_close(slope, torch.zeros_like(p.flat), rtol=0, atol=2e-3)
    with torch.no_grad():
        p["net.4.bias"].add_(0.05)
    assert gradients(agent.policy_loss(batch, {})[0], [p])[0].abs().max() > 0.1


def test_bc_loss_is_the_datas_negative_log_likelihood_without_the_weights() -> None:
    agent, batch = make(), transitions(4, rows=16)
    normal = torch.distributions.Normal(agent.actor.actions(*agent.actor(batch["states"])) / MAX_ACTION, 1.0)
    with torch.no_grad():
        agent.actor.parameters["log_std"].zero_()
    loss, metrics = agent.policy_loss(batch, {})
    expected = -normal.log_prob(batch["actions"] / MAX_ACTION).sum(dim=2).mean(dim=1)
    torch.testing.assert_close(metrics["bc_loss"], expected, rtol=1e-5, atol=1e-5)
    assert (metrics["bc_loss"] - loss).abs().min() > 1e-3


def test_advantage_weights_turn_the_data_into_the_tilted_policy() -> None:
    """mu exp(beta A) / Z of a discrete mu: the weighted frequencies of data drawn with exact frequencies mu."""
    mu, advantage = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([-1.0, 0.2, 0.4])
    weighted = mu * advantage_weights(advantage, beta=2.0)
    torch.testing.assert_close(weighted / weighted.sum(), torch.softmax(mu.log() + 2.0 * advantage, dim=0))
    assert advantage_weights(torch.tensor([3.0, 500.0]), beta=10.0).tolist() == [100.0, 100.0]


def test_the_expectile_loss_is_the_weighted_square() -> None:
    u = torch.tensor([-2.0, -0.5, 0.0, 1.0])
    assert torch.allclose(expectile_loss(u, 0.9), torch.tensor([0.4, 0.025, 0.0, 0.9]))


def test_the_density_is_the_normal_one_over_the_unit_box() -> None:
    agent = make(seeds=(0, 1))
    states, actions = torch.randn(2, 7, STATES), torch.randn(2, 7, ACTIONS)
    with torch.no_grad():
        agent.actor.parameters["log_std"].copy_(torch.tensor([[0.3, -9.0, 5.0], [0.0, -1.0, 1.0]]))
    mean = agent.actor.actions(*agent.actor(states)) / MAX_ACTION
    log_std = torch.tensor([[0.3, -5.0, 2.0], [0.0, -1.0, 1.0]])
    normal = torch.distributions.Normal(mean, log_std.exp().unsqueeze(1))
    expected = normal.log_prob(actions / MAX_ACTION).sum(dim=2)
    torch.testing.assert_close(agent.actor.log_density(*agent.actor(states), actions), expected, rtol=1e-4, atol=1e-3)


def test_evaluation_takes_the_mean() -> None:
    agent, states = make(seeds=(0, 1)), torch.randn(2, 6, STATES)
    first, second = (agent.act(states, torch.Generator().manual_seed(s)) for s in (0, 1))
    assert torch.equal(first, second) and torch.equal(first, agent.actor.actions(*agent.actor(states)).detach())


# --- Settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "expectile", "beta", "dropout", "reward_tune"),
    [
        ("halfcheetah-medium-expert-v2", 0.7, 3.0, 0.0, "iql_returns"),
        ("antmaze-large-play-v0", 0.9, 10.0, 0.0, "iql_antmaze"),
        ("pen-human-v1", 0.7, 0.5, 0.1, "no"),
        ("kitchen-mixed-v0", 0.7, 0.5, 0.1, "no"),
    ],
)
def test_the_settings_are_those_of_the_official_configs(
    task: str, expectile: float, beta: float, dropout: float, reward_tune: str
) -> None:
    c = hyperparameters.get("iql", task)
    assert (c.expectile, c.beta, c.dropout, c.reward_tune) == (expectile, beta, dropout, reward_tune)
    assert (c.learning_rate, c.critic_learning_rate, c.tau, c.discount) == (3e-4, 3e-4, 0.005, 0.99)
    assert c.lr_decay and c.num_epochs * c.num_steps_per_epoch == 10**6


def test_a_dropout_that_drops_everything_is_refused() -> None:
    with pytest.raises(ValueError, match="dropout must be below 1"):
        make(dropout=1.0)


def test_initial_weights_are_orthogonal_with_the_published_gain() -> None:
    agent = make(seeds=(3, 4))
    square = agent.critic.parameters["2.weight"]
    for member in range(4):
        torch.testing.assert_close(square[member] @ square[member].T, 2 * torch.eye(16), rtol=0, atol=1e-5)
    assert not torch.equal(square[0], square[1])
    assert not agent.actor.parameters["log_std"].any()
