"""D4RL's physics: model constants and single steps against the recorded originals, the interface around them."""

import json
import pathlib
import subprocess
import sys
import warnings

import gymnasium
import mujoco
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from benchmarks.fidelity.physics import (
    ENVIRONMENTS,
    RECORDINGS,
    Errors,
    load_recording,
    measure,
    off_walls,
    one_step_errors,
)
from utils import environments
from utils.environments import physics
from utils.errors import UserError

REFERENCE = pathlib.Path(__file__).parents[3] / "shared" / "reference"
ALL_RECORDINGS = REFERENCE / "physics" / "d4rl_golden.npz"
LOCOMOTION = ("D4RL/Hopper-v2", "D4RL/HalfCheetah-v2", "D4RL/Walker2d-v2")
IDS = (
    *LOCOMOTION,
    *(
        f"D4RL/antmaze-{name}-v{version}"
        for name in ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse")
        for version in (0, 2)
    ),
)


# gymnasium calls every -v0 with a -v2 beside it out of date.
pytestmark = pytest.mark.filterwarnings("ignore:.*out of date:DeprecationWarning")


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_model_constants_are_those_of_mujoco_210(environment):
    model = environments.make(ENVIRONMENTS[environment][0]).unwrapped.model
    prefix = f"{environment}/model/"
    with np.load(RECORDINGS) as recordings:
        names = [key for key in recordings if key.startswith(prefix) and "names" not in key]
        assert len(names) >= 20
        for key in names:
            value = getattr(model, key.removeprefix(prefix))
            if key.endswith("geom_margin") and physics.MARGINS_ADD_UP:
                value = 2 * value
            np.testing.assert_allclose(value, recordings[key], rtol=1e-12, atol=1e-14, err_msg=key)
        opt = model.opt
        settings = [opt.timestep, opt.integrator, opt.solver, opt.iterations, opt.tolerance, opt.cone]
        assert settings == recordings[f"{environment}/opt"].tolist()


def antmaze_changes(environment: str) -> str:
    """What the installed MuJoCo changes in an AntMaze; skips where that is more than its walls' contacts."""
    changes = (physics.antmaze_warning(mujoco.__version__) or "") if "antmaze" in environment else ""
    if "RK4" in changes:
        pytest.skip(changes)
    return changes


def errors_of_what_is_restored(environment: str, path: pathlib.Path) -> Errors:
    """Of all recorded steps; with a MuJoCo that has not AntMaze's contacts, of the ant's steps off the walls."""
    changes = antmaze_changes(environment)
    env, recording = environments.make(ENVIRONMENTS[environment][0]), load_recording(environment, path)
    return one_step_errors(env, off_walls(env, recording) if changes else recording)


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_one_step_is_the_recorded_one(environment):
    """Far within the 1e-7 that the inertia alone gives: D4RL's rounding of float32 actions is restored, too."""
    errors = errors_of_what_is_restored(environment, RECORDINGS)
    assert errors.qpos < 1e-12
    assert errors.qvel < 1e-10
    assert errors.observation < 1e-10
    assert errors.reward < 1e-11
    assert errors.terminations == 0


@pytest.mark.skipif(not ALL_RECORDINGS.exists(), reason="the full recordings are not beside the checkout")
@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_one_step_is_the_recorded_one_in_all_rows(environment):
    errors = errors_of_what_is_restored(environment, ALL_RECORDINGS)
    assert max(errors.qpos, errors.reward) < 1e-12
    assert max(errors.qvel, errors.observation) < 1e-10
    assert errors.terminations == 0


