"""One tester that every agent in AGENTS passes: what `agents/parts/agent.py` promises, whatever the learning rule."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import hyperparameters
from agents import AGENTS
from agents.parts.agent import Agent
from tests import small
from utils.data.dataset import Columns

STATES, ACTIONS, ROWS, MAX_ACTION = 5, 3, 16, 0.7
QUICK = {
    "support_actions": 4,
    "plan_actions": 4,
    "ema_start": 2,
    "action_candidates": 8,
    "clip_denoised": MAX_ACTION,
    "hidden_dim": 64,
    "vae_hidden_dim": 32,
    "bc_steps": 3,
    "warmup_steps": 4,
}  # where an agent has them
SHORT_WINDOWS = {  # four channels in every group of the shortest layer: with one, its normalisation has nothing to say
    "horizon": 4, "hidden_dim": 32, "dim_mults": "1,4", "diffusion_steps": 3, "inverse_dim": 32, "value_steps": 20
}  # fmt: skip
UNTRAINED = ("lambda", "normalizer", "action_normalizer")  # may stand still in a few steps

every_agent = pytest.mark.parametrize("algo", list(AGENTS))


def make(algo: str, seeds: Sequence[int], env_name: str = "hopper-medium-v2", **settings: Any) -> Agent:
    fields = {f.name for f in dataclasses.fields(hyperparameters.CONFIGS[algo])}
    if "horizon" in fields:
        settings = {**SHORT_WINDOWS, **settings}
    quick = {name: value for name, value in {**QUICK, **settings}.items() if name in fields}
    return AGENTS[algo](STATES, ACTIONS, MAX_ACTION, hyperparameters.get(algo, env_name, **quick), seeds)


def rngs(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(1000 + seed) for seed in seeds]


def batch(agent: Agent, generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
    """A batch a seed, from that seed's generator; what the agent would plan for itself is random too."""
    parts = []
    for g in generators:
        planned = {n: torch.rand(1, ROWS, width, generator=g) * MAX_ACTION for n, width in agent.planned.items()}
        if agent.windows is None:
            parts.append(small.batch(g, STATES, ACTIONS, MAX_ACTION, ROWS) | planned)
        else:
            parts.append(small.windows(g, STATES, ACTIONS, ROWS, agent.windows.horizon))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def train(agent: Agent, generators: Sequence[torch.Generator], steps: int) -> list[dict[str, Tensor]]:
    return [agent.update(batch(agent, generators), agent.draw(generators, ROWS)) for _ in range(steps)]


def parameters(agent: Agent) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in agent.state_dict()["networks"].items()}


def starts(agent: Agent) -> list[int]:
    """The first step of each phase of training."""
    return sorted({agent.first_step, 0, *(getattr(agent.config, name, 0) for name in ("bc_steps", "value_steps"))})


# --- Shapes and metrics -------------------------------------------------------------------------------------------


@every_agent
def test_shapes(algo: str) -> None:
    agent, generators = make(algo, [3, 4]), rngs([3, 4])
    single, block = agent.draw(generators, ROWS), agent.draw(generators, ROWS, steps=6)
    assert single.keys() == block.keys()
    for name, value in single.items():
        assert value.shape[0] == 2 and block[name].shape == (6, *value.shape), name
        assert value.dtype == block[name].dtype
    for metrics in train(agent, generators, 2):
        assert tuple(metrics) == agent.METRICS
        assert all(value.shape == (2,) and not value.requires_grad for value in metrics.values())
    for number in (1, 7):
        assert agent.act(torch.randn(2, number, STATES), generators).shape == (2, number, ACTIONS)
    assert agent.step == 2


