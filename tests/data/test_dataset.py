"""Datasets, reward tuning in closed form, and the table that batches are drawn from."""

import dataclasses

import numpy as np
import pytest
import torch

from utils.data import dataset as dataset_module
from utils.data.dataset import REWARD_TUNES, Columns, Dataset, tune_rewards
from utils.errors import UserError


def make_dataset(size: int = 50, state_dim: int = 4, action_dim: int = 2, seed: int = 0) -> Dataset:
    rng = np.random.default_rng(seed)
    return Dataset(
        states=rng.normal(size=(size, state_dim)).astype(np.float32),
        actions=rng.uniform(-1, 1, size=(size, action_dim)).astype(np.float32),
        rewards=rng.normal(size=(size, 1)).astype(np.float32),
        next_states=rng.normal(size=(size, state_dim)).astype(np.float32),
        not_dones=(rng.uniform(size=(size, 1)) > 0.2).astype(np.float32),
        env_name="hopper-medium-v2",
        source="d4rl",
        info={"bytes": 1},
    )


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# --------------------------------------------------------------------------------------------------
# Dataset
# --------------------------------------------------------------------------------------------------
def test_arrays_are_read_only_float32_and_sized():
    data = make_dataset()
    assert (data.size, data.state_dim, data.action_dim) == (50, 4, 2)
    for array in data.columns.values():
        assert array.dtype == np.float32
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_the_callers_arrays_stay_writable():
    states = np.zeros((3, 1), dtype=np.float32)
    Dataset(states, states, states, states, states, "x", "y")
    states[0] = 1


@pytest.mark.parametrize("name", ["actions", "rewards", "next_states", "not_dones"])
def test_arrays_that_do_not_fit_are_refused(name):
    columns = dict(make_dataset().columns)
    columns[name] = columns[name][:-1]
    with pytest.raises(ValueError, match=f"{name} has shape"):
        Dataset(**columns, env_name="x", source="y")


# --------------------------------------------------------------------------------------------------
# Reward tuning
# --------------------------------------------------------------------------------------------------
REWARDS = np.array([[1.0], [2.0], [4.0], [0.0], [3.0], [7.0]], dtype=np.float32)
# Episodes as the published code counts them: {1, 2}, {4, 0, 3}; the 7 follows the last terminal.
NOT_DONES = np.array([[1.0], [0.0], [1.0], [1.0], [0.0], [1.0]], dtype=np.float32)

CLOSED_FORMS = {
    "no": lambda r: r,
    "normalize": lambda r: (r - 17 / 6) / np.sqrt(((r - 17 / 6) ** 2).sum() / 5),  # n - 1, as torch's std
    "iql_locomotion": lambda r: r / (7 - 3) * 1000,
    "iql_returns": lambda r: r / (7 - 3) * 1000,
    "return_range": lambda r: r / (7 - 3) * 1000,
    "iql_antmaze": lambda r: r - 1,
    "cql_antmaze": lambda r: 4 * r - 2,
    "antmaze": lambda r: 2 * r - 0.5,
}


@pytest.mark.parametrize("name", REWARD_TUNES)
def test_reward_tuning_closed_forms(name):
    tuned = tune_rewards(name, REWARDS, NOT_DONES)
    assert tuned.dtype == np.float32
    np.testing.assert_allclose(tuned, CLOSED_FORMS[name](REWARDS.astype(np.float64)), rtol=1e-6)


def test_every_tuning_has_its_closed_form():
    assert set(REWARD_TUNES) == set(CLOSED_FORMS)


def test_iql_locomotion_equals_the_plain_loop_bit_for_bit():
    data = make_dataset(5000)
    returns, running = [], np.float32(0)
    for reward, not_done in zip(data.rewards[:, 0], data.not_dones[:, 0], strict=True):
        running = np.float32(running + reward)
        if not not_done:
            returns.append(running)
            running = np.float32(0)
    expected = data.rewards / np.float32(max(returns) - min(returns)) * np.float32(1000)
    np.testing.assert_array_equal(data.tuned("iql_locomotion").rewards, expected)


def test_iql_locomotion_counts_a_time_limit_with_the_next_episode():
    """Published: only a terminal ends an episode, so 1 + 2 + 4 and 0 + 3 are the two returns here."""
    not_dones = np.array([[1.0], [1.0], [0.0], [1.0], [0.0], [1.0]], dtype=np.float32)
    np.testing.assert_allclose(tune_rewards("iql_locomotion", REWARDS, not_dones), REWARDS / 4 * 1000, rtol=1e-6)


@pytest.mark.parametrize("terminals", [[], [3]])
def test_iql_locomotion_without_a_scale_is_refused(terminals):
    not_dones = np.ones_like(REWARDS)
    not_dones[terminals] = 0
    with pytest.raises(UserError, match=f"this set has {len(terminals)} terminals"):
        tune_rewards("iql_locomotion", REWARDS, not_dones)


