"""`--dataset local`: mixtures, caches, determinism; AntMaze's planner and behaviour; the policies that ship."""

import hashlib
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
from scipy.sparse.csgraph import shortest_path

from benchmarks import local_sets
from tests.terminal import pieces, start
from utils import tasks
from utils.behaviour import collect, local, navigation
from utils.behaviour.policies import LinearPolicy, UniformPolicy, load_policy, save_policy
from utils.environments import make_lockstep
from utils.environments.antmaze import MAZES, cell_center
from utils.errors import UserError

LOCOMOTION = ("hopper", "halfcheetah", "walker2d")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- The sets ---


def test_the_papers_tasks_are_there() -> None:
    assert len(local_sets.PAPER_TASKS) == 15
    assert len(local.ids()) == 9 + 2 * 6
    for body in LOCOMOTION:
        assert {f"{body}-{kind}-v2" for kind in ("medium", "medium-replay", "medium-expert")} <= set(local.ids())
    for maze in ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse"):
        assert {f"antmaze-{maze}-v0", f"antmaze-{maze}-v2"} <= set(local.ids())


@pytest.mark.parametrize("env_name", ["hopper-medium-replay-v2", "antmaze-medium-diverse-v0"])
def test_same_seed_same_bytes(env_name: str, tmp_path: Path) -> None:
    digests = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        local.load(env_name, 300, seed, tmp_path / name, progress=False)
        digests.append(digest(local.local_file(env_name, 300, seed, tmp_path / name)))
    assert digests[0] == digests[1] != digests[2]


def test_a_local_set_says_so_and_is_read_as_d4rl_reads(tmp_path: Path) -> None:
    dataset = local.load("halfcheetah-medium-expert-v2", 201, 3, tmp_path, progress=False)
    path = tmp_path / "halfcheetah-medium-expert-v2-local-201-seed3.hdf5"
    assert dataset.source == "local" and dataset.env_name == "halfcheetah-medium-expert-v2"
    assert dataset.info["path"] == str(path) and dataset.info["sha256"] == digest(path)
    attributes = collect.read_attributes(path)
    assert attributes["source"] == "local" and "not the official D4RL file" in attributes["description"]
    with h5py.File(path) as file:
        behaviour, timeouts, terminals = (file[k][:] for k in ("infos/behaviour", "timeouts", "terminals"))
        assert len(behaviour) == 201
        ends = np.flatnonzero(timeouts | terminals)
        np.testing.assert_array_equal(ends, [100, 200])  # each behaviour's share is cut where it is full
        keep = np.flatnonzero(~timeouts[:-1])
        np.testing.assert_array_equal(dataset.states, file["observations"][:][keep])
        np.testing.assert_array_equal(dataset.next_states, file["observations"][:][keep + 1])
    assert dataset.size == 199


@pytest.mark.parametrize(
    ("kind", "names", "shares"),
    [
        ("medium", ["medium"], [601]),
        ("medium-expert", ["medium", "expert"], [301, 300]),
        (
            "medium-replay",
            ["random", "replay_1", "replay_2", "replay_3", "replay_4", "medium"],
            [101, 100, 100, 100, 100, 100],
        ),
    ],
)
def test_mixtures(kind: str, names: list[str], shares: list[int], tmp_path: Path) -> None:
    local.load(f"hopper-{kind}-v2", 601, 0, tmp_path, progress=False)
    path = local.local_file(f"hopper-{kind}-v2", 601, 0, tmp_path)
    behaviours = collect.read_attributes(path)["behaviours"]
    assert [part["name"] for part in behaviours] == names
    assert [part["rows"] for part in behaviours] == shares
    with h5py.File(path) as file:
        behaviour, actions = file["infos/behaviour"][:], file["actions"][:]
    np.testing.assert_array_equal(np.bincount(behaviour), shares)
    if kind == "medium-replay":  # the uniform part alone spreads evenly over the box: deviation 1/sqrt(3)
        np.testing.assert_allclose(actions[behaviour == 0].std(), 3**-0.5, atol=0.05)


