"""AntMaze: geometry, goals, start states, reward and end. (Its single steps are in test_environments.)"""

import pathlib
import pickle

import gymnasium
import numpy as np
import pytest
from gymnasium.utils import seeding

from benchmarks.fidelity.physics import RECORDINGS, load_recording, off_walls
from utils import environments
from utils.environments.antmaze import CELL, MAZES, AntMazeEnv, cell_center, draw_goal
from utils.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*out of date:DeprecationWarning")

FACTS = pathlib.Path(__file__).parents[3] / "shared" / "reference" / "d4rl_facts.json"
RECORDED = ("antmaze-umaze-v0", "antmaze-medium-play-v0", "antmaze-large-diverse-v0")
GOAL_CELLS = {"umaze": (0.0, 8.0), "medium": (20.0, 20.0), "large": (32.0, 24.0)}


@pytest.mark.parametrize("name", RECORDED)
def test_recordings_touch_walls(name):
    """So that the equality of single steps says something about capsule-box contacts."""
    env = environments.make(name).unwrapped
    recording = load_recording(name)
    assert len(recording["qpos"]) - len(off_walls(env, recording)["qpos"]) >= 10


@pytest.mark.parametrize("name", RECORDED)
def test_bodies_and_geoms_are_d4rls(name):
    model = environments.make(name).unwrapped.model
    with np.load(RECORDINGS) as recordings:
        geoms = recordings[f"{name}/model/geom_names"].tolist()
        bodies = recordings[f"{name}/model/names"].tolist()
    assert [model.geom(i).name for i in range(model.ngeom)] == geoms
    assert [model.body(i).name for i in range(model.nbody) if model.body(i).name] == bodies


@pytest.mark.skipif(not FACTS.exists(), reason="D4RL's facts are not beside the checkout")
def test_maps_are_d4rls():
    import json

    layouts = json.loads(FACTS.read_text())["maze_layouts"]
    d4rl = {"umaze": "U_MAZE_TEST", "medium": "BIG_MAZE_TEST", "large": "HARDEST_MAZE_TEST"}
    assert {maze: tuple(layouts[key]) for maze, key in d4rl.items()} == MAZES


@pytest.mark.parametrize("maze", MAZES)
def test_walls_stand_where_the_map_has_them(maze):
    env = AntMazeEnv(maze, False)
    walls = {tuple(env.model.geom(i).pos) for i in range(env.model.ngeom) if env.model.geom(i).name.startswith("block")}
    cells = [(row, column) for row, line in enumerate(MAZES[maze]) for column, kind in enumerate(line) if kind == "1"]
    # The start is cell (1, 1) in all three mazes and stands at the origin.
    assert walls == {(CELL * (column - 1), CELL * (row - 1), 1.0) for row, column in cells}
    assert cell_center(maze, 1, 1).tolist() == [0, 0]


@pytest.mark.parametrize("maze", MAZES)
def test_goals_follow_d4rls_distribution(maze):
    """Centre + U(0, 1) + U(0, 0.5): mean 0.75, variance 1/12 + 1/48, support [0, 1.5]."""
    rng = np.random.default_rng(0)
    offsets = np.array([draw_goal(maze, rng) for _ in range(4000)]) - GOAL_CELLS[maze]
    assert offsets.min() >= 0 and offsets.max() <= 1.5
    np.testing.assert_allclose(offsets.mean(axis=0), 0.75, atol=0.02)
    np.testing.assert_allclose(offsets.var(axis=0), 1 / 12 + 1 / 48, atol=0.006)
    with np.load(RECORDINGS) as recordings:
        names = [name for name in RECORDED if name.startswith(f"antmaze-{maze}")]
        recorded = np.array([recordings[f"{name}/goal"] for name in names]) - GOAL_CELLS[maze]
    assert (recorded >= 0).all() and (recorded <= 1.5).all()


def test_start_states_are_d4rls_for_a_seed():
    """Written down a second time: noise on all of qpos, quaternion normalised, goals from another stream."""
    for version in (0, 2):
        env = gymnasium.make(f"D4RL/antmaze-large-play-v{version}")
        rng, _ = seeding.np_random(11)
        for seed in (11, None, None):
            qpos = np.concatenate([[0, 0, 0.75, 1, 0, 0, 0], np.zeros(8)]) + rng.uniform(-0.1, 0.1, 15)
            qpos[3:7] /= np.linalg.norm(qpos[3:7])
            qvel = 0.1 * rng.standard_normal(14)
            observation, _ = env.reset(seed=seed)
            np.testing.assert_allclose(observation, np.concatenate([qpos, qvel]), rtol=0, atol=1e-15)


