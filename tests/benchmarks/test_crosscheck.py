"""The cross-check with the original stack: its planner and policies, and that its claims fail where they should."""

import sys

import numpy as np
import pytest

from benchmarks.fidelity import crosscheck, play
from benchmarks.fidelity.crosscheck import return_claims, state_claims, step_claims
from benchmarks.fidelity.physics import FIELDS, load_recording
from benchmarks.fidelity.play import CELL, FIXED_ACTIONS, Game, TanhGaussian, WaypointPlanner, play_all
from utils.errors import UserError

U_MAZE = np.array([list(row) for row in ("11111", "10001", "11101", "10001", "11111")]) == "1"
START = (1, 1)


class Ones:
    """A generator whose noise is known: 0 uniform, 1 normal."""

    def uniform(self, low, high, size):
        return np.full(size, low, dtype=float)

    def randn(self, count):
        return np.ones(count)


def planner(goal=(0.7, 8.6)):
    return WaypointPlanner(U_MAZE, START, np.array(goal))


@pytest.mark.parametrize(
    ("position", "waypoint"),
    [
        ((0.0, 0.0), (CELL, 0.0)),
        ((-1.5, -1.0), (CELL, 0.0)),  # left of the start's centre is still the start's cell
        ((5.0, 1.0), (2 * CELL, 0.0)),
        ((9.0, 1.0), (2 * CELL, CELL)),
        ((9.0, 5.0), (2 * CELL, 2 * CELL)),
        ((9.0, 9.0), (CELL, 2 * CELL)),
        ((5.0, 9.0), (0.7, 8.6)),  # the next cell is the goal's: head for the goal itself
        ((1.0, 9.0), (0.7, 8.6)),
        ((1.0, 5.0), (0.7, 8.6)),  # counted as a wall beside the goal's cell
    ],
)
def test_planner_follows_the_shortest_path(position, waypoint):
    np.testing.assert_allclose(planner().waypoint(np.array(position), Ones()), waypoint, atol=1e-12)


def test_waypoints_scatter_over_a_quarter_cell():
    random = np.random.RandomState(0)
    points = np.array([planner().waypoint(np.zeros(2), random) - [CELL, 0.0] for _ in range(400)])
    assert (points >= 0).all() and (points < CELL / 4).all()
    np.testing.assert_allclose(points.mean(axis=0), CELL / 8, atol=0.05)


def test_policy_is_the_tanh_gaussian():
    weights = {
        "fc0.weight": np.array([[1.0], [-1.0]]),
        "fc0.bias": np.array([0.0, 0.25]),
        "fc1.weight": np.eye(2),
        "fc1.bias": np.zeros(2),
        "last_fc.weight": np.array([[1.0, 1.0]]),
        "last_fc.bias": np.array([0.1]),
        "last_fc_log_std.weight": np.zeros((1, 2)),
        "last_fc_log_std.bias": np.array([5.0]),  # cut to 2
    }
    policy = TanhGaussian(weights)
    assert policy.act(np.array([0.5]), Ones())[0] == pytest.approx(np.tanh(0.5 + 0.1 + np.exp(2.0)), abs=1e-15)
    weights["last_fc_log_std.bias"] = np.array([-50.0])  # cut to -20
    assert policy.act(np.array([-0.5]), Ones())[0] == pytest.approx(np.tanh(0.75 + 0.1 + np.exp(-20.0)), abs=1e-15)


def test_play_is_the_same_twice_and_covers_all_bodies(monkeypatch):
    """This side needs nothing but the project; the original's steps are kept in the original only."""
    monkeypatch.setattr(play, "FIXED_EPISODES", 2)
    game = Game("mujoco", "antmaze-umaze-v2")
    walls, start = game.maze()
    np.testing.assert_array_equal(walls, U_MAZE)
    assert start == START
    plays, steps = play_all("mujoco", None, 2)
    again, _ = play_all("mujoco", None, 2)
    assert plays == again
    assert steps == {}
    assert {play.task.split("-")[0] for play in plays} == {"hopper", "halfcheetah", "walker2d", "antmaze"}
    assert all(play.policy == FIXED_ACTIONS and len(play.states) == min(play.length, 20) + 1 for play in plays)


def fixed(states):
    return {("hopper-medium-v2", FIXED_ACTIONS): [{"states": episode} for episode in states]}


