"""Sets of the Minari library, on sets that the tests write through it."""

import json

import gymnasium
import numpy as np
import pytest

from utils.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*is set to None", "ignore:env_spec is None")
minari = pytest.importorskip("minari", reason="the optional minari package is not installed")

from utils import describe  # noqa: E402
from utils.data import minari as source  # noqa: E402


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return tmp_path


def collect(name: str, steps: int = 450, data_format: str = "hdf5", **options) -> list[tuple]:
    """Random actions in Pendulum (box [-2, 2], limit 200), written with its environment -> the steps as seen."""
    env = gymnasium.make("Pendulum-v1")
    env.action_space.seed(0)
    seen, episodes = [], []
    while len(seen) < steps:
        state, _ = env.reset(seed=len(seen))
        states, columns, ended = [state], [], False
        while not ended and len(seen) < steps:
            action = env.action_space.sample()
            state, reward, terminated, truncated, _ = env.step(action)
            ended = terminated or truncated
            columns.append((action, reward, terminated, truncated))
            seen.append((states[-1], action, reward, state, terminated, truncated))
            states.append(state)
        actions, rewards, terminations, truncations = zip(*columns, strict=True)
        episodes.append(
            minari.data_collector.EpisodeBuffer(
                observations=np.array(states),
                actions=np.array(actions),
                rewards=np.array(rewards),
                terminations=np.array(terminations),
                truncations=np.array(truncations),
                infos={},
            )
        )
    spaces = {"observation_space": env.observation_space, "action_space": env.action_space}
    minari.create_dataset_from_buffers(name, episodes, env=env, data_format=data_format, **spaces, **options)
    return seen


def buffer(steps: int, terminated: bool, seed: int = 0, **changes):
    rng = np.random.default_rng(seed)
    flags = np.zeros(steps, dtype=bool)
    flags[-1] = True
    columns = {
        "observations": rng.normal(size=(steps + 1, 3)).astype(np.float32),
        "actions": rng.uniform(-1, 1, size=(steps, 2)).astype(np.float32),
        "rewards": rng.normal(size=steps),
        "terminations": flags if terminated else np.zeros(steps, dtype=bool),
        "truncations": np.zeros(steps, dtype=bool) if terminated else flags,
        "infos": {},
    }
    return minari.data_collector.EpisodeBuffer(**{**columns, **changes})


def write(name: str, episodes: list, observations=None, actions=None, **options) -> None:
    box = gymnasium.spaces.Box
    minari.create_dataset_from_buffers(
        name,
        episodes,
        observation_space=observations or box(-np.inf, np.inf, (3,), np.float32),
        action_space=actions or box(-1, 1, (2,), np.float32),
        **options,
    )


@pytest.mark.parametrize("data_format", ["hdf5", "arrow"])
def test_every_step_with_its_true_successor(cache, data_format):
    if data_format == "arrow":
        pytest.importorskip("pyarrow", reason="Minari's Arrow storage needs pyarrow")
    seen = collect("test/pendulum-v0", data_format=data_format)
    data = source.load("minari:test/pendulum-v0")
    states, actions, rewards, successors, terminated, truncated = (np.array(c) for c in zip(*seen, strict=True))
    assert data.size == 450 and truncated.sum() == 2
    np.testing.assert_array_equal(data.states, states)
    np.testing.assert_array_equal(data.next_states, successors)  # at the time limit too
    np.testing.assert_allclose(data.actions, actions / 2, atol=1e-7)
    np.testing.assert_allclose(data.rewards[:, 0], rewards, rtol=1e-6)
    np.testing.assert_array_equal(data.not_dones[:, 0], np.ones(450))
    assert not terminated.any()
    assert (data.source, data.env_name) == ("minari:test/pendulum-v0", "Pendulum-v1")
    assert data.info["rows"] == 450 and data.info["bytes"] > 10_000 and len(data.info["sha256"]) == 64
    assert data.info == source.load("minari:test/pendulum-v0").info


def test_terminations_alone_stop_the_bootstrap():
    write("test/ends-v0", [buffer(4, terminated=True), buffer(3, terminated=False, seed=1)])
    data = source.load("minari:test/ends-v0")
    np.testing.assert_array_equal(data.not_dones[:, 0], [1, 1, 1, 0, 1, 1, 1])
    np.testing.assert_array_equal(data.next_states[:3], data.states[1:4])
    assert not np.array_equal(data.next_states[3], data.states[4])