def test_recorded_start_states_have_this_noise():
    with np.load(RECORDINGS) as recordings:
        starts = np.concatenate([recordings[f"{name}/starts"] for name in RECORDED])
    noise = starts[:, :3] - [0, 0, 0.75]
    assert np.abs(noise).max() <= 0.1
    np.testing.assert_allclose(np.linalg.norm(starts[:, 3:7], axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(noise.std(), 0.1 / np.sqrt(3), atol=0.01)
    np.testing.assert_allclose(starts[:, 15:].std(), 0.1, atol=0.01)


def test_v0_keeps_one_goal_and_v2_draws_at_every_reset():
    keeps = gymnasium.make("D4RL/antmaze-medium-diverse-v0")
    draws = gymnasium.make("D4RL/antmaze-medium-diverse-v2")
    goals = {env: [] for env in (keeps, draws)}
    for env, seen in goals.items():
        for seed in (5, None, None, 6):
            env.reset(seed=seed)
            seen.append(tuple(env.unwrapped.target_goal))
    assert len(set(goals[keeps])) == 1
    assert len(set(goals[draws])) == 4


@pytest.mark.parametrize("version", [0, 2])
def test_goals_are_seeded_with_the_environment(version):
    def goals(seed: int) -> list:
        env = gymnasium.make(f"D4RL/antmaze-umaze-v{version}")
        np.random.seed(0)  # D4RL's source of goals must not matter
        env.reset(seed=seed)
        first = env.unwrapped.target_goal
        env.reset()
        return [*first, *env.unwrapped.target_goal]

    assert goals(1) == goals(1)
    assert goals(1) != goals(2)


def test_goal_set_by_hand_stays_in_v0():
    env = gymnasium.make("D4RL/antmaze-umaze-v0")
    env.unwrapped.target_goal = (1.0, 2.0)
    env.reset(seed=0)
    assert env.unwrapped.target_goal.tolist() == [1.0, 2.0]
    for goal in ((1.0,), (np.nan, 0.0), (1.0, 2.0, 3.0)):
        with pytest.raises(UserError, match="target_goal"):
            env.unwrapped.target_goal = goal


@pytest.mark.parametrize(("distance", "arrives"), [(0.499, True), (0.501, False)])
def test_reward_and_end_within_half_a_metre(distance, arrives):
    env = environments.make("antmaze-umaze-v2")
    env.reset(seed=0)
    action = np.zeros(8, dtype=np.float32)
    state = env.unwrapped.data.qpos.copy(), env.unwrapped.data.qvel.copy()
    after, *_ = env.step(action)
    env.unwrapped.set_state(*state)
    env.unwrapped.data.qacc_warmstart[:] = 0
    env.unwrapped.target_goal = after[:2] + distance * np.array([0.6, -0.8])
    _, reward, terminated, truncated, _ = env.step(action)
    assert (reward, terminated, truncated) == (float(arrives), arrives, False)


def test_control_is_thirty_times_the_action():
    env = AntMazeEnv("umaze", False)
    action = np.array([-2, -1, -0.5, 0, 0.25, 0.5, 1, 3.0])
    np.testing.assert_allclose(env.control(action, (8,)), 30 * np.clip(action, -1, 1), atol=1e-14)
    assert env.action_space == gymnasium.spaces.Box(-1, 1, (8,), np.float32)
    np.testing.assert_allclose(env.dt, 0.1)


def test_set_state_normalises_the_quaternion():
    env = AntMazeEnv("umaze", False)
    env.reset(seed=0)
    qpos = env.init_qpos.copy()
    qpos[3:7] = [2, 0, 0, 2]
    env.set_state(qpos, env.init_qvel)
    np.testing.assert_allclose(env.data.qpos[3:7], [np.sqrt(0.5), 0, 0, np.sqrt(0.5)], atol=1e-15)
    assert qpos[3] == 2


def test_unknown_maze_names_the_known_ones():
    with pytest.raises(UserError, match="umaze, medium, large"):
        AntMazeEnv("huge", False)


def test_environment_pickles():
    env = pickle.loads(pickle.dumps(AntMazeEnv("medium", True)))
    assert (env.maze, env.goal_every_reset) == ("medium", True)


def test_frame_shows_the_goal():
    env = environments.make("antmaze-umaze-v2", render_mode="rgb_array", width=120, height=90)
    env.reset(seed=0)
    try:
        frame = env.render()
    except UserError as error:
        pytest.skip(str(error))
    assert frame.shape == (90, 120, 3)
    env.unwrapped.target_goal = (8.0, 4.0)
    moved = env.render().astype(int)
    changed = np.abs(moved - frame).sum(axis=2) > 60
    green = (moved[..., 1] > moved[..., 0] + 40) & (moved[..., 1] > moved[..., 2] + 40)
    assert 5 < changed.sum() < 0.1 * changed.size
    assert (green & changed).any()
    env.close()
