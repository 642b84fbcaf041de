"""The classic backend: its contract on a stand-in for gym and d4rl, and the real stack where it is installed."""

import importlib.util
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import pytest

from utils import classic
from utils.errors import UserError

LIMIT = 5


class Generator(np.random.Generator):
    """gym 0.23.1's class around a bit generator, with the one old name that d4rl calls."""

    def randn(self, *size):
        return self.standard_normal(size)


class Unstable(Exception):
    """mujoco_py.MujocoException's stand-in."""


class Base:
    """An environment that starts at two draws and adds its action; what the action's first entry says, happens."""

    ENDS, BREAKS = 0.5, -0.5
    np_random = None

    def __init__(self, **_):
        self.state = np.zeros(2)

    def reset(self):
        self.state = np.append(self.np_random.uniform(-1, 1), self.np_random.randn(1))
        return self.state.copy()

    def step(self, action):
        if action[0] == self.BREAKS:
            raise Unstable("Nan, Inf or huge value in QACC")
        self.state = self.state + action
        return self.state.copy(), 1.5, bool(action[0] == self.ENDS), {}


class Maze(Base):
    """As d4rl's: goals from the global generator, printed; a temporary file that stays open."""

    def __init__(self, v2_resets):
        super().__init__()
        self.v2_resets = v2_resets
        self.path = tempfile.mkstemp(suffix=".xml")[1]
        self.set_target()

    def set_target(self):
        self.target_goal = tuple(np.random.uniform(size=2))
        print("Target Goal: ", self.target_goal)

    def reset(self):
        if self.v2_resets:
            self.set_target()
        return super().reset()


class Wrapped:
    """gym's time limit around d4rl's action wrapper around the base."""

    observation_space = types.SimpleNamespace(shape=(2,))
    action_space = types.SimpleNamespace(shape=(2,), high=np.ones(2))
    spec = types.SimpleNamespace(max_episode_steps=LIMIT)
    closed = False

    def __init__(self, base):
        self.base = base
        self.unwrapped = types.SimpleNamespace(wrapped_env=base)

    def reset(self):
        self.elapsed = 0
        return self.base.reset()

    def step(self, action):
        state, reward, done, info = self.base.step(action)
        self.elapsed += 1
        if self.elapsed >= LIMIT:
            info["TimeLimit.truncated"] = not done
            done = True
        return state, reward, done, info

    def close(self):
        self.closed = True


class Error(Exception):
    """gym.error.Error's stand-in."""


def make(env_name):
    known = {"runner-v2": Base, "maze-v0": lambda: Maze(False), "maze-v2": lambda: Maze(True)}
    if env_name not in known:
        raise Error("Environment doesn't exist")
    return Wrapped(known[env_name]())


@pytest.fixture
def stack(monkeypatch):
    """gym, d4rl and mujoco_py as modules with what the backend uses of them."""
    seeding = types.SimpleNamespace(RandomNumberGenerator=Generator)
    logger = types.SimpleNamespace(ERROR=40, set_level=lambda level: None)
    contents = {
        "gym": {"make": make, "error": types.SimpleNamespace(Error=Error), "logger": logger},
        "gym.utils": {"seeding": seeding},
        "mujoco_py": {"MujocoException": Unstable},
        "d4rl": {},
        "d4rl.gym_mujoco": {},
        "d4rl.locomotion": {},
    }
    for name, attributes in contents.items():
        module = types.ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)


def rngs(*seeds):
    return [np.random.default_rng(seed) for seed in seeds]


def start_of(rng):
    return np.append(rng.uniform(-1, 1), rng.standard_normal(1))


def all_of(envs):
    return np.ones(envs.num_envs, dtype=bool)


def test_sizes_and_limits(stack):
    envs = classic.make_lockstep("runner-v2", 3)
    sizes = envs.num_envs, envs.state_dim, envs.action_dim, envs.max_action, envs.max_episode_steps
    assert sizes == (3, 2, 2, 1.0, LIMIT)
    assert envs.goals is None
    assert envs.unstable.tolist() == [0, 0, 0]


@pytest.mark.parametrize("env_name", ["runner-v2", "maze-v0", "maze-v2"])
def test_start_states_are_the_generators_draws_in_order(stack, env_name):
    envs = classic.make_lockstep(env_name, 3)
    shared, other = rngs(7, 8)
    states = envs.reset([shared, other, shared])
    expected = np.random.default_rng(7)
    first, second = start_of(expected), start_of(expected)
    np.testing.assert_array_equal(states, [first, start_of(np.random.default_rng(8)), second])
    np.testing.assert_array_equal(envs.reset_one(1, shared), start_of(expected))


