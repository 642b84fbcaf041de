"""Windows of whole episodes: which there are, what they hold, and sets that have none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from agents.parts.windows import Windows
from utils.data.rows import Rows
from utils.data.windows import WindowTable, complete_episodes, window_starts
from utils.errors import UserError

LENGTHS, TERMINAL = [9, 20, 6, 2, 1], [True, False, True, False, True]
H, LONGEST, TAIL = 4, 20, 3


def rows(**changes: Any) -> Rows:
    rng, size = np.random.default_rng(0), sum(LENGTHS) + TAIL
    flags = {True: np.zeros(size, bool), False: np.zeros(size, bool)}
    for last, terminal in zip(np.cumsum(LENGTHS) - 1, TERMINAL, strict=True):
        flags[terminal][last] = True
    arrays = {
        "observations": rng.standard_normal((size, 3)).astype(np.float32),
        "actions": rng.standard_normal((size, 2)).astype(np.float32),
        "rewards": rng.standard_normal(size).astype(np.float32),
        "terminals": flags[True],
        "timeouts": flags[False],
    }
    return Rows(**{**arrays, **changes})


def table(recorded: Rows, horizon: int = H) -> WindowTable:
    wanted = Windows(horizon, 0.9, -100.0, LONGEST)
    return WindowTable(complete_episodes(recorded, LONGEST, "set"), wanted, "cpu")


def test_every_window_is_what_a_padded_table_holds() -> None:
    """The published form: episodes copied into arrays of zeros, normalised, cut into windows."""
    recorded = rows()
    windows = table(recorded)
    windows.normalize(lambda x: 2 * x + 1, lambda a: a - 5)
    batch = windows.gather(torch.arange(windows.size).expand(2, -1))
    first, k = 0, 0
    for length, terminal in zip(LENGTHS, TERMINAL, strict=True):
        observations, actions = np.zeros((LONGEST, 3)), np.zeros((LONGEST, 2))
        observations[:length] = recorded.observations[first : first + length]
        actions[:length] = recorded.actions[first : first + length]
        rewards = recorded.rewards[first : first + length].astype(np.float64)
        rewards[-1] += -100 if terminal else 0
        for start in range(min(length - 1, LONGEST - H)):
            np.testing.assert_allclose(batch["observations"][1, k], 2 * observations[start : start + H] + 1, atol=1e-5)
            np.testing.assert_allclose(batch["actions"][1, k], actions[start : start + H] - 5, atol=1e-5)
            wanted = (0.9 ** np.arange(length - start) * rewards[start:]).sum()
            assert float(batch["returns"][1, k, 0]) == pytest.approx(wanted, rel=1e-5)
            k += 1
        first += length
    assert k == windows.size and len(windows.observations) == sum(LENGTHS)


def test_starts_with_and_without_padding() -> None:
    episodes, steps = window_starts(np.array([9, 20, 2, 1]), 4, 20)
    assert np.bincount(episodes).tolist() == [8, 16, 1] and steps[8:24].tolist() == list(range(16))
    episodes, _ = window_starts(np.array([9, 20, 2, 1]), 4, 20, padding=False)
    assert np.bincount(episodes).tolist() == [5, 16]


def test_a_table_takes_no_more_memory_than_its_rows() -> None:
    """Twice the rows, as recorded and as normalised, and three numbers a window; nothing times the horizon."""
    windows = table(rows(), horizon=16)
    held = [value for value in vars(windows).values() if isinstance(value, torch.Tensor)]
    assert sum(value.numel() for value in held) <= 2 * 5 * (sum(LENGTHS) + 1) + 3 * windows.size + 16


def test_a_seed_draws_alike_alone_and_in_company() -> None:
    windows = table(rows())
    three = windows.draw_indices([torch.Generator().manual_seed(s) for s in range(3)], 8, 5)
    alone = windows.draw_indices([torch.Generator().manual_seed(1)], 8, 5)
    assert three.shape == (5, 3, 8) and torch.equal(three[:, 1:2], alone) and int(three.max()) < windows.size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timeouts": None}, "has no 'timeouts'"),
        ({"timeouts": np.zeros(41, bool), "terminals": np.zeros(41, bool)}, "marks no end"),
        ({"timeouts": np.zeros(41, bool)}, "episode 1 has 26 steps, the table of windows takes 20"),
        ({"timeouts": rows().timeouts | rows().terminals}, "row 8 is both a terminal and a timeout"),
    ],
)
def test_sets_without_whole_episodes_are_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        complete_episodes(rows(**changes), LONGEST, "set")
    assert "\n" not in str(caught.value)


def test_a_horizon_as_long_as_the_table_has_no_windows() -> None:
    with pytest.raises(UserError, match="no window of 20 steps fits"):
        table(rows(), horizon=20)
