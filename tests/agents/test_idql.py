"""IDQL against a plain second implementation, and on small problems whose optimum is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hyperparameters
from agents.idql import IDQL
from agents.parts.diffusion import Diffusion, beta_schedule
from agents.parts.losses import expectile_loss, implicit_policy_weights
from tests import small

STATES, ACTIONS, ROWS, MAX_ACTION, WIDTH = 5, 3, 12, 0.8, 16


def make(env_name: str = "hopper-medium-v2", seeds: tuple[int, ...] = (0,), **settings: Any) -> IDQL:
    config = hyperparameters.get("idql", env_name, **{"hidden_dim": WIDTH, "critic_batch_size": 8, **settings})
    return IDQL(STATES, ACTIONS, MAX_ACTION, config, seeds)


def transitions(seed: int, rows: int = ROWS) -> dict[str, Tensor]:
    return small.batch(torch.Generator().manual_seed(seed), STATES, ACTIONS, MAX_ACTION, rows)


# --- A plain second implementation --------------------------------------------------------------------------------

# Of the published code: the noise network's activation, and the width of its time features.
VERSIONS: dict[str, tuple[type[nn.Module], int]] = {"last": (nn.SiLU, 128), "paper": (nn.Mish, 64)}
versions = pytest.mark.parametrize("version", list(VERSIONS))


class PlainNoise(nn.Module):
    """IDQL's LN_Resnet as its paper draws it, over one concatenated input."""

    def __init__(self, state: dict[str, Tensor], blocks: int, dropout: float, version: str = "last") -> None:
        super().__init__()
        act, features = VERSIONS[version]
        self.frequencies = nn.Parameter(state["time.frequencies"].clone())
        self.time = nn.Sequential(nn.Linear(features, 2 * features), act(), nn.Linear(2 * features, 2 * features))
        self.first, self.last = nn.Linear(ACTIONS + STATES + 2 * features, WIDTH), nn.Linear(WIDTH, ACTIONS)
        self.act, self.dropout = act(), dropout
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(WIDTH, eps=1e-6), nn.Linear(WIDTH, 4 * WIDTH), act(), nn.Linear(4 * WIDTH, WIDTH)
            )
            for _ in range(blocks)
        )
        theirs = {"time.1": self.time[0], "time.3": self.time[2], "first": self.first, "last": self.last}
        for i, block in enumerate(self.blocks):
            theirs |= {f"blocks.{i}.norm": block[0], f"blocks.{i}.1": block[1], f"blocks.{i}.3": block[3]}
        self.names = theirs
        with torch.no_grad():
            for name, layer in theirs.items():
                layer.weight.copy_(state[f"{name}.weight"])
                layer.bias.copy_(state[f"{name}.bias"])

    def forward(self, actions: Tensor, states: Tensor, steps: Tensor, kept: Tensor | None = None) -> Tensor:
        angles = 2 * math.pi * steps.float().unsqueeze(1) * self.frequencies
        time = self.time(torch.cat([angles.cos(), angles.sin()], dim=1))
        x = self.first(torch.cat([actions, states, time], dim=1))
        for i, block in enumerate(self.blocks):
            inside = x if kept is None else x * kept[:, i * WIDTH : (i + 1) * WIDTH] / (1 - self.dropout)
            x = x + block(inside)
        return self.last(self.act(x))


class PlainAdamW:
    """optax.adamw written out: p <- p - rate (m' / (sqrt(v') + 1e-8) + decay p), every parameter alike."""

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay, self.count = parameters, decay, 0
        self.m, self.v = ([torch.zeros_like(p) for p in parameters] for _ in range(2))

    @torch.no_grad()
    def step(self, gradients: list[Tensor], rate: float) -> None:
        self.count += 1
        for p, m, v, g in zip(self.parameters, self.m, self.v, gradients, strict=True):
            m.copy_(0.9 * m + 0.1 * g)
            v.copy_(0.999 * v + 0.001 * g**2)
            step = m / (1 - 0.9**self.count) / ((v / (1 - 0.999**self.count)).sqrt() + 1e-8)
            p -= rate * (step + self.decay * p)


