"""The searches for behaviour policies: their arithmetic on small cases, and that they go on where they stopped."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.behaviour import gait_search, policy_search, search
from utils.behaviour.navigation import yaw
from utils.behaviour.policies import NoisyPolicy, load_policy
from utils.environments import make_lockstep

ROOT = Path(__file__).parents[2]
HOPPER = "hopper-medium-v2"


# --- Augmented random search ---


def test_running_moments_are_those_of_all_states() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.normal(3, 2, (n, 4)) for n in (5, 1, 40)]
    moments = policy_search._RunningMoments(4)
    for part in parts:
        moments.add(part)
    states = np.concatenate(parts)
    assert moments.count == 46
    np.testing.assert_allclose(moments.mean, states.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.std, states.std(0), rtol=1e-12)


def test_one_iteration_is_the_papers_algorithm_2() -> None:
    settings = policy_search.ARSSettings(iterations=1, directions=3, best=2, snapshot_interval=1, eval_episodes=1)
    first, second = policy_search.augmented_random_search(HOPPER, 5, settings)
    assert not first.policy.weight.any() and first.step == 0

    # the same draws, candidates one after another
    rng = np.random.default_rng(5)
    delta = rng.standard_normal((3, 3, 11))
    envs = make_lockstep(HOPPER, 6)
    states, running = envs.reset([rng] * 6), np.ones(6, dtype=bool)
    returns, count = np.zeros(6), 0
    candidates = [sign * settings.noise * delta[k] for sign in (1, -1) for k in range(3)]
    while running.any():
        count += running.sum()
        actions = np.clip([candidates[k] @ states[k] for k in range(6)], -1, 1)
        states, rewards, terminated, truncated = envs.step(actions, running)
        returns += np.where(running, rewards - 1, 0)
        running &= ~(terminated | truncated)
    plus, minus = returns[:3], returns[3:]
    best = sorted(range(3), key=lambda k: max(plus[k], minus[k]))[1:]
    deviation = np.std([*plus[best], *minus[best]])
    step = sum((plus[k] - minus[k]) * delta[k] for k in best) * settings.step_size / (2 * deviation)
    assert second.step == count
    np.testing.assert_allclose(second.policy.weight, step, rtol=1e-4)


@pytest.mark.slow
def test_random_search_finds_better_policies() -> None:
    settings = policy_search.ARSSettings(iterations=30, snapshot_interval=30, eval_episodes=5)
    first, last = policy_search.augmented_random_search(HOPPER, 0, settings)
    assert last.mean_return > first.mean_return + 100


# --- Soft actor-critic ---

TINY = policy_search.SACSettings(
    steps=60,
    random_steps=20,
    snapshot_interval=30,
    checkpoint_interval=30,
    eval_episodes=1,
    actor_width=8,
    critic_width=8,
    batch_size=16,
)


def test_actors_log_probability_is_that_of_a_squashed_normal() -> None:
    torch.manual_seed(0)
    actor = policy_search._Actor(3, 2, 8)
    states, noise = torch.randn(5, 3), torch.randn(5, 2)
    actions, log_prob = actor(states, noise)
    hidden = torch.relu(actor.hidden[1](torch.relu(actor.hidden[0](states))))
    normal = torch.distributions.Normal(actor.mean(hidden), actor.log_std(hidden).exp())
    squashed = torch.distributions.TransformedDistribution(normal, torch.distributions.TanhTransform(cache_size=1))
    torch.testing.assert_close(log_prob, squashed.log_prob(actions).sum(-1), rtol=1e-4, atol=1e-4)


def test_exported_actor_acts_as_the_network() -> None:
    torch.manual_seed(1)
    actor = policy_search._Actor(11, 3, 8)
    states = torch.randn(4, 11)
    policy = actor.export()
    with torch.no_grad():
        expected = actor(states, torch.zeros(4, 3))[0].numpy()
    np.testing.assert_allclose(policy.act(states.numpy()), expected, atol=1e-6)


def test_twin_critic_is_two_networks() -> None:
    torch.manual_seed(2)
    critic = policy_search._TwinCritic(5, 8)
    states, actions = torch.randn(4, 3), torch.randn(4, 2)
    values = critic(states, actions)
    for k in range(2):
        h = torch.cat([states, actions], 1)
        for layer in range(3):
            h = h @ critic.weights[layer][k] + critic.biases[layer][k]
            h = torch.relu(h) if layer < 2 else h
        torch.testing.assert_close(values[k], h[:, 0])


def test_update_moves_the_target_towards_the_critic_and_alpha_towards_its_entropy() -> None:
    search = policy_search._SAC(3, 2, policy_search.SACSettings(steps=40, batch_size=16), seed=0)
    rng = np.random.default_rng(0)
    for _ in range(40):
        search.remember(rng.random(3), rng.uniform(-1, 1, 2), rng.random(3), rng.random(), False)
    before = [p.clone() for p in search.target.parameters()]
    search.update()
    for old, target, online in zip(before, search.target.parameters(), search.critic.parameters(), strict=True):
        torch.testing.assert_close(target, old + 0.005 * (online - old), rtol=0, atol=1e-7)
    # a fresh actor's entropy, near 2 (log 2), is above the target -2: the temperature falls
    assert search.log_alpha.item() == pytest.approx(-5e-4, rel=1e-3)


def test_an_interrupted_search_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.pt"
    search = policy_search.soft_actor_critic(HOPPER, 0, TINY, checkpoint)
    assert next(search).step == 30
    search.close()  # before step 30's checkpoint was written
    assert not checkpoint.exists()

    whole = list(policy_search.soft_actor_critic(HOPPER, 0, TINY, checkpoint))
    assert [snapshot.step for snapshot in whole] == [30, 60]
    assert list(policy_search.soft_actor_critic(HOPPER, 0, TINY, checkpoint)) == []  # it is at its end
    longer = policy_search.SACSettings(**{**vars(TINY), "steps": 90})
    assert [snapshot.step for snapshot in policy_search.soft_actor_critic(HOPPER, 0, longer, checkpoint)] == [90]


def test_a_checkpoint_holds_all_that_an_update_needs(tmp_path: Path) -> None:
    def searching(step_count: int) -> policy_search._SAC:
        search = policy_search._SAC(3, 2, TINY, seed=3)
        rng = np.random.default_rng(1)
        for _ in range(step_count):
            search.remember(rng.random(3), rng.uniform(-1, 1, 2), rng.random(3), rng.random(), False)
        return search

    one = searching(40)
    for _ in range(3):
        one.update()
    one.save(tmp_path / "checkpoint.pt")
    one.update()
    other = policy_search._SAC(3, 2, TINY, seed=4)
    other.load(tmp_path / "checkpoint.pt")
    other.update()
    for name in ("actor", "critic", "target"):
        for a, b in zip(getattr(one, name).parameters(), getattr(other, name).parameters(), strict=True):
            assert torch.equal(a, b)
    assert one.log_alpha == other.log_alpha and one.step == other.step
    assert one.rng.random() == other.rng.random()


# --- Choosing ---


def test_choice_of_behaviours() -> None:
    scores = [0.0, 5, 12, 26, 21, 40, 60, 90, 100, 97]
    chosen = search.choose(scores)
    assert chosen["expert"] == 8
    assert chosen["medium"] == 5  # the first between 33.3 and 50
    # even steps from 0 to 40: 0, 10, 20, 30
    assert [chosen[f"replay_{k}"] for k in (1, 2, 3, 4)] == [0, 2, 4, 3]


def test_medium_is_the_nearest_where_none_is_between() -> None:
    assert search.choose([0.0, 20, 60, 100])["medium"] == 2
    assert search.choose([0.0, 30, 60, 100])["medium"] == 1


# --- The gait ---


def test_gait_is_the_same_for_a_quarter_turn_of_legs() -> None:
    """Turning the way by 90 degrees moves every leg's part to the next leg, half a period on."""
    rng = np.random.default_rng(0)
    numbers = np.tile(rng.uniform(0.2, 1.0, 10), (6, 1))
    states = np.zeros((6, 29))
    states[:, 3] = 1
    phases, directions = rng.uniform(0, 6, 6), rng.uniform(0, 6, 6)
    plain = gait_search.gait_actions(numbers, phases, directions, states)
    turned = gait_search.gait_actions(numbers, phases + np.pi, directions + np.pi / 2, states)

    def by_leg(actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        joints = np.empty_like(actions)
        joints[:, gait_search.ACTUATORS] = actions
        return joints[:, ::2], joints[:, 1::2] * gait_search.ANKLE_SIGNS

    for one, other in zip(by_leg(plain), by_leg(turned), strict=True):
        np.testing.assert_allclose(np.roll(one, 1, axis=1), other, atol=1e-12)


def test_gait_turns_with_the_torso() -> None:
    rng = np.random.default_rng(1)
    numbers = np.tile(rng.uniform(0.2, 1.0, 10), (4, 1))
    phases, directions, angle = rng.uniform(0, 6, 4), rng.uniform(0, 6, 4), rng.uniform(-3, 3, 4)
    states = np.zeros((4, 29))
    states[:, 3] = 1
    turned = states.copy()
    turned[:, 3], turned[:, 6] = np.cos(angle / 2), np.sin(angle / 2)
    np.testing.assert_allclose(yaw(turned), angle, atol=1e-12)
    np.testing.assert_allclose(
        gait_search.gait_actions(numbers, phases, directions + angle, turned),
        gait_search.gait_actions(numbers, phases, directions, states),
        atol=1e-12,
    )


def test_shipped_gait_walks_any_way() -> None:
    policy = load_policy(ROOT / "utils" / "behaviour" / "ant" / "gait.npz")
    envs = gait_search.open_envs(12)
    result = gait_search.walk(envs, np.random.default_rng(0), 60, policy=policy)
    assert np.median(result.progress) > 5.0  # metres in six seconds; the start is included
    assert (result.upright > 0.3).sum() >= 10


def test_cloning_learns_the_gaits_actions() -> None:
    settings = gait_search.GaitSettings(clone_walks=50, clone_walk_steps=20, clone_updates=600, width=32)
    rng = np.random.default_rng(2)
    gait = np.array([getattr(gait_search.Gait(), f.name) for f in gait_search.fields(gait_search.Gait)])
    policy = gait_search.clone(gait, settings, rng, progress=False)
    walk = gait_search.walk(gait_search.open_envs(10), rng, 20, np.tile(gait, (10, 1)))
    features, labels = walk.features.reshape(-1, 28), walk.labels.reshape(-1, 8)
    error = np.square(policy.act(features) - labels).mean()
    assert error < 0.25 * labels.var(0).mean()


def test_cross_entropy_method_improves_the_gait() -> None:
    settings = gait_search.GaitSettings(iterations=4, population=12, elite=3, trials=2, walk_steps=30)
    found = gait_search.cross_entropy_method(settings, np.random.default_rng(3), progress=False)
    start = np.array([getattr(gait_search.Gait(), f.name) for f in gait_search.fields(gait_search.Gait)])
    envs = gait_search.open_envs(16)
    before, after = (
        gait_search.walk(envs, np.random.default_rng(4), 30, np.tile(gait, (16, 1))).progress.mean()
        for gait in (start, found)
    )
    assert after > before + 0.3


# --- The command ---


@pytest.mark.slow
def test_command_writes_policies_that_load(tmp_path: Path) -> None:
    arguments = ["--env", "hopper", "--steps", "5", "--dir", str(tmp_path / "dir"), "--out", str(tmp_path / "out")]
    search.main(arguments)
    names = {path.stem for path in (tmp_path / "out" / "hopper").iterdir()}
    assert names == {"medium", "expert", "replay_1", "replay_2", "replay_3", "replay_4"}
    policy = load_policy(tmp_path / "out" / "hopper" / "expert.npz")
    assert policy.info["environment"] == "hopper" and policy.info["search"] == "augmented random search"
    envs = make_lockstep(HOPPER, 50)
    again = policy_search.mean_return(envs, NoisyPolicy(policy, 0.1), seed=30_000, noise=True)
    assert policy.info["mean_return"] == round(again, 1)  # what the file says can be measured again


def test_command_line_errors(tmp_path: Path) -> None:
    arguments = ["--env", "walker2d", "--choose_only", "--dir", str(tmp_path)]
    result = subprocess.run(
        [sys.executable, "-m", "utils.behaviour.search", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr == f"utils.behaviour.search: no snapshots in {tmp_path / 'walker2d'}; run the search longer\n"
