"""Lockstep environments against single ones, step for step and bit for bit."""

import os

import mujoco
import numpy as np
import pytest
from gymnasium.utils import seeding

from benchmarks import stepping
from utils import environments
from utils.environments.lockstep import LockstepEnvs
from utils.errors import UserError

TASKS = ("hopper-medium-v2", "halfcheetah-medium-v2", "walker2d-medium-v2", "antmaze-umaze-v0", "antmaze-large-play-v2")


def _actions(steps: int, envs: LockstepEnvs, dtype: type = np.float32) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.uniform(-1.2, 1.2, (steps, envs.num_envs, envs.action_dim)).astype(dtype)


def _generators(number: int, seed: int = 0) -> list[np.random.Generator]:
    return [seeding.np_random(seed + row)[0] for row in range(number)]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("task", TASKS)
def test_equals_one_environment_reset_again_and_again(task, threads):
    """One generator in every row is one seeded environment whose episodes follow each other."""
    envs = LockstepEnvs(environments.make(task), 5, threads)
    actions = _actions(60, envs)
    rng, _ = seeding.np_random(8)
    states = [envs.reset([rng] * 5)]
    goals = envs.goals
    running = np.ones(5, dtype=bool)
    results = []
    for action in actions:
        results.append(envs.step(action, running))
        states.append(results[-1][0])
        running = running & ~(results[-1][2] | results[-1][3])
    env = environments.make(task)
    for row in range(5):
        state, _ = env.reset(seed=8 if row == 0 else None)
        np.testing.assert_array_equal(states[0][row], state)
        if goals is not None:
            np.testing.assert_array_equal(goals[row], env.unwrapped.target_goal)
        for step, action in enumerate(actions[:, row]):
            state, reward, terminated, truncated, _ = env.step(action)
            np.testing.assert_array_equal(states[step + 1][row], state)
            assert (reward, terminated, truncated) == tuple(result[row] for result in results[step][1:])
            if terminated:
                break
    envs.close()


def test_rows_that_do_not_run_keep_their_state_and_their_simulation():
    envs = environments.make_lockstep("hopper-medium-v2", 3)
    alone = environments.make_lockstep("hopper-medium-v2", 1)
    start = envs.reset(_generators(3))
    np.testing.assert_array_equal(alone.reset([_generators(3)[1]])[0], start[1])
    actions = _actions(6, envs)
    for step in range(3):
        states, rewards, terminated, truncated = envs.step(actions[step], np.array([True, False, True]))
        np.testing.assert_array_equal(states[1], start[1])
        assert (rewards[1], terminated[1], truncated[1]) == (0.0, False, False)
        assert rewards[0] != 0 and rewards[2] != 0
    for step in range(3, 6):
        states, rewards, *_ = envs.step(actions[step], np.ones(3, dtype=bool))
        expected, reward, *_ = alone.step(actions[step, 1:2], np.ones(1, dtype=bool))
        np.testing.assert_array_equal(states[1], expected[0])
        assert rewards[1] == reward[0]
    states, rewards, *_ = envs.step(np.full((3, 3), np.nan), np.zeros(3, dtype=bool))
    assert not rewards.any()


def test_one_row_restarts_while_the_others_go_on():
    envs, undisturbed = (environments.make_lockstep("walker2d-medium-v2", 2) for _ in range(2))
    envs.reset(_generators(2))
    undisturbed.reset(_generators(2))
    actions = _actions(8, envs)
    for step in range(8):
        if step == 4:
            fresh, _ = environments.make("walker2d-medium-v2").reset(seed=99)
            np.testing.assert_array_equal(envs.reset_one(1, seeding.np_random(99)[0]), fresh)
        states, *_ = envs.step(actions[step], np.ones(2, dtype=bool))
        expected, *_ = undisturbed.step(actions[step], np.ones(2, dtype=bool))
        np.testing.assert_array_equal(states[0], expected[0])


def test_what_is_returned_is_the_callers():
    envs = environments.make_lockstep("hopper-medium-v2", 2)
    first = envs.reset(_generators(2))
    kept = first.copy()
    second, *_ = envs.step(np.zeros((2, 3)), np.ones(2, dtype=bool))
    np.testing.assert_array_equal(first, kept)
    second[:] = 0
    third, *_ = envs.step(np.zeros((2, 3)), np.array([True, False]))
    assert third[1].any()


def test_time_limit_counts_from_each_rows_reset():
    envs = environments.make_lockstep("antmaze-umaze-v2", 2)
    assert envs.max_episode_steps == 700
    envs.reset(_generators(2))
    running = np.ones(2, dtype=bool)
    action = np.zeros((2, 8), dtype=np.float32)
    for step in range(1, 703):
        if step == 3:
            envs.reset_one(1, np.random.default_rng(3))
        _, _, terminated, truncated = envs.step(action, running)
        assert not terminated.any()
        assert truncated.tolist() == [step == 700, step == 702]
        running &= ~truncated