def test_iql_returns_ends_an_episode_where_the_next_row_starts_elsewhere():
    """Rows 0-1 end in a terminal, 2-3 at a gap, 4-5 with the file: returns 3, 4 and 10."""
    states = np.array([[0.0], [1.0], [5.0], [6.0], [9.0], [10.0]], dtype=np.float32)
    next_states = np.array([[1.0], [5.0], [6.0], [7.0], [10.0], [11.0]], dtype=np.float32)
    not_dones = np.array([[1.0], [0.0], [1.0], [1.0], [1.0], [1.0]], dtype=np.float32)
    data = Dataset(states, states, REWARDS, next_states, not_dones, "x", "y")
    assert data.ends.tolist() == [False, True] * 3
    np.testing.assert_allclose(data.tuned("iql_returns").rewards, REWARDS / 7 * 1000, rtol=1e-6)
    whole = dataclasses.replace(data, states=next_states - 1, not_dones=np.ones_like(REWARDS))
    with pytest.raises(UserError, match="this set has 1 episodes"):
        dataclasses.replace(whole, next_states=np.roll(whole.states, -1)).tuned("iql_returns")


def plain_return_range(rewards, terminals, limit):
    """As QGPO's code counts: lowest and highest return."""
    returns, total, length = [], 0.0, 0
    for reward, terminal in zip(rewards, terminals, strict=True):
        total, length = total + float(reward), length + 1
        if terminal or length == limit:
            returns.append(total)
            total, length = 0.0, 0
    return min(returns), max(returns)


@pytest.mark.parametrize("every", [7, 90, 1000, 1500, 10**6])
def test_return_range_ends_an_episode_after_1000_rows_too(every):
    """Time limits of 999 rows, as `qlearning_dataset` leaves them: the count of 1,000 drifts over them."""
    data = make_dataset(6500)
    not_dones = np.ones((6500, 1), dtype=np.float32)
    not_dones[every - 1 :: every] = 0
    low, high = plain_return_range(data.rewards[:, 0], not_dones[:, 0] == 0, 1000)
    tuned = dataclasses.replace(data, not_dones=not_dones).tuned("return_range").rewards
    np.testing.assert_array_equal(tuned, data.rewards / np.float32(high - low) * np.float32(1000))


def test_return_range_of_one_episode_is_refused():
    with pytest.raises(UserError, match="this set has 0 that end in a terminal or after 1,000 rows"):
        tune_rewards("return_range", REWARDS, np.ones_like(REWARDS))


def test_normalize_of_constant_rewards_is_refused():
    with pytest.raises(UserError, match="deviation, which is zero"):
        tune_rewards("normalize", np.ones_like(REWARDS), NOT_DONES)


def test_unknown_tuning_lists_the_known():
    with pytest.raises(UserError, match="unknown reward_tune 'x'; known: no, normalize, iql_locomotion, iql_ret"):
        make_dataset().tuned("x")


def test_tuning_shares_the_other_arrays_and_leaves_the_original():
    data = make_dataset()
    before = data.rewards.copy()
    tuned = data.tuned("cql_antmaze")
    np.testing.assert_array_equal(data.rewards, before)
    assert np.shares_memory(tuned.states, data.states) and np.shares_memory(tuned.next_states, data.next_states)
    assert tuned.info == {"bytes": 1, "reward_tune": "cql_antmaze"}
    assert not tuned.rewards.flags.writeable


# --------------------------------------------------------------------------------------------------
# Table
# --------------------------------------------------------------------------------------------------
def test_table_holds_every_transition_in_no_more_bytes(monkeypatch):
    monkeypatch.setattr(dataset_module, "_ROWS_AT_ONCE", 7)  # several blocks and a short last one
    data = make_dataset(50)
    table = data.to("cpu")
    packed = np.concatenate([data.states, data.actions, data.rewards, data.next_states, data.not_dones], axis=1)
    np.testing.assert_array_equal(table.rows.numpy(), packed)
    assert table.rows.untyped_storage().nbytes() == 50 * (4 + 2 + 1 + 4 + 1) * 4
    assert (table.size, table.state_dim, table.action_dim, table.width) == (50, 4, 2, 12)
    assert table.device == torch.device("cpu")


def test_gather_returns_the_rows_of_each_seed():
    data = make_dataset()
    indices = torch.tensor([[0, 49, 3], [3, 3, 7]])
    batch = data.to("cpu").gather(indices)
    assert list(batch) == ["states", "actions", "rewards", "next_states", "not_dones"]
    for name, found in batch.items():
        expected = getattr(data, name)[indices.numpy()]
        assert tuple(found.shape) == expected.shape == (2, 3, expected.shape[-1])
        np.testing.assert_array_equal(found.numpy(), expected)


def test_blocks_are_the_rows_by_name():
    data = make_dataset()
    for name, found in data.to("cpu").block(7, 20).items():
        np.testing.assert_array_equal(found.numpy(), getattr(data, name)[7:20])