def plain_chain(width: int, prefix: str, state: dict[str, Tensor]) -> nn.Sequential:
    return small.plain_chain((width, WIDTH, WIDTH, 1), prefix, state)


@versions
def test_the_noise_network_equals_the_written_out_one(version: str) -> None:
    agent = make(seeds=(0, 1), dropout=0.25, residual_blocks=2, idql_version=version)
    with torch.no_grad():
        agent.actor.parameters["first.weight"].mul_(1e-3)  # small numbers show what stands beside the variance
    states, actions = torch.randn(2, 6, STATES), torch.randn(2, 6, ACTIONS)
    kept = torch.rand(2, 6, 2 * WIDTH) > 0.25
    condition = agent.actor.state_part(states) + agent.actor.time_part()[:, 3:4]
    whole, dropped = agent.actor.noise(actions, condition), agent.actor.dropping(kept).noise(actions, condition)
    for seed in range(2):
        plain = PlainNoise(agent.actor.parameters.member_state(seed), blocks=2, dropout=0.25, version=version)
        steps = torch.full((6,), 3)
        for ours, mask in ((whole, None), (dropped, kept[seed])):
            expected = plain(actions[seed], states[seed], steps, mask)
            torch.testing.assert_close(ours[seed], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(whole, dropped) and agent.actor.kept is None


@versions
def test_the_update_equals_a_plain_one_with_dropout_and_decay(version: str) -> None:
    """Three networks, their optimisers and both averages over five steps.

    In the last version the critics take all rows, the weights decay (here much) and V's states are normalised. In the
    paper's the critics take the first rows (here 8), and after each step of the policy comes one with gradient zero.
    """
    last = version == "last"
    rows, weight_decay = (ROWS, 0.3) if last else (8, 0.0)
    own = {"critic_batch_size": 512, "weight_decay": 0.3} if last else {}
    rates = {"learning_rate": 3e-3, "ema_decay": 0.9, "tau": 0.1}
    agent = make(num_epochs=1, num_steps_per_epoch=8, idql_version=version, **own, **rates)
    c, state = agent.config, agent.published_state()[0]
    noise_net, noise_average = (PlainNoise(state["actor"], 3, c.dropout, version) for _ in range(2))
    q = [plain_chain(STATES + ACTIONS, f"q{i}_model", state["critic"]) for i in (1, 2)]
    q_target = [plain_chain(STATES + ACTIONS, f"q{i}_model", state["critic"]) for i in (1, 2)]
    norm, v_chain = nn.LayerNorm(STATES, eps=1e-6), plain_chain(STATES, "v_model", state["critic"])
    v = nn.Sequential(norm, v_chain) if last else v_chain
    actor_optimizer = PlainAdamW(list(noise_net.parameters()), weight_decay)
    q_optimizer = torch.optim.Adam([p for net in q for p in net.parameters()], c.critic_learning_rate)
    v_optimizer = torch.optim.Adam(v.parameters(), c.critic_learning_rate)
    alpha_bar = torch.cumprod(1 - beta_schedule("vp", 5), dim=0).float()

    def minimise(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def follow(slow: nn.Module, fast: nn.Module, rate: float) -> None:
        for a, b in zip(slow.parameters(), fast.parameters(), strict=True):
            a.data.lerp_(b.data, rate)

    rng = torch.Generator().manual_seed(3)
    for k in range(5):
        batch, draws = transitions(k), agent.draw(rng, ROWS)
        for name in ("states", "next_states"):
            batch[name] *= 3e-3  # small numbers show what stands beside the variance
        metrics = agent.update(batch, draws)
        states, actions, next_states, rewards, not_dones = (value[0] for value in batch.values())
        rate = 3e-3 * 0.5 * (1 + math.cos(math.pi * k / 8))
        level = alpha_bar[draws["timesteps"][0]].unsqueeze(1)
        noisy = level.sqrt() * actions + (1 - level).sqrt() * draws["noise"][0]
        predicted = noise_net(noisy, states, draws["timesteps"][0], draws["kept"][0])
        loss = (predicted - draws["noise"][0]).square().sum(dim=1).mean()
        torch.testing.assert_close(metrics["bc_loss"][0], loss.detach(), rtol=1e-4, atol=1e-5)
        slopes = torch.autograd.grad(loss, actor_optimizer.parameters)
        for gradients in [slopes] if last else [slopes, [torch.zeros_like(g) for g in slopes]]:
            actor_optimizer.step(gradients, rate)
            follow(noise_average, noise_net, 0.1)
        x = torch.cat([states, actions], dim=1)[:rows]
        with torch.no_grad():
            best = torch.minimum(*(net(x) for net in q_target))
        minimise(v_optimizer, expectile_loss(best - v(states[:rows]), c.expectile).mean())
        with torch.no_grad():
            target = rewards[:rows] + c.discount * not_dones[:rows] * v(next_states[:rows])
        minimise(q_optimizer, sum(F.mse_loss(net(x), target) for net in q))
        for slow, fast in zip(q_target, q, strict=True):
            follow(slow, fast, c.tau)
    after = agent.published_state()[0]
    for kind, net in (("actor", noise_net), ("ema", noise_average)):
        torch.testing.assert_close(after[kind]["time.frequencies"], net.frequencies.data, rtol=1e-4, atol=1e-5)
        for name, layer in net.names.items():
            torch.testing.assert_close(after[kind][f"{name}.weight"], layer.weight.data, rtol=1e-3, atol=2e-5)
    for prefix, kind, net in (
        *([("v_norm", "critic", norm)] if last else []),
        ("v_model", "critic", v_chain),
        ("q1_model", "critic", q[0]),
        ("q2_model", "critic_target", q_target[1]),
    ):
        for weight, value in net.state_dict().items():
            torch.testing.assert_close(after[kind][f"{prefix}.{weight}"], value, rtol=1e-4, atol=1e-5)


# --- The chain ----------------------------------------------------------------------------------------------------


def test_the_ancestral_chain_is_algorithm_2_with_the_action_cut() -> None:
    agent = make(seeds=(0, 1))
    states, noise = torch.randn(2, 2, STATES), torch.randn(2, 5, 6, ACTIONS) * 1.5  # three actions per state
    actions = agent.actor.sample(states, noise)
    betas = beta_schedule("vp", 5).float()
    alpha_bar = torch.cumprod(1 - betas, dim=0)
    for seed in range(2):
        plain = PlainNoise(agent.actor.parameters.member_state(seed), 3, 0.1)
        x = noise[seed, 0]
        for k, i in enumerate((4, 3, 2, 1, 0), start=1):
            predicted = plain(x, states[seed].repeat_interleave(3, dim=0), torch.full((6,), i))
            x = (x - betas[i] / (1 - alpha_bar[i]).sqrt() * predicted) / (1 - betas[i]).sqrt()
            x = x + (betas[i].sqrt() * noise[seed, k] if i > 0 else 0)
            x = x.clamp(-MAX_ACTION, MAX_ACTION)
        torch.testing.assert_close(actions[seed], x, rtol=1e-4, atol=1e-5)


class PointMass:
    """The exact noise predictor of data that are one action: eps = (x - sqrt(alpha-bar) a) / sqrt(1 - alpha-bar)."""

    def __init__(self, diffusion: Diffusion, action: Tensor) -> None:
        self.diffusion, self.action = diffusion, action

    def state_part(self, states: Tensor) -> Tensor:
        return torch.zeros(*states.shape[:2], 1)

    def time_part(self) -> Tensor:
        return torch.arange(5.0).view(1, 5, 1)

    def noise(self, x: Tensor, condition: Tensor) -> Tensor:
        step = condition[..., 0].long()
        return (x - self.diffusion.signal[step].unsqueeze(-1) * self.action) / self.diffusion.spread[step].unsqueeze(-1)


def test_with_the_exact_noise_both_chains_end_at_the_only_action() -> None:
    diffusion = Diffusion("vp", 5, 1.0, "cpu")
    network = PointMass(diffusion, torch.tensor([0.3, -0.9]))
    noise = torch.randn(1, 5, 40, 2)
    for chain in (diffusion.ancestral, diffusion.sample):
        ends = chain(network, torch.zeros(1, 10, 1), noise)
        torch.testing.assert_close(ends, network.action.expand(1, 40, 2), rtol=0, atol=1e-5)


# --- The implicit policy ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expectile", [0.5, 0.7, 0.9])
def test_the_expectile_is_the_implicit_policys_mean_value(expectile: float) -> None:
    """On a table: where V minimises the expectile loss under mu, V = E[Q] under mu |expectile - 1(Q < V)| / Z."""
    mu, q = torch.tensor([0.5, 0.2, 0.2, 0.1]), torch.tensor([0.0, 1.0, 3.0, 4.0])
    v = torch.zeros((), requires_grad=True)
    for _ in range(500):
        v.data -= 0.5 * torch.autograd.grad((mu * expectile_loss(q - v, expectile)).sum(), v)[0]
    weights = mu * implicit_policy_weights(q - v.detach(), expectile)
    torch.testing.assert_close((weights @ q) / weights.sum(), v.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("expectile", [0.5, 0.9])
def test_actions_follow_the_implicit_policy(expectile: float) -> None:
    """Candidates from a known mu over three actions: what is chosen has the reweighted frequencies."""
    agent = make(expectile=expectile, greedy_action=False, action_candidates=256)
    mu, q, v = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([-1.0, 0.5, 2.0]), 0.2
    values = torch.tensor([-0.5, 0.0, 0.5])
    states, rng = torch.zeros(1, 4000, STATES), torch.Generator().manual_seed(0)
    noise = agent.act_draws(rng, 4000)
    which = torch.multinomial(mu, 4000 * 256, replacement=True, generator=rng)
    agent.ema.process.ancestral = lambda *_: values[which].view(1, -1, 1).expand(-1, -1, ACTIONS)
    agent.critic_target = lambda states, actions: torch.stack([q[which], q[which] + 1]).unsqueeze(0)
    agent.value = lambda states: torch.full((1, 4000), v)
    actions = agent.actions_for(states, noise)[0, :, 0]
    weights = mu * torch.where(q > v, expectile, 1 - expectile)
    for value, expected in zip(values, weights / weights.sum(), strict=True):
        assert abs((actions == value).float().mean() - expected) < 0.03


def test_the_greedy_action_is_the_best_candidate_by_the_lower_critic() -> None:
    agent, states = make(seeds=(0, 1), action_candidates=6), torch.randn(2, 4, STATES)
    noise = agent.act_draws(torch.Generator().manual_seed(0), 4)
    assert set(noise) == {"noise"}
    actions = agent.actions_for(states, noise)
    candidates = agent.ema.candidates(states, noise["noise"]).flatten(1, 2)
    for seed in range(2):
        for row in range(4):
            own = candidates[seed].view(4, 6, ACTIONS)[row]
            values = agent.critic_target(states[:, row : row + 1], own.expand(2, -1, -1))[seed].amin(dim=0)
            assert torch.equal(actions[seed, row], own[values.argmax()])


def test_the_policy_is_the_average_not_the_trained_network() -> None:
    agent, states = make(action_candidates=3), torch.randn(1, 5, STATES)
    before = agent.act(states, torch.Generator().manual_seed(0))
    with torch.no_grad():
        agent.actor.parameters.flat.mul_(2)
        agent.critic.parameters.flat.mul_(2)
    assert torch.equal(agent.act(states, torch.Generator().manual_seed(0)), before)
    with torch.no_grad():
        agent.ema.parameters.flat.mul_(2)
    assert not torch.equal(agent.act(states, torch.Generator().manual_seed(0)), before)


@pytest.mark.slow
def test_it_learns_where_the_reward_is() -> None:
    """One state, two actions in the data, one of them rewarded: candidates of both, and the better one is chosen."""
    agent = make(num_epochs=1, learning_rate=3e-3, critic_learning_rate=3e-3, dropout=0.0, ema_decay=0.9, tau=0.1,
                 hidden_dim=32, lr_decay=False)  # fmt: skip
    rng = torch.Generator().manual_seed(0)
    for _ in range(400):
        sign = torch.randint(2, (1, 64, 1), generator=rng) * 2.0 - 1
        batch = {
            "states": torch.zeros(1, 64, STATES),
            "actions": (0.5 * sign).expand(1, 64, ACTIONS),
            "next_states": torch.zeros(1, 64, STATES),
            "rewards": (sign > 0).float(),
            "not_dones": torch.zeros(1, 64, 1),
        }
        agent.update(batch, agent.draw(rng, 64))
    assert abs(agent.value(torch.zeros(1, 1, STATES)).item() - 0.7) < 0.08  # the 0.7 expectile of a fair coin
    noise = torch.randn(1, 5, 200, ACTIONS, generator=rng)
    candidates = agent.ema.sample(torch.zeros(1, 1, STATES), noise)
    assert 0.25 < (candidates[0, :, 0] > 0).float().mean() < 0.75
    chosen = agent.act(torch.zeros(1, 50, STATES), rng)
    assert (chosen > 0).all() and (chosen - 0.5).abs().mean() < 0.15


# --- Settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "expectile", "reward_tune"),
    [("walker2d-medium-v2", 0.7, "iql_returns"), ("antmaze-large-play-v0", 0.9, "iql_antmaze")],
)
def test_the_settings_are_those_of_the_official_launcher(task: str, expectile: float, reward_tune: str) -> None:
    c = hyperparameters.get("idql", task)
    assert (c.expectile, c.reward_tune) == (expectile, reward_tune)
    assert (c.batch_size, c.critic_batch_size, c.num_epochs * c.num_steps_per_epoch) == (512, 512, 3 * 10**6)
    assert (c.activation, 2 * c.time_frequencies, c.weight_decay, c.value_norm) == ("swish", 128, 1e-4, True)
    assert not c.empty_step
    assert (c.learning_rate, c.critic_learning_rate, c.tau, c.ema_decay) == (3e-4, 3e-4, 0.005, 0.999)
    assert (c.diffusion_steps, c.beta_schedule, c.residual_blocks, c.dropout) == (5, "vp", 3, 0.1)
    assert (c.action_candidates, c.greedy_action, c.lr_decay) == (64, True, True)


def test_the_papers_version_is_one_switch_and_a_flag_goes_before_it() -> None:
    c, found = hyperparameters.resolve("idql", "walker2d-medium-v2", {"idql_version": "paper", "weight_decay": 1e-3})
    assert (c.batch_size, c.critic_batch_size, c.num_epochs * c.num_steps_per_epoch) == (2048, 256, 15 * 10**5)
    assert (c.activation, 2 * c.time_frequencies, c.weight_decay, c.value_norm) == ("mish", 64, 1e-3, False)
    assert c.empty_step and c.reward_tune == "iql_returns"
    assert found["num_epochs"] == (1500, "idql_version paper") and found["weight_decay"] == (1e-3, "command line")
    with pytest.raises(ValueError, match="idql_version must be last or paper, not 'first'"):
        hyperparameters.get("idql", "walker2d-medium-v2", idql_version="first")


def test_initial_weights_are_flaxs() -> None:
    agent = make(seeds=(3, 4), hidden_dim=64)
    p = agent.actor.parameters
    bound = math.sqrt(6 / (64 + ACTIONS))
    assert 0.95 * bound < p["last.weight"].abs().max() <= bound and not p["last.bias"].any()
    inner = p["blocks.1.1.weight"]
    assert abs(inner.std() - 1 / 8) < 0.005 and inner.abs().max() <= 2 / (8 * 0.87962566) + 1e-6
    assert abs(p["time.frequencies"].std() - 0.2) < 0.05
    assert (p["blocks.0.norm.weight"] == 1).all() and not p["blocks.0.norm.bias"].any()
    assert not torch.equal(inner[0], inner[1])