@every_agent
def test_each_metric_is_finite_when_due_and_nan_otherwise(algo: str) -> None:
    agent, generators = make(algo, [0, 1]), rngs([0, 1])
    in_any_phase: set[str] = set()
    for start in starts(agent):
        agent.step, seen = start, []
        for step in range(start, start + 2 * agent.period):
            one, draws = batch(agent, generators), agent.draw(generators, ROWS)
            agent.prepare()
            due = agent.gradient_step(one, draws, step)
            agent.step += 1
            assert set(due) <= set(agent.METRICS)
            assert all(value.shape == (2,) and value.isfinite().all() for value in due.values())
            seen.append(set(due))
        assert seen[: agent.period] == seen[agent.period :], "what is due must repeat with the period"
        in_any_phase |= set().union(*seen)
    assert in_any_phase == set(agent.METRICS), "every metric is due at some step of some phase"
    agent.step = start  # of the last phase
    for metrics, due in zip(train(agent, generators, agent.period), seen, strict=False):
        for name, value in metrics.items():
            assert value.isfinite().all() if name in due else value.isnan().all(), name


@every_agent
def test_training_moves_the_policy(algo: str) -> None:
    agent, generators = make(algo, [0]), rngs([0])
    states, before = torch.randn(1, 64, STATES), parameters(agent)
    first = agent.act(states, rngs([5]))
    for start in sorted({agent.first_step, 2}):  # every phase; from 2 on every average moves too
        agent.step = start
        train(agent, generators, 2 * agent.period)
    after = parameters(agent)
    assert all(not torch.equal(before[name], after[name]) for name in before if name not in UNTRAINED)
    assert (agent.act(states, rngs([5])) - first).abs().max() > 1e-3


# --- The seeds axis -----------------------------------------------------------------------------------------------


@every_agent
def test_a_seed_draws_alike_alone_and_in_company(algo: str) -> None:
    three, alone = make(algo, [0, 1, 2]), make(algo, [1])
    for name, value in three.draw(rngs([0, 1, 2]), ROWS, steps=3).items():
        assert torch.equal(value[:, 1:2], alone.draw(rngs([1]), ROWS, steps=3)[name]), name
    together, single = three.act_draws(rngs([0, 1, 2]), 6), alone.act_draws(rngs([1]), 6)
    for name, value in together.items():
        assert torch.equal(value[1:2], single[name]) and not torch.equal(value[1], value[2]), name


@every_agent
def test_a_seed_learns_alike_alone_and_in_company(algo: str) -> None:
    for start in starts(make(algo, [0])):
        three, alone = make(algo, [0, 1, 2]), make(algo, [1])
        for name, value in parameters(three).items():
            assert torch.equal(value[1:2], parameters(alone)[name]), f"{name} starts otherwise in company"
        three.step = alone.step = start
        together, single = train(three, rngs([0, 1, 2]), 8), train(alone, rngs([1]), 8)
        for a, b in zip(together, single, strict=True):
            for name in a:
                torch.testing.assert_close(a[name][1:2], b[name], rtol=1e-4, atol=1e-5, equal_nan=True, msg=name)
        for name, value in parameters(three).items():
            # Adam makes a step of what rounding leaves of a gradient of zero: of a convolution's many weights one may.
            apart = ~torch.isclose(value[1:2], parameters(alone)[name], rtol=1e-4, atol=5e-5)
            assert apart.sum() <= (1e-4 * apart.numel() if three.windows else 0), name
        states = torch.randn(1, 9, STATES, generator=torch.Generator().manual_seed(7)).expand(3, 9, STATES)
        together_act, single_act = three.act(states, rngs([0, 1, 2])), alone.act(states[:1], rngs([1]))
        torch.testing.assert_close(together_act[1:2], single_act, rtol=1e-3, atol=1e-4)


@every_agent
def test_clipping_keeps_to_its_own_seed(algo: str) -> None:
    """A seed with a wild batch must not change how another seed's gradient is clipped."""
    states = []
    for scale in (1.0, 1000.0):
        agent, generators = make(algo, [0, 1], grad_norm=0.5), rngs([0, 1])
        one, draws = batch(agent, generators), agent.draw(generators, ROWS)
        one["rewards" if "rewards" in one else "returns"][0] *= scale
        one["actions"][0] *= 1 / scale
        for _ in range(2):
            agent.update(one, draws)
        states.append(parameters(agent))
    for name, value in states[0].items():
        torch.testing.assert_close(value[1], states[1][name][1], rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(value[0], states[1][name][0]) for name, value in states[0].items())


# --- Same numbers again -------------------------------------------------------------------------------------------