@pytest.mark.parametrize(
    ("theirs", "holds"),
    [
        ([[[0.0, 1.0], [2.0, 3.0]]], True),
        ([[[0.0, 1.0], [2.0, 3.0 + 5e-7]]], True),
        ([[[0.0, 1.0], [2.0, 3.0 + 2e-6]]], False),
        ([[[0.0, 1.0]]], False),  # ended earlier
    ],
)
def test_state_claims(theirs, holds):
    (claim,) = state_claims(fixed([[[0.0, 1.0], [2.0, 3.0]]]), fixed(theirs))
    assert claim.holds is holds


def returns(policy, values):
    return {("hopper-medium-v2", policy): [{"total": value} for value in values]}


@pytest.mark.parametrize(
    ("policy", "theirs", "allowed", "holds"),
    [
        ("hopper_online_3", [1.0, 2.0, 3.04], 2, True),
        ("hopper_online_3", [1.0, 2.0, 3.2], 2, False),  # an error of 0.067 in the mean: not the decimal
        ("walker_online_3", [1.0, 2.0, 3.2], 2, True),
        ("walker_online_3", [3.0, 4.0, 5.0], 2, False),  # 2 apart, two standard errors are 1.63
        ("walker_online_3", [3.0, 4.0, 5.0], 3, True),
    ],
)
def test_return_claims(policy, theirs, allowed, holds):
    (claim,) = return_claims(returns(policy, [1.0, 2.0, 3.0]), returns(policy, theirs), allowed)
    assert claim.holds is holds
    assert claim.original == "2.0 ± 0.6"


@pytest.mark.parametrize(
    ("field", "shift", "holds"), [("action", 0.0, True), ("next_qpos", 1e-6, False), ("done", 1, False)]
)
def test_step_claims_on_recorded_steps(field, shift, holds):
    """The recorded rows of the original pass; a shift of one of them in one field is seen."""
    steps = {f"hopper-medium-v2/{name}": load_recording("hopper")[name][:5].copy() for name in FIELDS}
    steps[f"hopper-medium-v2/{field}"][3] += np.asarray(shift).astype(steps[f"hopper-medium-v2/{field}"].dtype)
    (claim,) = step_claims(steps)
    assert claim.holds is holds


def test_step_claims_give_every_row_its_goal():
    recording = load_recording("antmaze-umaze-v0")
    steps = {f"antmaze-umaze-v2/{name}": recording[name] for name in FIELDS}
    steps["antmaze-umaze-v2/goal"] = np.tile(recording["goal"], (len(recording["done"]), 1))
    assert recording["done"].any()
    (claim,) = step_claims(steps)
    assert claim.holds
    steps["antmaze-umaze-v2/goal"] = steps["antmaze-umaze-v2/goal"] + 3.0
    (claim,) = step_claims(steps)
    assert not claim.holds


def test_a_run_from_end_to_end(tmp_path, monkeypatch, capsys):
    """Both sides played here (the project stands in for the original): report, table and exit code."""
    original, restored = ({"versions": {"numpy": "1"}, "plays": []} for _ in range(2))
    recording = load_recording("hopper")

    def play_both(classic, policies, episodes, folder):
        for side, total in ((original, 1.0), (restored, 2.0)):
            plays = [{"task": "hopper-medium-v2", "policy": "hopper_online_3", "total": total} for _ in range(2)]
            side["plays"] = [play | {"episode": k, "seed": 1000 + k, "length": 9} for k, play in enumerate(plays)]
        (folder / "d4rl").mkdir()
        np.savez(folder / "d4rl" / "steps.npz", **{f"hopper-medium-v2/{name}": recording[name] for name in FIELDS})
        return original, restored

    monkeypatch.setattr(crosscheck, "_play_both", play_both)
    assert crosscheck.main(["--classic", "VENV", "--out", str(tmp_path)]) == 1
    assert "crosscheck: 1 of 2 claims hold" in capsys.readouterr().out
    assert "**NO**" in (tmp_path / "crosscheck.md").read_text()
    rows = (tmp_path / "crosscheck.csv").read_text().splitlines()
    assert rows[1] == "original,hopper-medium-v2,hopper_online_3,0,1000,1.0,9"
    assert len(rows) == 5


def test_what_cannot_be_checked_is_one_clear_line(tmp_path):
    for arguments in (["--classic", str(tmp_path)], ["--classic", str(tmp_path), "--episodes", "1"]):
        with pytest.raises(UserError) as error:
            crosscheck.main(arguments)
        assert "\n" not in str(error.value)


def test_a_side_that_fails_is_reported(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    with pytest.raises(UserError, match="exit code"):
        crosscheck.main(["--classic", str(tmp_path), "--policies", str(tmp_path / "nowhere")])
