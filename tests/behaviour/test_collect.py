"""Policy files, recording, and the HDF5 files of `utils.behaviour.collect`."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from utils.behaviour import collect
from utils.behaviour.policies import (
    LinearPolicy,
    NetworkPolicy,
    NoisyPolicy,
    UniformPolicy,
    load_policy,
    save_policy,
)
from utils.data import d4rl
from utils.data.rows import read_rows
from utils.environments import make, make_lockstep
from utils.errors import UserError

ROOT = Path(__file__).parents[2]
HOPPER, CHEETAH = "hopper-medium-v2", "halfcheetah-medium-v2"


def linear_policy(state_dim: int = 11, action_dim: int = 3, seed: int = 0) -> LinearPolicy:
    rng = np.random.default_rng(seed)
    weight, mean = rng.standard_normal((action_dim, state_dim)), rng.standard_normal(state_dim)
    return LinearPolicy(0.3 * weight, mean, 1 + rng.random(state_dim), {"made": "by a test"})


def network_policy(state_dim: int = 11, action_dim: int = 3, gaussian: bool = True) -> NetworkPolicy:
    rng = np.random.default_rng(1)
    sizes = [(8, state_dim), (8, 8), (action_dim, 8)]
    return NetworkPolicy(
        [rng.standard_normal(size) for size in sizes],
        [rng.standard_normal(size[0]) for size in sizes],
        rng.standard_normal((action_dim, 8)) if gaussian else None,
        np.full(action_dim, -1.0) if gaussian else None,
    )


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- Policies ---


def test_linear_policy_is_the_clipped_product_of_normalised_states() -> None:
    policy = linear_policy()
    states = np.random.default_rng(2).standard_normal((5, 11))
    expected = [
        [
            min(1.0, max(-1.0, sum(policy.weight[a, s] * (x[s] - policy.mean[s]) / policy.std[s] for s in range(11))))
            for a in range(3)
        ]
        for x in states
    ]
    np.testing.assert_allclose(policy.act(states), expected, rtol=0, atol=1e-14)


def test_network_policy_equals_torch() -> None:
    import torch

    policy = network_policy()
    states = np.random.default_rng(3).standard_normal((4, 11))
    hidden = torch.from_numpy(states)
    for weight, bias in zip(policy.weights[:-1], policy.biases[:-1], strict=True):
        hidden = torch.relu(torch.nn.functional.linear(hidden, torch.from_numpy(weight), torch.from_numpy(bias)))
    mean = hidden @ torch.from_numpy(policy.weights[-1]).T + torch.from_numpy(policy.biases[-1])
    np.testing.assert_allclose(policy.act(states), torch.tanh(mean).numpy(), rtol=0, atol=1e-13)
    log_std = hidden @ torch.from_numpy(policy.log_std_weight).T + torch.from_numpy(policy.log_std_bias)
    noise = torch.from_numpy(np.random.default_rng(4).standard_normal((4, 3)))
    sampled = torch.tanh(mean + log_std.clamp(-20, 2).exp() * noise)
    np.testing.assert_allclose(policy.act(states, np.random.default_rng(4)), sampled.numpy(), rtol=0, atol=1e-13)


def test_noise_has_the_asked_deviation_and_stays_in_the_box() -> None:
    inner = NetworkPolicy([np.zeros((3, 11))], [np.arctanh([0.0, 0.2, 0.99])])
    actions = NoisyPolicy(inner, 0.2).act(np.zeros((40_000, 11)), np.random.default_rng(5))
    assert np.abs(actions).max() <= 1
    # 40,000 draws: standard errors of 0.001 (mean) and 0.0007 (deviation)
    np.testing.assert_allclose(actions[:, :2].mean(0), [0.0, 0.2], atol=0.005)
    np.testing.assert_allclose(actions[:, :2].std(0), 0.2, atol=0.004)
    assert (actions[:, 2] == 1).mean() == pytest.approx(0.48, abs=0.02)  # P(0.99 + 0.2 N > 1)
    np.testing.assert_array_equal(NoisyPolicy(inner, 0.2).act(np.zeros((2, 11))), inner.act(np.zeros((2, 11))))


def test_uniform_policy_fills_the_box_evenly() -> None:
    actions = UniformPolicy(2).act(np.zeros((20_000, 5)), np.random.default_rng(6))
    assert actions.shape == (20_000, 2)
    np.testing.assert_allclose(np.histogram(actions, 4, (-1, 1))[0] / 40_000, 0.25, atol=0.01)


@pytest.mark.parametrize("policy", [linear_policy(), network_policy(), network_policy(gaussian=False)])
def test_policy_file_round_trip(policy: LinearPolicy | NetworkPolicy, tmp_path: Path) -> None:
    path = tmp_path / "policy.npz"
    save_policy(path, policy, dtype=np.float64)
    loaded = load_policy(path)
    states = np.random.default_rng(7).standard_normal((6, 11))
    np.testing.assert_array_equal(loaded.act(states), policy.act(states))
    np.testing.assert_array_equal(
        loaded.act(states, np.random.default_rng(8)), policy.act(states, np.random.default_rng(8))
    )
    assert loaded.info == policy.info
    assert loaded.sizes == (11, 3)


@pytest.mark.parametrize(("name", "samples"), [("SAC", True), ("TD3", False), ("PPO", True)])
def test_stable_baselines3_policy_acts_as_its_model(name: str, samples: bool, tmp_path: Path) -> None:
    sb3 = pytest.importorskip("stable_baselines3", reason="stable-baselines3 is an optional requirement")
    env = make(HOPPER)
    model = getattr(sb3, name)("MlpPolicy", env, policy_kwargs={"net_arch": [8]}, seed=0, device="cpu")
    model.save(tmp_path / "policy.zip")
    policy = load_policy(tmp_path / "policy.zip")
    assert policy.sizes == (11, 3)
    states = np.random.default_rng(9).standard_normal((4, 11))
    expected, _ = model.predict(states.astype(np.float32), deterministic=True)
    np.testing.assert_allclose(policy.act(states), expected, rtol=0, atol=1e-6)
    first, second = (policy.act(states, np.random.default_rng(10)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert (np.abs(first - expected).max() > 0.01) == samples


def test_bad_policy_files_are_refused_in_one_line(tmp_path: Path) -> None:
    def refused(match: str, name: str, **arrays: object) -> None:
        path = tmp_path / name
        if arrays:
            np.savez(path, **arrays)
        with pytest.raises(UserError, match=match) as error:
            load_policy(path)
        assert "\n" not in str(error.value)

    ones = np.ones((3, 11))
    refused("no policy file", "missing.npz")
    refused("kind is ''", "nothing.npz", x=np.zeros(2))
    refused("kind is 'cubic'", "cubic.npz", kind="cubic")
    refused("not a sound linear", "part.npz", kind="linear", weight=ones, mean=np.zeros(11))
    refused("not a sound linear", "sizes.npz", kind="linear", weight=ones, mean=np.zeros(4), std=np.ones(11))
    refused("not a sound network", "empty.npz", kind="network", bias_0=np.zeros(3))
    refused("not a sound network", "nan.npz", kind="network", weight_0=ones * np.nan, bias_0=np.zeros(3))
    (tmp_path / "text.npz").write_text("no arrays here")
    refused("not a policy file", "text.npz")
    (tmp_path / "text.zip").write_text("no archive here")
    pytest.importorskip("stable_baselines3", reason="stable-baselines3 is an optional requirement")
    refused("not a policy file of stable-baselines3", "text.zip")


# --- Recording ---


def test_recording_is_what_a_plain_loop_over_one_environment_sees() -> None:
    policy, seed = linear_policy(), np.random.SeedSequence(11)
    noisy = NoisyPolicy(policy, 0.1)
    part = collect.record(make_lockstep(HOPPER, 1), noisy, seed, rows=200)

    noise_seed, start_seed = np.random.SeedSequence(11).spawn(2)
    noise, env = np.random.default_rng(noise_seed), make(HOPPER)
    env.unwrapped.np_random = np.random.default_rng(start_seed)
    state, _ = env.reset()
    for k in range(200):
        action = noisy.act(state[None], noise)[0].astype(np.float32)
        np.testing.assert_array_equal(part.observations[k], state.astype(np.float32))
        np.testing.assert_array_equal(part.actions[k], action)
        state, reward, terminated, truncated, _ = env.step(action)
        assert part.rewards[k] == np.float32(reward)
        assert part.terminals[k] == terminated
        if terminated or truncated:
            state, _ = env.reset()
    assert part.terminals.sum() >= 2  # the comparison went over ends of episodes
    assert part.timeouts.tolist() == [False] * 199 + [not part.terminals[199]]


def test_a_policy_acts_with_one_blas_thread() -> None:
    def threads() -> set[int]:
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    class Watched(UniformPolicy):
        def act(self, states: np.ndarray, rng: np.random.Generator) -> np.ndarray:
            seen.append(threads())
            return super().act(states, rng)

    seen: list[set[int]] = []
    with threadpool_limits(2, user_api="blas"):
        collect.record(make_lockstep(HOPPER, 1), Watched(3), np.random.SeedSequence(0), rows=2)
        assert seen == [{1}, {1}] and threads() == {2}


def test_rows_are_dealt_to_streams_and_cut_there() -> None:
    part = collect.record(make_lockstep(CHEETAH, 3), UniformPolicy(6), np.random.SeedSequence(0), rows=100)
    assert len(part) == 100
    assert np.flatnonzero(part.timeouts).tolist() == [33, 66, 99]  # 34 + 33 + 33 rows
    np.testing.assert_array_equal(part.cut, part.timeouts)
    assert not part.terminals.any()
    assert len(part.whole_returns()) == 0  # no whole episode


def test_asked_number_of_whole_episodes() -> None:
    policy = NoisyPolicy(linear_policy(), 0.1)
    part = collect.record(make_lockstep(HOPPER, 3), policy, np.random.SeedSequence(0), episodes=8)
    ends = np.flatnonzero(part.terminals | part.timeouts)
    assert len(ends) == 8 and ends[-1] == len(part) - 1 and not part.cut.any()
    starts = np.r_[0, ends[:-1] + 1]
    by_hand = [part.rewards[i : j + 1].astype(np.float64).sum() for i, j in zip(starts, ends, strict=True)]
    np.testing.assert_allclose(part.whole_returns(), by_hand, rtol=0, atol=1e-9)
    # the start states: height 1.25 +- 0.005
    assert np.abs(part.observations[starts, 0] - 1.25).max() <= 0.005


@pytest.mark.parametrize("amounts", [{}, {"rows": 5, "episodes": 1}, {"rows": 0}, {"episodes": -1}])
def test_record_needs_one_amount(amounts: dict) -> None:
    with pytest.raises(ValueError, match="record needs"):
        collect.record(make_lockstep(HOPPER, 1), UniformPolicy(3), np.random.SeedSequence(0), **amounts)


def test_a_published_snapshot_becomes_a_policy_file_as_the_docs_say(tmp_path: Path, monkeypatch) -> None:
    """The program in docs/data.md, on a snapshot of the published form, acts as Deep OPE's own code does."""
    rng = np.random.default_rng(5)
    shapes = {"fc0": (8, 11), "fc1": (8, 8), "last_fc": (3, 8), "last_fc_log_std": (3, 8)}
    snapshot = {f"{layer}/weight": rng.standard_normal(shape).astype(np.float32) for layer, shape in shapes.items()}
    snapshot |= {f"{layer}/bias": rng.standard_normal(shape[0]).astype(np.float32) for layer, shape in shapes.items()}
    (tmp_path / "hopper_online_3.pkl").write_bytes(
        pickle.dumps({**snapshot, "nonlinearity": "relu", "output_distribution": "tanh_gaussian"})
    )
    (program,) = (
        text.partition("```")[0]
        for text in (ROOT / "docs" / "data.md").read_text(encoding="utf-8").split("```python\n")[1:]
    )
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    policy = load_policy(tmp_path / "hopper_online_3.npz")
    assert policy.info["snapshot"] == "hopper_online_3"
    state = rng.standard_normal(11)
    x = state
    for layer in ("fc0", "fc1"):
        x = np.maximum(snapshot[f"{layer}/weight"].astype(np.float64) @ x + snapshot[f"{layer}/bias"], 0)
    mean, log_std = (
        snapshot[f"{layer}/weight"].astype(np.float64) @ x + snapshot[f"{layer}/bias"]
        for layer in ("last_fc", "last_fc_log_std")
    )
    noise = np.random.default_rng(6).standard_normal((1, 3))[0]
    expected = np.tanh(mean + np.exp(np.clip(log_std, -20, 2)) * noise)
    np.testing.assert_allclose(policy.act(state[None], np.random.default_rng(6))[0], expected, rtol=0, atol=1e-12)