@every_agent
def test_the_same_seeds_give_the_same_bits(algo: str) -> None:
    ends = []
    for _ in range(2):
        agent, generators = make(algo, [2, 9]), rngs([2, 9])
        train(agent, generators, 6)
        ends.append({**parameters(agent), "act": agent.act(torch.ones(2, 3, STATES), generators)})
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


@every_agent
@pytest.mark.parametrize("decay", ["lr_decay", "lr_decay_full"])
def test_a_checkpoint_continues_bit_for_bit(algo: str, decay: str) -> None:
    """Through a file of tensors and plain values, in the middle of a period, under a schedule that moves."""
    settings = {name: name == decay for name in ("lr_decay", "lr_decay_full")}
    settings |= {"num_steps_per_epoch": 2, "num_epochs": 20, "eval_interval": 2, "pretrain_epochs": 1}
    for start in starts(make(algo, [0], **settings)):
        agent, generators = make(algo, [0, 1], **settings), rngs([0, 1])
        agent.step = start
        train(agent, generators, 3)
        file = io.BytesIO()
        torch.save(agent.state_dict(), file)
        file.seek(0)
        resumed = make(algo, [0, 1], **settings)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        assert resumed.step == agent.step == start + 3
        again = rngs([0, 1])
        for g, h in zip(again, generators, strict=True):
            g.set_state(h.get_state())
        for a, b in zip(train(agent, generators, 7), train(resumed, again, 7), strict=True):
            assert all(torch.equal(a[name].nan_to_num(-7.0), b[name].nan_to_num(-7.0)) for name in a)
        here, there = agent.state_dict(), resumed.state_dict()
        assert same(here, there)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


@every_agent
def test_every_tensor_of_a_checkpoint_has_the_seeds_axis_first(algo: str) -> None:
    agent = make(algo, [0, 1, 2])
    train(agent, rngs([0, 1, 2]), 1)

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            for inner in value.values():
                walk(inner)
        else:
            assert value.shape[0] == 3 if isinstance(value, Tensor) else isinstance(value, int | float | str)

    walk(agent.state_dict())


@every_agent
def test_a_checkpoint_of_other_sizes_is_refused(algo: str) -> None:
    saved = make(algo, [0]).state_dict()
    with pytest.raises(ValueError, match="this agent's is"):
        make(algo, [0, 1]).load_state_dict(saved)
    name = next(iter(saved["networks"]))
    del saved["networks"][name]
    with pytest.raises(ValueError, match=f"the saved '{name}' is missing"):
        make(algo, [0]).load_state_dict(saved)
    with pytest.raises(ValueError, match="at least one seed"):
        make(algo, [])


# --- Acting -------------------------------------------------------------------------------------------------------


@every_agent
def test_actions_lie_in_the_box(algo: str) -> None:
    agent, generators = make(algo, [0, 1]), rngs([0, 1])
    train(agent, generators, 3)
    actions = agent.act(torch.randn(2, 50, STATES) * 10, generators)
    assert actions.isfinite().all() and actions.abs().max() <= MAX_ACTION
    assert actions.std() > 1e-3 and not actions.requires_grad  # CQL's policy starts with all actions near 0


@every_agent
def test_only_active_rows_are_computed_and_they_do_not_depend_on_the_others(algo: str) -> None:
    agent, states = make(algo, [0, 1]), torch.randn(2, 6, STATES)
    active = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 0]]).bool()
    whole, some = agent.act(states, rngs([0, 1])), agent.act(states, rngs([0, 1]), active)
    torch.testing.assert_close(some[active], whole[active], rtol=1e-4, atol=1e-5)
    assert not some[~active].any()