@pytest.mark.parametrize("task", ["hopper-medium-v2", "antmaze-umaze-v0"])
def test_unstable_row_is_ended_warned_of_and_counted(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its own log there
    envs, stable = (environments.make_lockstep(task, 3) for _ in range(2))
    start = envs.reset(_generators(3))
    stable.reset(_generators(3))
    envs._datas[1].qvel[2] = 1e11
    running, actions = np.ones(3, dtype=bool), np.zeros((3, envs.action_dim))
    with pytest.warns(RuntimeWarning, match=r"\[1\] became unstable"):
        states, rewards, terminated, truncated = envs.step(actions, running)
    expected, expected_rewards, *_ = stable.step(actions, running)
    np.testing.assert_array_equal(states, [expected[0], start[1], expected[2]])
    assert rewards.tolist() == [expected_rewards[0], 0.0, expected_rewards[2]]
    assert terminated.tolist() == [False, True, False] and not truncated.any()
    assert envs.unstable.tolist() == [0, 1, 0]
    envs.reset_one(1, np.random.default_rng(0))
    assert not envs.step(actions, running)[2].any()
    assert envs.unstable.tolist() == [0, 1, 0]


def test_v0_goal_belongs_to_the_generator_and_v2_goal_to_the_reset():
    keeps = environments.make_lockstep("antmaze-medium-play-v0", 4)
    one, other = _generators(2)
    keeps.reset([one, one, other, other])
    goals = keeps.goals
    np.testing.assert_array_equal(goals[0], goals[1])
    np.testing.assert_array_equal(goals[2], goals[3])
    assert (goals[0] != goals[2]).any()
    keeps.reset_one(2, one)
    np.testing.assert_array_equal(keeps.goals[2], goals[0])
    draws = environments.make_lockstep("antmaze-medium-play-v2", 4)
    draws.reset([one] * 4)
    assert len({tuple(goal) for goal in draws.goals}) == 4


def test_each_row_is_judged_by_its_own_goal():
    envs = environments.make_lockstep("antmaze-umaze-v2", 3)
    states = envs.reset(_generators(3))
    goals = states[:, :2] + [[0.0, 0.0], [9.0, 0.0], [0.0, 0.3]]
    envs._goals = goals
    np.testing.assert_array_equal(envs.goals, goals)
    _, rewards, terminated, _ = envs.step(np.zeros((3, 8)), np.ones(3, dtype=bool))
    assert rewards.tolist() == [1.0, 0.0, 1.0] and terminated.tolist() == [True, False, True]
    assert environments.make_lockstep("hopper-medium-v2", 1).goals is None


def test_misuse_raises_one_clear_line():
    envs = environments.make_lockstep("hopper-medium-v2", 2)
    envs.reset(_generators(2))
    running = np.ones(2, dtype=bool)
    nan = np.array([[0, 0, np.nan], [0, 0, 0]])
    for call, message in (
        (lambda: envs.step(np.zeros((2, 4)), running), "expected"),
        (lambda: envs.step(np.zeros((3, 3)), np.ones(3, dtype=bool)), "expected"),
        (lambda: envs.step(nan, running), "NaN"),
        (lambda: envs.reset(_generators(3)), "3 generators for 2"),
        (lambda: environments.make_lockstep("hopper-medium-v2", 0), "at least one"),
        (lambda: LockstepEnvs(environments.make("hopper-medium-v2"), 2, 0), "at least one"),
    ):
        with pytest.raises(UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    envs.step(np.where(np.isnan(nan), 0, nan), running)


@pytest.mark.parametrize("threads", [1, 4])
def test_error_in_any_thread_reaches_the_caller(threads, monkeypatch):
    envs = LockstepEnvs(environments.make("hopper-medium-v2"), 4, threads)
    envs.reset(_generators(4))

    def fail(*_):
        raise RuntimeError("no memory")

    step = mujoco.mj_step
    running = np.ones(4, dtype=bool)
    monkeypatch.setattr(mujoco, "mj_step", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        envs.step(np.zeros((4, 3)), running)
    monkeypatch.setattr(mujoco, "mj_step", step)
    states, *_ = envs.step(np.zeros((4, 3)), running)
    assert np.isfinite(states).all()


def test_close_ends_the_threads():
    envs = LockstepEnvs(environments.make("hopper-medium-v2"), 4, 3)
    helpers = envs._team._helpers
    assert all(helper.is_alive() for helper in helpers) and len(helpers) == 2
    envs.close()
    envs.close()
    for helper in helpers:
        helper.join(timeout=10)
    assert not any(helper.is_alive() for helper in helpers)


def test_sizes():
    envs = environments.make_lockstep("antmaze-large-diverse-v0", 3)
    sizes = (envs.num_envs, envs.state_dim, envs.action_dim, envs.max_action, envs.max_episode_steps)
    assert sizes == (3, 29, 8, 1.0, 1000)


def test_stepping_benchmark_reports_both(capsys):
    stepping.main(["--envs", "2", "--steps", "3", "--rounds", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("environment steps/s of 2 environments") and str(os.cpu_count()) in lines[0]
    assert [line.split()[0] for line in lines[2:]] == list(stepping.TASKS)
    for line in lines[2:]:
        sync, lockstep, ratio = map(float, line.split()[1:])
        rounding = 0.005 + 0.5 * (1.01 + ratio) / sync  # rates are printed to 1, ratios to 0.01
        assert sync > 0 and abs(ratio - lockstep / sync) <= rounding