# --- Files and the command ---


def collect_hopper(path: Path, policy: Path | list[Path], **settings: object) -> dict:
    return collect.collect_file("hopper", policy, path, progress=False, **settings)


@pytest.fixture
def policy_path(tmp_path: Path) -> Path:
    save_policy(tmp_path / "policy.npz", linear_policy())
    return tmp_path / "policy.npz"


def test_same_seed_same_file(policy_path: Path, tmp_path: Path) -> None:
    settings = {"transitions": 300, "noise": 0.1}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        collect_hopper(tmp_path / name, policy_path, seed=seed, **settings)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")


def test_file_is_read_as_d4rl_and_says_what_it_is(policy_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "set.hdf5"
    collect_hopper(path, policy_path, episodes=6)
    rows = read_rows(path, 11, 3)
    attributes = collect.read_attributes(path)
    assert attributes["rows"] == len(rows.rewards)
    assert "not the official D4RL file" in attributes["description"]
    (behaviour,) = attributes["behaviours"]
    mean = rows.rewards.sum() / 6
    assert behaviour["episodes"] == 6
    assert behaviour["mean_return"] == pytest.approx(mean, rel=1e-5)
    assert behaviour["normalized_return"] == pytest.approx(100 * (mean + 20.272305) / (3234.3 + 20.272305), rel=1e-5)
    assert behaviour["policy"] == {"made": "by a test"}
    assert attributes["policy_sha256"] == digest(policy_path)
    assert set(attributes["versions"]) == {"python", "mujoco", "gymnasium", "numpy", "h5py"}
    dataset = d4rl.load(HOPPER, path=path)
    assert dataset.size == len(rows.rewards) - 1 - int(rows.timeouts[:-1].sum())


def test_several_policies_make_one_part_each_with_a_random_stream_of_its_own(policy_path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.npz"
    save_policy(other, network_policy())
    settings = {"transitions": 4000, "noise": 0.1, "seed": 3}
    for name, paths in (("alone", policy_path), ("list", [policy_path]), ("two", [policy_path, policy_path, other])):
        collect_hopper(tmp_path / name, paths, **settings)
    assert digest(tmp_path / "alone") == digest(tmp_path / "list")  # one policy: the bytes of ever
    alone, two = (read_rows(tmp_path / name, 11, 3) for name in ("alone", "two"))
    assert len(two.rewards) == 3 * 4000
    for name in ("observations", "actions", "rewards", "terminals", "timeouts"):
        np.testing.assert_array_equal(getattr(two, name)[:4000], getattr(alone, name))
    # The same policy again is another sample: no state occurs twice.
    first, second = ({row.tobytes() for row in two.observations[i : i + 4000]} for i in (0, 4000))
    assert len(first) == len(second) == 4000 and not first & second
    with h5py.File(tmp_path / "two") as file:
        assert file["infos/behaviour"][:].tolist() == [0] * 4000 + [1] * 4000 + [2] * 4000
    attributes = collect.read_attributes(tmp_path / "two")
    assert attributes["rows"] == 12_000 and attributes["seed"] == 3
    assert [part["name"] for part in attributes["behaviours"]] == ["policy", "policy", "other"]
    assert attributes["policy_sha256"] == [digest(policy_path), digest(policy_path), digest(other)]
    assert collect.read_attributes(tmp_path / "list")["policy_sha256"] == digest(policy_path)


def test_nothing_is_left_of_a_write_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = collect.record(make_lockstep(HOPPER, 1), UniformPolicy(3), np.random.SeedSequence(0), rows=20)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(collect.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        collect.write_hdf5(tmp_path / "set.hdf5", [part], {})
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    part = collect.record(make_lockstep(HOPPER, 1), UniformPolicy(3), np.random.SeedSequence(0), rows=20)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = {
        "killed": f".set.hdf5.{gone.pid}.part",
        "living": f".set.hdf5.{os.getppid()}.part",
        "elsewhere": f".set.hdf5.{gone.pid + 10**7}.part",  # touched a moment ago
        "other": f".other.hdf5.{gone.pid}.part",
        "foreign": ".set.hdf5.backup.part",
    }
    for name in left.values():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1e9, 1e9))
    os.utime(tmp_path / left["elsewhere"])
    collect.write_hdf5(tmp_path / "set.hdf5", [part], {})
    assert {path.name for path in tmp_path.iterdir()} == {"set.hdf5", *left.values()} - {left["killed"]}


def test_no_time_stamps_in_the_file(tmp_path: Path) -> None:
    part = collect.record(make_lockstep(HOPPER, 1), UniformPolicy(3), np.random.SeedSequence(0), rows=20)
    collect.write_hdf5(tmp_path / "set.hdf5", [part, part], {"b": 1, "a": {"x": [2]}})
    with h5py.File(tmp_path / "set.hdf5") as file:
        assert {name: json.loads(value) for name, value in file.attrs.items()} == {"a": {"x": [2]}, "b": 1}
        for name in ("observations", "actions", "rewards", "terminals", "timeouts", "infos/behaviour"):
            assert h5py.h5o.get_info(file[name].id).mtime == 0
        assert file["infos/behaviour"][:].tolist() == [0] * 20 + [1] * 20


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"env": "hoper"}, "unknown task 'hoper'"),
        ({"env": "walker2d"}, "11 state and 3 action dimensions; walker2d has 17 and 6"),
        ({"transitions": 0}, "at least 1"),
        ({"noise": -0.5}, "--noise is -0.5"),
        ({"noise": float("nan")}, "--noise is nan"),
        ({"seed": -1}, "--seed is -1"),
        ({"policy_path": "nowhere.npz"}, "no policy file"),
    ],
)
def test_illegal_input(change: dict, match: str, policy_path: Path, tmp_path: Path) -> None:
    settings = {"env": "hopper", "policy_path": policy_path, "out": tmp_path / "x.hdf5", "transitions": 50} | change
    with pytest.raises(UserError, match=match) as error:
        collect.collect_file(**settings, progress=False)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "x.hdf5").exists()


def test_an_existing_output_is_kept(policy_path: Path, tmp_path: Path) -> None:
    (tmp_path / "x.hdf5").write_text("mine")
    with pytest.raises(UserError, match="exists"):
        collect_hopper(tmp_path / "x.hdf5", policy_path, transitions=50)
    assert (tmp_path / "x.hdf5").read_text() == "mine"


@pytest.mark.slow
def test_command_line(policy_path: Path, tmp_path: Path) -> None:
    def command(out: str) -> subprocess.CompletedProcess:
        arguments = ["--env", "hopper", "--policy", str(policy_path), "--transitions", "50", "--out", out]
        return subprocess.run(
            [sys.executable, "-m", "utils.behaviour.collect", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

    good, bad = command(str(tmp_path / "x.hdf5")), command(str(tmp_path / "x.hdf5"))
    assert good.returncode == 0 and "50 rows" in good.stdout
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and bad.stderr.startswith("utils.behaviour.collect: ")