def test_only_running_rows_step(stack):
    envs = classic.make_lockstep("runner-v2", 2)
    before = envs.reset(rngs(0, 1))
    actions = np.array([[0.25, 0.0], [0.25, 0.0]])
    states, rewards, terminated, truncated = envs.step(actions, np.array([True, False]))
    np.testing.assert_array_equal(states - before, [[0.25, 0.0], [0.0, 0.0]])
    assert rewards.tolist() == [1.5, 0.0]
    assert not terminated.any() and not truncated.any()


def test_the_task_and_the_time_limit_end_episodes_apart(stack):
    envs = classic.make_lockstep("runner-v2", 3)
    envs.reset(rngs(0, 1, 2))
    for step in range(LIMIT):
        actions, running = np.zeros((3, 2)), np.array([True, True, step == 0])
        actions[0, 0] = Base.ENDS if step == LIMIT - 1 else 0.0  # ends at the limit: both flags, as gymnasium has it
        actions[2, 0] = Base.ENDS
        *_, terminated, truncated = envs.step(actions, running)
        assert terminated[2] == (step == 0)
        assert not truncated[2]
    assert terminated.tolist() == [True, False, False]
    assert truncated.tolist() == [True, True, False]


def test_an_unstable_simulation_ends_its_episode_and_is_counted(stack):
    envs = classic.make_lockstep("runner-v2", 2)
    before = envs.reset(rngs(0, 1))
    actions = np.array([[0.1, 0.0], [Base.BREAKS, 0.0]])
    with pytest.warns(RuntimeWarning, match="environment 1 became unstable"):
        states, rewards, terminated, truncated = envs.step(actions, all_of(envs))
    assert rewards.tolist() == [1.5, 0.0]
    assert terminated.tolist() == [False, True]
    assert not truncated.any()
    np.testing.assert_array_equal(states[1], before[1])
    assert envs.unstable.tolist() == [0, 1]
    envs.reset_one(1, np.random.default_rng(3))
    assert envs.unstable.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("actions", "running"),
    [
        ([[np.nan, 0.0], [0.0, 0.0]], [True, True]),
        ([[0.0, np.inf], [0.0, 0.0]], [True, False]),
        ([[0.0, 0.0]], [True, True]),
        ([[0.0], [0.0]], [True, True]),
        ([[0.0, 0.0], [0.0, 0.0]], [True]),
    ],
)
def test_illegal_actions_raise(stack, actions, running):
    envs = classic.make_lockstep("runner-v2", 2)
    envs.reset(rngs(0, 1))
    with pytest.raises(UserError):
        envs.step(np.array(actions), np.array(running))


def test_an_idle_rows_action_is_nobodys_concern(stack):
    envs = classic.make_lockstep("runner-v2", 2)
    envs.reset(rngs(0, 1))
    _, rewards, _, _ = envs.step(np.array([[0.0, 0.0], [np.nan, 0.0]]), np.array([True, False]))
    assert rewards.tolist() == [1.5, 0.0]


def test_goals_are_seeded_and_leave_the_global_generator_alone(stack, capsys):
    np.random.seed(11)
    expected = np.random.RandomState(11).uniform()
    runs = []
    for _ in range(2):
        envs = classic.make_lockstep("maze-v2", 2)
        envs.reset(rngs(4, 5))
        first = envs.goals
        envs.reset_one(0, np.random.default_rng(6))
        runs.append(np.stack([first, envs.goals]))
    assert np.random.uniform() == expected
    np.testing.assert_array_equal(runs[0], runs[1])
    first, second = runs[0]
    assert (first[0] != first[1]).all() and (first[0] != second[0]).all()
    np.testing.assert_array_equal(first[1], second[1])
    assert capsys.readouterr().out == ""


def test_successive_episodes_of_one_generator_share_a_v0_goal_only(stack):
    one_goal, many_goals = (classic.make_lockstep(f"maze-{version}", 3) for version in ("v0", "v2"))
    for envs in (one_goal, many_goals):
        envs.reset([np.random.default_rng(4)] * 3)
    assert len(np.unique(one_goal.goals, axis=0)) == 1
    assert len(np.unique(many_goals.goals, axis=0)) == 3
    before = one_goal.goals
    one_goal.reset([np.random.default_rng(5)] * 3)
    assert (one_goal.goals != before).all()