@pytest.mark.parametrize("environment", ["hopper", "halfcheetah", "walker2d", "antmaze-umaze-v0"])
def test_episode_is_the_recorded_one(environment):
    """From a seed through hundreds of steps: start state, every reward and the end, as in the original stack.

    Hopper's 537 steps and the ant's 139 are whole episodes. The others are cut before the last digits, in which
    machines differ, have grown to a difference that matters.
    """
    antmaze_changes(environment)  # the ant's episode touches no wall
    with np.load(RECORDINGS) as recordings:
        prefix = f"{environment}/episode/"
        episode = {key.removeprefix(prefix): recordings[key] for key in recordings if key.startswith(prefix)}
    env = environments.make(ENVIRONMENTS[environment][0])
    if "goal" in episode:
        env.unwrapped.target_goal = episode["goal"]
    states, rewards, ends = [env.reset(seed=int(episode["seed"]))[0]], [], []
    for action in episode["actions"]:
        state, reward, terminated, _, _ = env.step(action)
        states.append(state)
        rewards.append(reward)
        ends.append(terminated)
    np.testing.assert_allclose(states[::10], episode["states"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(rewards, episode["rewards"], rtol=0, atol=1e-6)
    assert ends == [False] * (len(ends) - 1) + [bool(episode["terminated"])]


@pytest.mark.parametrize("environment", ["hopper", "walker2d", "antmaze-umaze-v0"])
def test_stock_environment_is_told_apart(environment):
    """The recorded rows can see what is restored: without it they are off by more than a thousandth."""
    assert measure(environment)["stock"].qpos > 1e-4


def test_recordings_hold_terminations():
    for environment in ENVIRONMENTS:
        done = load_recording(environment)["done"]
        assert done.sum() >= (0 if environment == "halfcheetah" else 2)
        assert not done.all()


@pytest.mark.slow
def test_physics_command_prints_the_errors_of_every_environment():
    command = [sys.executable, "-m", "benchmarks.fidelity.physics", "--json"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=RECORDINGS.parents[2])
    measured = json.loads(run.stdout)
    assert set(measured) == set(ENVIRONMENTS)
    changes = physics.antmaze_warning(mujoco.__version__) or ""
    for environment, kinds in measured.items():
        if "antmaze" in environment and "RK4" in changes:
            continue
        restored = kinds["off_walls" if "antmaze" in environment and changes else "restored"]
        assert restored["qpos"] < 1e-7 < kinds["stock"]["qpos"]
        assert restored["qvel"] < 1e-5 < kinds["stock"]["qvel"]


@pytest.mark.parametrize("env_id", IDS)
def test_gymnasium_checker_passes(env_id):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_env(gymnasium.make(env_id).unwrapped, skip_render_check=True)


@pytest.mark.parametrize(
    ("task", "env_id", "limit"),
    [
        ("hopper-medium-v2", "D4RL/Hopper-v2", 1000),
        ("halfcheetah-full-replay-v2", "D4RL/HalfCheetah-v2", 1000),
        ("walker2d-medium-expert-v2", "D4RL/Walker2d-v2", 1000),
        ("antmaze-umaze-v0", "D4RL/antmaze-umaze-v0", 700),
        ("antmaze-umaze-diverse-v2", "D4RL/antmaze-umaze-diverse-v2", 700),
        ("antmaze-medium-play-v1", "D4RL/antmaze-medium-play-v0", 1000),
        ("antmaze-large-diverse-v2", "D4RL/antmaze-large-diverse-v2", 1000),
    ],
)
def test_task_names(task, env_id, limit):
    env = environments.make(task)
    assert environments.environment_id(task) == env.spec.id == env_id
    assert env.spec.max_episode_steps == limit


@pytest.mark.parametrize("task", ["hopper-medium-v0", "hopper", "hopper-medium-v2x", "antmaze-huge-v0", "pen-v0"])
def test_unknown_task_names_the_known_ones(task):
    with pytest.raises(UserError, match=r"unknown task .*hopper.*antmaze") as error:
        environments.make(task)
    assert "\n" not in str(error.value)


def test_time_limit_truncates():
    env = environments.make("halfcheetah-medium-v2")
    env.reset(seed=0)
    ends = [env.step(np.zeros(6, dtype=np.float32))[2:4] for _ in range(1000)]
    assert ends[:-1] == [(False, False)] * 999
    assert ends[-1] == (False, True)


@pytest.mark.parametrize("env_id", LOCOMOTION)
def test_start_states_are_those_of_gymnasium_v4(env_id):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        stock = gymnasium.make(env_id.removeprefix("D4RL/").replace("-v2", "-v4"))
    env = gymnasium.make(env_id)
    for seed in (0, None, 7):
        np.testing.assert_array_equal(env.reset(seed=seed)[0], stock.reset(seed=seed)[0])


@pytest.mark.parametrize("env_id", (*LOCOMOTION, "D4RL/antmaze-umaze-v2"))
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_actions_are_clipped_first(env_id, dtype):
    """Beyond [-1, 1] nothing changes, the cost of control included."""
    env = gymnasium.make(env_id)
    action = np.linspace(-3, 3, env.action_space.shape[0]).astype(dtype)
    env.reset(seed=3)
    wild = env.step(action)
    env.reset(seed=3)
    clipped = env.step(np.clip(action, -1, 1))
    np.testing.assert_array_equal(wild[0], clipped[0])
    assert wild[1] == clipped[1]


def test_float64_actions_are_not_rounded_to_float32():
    task = environments.make("hopper-medium-v2").unwrapped
    action = np.array([0.1, -0.7, 1e-9])
    np.testing.assert_allclose(task.control(action, (3,)), action, rtol=0, atol=1e-15)
    rounded = task.control(action.astype(np.float32), (3,))
    assert 0 < np.abs(rounded - action).max() < 2.0**-24 * 2


@pytest.mark.parametrize("env_id", (*LOCOMOTION, "D4RL/antmaze-large-play-v0"))
def test_illegal_actions_raise_one_clear_line(env_id):
    env = gymnasium.make(env_id, disable_env_checker=True)
    env.reset(seed=0)
    size = env.action_space.shape[0]
    for action, message in (
        (np.full(size, np.nan), "NaN"),
        (np.full(size, np.inf, dtype=np.float32), "infinite"),
        (np.zeros(size + 1), "shape"),
        (np.zeros((1, size)), "shape"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            env.step(action)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("env_id", (*LOCOMOTION, "D4RL/antmaze-umaze-v0"))
def test_unstable_simulation_ends_the_episode(env_id, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its own log there
    env = gymnasium.make(env_id)
    env.reset(seed=0)
    action = np.zeros(env.action_space.shape, dtype=np.float32)
    observation, _, terminated, _, info = env.step(action)
    assert not terminated and not info["unstable"]
    env.unwrapped.data.qvel[2] = 1e11
    before = env.unwrapped._get_obs()
    with pytest.warns(RuntimeWarning, match="unstable"):
        observation, reward, terminated, truncated, info = env.step(action)
    assert (reward, terminated, truncated, info["unstable"]) == (0.0, True, False, True)
    np.testing.assert_array_equal(observation, before)
    env.reset(seed=0)
    assert not env.step(action)[4]["unstable"]


def test_what_another_mujoco_changes_in_antmaze_alone(monkeypatch):
    assert physics.antmaze_warning("3.2.6") is None and physics.antmaze_warning("3.1.0") is None
    for version, changes in (("3.2.7", ["walls"]), ("3.8.1", ["walls"]), ("4.0.0", ["walls", "RK4"])):
        text = physics.antmaze_warning(version)
        assert [word for word in ("walls", "RK4", "margin") if word in text] == changes and "\n" not in text
    monkeypatch.setattr(mujoco, "__version__", "3.3.0")
    with pytest.warns(UserWarning, match=r"AntMaze with mujoco 3\.3\.0 is not quite D4RL's.*since 3\.2\.7"):
        environments.make("antmaze-umaze-v0")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        environments.make("hopper-medium-v2")


@pytest.mark.parametrize("environment", ["hopper", "antmaze-umaze-v0"])
def test_margins_that_are_added_sum_to_the_larger_one(environment, monkeypatch):
    xml = environments.make(ENVIRONMENTS[environment][0]).unwrapped.mjcf()
    monkeypatch.setattr(physics, "MARGINS_ADD_UP", False)
    margins = physics.restored_model(xml).geom_margin
    monkeypatch.setattr(physics, "MARGINS_ADD_UP", True)
    halved = physics.restored_model(xml).geom_margin
    assert margins[0] > 0
    np.testing.assert_array_equal(halved[:, None] + halved, np.maximum(margins[:, None], margins))


def test_capsules_weigh_like_longer_cylinders():
    """The closed form of 2.1.0's rule, for a lying, off-centre capsule between two points."""
    radius, length = 0.08, 0.5
    xml = (
        "<mujoco><worldbody><body><freejoint/>"
        f"<geom type='capsule' size='{radius}' fromto='0.1 0 0 {0.1 + length} 0 0' density='700'/>"
        "</body></worldbody></mujoco>"
    )
    model = physics.restored_model(xml)
    mass = 700 * np.pi * radius**2 * (length + radius)
    across = mass * (3 * radius**2 + (length + radius) ** 2) / 12
    np.testing.assert_allclose(model.body_mass[1], mass, rtol=1e-12)
    np.testing.assert_allclose(sorted(model.body_inertia[1]), [mass * radius**2 / 2, across, across], rtol=1e-9)
    np.testing.assert_allclose(model.body_ipos[1], [0.1 + length / 2, 0, 0], atol=1e-12)
    np.testing.assert_allclose(model.body_subtreemass[0], mass, rtol=1e-12)
    assert model.geom_type[0] == mujoco.mjtGeom.mjGEOM_CAPSULE


def test_rendering_offscreen():
    env = environments.make("hopper-medium-v2", render_mode="rgb_array", width=64, height=48)
    env.reset(seed=0)
    try:
        frame = env.render()
    except UserError as error:
        pytest.skip(str(error))
    assert frame.shape == (48, 64, 3) and frame.dtype == np.uint8
    assert frame.std() > 5
    env.close()


def test_rendering_without_opengl_says_so(monkeypatch):
    for name in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(physics.sys, "platform", "linux")
    monkeypatch.setattr(physics.sys, "executable", "/bin/false")
    env = environments.make("hopper-medium-v2", render_mode="rgb_array")
    env.reset(seed=0)
    with pytest.raises(UserError, match=r"no OpenGL.*libegl1"):
        env.render()