@pytest.mark.parametrize("at_once", [3, 1 << 16])
def test_a_trajectory_ends_at_a_terminal_at_a_gap_and_with_the_file(at_once, monkeypatch):
    monkeypatch.setattr(dataset_module, "_ROWS_AT_ONCE", at_once)
    # Two trajectories 0-1-2-3 | (its row at the time limit dropped) 10-11-12 x, and one that goes on to the file's end.
    states = np.array([[0.0], [1], [2], [10], [11], [20], [21]])
    next_states = np.array([[1.0], [2], [3], [11], [12], [21], [22]])
    not_dones = np.array([[1.0], [1], [1], [1], [0], [1], [1]])
    data = Dataset(states, states, states, next_states, not_dones, "x", "y")
    assert data.to("cpu").ends.tolist() == [False, False, True, False, True, False, True]
    # A terminal ends a trajectory even where the next row begins in the same state: a bandit's rows.
    bandit = Dataset(states * 0, states, states, states * 0, not_dones * 0, "x", "y")
    assert bandit.to("cpu").ends.all()


def test_columns_are_gathered_seed_by_seed_and_written_in_place():
    columns = Columns({"returns": 1, "support": 3}, seeds=2, size=5, device="cpu")
    where = columns.rows.data_ptr()
    columns.views["returns"].copy_(torch.arange(10.0).view(2, 5, 1))
    columns.views["support"][1, 4] = torch.tensor([7.0, 8.0, 9.0])
    batch = columns.gather(torch.tensor([[0, 4, 4, 1], [4, 0, 3, 3]]))
    assert batch["returns"].shape == (2, 4, 1) and batch["support"].shape == (2, 4, 3)
    assert batch["returns"][..., 0].tolist() == [[0, 4, 4, 1], [9, 5, 8, 8]]
    assert batch["support"][1, 0].tolist() == [7, 8, 9] and not batch["support"][0].any()
    assert columns.rows.data_ptr() == where


def test_gather_into_a_fixed_buffer():
    table = make_dataset().to("cpu")
    buffer = torch.empty(6, table.width)
    batch = table.gather(torch.arange(6).view(2, 3), out=buffer)
    torch.testing.assert_close(buffer, table.rows[:6], rtol=0, atol=0)
    assert batch["states"].data_ptr() == buffer.data_ptr()
    table.gather(torch.arange(6, 12).view(2, 3), out=buffer)
    torch.testing.assert_close(batch["states"].reshape(6, 4), table.rows[6:12, :4], rtol=0, atol=0)


def test_a_seed_draws_the_same_alone_and_in_company():
    table = make_dataset().to("cpu")
    together = table.draw_indices(generators(3, 1, 4), batch_size=8, steps=5)
    assert together.shape == (5, 3, 8) and together.dtype == torch.int64
    for k, seed in enumerate([3, 1, 4]):
        alone = table.draw_indices(generators(seed), batch_size=8, steps=5)
        assert torch.equal(together[:, k], alone[:, 0])
    assert not torch.equal(together[:, 0], together[:, 1])


def test_a_block_of_steps_draws_what_single_steps_do():
    table = make_dataset().to("cpu")
    block = table.draw_indices(generators(0, 1), batch_size=8, steps=6)
    rng = generators(0, 1)
    singles = torch.cat([table.draw_indices(rng, batch_size=8, steps=1) for _ in range(6)])
    assert torch.equal(block, singles)


def test_sample_is_one_step_of_both():
    table = make_dataset().to("cpu")
    batch = table.sample(generators(0, 1), batch_size=8)
    expected = table.gather(table.draw_indices(generators(0, 1), batch_size=8, steps=1)[0])
    for name, value in expected.items():
        assert torch.equal(batch[name], value)


def test_draws_are_uniform_with_replacement():
    size, draws = 20, 20_000
    counts = torch.bincount(
        make_dataset(size).to("cpu").draw_indices(generators(0), batch_size=draws, steps=1).flatten(), minlength=size
    )
    assert counts.shape == (size,)
    chi_squared = ((counts - draws / size) ** 2 / (draws / size)).sum().item()
    assert chi_squared < 43.8  # 19 degrees of freedom: exceeded once in 1000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_table_on_the_gpu_needs_no_more_memory_than_the_arrays():
    data = make_dataset(200_000)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    table = data.to("cuda")
    assert torch.cuda.max_memory_allocated() - before <= 1.1 * sum(array.nbytes for array in data.columns.values())
    rng = [torch.Generator("cuda").manual_seed(seed) for seed in (0, 1)]
    batch = table.sample(rng, 256)
    assert all(value.is_cuda and value.shape[:2] == (2, 256) for value in batch.values())
    indices = table.draw_indices(rng, 256, 1)[0]
    torch.testing.assert_close(
        table.gather(indices)["rewards"].cpu(), torch.from_numpy(data.rewards[indices.cpu().numpy()])
    )