def test_temporary_files_are_closed_and_removed(stack, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    make_file, descriptors = tempfile.mkstemp, len(list(Path("/proc/self/fd").glob("*")))
    envs = classic.make_lockstep("maze-v2", 20)
    assert len(list(Path("/proc/self/fd").glob("*"))) <= descriptors
    assert list(tmp_path.iterdir()) == []
    assert tempfile.mkstemp is make_file
    assert envs.bases[0].path.startswith(str(tmp_path))


class Viewer:
    """mujoco-py's offscreen viewer, as far as a maze from above goes."""

    def __init__(self):
        self.cam = types.SimpleNamespace(lookat=np.zeros(3), distance=0.0, elevation=0.0, azimuth=0.0)
        self._markers = []

    def add_marker(self, **marker):
        self._markers.append(marker)


def test_a_frame_is_the_first_rows(stack, monkeypatch):
    asked, viewer = [], Viewer()

    def render(self, mode, width, height, camera_id=None):
        asked.append((mode, camera_id))
        return np.full((height, width, 3), 7, np.uint8)

    monkeypatch.setattr(Base, "render", render, raising=False)
    monkeypatch.setattr(Base, "dt", 0.125, raising=False)
    monkeypatch.setattr(Base, "_get_viewer", lambda self, mode: viewer, raising=False)
    stat = types.SimpleNamespace(center=np.array([4.0, 4.0, 0.0]), extent=20.0)
    monkeypatch.setattr(Base, "model", types.SimpleNamespace(stat=stat), raising=False)
    runner, maze = classic.make_lockstep("runner-v2", 1), classic.make_lockstep("maze-v2", 1)
    for envs in (runner, maze, maze):
        envs.reset(rngs(0))
        frame = envs.frame()
        assert envs.fps == 8 and frame.shape == (classic.FRAME, classic.FRAME, 3) and frame.dtype == np.uint8
    assert asked == [("rgb_array", None), ("rgb_array", -1), ("rgb_array", -1)]
    (goal,) = viewer._markers  # one, however many frames
    np.testing.assert_array_equal(goal["pos"][:2], maze.goals[0])
    assert viewer.cam.elevation == -70 and viewer.cam.lookat.tolist() == [4, 4, 0]


def test_a_frame_that_cannot_be_drawn_is_one_line(stack):
    with pytest.raises(UserError, match=r"mujoco-py cannot draw here.*libosmesa6-dev"):
        classic.make_lockstep("runner-v2", 1).frame()


def test_close_closes_every_environment(stack):
    envs = classic.make_lockstep("runner-v2", 2)
    made = list(envs._envs)
    envs.close()
    assert [env.closed for env in made] == [True, True]


def test_what_cannot_be_made_is_one_clear_line(stack):
    for arguments in (("nothing-v2", 1), ("runner-v2", 0)):
        with pytest.raises(UserError) as error:
            classic.make_lockstep(*arguments)
        assert "\n" not in str(error.value)
    envs = classic.make_lockstep("runner-v2", 2)
    with pytest.raises(UserError, match="1 generators for 2"):
        envs.reset(rngs(0))


@pytest.mark.parametrize("missing", ["gym", "d4rl", "mujoco_py"])
def test_a_missing_stack_says_what_to_install(stack, monkeypatch, missing):
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError) as error:
        classic.make_lockstep("runner-v2", 1)
    assert "utils/environments/install_classic.sh" in str(error.value)
    assert "\n" not in str(error.value)


REAL = all(importlib.util.find_spec(name) for name in ("gym", "d4rl", "mujoco_py"))


@pytest.mark.skipif(
    not REAL, reason="the original stack is not installed (utils/environments/install_classic.sh builds it)"
)
@pytest.mark.parametrize(
    ("env_name", "sizes"),
    [
        ("hopper-medium-v2", (11, 3, 1000)),
        ("halfcheetah-medium-v2", (17, 6, 1000)),
        ("walker2d-medium-v2", (17, 6, 1000)),
        ("antmaze-umaze-v0", (29, 8, 700)),
        ("antmaze-large-diverse-v0", (29, 8, 1000)),
        ("antmaze-medium-play-v2", (29, 8, 1000)),
    ],
)
def test_the_original_environments(env_name, sizes):
    import gym

    envs = classic.make_lockstep(env_name, 2)
    assert (envs.state_dim, envs.action_dim, envs.max_episode_steps) == sizes
    states = envs.reset(rngs(5, 6))
    if not env_name.startswith("antmaze"):
        np.testing.assert_array_equal(states[1], gym.make(env_name).reset(seed=6))
    random, running, lengths = np.random.default_rng(0), all_of(envs), np.zeros(2, dtype=int)
    while running.any():
        states, _, terminated, truncated = envs.step(random.uniform(-1, 1, (2, envs.action_dim)), running)
        lengths += running
        assert (truncated <= (lengths == envs.max_episode_steps)).all()
        running &= ~(terminated | truncated)
    assert np.isfinite(states).all() and envs.unstable.tolist() == [0, 0]
    envs.close()
