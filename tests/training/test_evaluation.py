"""Lockstep evaluation against one episode at a time, on an environment whose returns are known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from agents.parts.parameters import Parameters
from utils.errors import UserError
from utils.runs.checkpoint import split
from utils.training.evaluation import Evaluator, environment_rngs, evaluate


class Countdown:
    """Starts at a random integer n in 3 .. 9, pays n + action each step and ends after n steps, or at the limit."""

    state_dim, action_dim, max_action = 1, 1, 1.0

    def __init__(self, num_envs: int, limit: int = 8) -> None:
        self.num_envs, self.max_episode_steps = num_envs, limit
        self.unstable = np.zeros(num_envs, dtype=np.int64)
        self.steps_taken = 0

    def reset(self, rngs: Sequence[np.random.Generator]) -> np.ndarray:
        self.start = np.array([rng.integers(3, 10) for rng in rngs])
        self.time = np.zeros(self.num_envs, dtype=int)
        return self.start[:, None].astype(float)

    def step(self, actions: np.ndarray, running: np.ndarray) -> tuple[np.ndarray, ...]:
        assert actions.shape == (self.num_envs, 1)
        self.steps_taken += int(running.sum())
        self.time[running] += 1
        rewards = np.where(running, self.start + actions[:, 0], 0.0)
        ended = self.time >= self.start
        return self.start[:, None].astype(float), rewards, ended, (self.time >= self.max_episode_steps) & ~ended


def constant(states: torch.Tensor, rngs: Sequence[torch.Generator], active: torch.Tensor) -> torch.Tensor:
    return 0.5 * active.unsqueeze(-1)


def test_returns_and_lengths_are_those_of_the_episodes() -> None:
    environments = Countdown(6)
    rngs = environment_rngs([0, 4], evaluation=3, fresh=False)
    episodes = evaluate(constant, environments, [0, 4], rngs, [], "cpu")
    for k, seed in enumerate((0, 4)):
        rng = np.random.default_rng(seed + 100)  # one environment, reset three times
        starts = np.array([rng.integers(3, 10) for _ in range(3)])
        lengths = np.minimum(starts, 8)
        assert episodes.lengths[k].tolist() == lengths.tolist()
        np.testing.assert_allclose(episodes.returns[k], lengths * (starts + 0.5))
    assert environments.steps_taken == episodes.lengths.sum()  # ended episodes are not stepped on


def test_published_seeds_repeat_and_fresh_ones_do_not() -> None:
    draw = lambda number, fresh: [g.random() for g in environment_rngs([0, 1], number, fresh)]  # noqa: E731
    assert draw(0, False) == draw(7, False)
    assert draw(0, True) != draw(7, True) and draw(7, True) == draw(7, True)
    assert draw(7, True)[0] != draw(7, True)[1]


def test_environments_must_be_shared_out_evenly() -> None:
    with pytest.raises(ValueError, match="5 environments cannot be shared out among 2 seeds"):
        evaluate(constant, Countdown(5), [0, 1], environment_rngs([0, 1], 0, False), [], "cpu")


def test_unstable_episodes_are_counted_once() -> None:
    class Unstable(Countdown):
        def step(self, actions: np.ndarray, running: np.ndarray) -> tuple[np.ndarray, ...]:
            states, rewards, ended, truncated = super().step(actions, running)
            if self.time[2] == 1:
                self.unstable[2] += 1
                ended = ended.copy()
                ended[2] = True
            return states, rewards, ended, truncated

    environments = Unstable(4)
    for _ in range(2):  # the count of an earlier evaluation does not carry over
        episodes = evaluate(constant, environments, [0, 1], environment_rngs([0, 1], 0, False), [], "cpu")
        assert episodes.unstable.tolist() == [[False, False], [True, False]]
        assert episodes.lengths[1, 0] == 1


class Learner:
    """The least that an evaluator needs of an agent: one weight, which is its action."""

    def __init__(self, weight: float) -> None:
        self.device, self.seeds, self.num_seeds, self.step = torch.device("cpu"), [0], 1, 7
        self.networks = {"policy": Parameters({"a": ()}, 1, "cpu", trainable=False)}
        self.networks["policy"].flat.fill_(weight)

    def act(self, states: torch.Tensor, rngs: Sequence[torch.Generator], active: torch.Tensor) -> torch.Tensor:
        return self.networks["policy"].flat.view(1, 1, 1).expand(1, states.shape[1], 1).clone()


def test_a_snapshot_keeps_the_weights_of_the_moment() -> None:
    learner, snapshot = Learner(0.5), Learner(0.0)
    evaluator = Evaluator(learner, snapshot, snapshot.act, Countdown(3), fresh=False)
    evaluator.begin()
    learner.networks["policy"].flat.fill_(-9.0)
    learner.step = 8
    with pytest.raises(RuntimeError, match="under way"):
        evaluator.begin()
    step, episodes = evaluator.collect(wait=True)
    expected = evaluate(Learner(0.5).act, Countdown(3), [0], environment_rngs([0], 7, False), [], "cpu")
    assert step == 7 and np.array_equal(episodes.returns, expected.returns)
    assert evaluator.collect(wait=True) is None and not evaluator.under_way
    evaluator.close()


@pytest.mark.parametrize("beside", [True, False])
def test_what_was_under_way_is_made_again(beside: bool) -> None:
    """From its own weights, not from those that the agent has by then; with and without a snapshot."""
    learner, snapshot = Learner(0.5), Learner(0.0)
    evaluator = Evaluator(learner, snapshot, snapshot.act, Countdown(3), fresh=False)
    assert evaluator.state_dict() == {}
    evaluator.begin()
    learner.networks["policy"].flat.fill_(-9.0)
    learner.step = 11
    (saved,) = split(evaluator.state_dict(), 1)
    expected_step, expected = evaluator.collect(wait=True)
    evaluator.close()
    later, snapshot = Learner(-9.0), Learner(0.0) if beside else None
    later.step = 11
    again = Evaluator(later, snapshot, (snapshot or later).act, Countdown(3), fresh=False)
    again.resume([saved])
    step, episodes = again.collect(wait=True)
    assert step == expected_step == 7 and np.array_equal(episodes.returns, expected.returns)
    assert later.networks["policy"].flat.item() == -9.0
    again.resume([{}])
    assert not again.under_way
    again.close()


@pytest.mark.parametrize("wrong", ["gone", None, 3, "text", [1], torch.zeros(2, 3), {"policy": torch.zeros(5)}])
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize("key", ["step", "played", "networks", None])
def test_a_saved_evaluation_of_any_other_form_is_one_line(key: str | None, wrong: object) -> None:
    learner = Learner(0.5)
    evaluator = Evaluator(learner, None, learner.act, Countdown(3), fresh=False)
    evaluator.begin()
    (saved,) = split(evaluator.state_dict(), 1)
    evaluator.collect(wait=True)
    changed = {**saved, key: wrong} if key else wrong
    if wrong == "gone" and key:
        changed = {name: value for name, value in saved.items() if name != key}
    try:
        evaluator.resume([changed])
    except UserError as error:
        assert "does not fit this run" in str(error) and "\n" not in str(error)
    evaluator.close()


def test_an_error_in_the_evaluation_is_raised_where_it_is_collected() -> None:
    def broken(*_: object) -> torch.Tensor:
        raise FloatingPointError("no action")

    evaluator = Evaluator(Learner(0.5), Learner(0.0), broken, Countdown(3), fresh=False)
    evaluator.begin()
    with pytest.raises(FloatingPointError, match="no action"):
        evaluator.collect(wait=True)
    evaluator.close()