def test_a_cache_is_used_until_its_policies_change_or_it_breaks(tmp_path: Path, monkeypatch) -> None:
    shipped = local.behaviour_folder()
    behaviours = tmp_path / "behaviour"
    (behaviours / "hopper").mkdir(parents=True)
    (behaviours / "hopper" / "medium.npz").write_bytes((shipped / "hopper" / "medium.npz").read_bytes())
    monkeypatch.setattr(local, "behaviour_folder", lambda: behaviours)
    cache = tmp_path / "cache"
    path = local.local_file("hopper-medium-v2", 120, 0, cache)

    def load() -> int:
        """Loads, and returns the file's identity, which changes when it is written anew."""
        local.load("hopper-medium-v2", 120, 0, cache, progress=False)
        return path.stat().st_mtime_ns

    first = load()
    assert load() == first
    before = digest(path)
    path.write_bytes(path.read_bytes()[:3000])  # a damaged cache
    assert load() != first and digest(path) == before
    save_policy(behaviours / "hopper" / "medium.npz", LinearPolicy(np.ones((3, 11)), np.zeros(11), np.ones(11)))
    load()
    assert digest(path) != before


@pytest.mark.slow
def test_a_killed_collection_leaves_no_cache(tmp_path: Path) -> None:
    code = "import sys; from utils.behaviour import local; local.load('hopper-medium-v2', 50_000_000, 0, sys.argv[1])"
    process, terminal = start(code, str(tmp_path))
    seen = b""
    for piece in pieces(terminal):
        seen += piece
        if b"/50000000 [00:" in seen:  # the bar moves: rows are being collected
            break
    process.kill()
    process.wait()
    os.close(terminal)
    assert b"(local)" in seen
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"env_name": "hopper-expert-v2"}, "no local data for 'hopper-expert-v2'"),
        ({"env_name": "antmaze-huge-v0"}, "no local data"),
        ({"size": 99}, "too small"),
        ({"seed": -1}, "seed of a local set is -1"),
    ],
)
def test_illegal_input(settings: dict, match: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=match) as error:
        local.load(**({"env_name": "hopper-medium-v2"} | settings), cache_dir=tmp_path, progress=False)
    assert "\n" not in str(error.value)


def test_a_missing_policy_and_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="DIFFCPS_LOCAL_DIR"):
        local.load("hopper-medium-v2", 100, 0, tmp_path / "file" / "cache", progress=False)
    monkeypatch.setattr(local, "behaviour_folder", lambda: tmp_path)
    with pytest.raises(UserError, match="no behaviour policy"):
        local.load("hopper-medium-v2", 100, 0, tmp_path / "cache", progress=False)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DIFFCPS_LOCAL_DIR", str(tmp_path))
    assert local.cache_folder() == tmp_path
    monkeypatch.delenv("DIFFCPS_LOCAL_DIR")
    assert local.cache_folder() == Path.home() / ".cache" / "diffcps" / "local"


# --- The policies that ship ---


def returns_of(policy, env_name: str, steps: int) -> float:
    """Mean return of the first `steps` steps, or of what comes before a fall, of five episodes."""
    envs = make_lockstep(env_name, 5)
    rng, running, total = np.random.default_rng(0), np.ones(5, dtype=bool), 0.0
    states = envs.reset([np.random.default_rng(k) for k in range(5)])
    for _ in range(steps):
        states, rewards, terminated, _ = envs.step(policy.act(states, rng), running)
        running &= ~terminated
        total += rewards.sum() / 5
    return total


@pytest.mark.parametrize("body", LOCOMOTION)
def test_shipped_policies_beat_random_in_the_order_of_their_names(body: str) -> None:
    env_name = f"{body}-medium-v2"
    random = returns_of(UniformPolicy(tasks.task(env_name).action_dim), env_name, 500)
    policies = {name: load_policy(local.behaviour_folder() / body / f"{name}.npz") for name in ("medium", "expert")}
    medium, expert = (returns_of(local.as_behaviour(policies[name]), env_name, 500) for name in ("medium", "expert"))
    assert medium > random + 200
    assert expert > medium
    # The search's own measurement: medium has a third to a half of the expert's normalised score. Measured anew
    # after the choice, so it may miss these bounds by a little.
    share = policies["medium"].info["normalized_return"] / policies["expert"].info["normalized_return"]
    assert 0.28 < share < 0.55