@every_agent
def test_acting_in_chunks_changes_nothing(algo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    agent, states = make(algo, [0, 1]), torch.randn(2, 7, STATES)
    active = torch.tensor([[1, 1, 1, 1, 0, 1], [1, 0, 0, 0, 1, 1]]).bool()
    whole, some = agent.act(states, rngs([0, 1])), agent.act(states[:, :6], rngs([0, 1]), active)
    calls, plain = [], agent.actions_for
    monkeypatch.setattr("agents.parts.agent.CHUNK", {"cpu": 2 * 2 * agent.rows_per_state})
    monkeypatch.setattr(agent, "actions_for", lambda states, noise: calls.append(states.shape) or plain(states, noise))
    torch.testing.assert_close(agent.act(states, rngs([0, 1])), whole, rtol=1e-4, atol=1e-5)
    assert [shape[1] for shape in calls] == [2, 2, 2, 1]
    torch.testing.assert_close(agent.act(states[:, :6], rngs([0, 1]), active), some, rtol=1e-4, atol=1e-5)


# --- Planned columns ----------------------------------------------------------------------------------------------


def planned(agent: Agent, rows: int = 30) -> dict[str, Tensor]:
    """What the agent plans on a small table, from its seeds' own generators."""
    table = small.dataset(rows, STATES, ACTIONS).to("cpu")
    columns = Columns(agent.planned, agent.num_seeds, rows, "cpu")
    columns.rows.fill_(float("nan"))
    with torch.no_grad():
        agent.plan(table, rngs(agent.seeds), columns.views)
    return columns.views


@every_agent
def test_a_plan_fills_its_columns_and_a_seed_plans_alike_alone_and_in_company(algo: str) -> None:
    three, alone = make(algo, [0, 1, 2]), make(algo, [1])
    if not three.planned:
        assert all(three.plan_step(step) is None for step in (three.first_step, 0, 10**6))
        return
    before = parameters(three)
    for (name, value), single in zip(planned(three).items(), planned(alone).values(), strict=True):
        assert value.shape == (3, 30, three.planned[name]) and value.isfinite().all()
        torch.testing.assert_close(value[1:2], single, rtol=1e-4, atol=1e-5, msg=name)
    assert all(torch.equal(value, before[name]) for name, value in parameters(three).items())


@every_agent
def test_a_plan_does_not_depend_on_how_many_rows_are_handled_at_once(
    algo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the random numbers, which are drawn block by block: here every draw is the same."""
    agent = make(algo, [0, 1])
    if not agent.planned:
        return
    same_draws = lambda rng, seeds, steps, shape: torch.full((steps, seeds, *shape), 0.3)  # noqa: E731
    monkeypatch.setattr(f"{type(agent).__module__}.normals", same_draws, raising=False)
    whole = {name: value.clone() for name, value in planned(agent).items()}
    monkeypatch.setattr("agents.parts.agent.PLAN_ROWS", 7)  # several blocks and a short last one
    for name, value in planned(agent).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-4, atol=1e-5, msg=name)


@every_agent
def test_when_to_plan_follows_from_the_step_and_changes_between_periods_only(algo: str) -> None:
    agent = make(algo, [0], num_steps_per_epoch=20, pretrain_epochs=2)
    last, period = None, agent.period
    for step in range(agent.first_step // period * period, 60 // period * period, period):
        due = {agent.plan_step(within) for within in range(step, step + period)}
        assert len(due) == 1
        (at,) = due
        assert at is None if not agent.planned else at is None or (at <= step and at % period == 0)
        assert last is None or at >= last
        last = at
    assert (last is not None) == bool(agent.planned), "the last phase of training reads what was planned"


# --- Published names ----------------------------------------------------------------------------------------------


@every_agent
def test_published_weights_go_out_and_come_in(algo: str) -> None:
    agent = make(algo, [0, 1])
    train(agent, rngs([0, 1]), 4)
    states = agent.published_state()
    assert len(states) == 2
    one = {name: value for name, value in states[1].items() if isinstance(value, dict)}
    fresh = make(algo, [5, 6])
    fresh.load_published(one)
    for loaded in fresh.published_state():
        assert same({name: loaded[name] for name in one}, one)
    here = agent.act_draws(rngs([0, 1]), 4)
    a, b = agent.actions_for(torch.ones(2, 4, STATES), here), fresh.actions_for(torch.ones(2, 4, STATES), here)
    torch.testing.assert_close(a[1], b[1], rtol=1e-4, atol=1e-5)


@every_agent
def test_published_weights_that_do_not_fit_are_refused(algo: str) -> None:
    agent = make(algo, [0])
    networks = {n: v for n, v in agent.published_state()[0].items() if isinstance(v, dict)}
    name = next((name for name in ("actor", "bc_actor") if name in networks), next(iter(networks)))
    weight = next(iter(networks[name]))
    short = {k: v for k, v in networks[name].items() if k != weight}
    with pytest.raises(ValueError, match="the weights lack"):
        agent.load_published({**networks, name: short})
    with pytest.raises(ValueError, match="has shape"):
        agent.load_published({**networks, name: {**networks[name], weight: torch.zeros(2, 2)}})


# --- Speed: what execution relies on ------------------------------------------------------------------------------


@every_agent
def test_every_loss_named_in_compiled_is_what_the_update_runs(algo: str) -> None:
    agent, generators = make(algo, [0, 1]), rngs([0, 1])
    one, draws, called = batch(agent, generators), agent.draw(generators, ROWS), []
    assert agent.COMPILED
    for name in agent.COMPILED:
        plain = getattr(agent, name)
        loss, metrics = plain(one, draws)
        assert loss.shape == (2,) and loss.requires_grad
        assert all(value.shape == (2,) and not value.requires_grad for value in metrics.values())

        def wrapped(*args: Any, _name: str = name, _plain: Any = plain) -> Any:
            called.append(_name)
            return _plain(*args)

        setattr(agent, name, wrapped)
    for start in starts(agent):
        agent.step = start
        train(agent, generators, agent.period)
    assert set(called) == set(agent.COMPILED)


class NoWaiting(TorchDispatchMode):
    """Refuses every operation whose result the host must wait for: reading a number, or a shape that data decide."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in self.WAITS, f"{func} makes the host wait for the device"
        return func(*args, **(kwargs or {}))


@every_agent
def test_the_update_never_waits_for_the_device(algo: str) -> None:
    agent, generators = make(algo, [0, 1]), rngs([0, 1])
    with NoWaiting(), pytest.raises(AssertionError, match="wait"):
        torch.ones(()).item()
    for start in starts(agent):
        agent.step = start
        for _ in range(agent.period):
            one, draws = batch(agent, generators), agent.draw(generators, ROWS)
            agent.prepare()
            with NoWaiting():
                agent.gradient_step(one, draws, agent.step)
            agent.step += 1


@every_agent
def test_only_in_place_writes_so_a_captured_graph_stays_valid(algo: str) -> None:
    agent, generators = make(algo, [0]), rngs([0])
    where = {name: p.flat.data_ptr() for name, p in agent.networks.items()}
    train(agent, generators, agent.period)
    agent.load_state_dict(make(algo, [1]).state_dict())
    assert where == {name: p.flat.data_ptr() for name, p in agent.networks.items()}
    for p in agent.networks.values():
        offset = p.flat.data_ptr()
        for name, tensor in p.tensors.items():
            assert tensor.data_ptr() == offset, name
            offset += tensor[0].numel() * tensor.element_size()


def test_every_agent_has_its_settings() -> None:
    assert list(AGENTS) == list(hyperparameters.CONFIGS)


@pytest.mark.parametrize(
    ("algo", "setting", "value"),
    [
        ("bcq", "phi", 0.3),
        ("bcq", "vae_learning_rate", 1e-2),
        ("bear", "vae_learning_rate", 1e-2),
        ("bear", "mmd_samples", 2),
        ("td3_bc", "target_noise_clip", 0.01),
    ],
)
def test_a_setting_changes_what_is_learnt(algo: str, setting: str, value: float) -> None:
    ends = []
    for changed in ({}, {setting: value}):
        agent, generators = make(algo, [0], warmup_steps=0, **changed), rngs([0])
        train(agent, generators, 4)
        ends.append(parameters(agent))
    assert any(not torch.equal(before, ends[1][name]) for name, before in ends[0].items())


def test_critic_layers_is_the_depth_of_sfbcs_critic() -> None:
    sizes = [make("sfbc", [0], critic_layers=layers).networks["critic"].shapes for layers in (1, 3)]
    assert [sum(len(shape) == 2 for shape in one.values()) for one in sizes] == [2, 4]