def test_dictionaries_are_joined_by_alphabetical_key():
    rng = np.random.default_rng(0)
    parts = {"b": rng.normal(size=(5, 2)).astype(np.float32), "a": rng.normal(size=(5, 1)).astype(np.float32)}
    box = gymnasium.spaces.Box
    space = gymnasium.spaces.Dict({key: box(-np.inf, np.inf, (part.shape[1],)) for key, part in parts.items()})
    write("test/dict-v0", [buffer(4, terminated=True, observations=parts)], observations=space)
    data = source.load("minari:test/dict-v0")
    joined = np.concatenate([parts["a"], parts["b"]], axis=1)
    np.testing.assert_array_equal(data.states, joined[:-1])
    np.testing.assert_array_equal(data.next_states, joined[1:])


def test_description_has_the_episodes():
    write("test/two-v0", [buffer(4, terminated=True), buffer(3, terminated=False, seed=1)])
    summary = describe.summarize(source.read_rows("minari:test/two-v0"))
    assert (summary["episodes"], summary["lengths"]) == (2, [4, 3])
    assert (summary["terminals"], summary["timeouts"]) == (1, 1)


def test_the_screen_of_a_set(capsys):
    collect("test/screen-v0", ref_min_score=-1600.0, ref_max_score=-200.0)
    assert describe.main(["minari:test/screen-v0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["lengths"] == [200, 200, 50] and "scored by its own reference scores" in found["title"][0]
    np.testing.assert_allclose(found["normalized_returns"], (np.array(found["returns"]) + 1600) / 14)
    write("test/bare-v0", [buffer(4, terminated=True)])
    assert describe.main(["minari:test/bare-v0"]) == 0
    assert "minari:test/bare-v0   no reference scores" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# What cannot be used
# --------------------------------------------------------------------------------------------------


def test_discrete_actions_images_and_unbounded_boxes_are_refused():
    box = gymnasium.spaces.Box
    write("test/d-v0", [buffer(2, True, actions=np.zeros(2, np.int64))], actions=gymnasium.spaces.Discrete(2))
    write(
        "test/i-v0",
        [buffer(2, True, observations=np.zeros((3, 4, 4), np.float32))],
        observations=box(0, 1, (4, 4), np.float32),
    )
    write("test/u-v0", [buffer(2, True)], actions=box(-np.inf, np.inf, (2,), np.float32))
    for name, message in {"d": "bounded box", "i": "vectors of numbers", "u": "bounded box"}.items():
        with pytest.raises(UserError, match=message):
            source.load(f"minari:test/{name}-v0")


@pytest.mark.parametrize(
    ("column", "shape", "message"), [("rewards", 4, "rewards holds NaN"), ("observations", (5, 3), "states holds NaN")]
)
def test_nan_is_refused(column, shape, message):
    write("test/nan-v0", [buffer(4, True, **{column: np.full(shape, np.nan, np.float32)})])
    with pytest.raises(UserError, match=message):
        source.load("minari:test/nan-v0")


def test_actions_beyond_the_sets_own_box_are_refused():
    write("test/far-v0", [buffer(2, True, actions=np.full((2, 2), 1.5, np.float32))])
    with pytest.raises(UserError, match="leave the action box"):
        source.load("minari:test/far-v0")


def test_a_damaged_file_is_one_line(cache):
    write("test/cut-v0", [buffer(40, True)])
    (path,) = cache.rglob("main_data.hdf5")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="minari:test/cut-v0 cannot be read") as error:
        source.load("minari:test/cut-v0")
    assert "\n" not in str(error.value)


def test_damaged_metadata_is_one_line(cache):
    write("test/meta-v0", [buffer(4, True)])
    (path,) = cache.rglob("metadata.json")
    path.write_text("{")
    with pytest.raises(UserError, match="minari:test/meta-v0 cannot be opened") as error:
        source.load("minari:test/meta-v0")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["test/absent-v0", "no version", ""])