def test_shipped_policies_are_small() -> None:
    assert sum(path.stat().st_size for path in local.behaviour_folder().rglob("*.npz")) < 1_000_000


# --- AntMaze ---


@pytest.mark.parametrize("maze", MAZES)
def test_planner_finds_shortest_paths(maze: str) -> None:
    planner, cells = navigation.Planner(maze), navigation.free_cells(maze)
    index = np.array(cells)
    neighbours = np.abs(index[:, None] - index).sum(-1) == 1
    expected = shortest_path(neighbours.astype(float), unweighted=True)
    for k, goal in enumerate(cells):
        for j, cell in enumerate(cells):
            assert planner.distance[(*goal, *cell)] == expected[k, j]
            following = tuple(planner.next_cell[(*goal, *cell)])
            if j == k:
                assert following == goal
            else:
                assert (
                    neighbours[j, cells.index(following)] and expected[k, cells.index(following)] == expected[k, j] - 1
                )


def plain_waypoint(maze: str, position: np.ndarray, goal: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """D4RL's rule said again: a search from the goal's cell that stops at the first neighbour of the ant's cell."""

    def cell_of(point: np.ndarray) -> tuple[int, int]:
        x, y = (max(value, 1e-4) for value in point)
        return int(1 + y / 4), int(1 + x / 4)

    here, there = cell_of(position), cell_of(goal)
    frontier, seen = [there], {there}
    while here != there:
        following = []
        for cell in frontier:
            for step in ((0, -1), (0, 1), (1, 0), (-1, 0)):
                neighbour = cell[0] + step[0], cell[1] + step[1]
                if neighbour == here:
                    return goal if cell == there else cell_center(maze, *cell) + offset
                if neighbour not in seen and MAZES[maze][neighbour[0]][neighbour[1]] != "1":
                    seen.add(neighbour)
                    following.append(neighbour)
        frontier = following
    return goal


@pytest.mark.parametrize("maze", MAZES)
def test_waypoints_are_d4rls(maze: str) -> None:
    planner, rng = navigation.Planner(maze), np.random.default_rng(0)
    cells = navigation.free_cells(maze)
    # positions all over the free cells, walls' side included: D4RL counts cells from their centres on
    centers = np.array([cell_center(maze, *cells[k]) for k in rng.integers(len(cells), size=500)])
    positions = centers + rng.uniform(-1.7, 1.7, (500, 2))
    goals = np.array([navigation.draw_goal(maze, cells, rng) for _ in range(500)])
    offsets = rng.uniform(0, 1, (500, 2))
    waypoints = planner.waypoints(positions, goals, offsets)
    compared = 0
    for k in range(500):
        if planner.next_cell[(*planner.locate(goals)[k], *planner.locate(positions)[k], 0)] < 0:
            np.testing.assert_array_equal(waypoints[k], goals[k])
            continue
        np.testing.assert_allclose(waypoints[k], plain_waypoint(maze, positions[k], goals[k], offsets[k]), atol=1e-12)
        compared += 1
    assert compared > 450


def test_starts_and_goals_are_those_of_d4rl() -> None:
    assert navigation.start_cells("umaze", "") == [(1, 1)] and navigation.goal_cells("umaze", "") == [(3, 1)]
    assert navigation.goal_cells("umaze", "diverse") == navigation.start_cells("umaze", "diverse")
    assert len(navigation.goal_cells("umaze", "diverse")) == 7
    # BIG_MAZE and HARDEST_MAZE mark 3 and 7 goals
    for maze, count in (("medium", 3), ("large", 7)):
        goals, starts = navigation.goal_cells(maze, "play"), navigation.start_cells(maze, "play")
        assert len(goals) == count
        assert sorted([*goals, *starts]) == sorted(navigation.free_cells(maze))
    # The evaluation's goal is one of them in the large maze; in the medium one it is on the only way to one of them.
    assert navigation.goal_cells("large", "")[0] in navigation.goal_cells("large", "play")
    planner = navigation.Planner("medium")
    (evaluation,) = navigation.goal_cells("medium", "")
    assert {cell for cell in starts_of_medium() if tuple(planner.next_cell[(6, 5, *cell)]) == (6, 5)} == {evaluation}


def starts_of_medium() -> list[tuple[int, int]]:
    return navigation.start_cells("medium", "play")


def test_collection_mazes_start_where_they_should() -> None:
    envs = navigation.maze_envs("medium", "diverse", 1)
    rng = np.random.default_rng(0)
    states = np.array([envs.reset_one(0, rng) for _ in range(200)])
    np.testing.assert_array_equal(envs.goals, [[20.75, 20.75]])
    cells = {tuple(cell) for cell in navigation.Planner("medium").locate(states[:, :2])}
    assert cells == set(navigation.start_cells("medium", "diverse"))
    offset = states[:, :2] % 4.0
    assert offset.min() >= 0 and offset.max() <= 1
    plain = navigation.maze_envs("umaze", "", 1)
    assert np.abs(plain.reset_one(0, rng)[:2]).max() <= 0.1


def test_gait_features_do_not_depend_on_where_the_ant_is_and_faces() -> None:
    rng = np.random.default_rng(1)
    states = rng.standard_normal((20, 29))
    states[:, 3:7] /= np.linalg.norm(states[:, 3:7], axis=1, keepdims=True)
    directions = rng.standard_normal((20, 2))
    turned, angle = states.copy(), 0.7
    cosine, sine = np.cos(angle), np.sin(angle)
    rotation = np.array([[cosine, -sine], [sine, cosine]])
    turned[:, :2] += 5.0
    w, x, y, z = states[:, 3:7].T
    c, s = np.cos(angle / 2), np.sin(angle / 2)
    turned[:, 3:7] = np.stack([c * w - s * z, c * x - s * y, c * y + s * x, c * z + s * w], axis=1)
    turned[:, 15:17] = states[:, 15:17] @ rotation.T  # world velocity; the angular one is the torso's already
    features = navigation.gait_features(states, directions)
    assert features.shape == (20, 28)
    np.testing.assert_allclose(navigation.gait_features(turned, 3 * directions @ rotation.T), features, atol=1e-12)


def test_the_ant_reaches_umazes_goal() -> None:
    envs = navigation.maze_envs("umaze", "", 10)
    gait = load_policy(local.behaviour_folder() / "ant" / "gait.npz")
    navigator = navigation.Navigator("umaze", "", gait, 10)
    part = collect.record(envs, navigator, np.random.SeedSequence(0), episodes=10, begin=navigator.begin)
    assert part.terminals.sum() >= 7
    assert part.rewards.sum() == part.terminals.sum()
    ends = part.observations[np.flatnonzero(part.terminals), :2]
    assert np.linalg.norm(ends - [0.75, 8.75], axis=1).max() < 1.0  # the row before the goal is one step away from it


def test_the_table_of_local_sets(tmp_path: Path) -> None:
    rows = [
        local_sets.describe_set(name, 1200, 0, tmp_path) for name in ("hopper-medium-v2", "hopper-medium-expert-v2")
    ]
    local_sets.write_tables(rows[1:], tmp_path / "tables", "a test")
    local_sets.write_tables(rows[:1], tmp_path / "tables", "a test")
    text = (tmp_path / "tables" / "local_sets.md").read_text()
    assert text.count("\n| hopper") == 2 and "not D4RL's files" in text
    with h5py.File(local.local_file("hopper-medium-v2", 1200, 0, tmp_path)) as file:
        rewards, ends = file["rewards"][:], np.flatnonzero(file["terminals"][:])
    mean = rewards[: ends[-1] + 1].sum() / len(ends)
    assert rows[0]["episodes"] == len(ends)
    assert rows[0]["normalized_return"] == pytest.approx(tasks.normalized_score("hopper-medium-v2", mean), abs=0.06)