def test_an_absent_set_says_what_to_do(name, monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(minari, "list_remote_datasets", offline)
    with pytest.raises(UserError, match=f"minari:{name} (is not in Minari's cache|cannot be opened)") as error:
        source.load(f"minari:{name}")
    assert "\n" not in str(error.value)


def test_a_set_that_is_too_large_is_not_downloaded(monkeypatch):
    asked = []
    sizes = {"test/large-v0": {"dataset_size": 8600.0}, "test/small-v0": {"dataset_size": 8500.0}, "test/old-v0": {}}
    monkeypatch.setattr(minari, "list_remote_datasets", lambda prefix: {prefix: sizes[prefix]})
    monkeypatch.setattr(minari.storage.local.hosting, "download_dataset", asked.append)
    with pytest.raises(UserError, match=r"minari:test/large-v0 has 8\.6 GB; sets of up to 8 GiB"):
        source.load("minari:test/large-v0")
    for name in ("test/small-v0", "test/old-v0"):  # they go on to the download, which leaves nothing here
        with pytest.raises(UserError, match="cannot be downloaded"):
            source.load(f"minari:{name}")
    assert asked == ["test/small-v0", "test/old-v0"]


# --------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------
def test_evaluation_environment_and_scores():
    collect("test/scored-v0", ref_min_score=-1600.0, ref_max_score=-200.0)
    spec = source.environment_spec("minari:test/scored-v0")
    assert (spec.spec.id, spec.max_episode_steps) == ("Pendulum-v1", 200)
    scores = source.normalized_score("minari:test/scored-v0", np.array([-1600.0, -900.0, -200.0]))
    np.testing.assert_allclose(scores, [0, 50, 100])


def test_without_reference_scores_there_is_no_score():
    collect("test/plain-v0", steps=10)
    assert np.isnan(source.normalized_score("minari:test/plain-v0", np.array([1.0, 2.0]))).all()
    assert np.isnan(source.normalized_score("minari:test/plain-v0", 1.0))


def test_a_set_without_an_environment_is_not_evaluated():
    write("test/none-v0", [buffer(2, True)])
    assert source.load("minari:test/none-v0").env_name == "minari:test/none-v0"
    with pytest.raises(UserError, match="the environment of minari:test/none-v0 cannot be made"):
        source.make_lockstep("minari:test/none-v0", 1)


def test_lockstep_equals_one_environment_at_a_time():
    collect("test/lock-v0", steps=10)
    envs = source.make_lockstep("minari:test/lock-v0", 2)
    assert (envs.state_dim, envs.action_dim, envs.max_action, envs.max_episode_steps) == (3, 1, 1.0, 200)
    states = envs.reset([np.random.default_rng(7)] * 2)
    seeds = np.random.default_rng(7).integers(2**31, size=2)
    for row, seed in enumerate(seeds):
        env = gymnasium.make("Pendulum-v1")
        expected, _ = env.reset(seed=int(seed))
        np.testing.assert_array_equal(states[row], expected)
    running, total, lengths = np.ones(2, dtype=bool), np.zeros(2), np.zeros(2)
    policy = np.random.default_rng(0)
    for _ in range(200):
        action = policy.uniform(-1, 1, size=1)
        states, rewards, terminated, truncated = envs.step(np.stack([action, action]), running)
        expected, reward, *_ = env.step((2 * action).astype(np.float32))
        np.testing.assert_allclose(states[1], expected, rtol=1e-6)
        assert rewards[1] == pytest.approx(reward)
        total += rewards
        lengths += running
        running &= ~(terminated | truncated)
    assert not running.any() and (lengths == 200).all() and (total < 0).all()
    before = states.copy()
    states, rewards, *_ = envs.step(np.zeros((2, 1)), running)  # no row runs: nothing moves
    np.testing.assert_array_equal(states, before)
    assert (rewards == 0).all()
    envs.close()


def test_lockstep_clips_and_refuses_nan():
    collect("test/clip-v0", steps=10)
    envs = source.make_lockstep("minari:test/clip-v0", 1)
    results = []
    for action in (1.0, 5.0):
        envs.reset([np.random.default_rng(0)])
        results.append(envs.step(np.array([[action]]), np.array([True]))[0])
    np.testing.assert_array_equal(*results)
    with pytest.raises(UserError, match="NaN or infinite"):
        envs.step(np.array([[np.nan]]), np.array([True]))
    with pytest.raises(UserError, match="2 generators for 1"):
        envs.reset([np.random.default_rng(0)] * 2)
    with pytest.raises(UserError, match="at least one"):
        source.make_lockstep("minari:test/clip-v0", 0)
