"""A fixed set of transitions: read-only arrays on the host, then one packed table on the training device.

Every source (`d4rl`, `minari`, `bandit`, `utils.behaviour.local`) returns the same `Dataset`, so nothing after it can
tell where the transitions came from. `python -m utils.describe FILE_OR_ID` describes a set in one screen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from utils.data.rows import Rows
from utils.data.windows import Wanted, WindowTable, complete_episodes
from utils.errors import UserError

Array = np.ndarray
_COLUMNS = ("states", "actions", "rewards", "next_states", "not_dones")


@dataclass(frozen=True, eq=False)
class Dataset:
    """N transitions in file order, before reward tuning unless `tuned` made it.

    states [N, state_dim], actions [N, action_dim], rewards [N, 1], next_states [N, state_dim] and
    not_dones [N, 1] (0 where the environment ended the episode, else 1: what a bootstrap is masked with; a
    time limit is no end). All float32; the views kept here cannot be written to.

    env_name: the D4RL or gymnasium id. source: "d4rl", "local", "minari:ID" or a path.
    info: plain values for `config.json` (path, bytes, SHA-256 of the file, its rows ...).
    raw: reads the recorded rows that the transitions were made of, for windows of whole episodes; None where there are
    none.

    Raises ValueError for arrays that do not fit together: a mistake in the code that made them.
    """

    states: Array
    actions: Array
    rewards: Array
    next_states: Array
    not_dones: Array
    env_name: str
    source: str
    info: Mapping[str, Any] = field(default_factory=dict)
    raw: Callable[[], Rows] | None = None

    def __post_init__(self) -> None:
        size = len(self.states)
        widths = {
            "states": self.states.shape[-1],
            "actions": self.actions.shape[-1],
            "rewards": 1,
            "next_states": self.states.shape[-1],
            "not_dones": 1,
        }
        for name, width in widths.items():
            array = np.asarray(getattr(self, name), dtype=np.float32)
            if array.shape != (size, width):
                raise ValueError(f"{name} has shape {array.shape}, expected {(size, width)}")
            view = array.view()
            view.setflags(write=False)
            object.__setattr__(self, name, view)

    @property
    def size(self) -> int:
        return self.states.shape[0]

    @property
    def state_dim(self) -> int:
        return self.states.shape[1]

    @property
    def action_dim(self) -> int:
        return self.actions.shape[1]

    @property
    def ends(self) -> Array:
        """[N] bool: the trajectory ends with this transition: by a terminal, or because the next row starts elsewhere.

        A next row whose state lies over 1e-6 from this row's next state starts elsewhere: IQL's rule
        (ikostrikov/implicit_q_learning, dataset_utils.py), since d4rl's `qlearning_dataset` drops the row at a time
        limit. The last row ends one.
        """
        ends = self.not_dones[:, 0] == 0
        for start in range(0, self.size - 1, _ROWS_AT_ONCE):
            stop = min(start + _ROWS_AT_ONCE, self.size - 1)
            gaps = np.linalg.norm(self.states[start + 1 : stop + 1] - self.next_states[start:stop], axis=1)
            ends[start:stop] |= gaps > 1e-6
        ends[-1:] = True
        return ends

    @property
    def columns(self) -> dict[str, Array]:
        """The five arrays by name, in the order in which `Table` packs them."""
        return {name: getattr(self, name) for name in _COLUMNS}

    def tuned(self, reward_tune: str) -> Dataset:
        """The same transitions with rewards rescaled by `tune_rewards`; the other arrays are shared."""
        ends = self.ends if reward_tune == "iql_returns" else None
        rewards = tune_rewards(reward_tune, self.rewards, self.not_dones, ends)
        return dataclasses.replace(self, rewards=rewards, info={**self.info, "reward_tune": reward_tune})

    def to(self, device: torch.device | str) -> Table:
        """Copy to `device`, once; batches are then drawn there."""
        return Table(self, device)

    def windows_to(self, device: torch.device | str, wanted: Wanted) -> WindowTable:
        """The windows that an agent wants, on `device`, of the recorded rows with the rewards as they are.

        Raises UserError, one line, for a set of single transitions, tuned rewards, or as `complete_episodes`.
        """
        if self.raw is None:
            raise UserError(f"{self.env_name} ({self.source}) has single transitions only; plans need whole episodes")
        if self.info.get("reward_tune", "no") != "no":
            raise UserError("plans are made of the data's own rewards: leave reward_tune at no")
        name = self.info.get("path", self.source)
        return WindowTable(complete_episodes(self.raw(), wanted.max_path_length, name), wanted, device)

    def batches_to(self, device: torch.device | str, wanted: Wanted | None) -> Table | WindowTable:
        """What an agent draws batches from: windows where it wants such, else transitions."""
        return self.to(device) if wanted is None else self.windows_to(device, wanted)


# --------------------------------------------------------------------------------------------------
# Reward tuning, as the published code of DiffCPS and Diffusion-QL does it
# --------------------------------------------------------------------------------------------------
def _normalize(rewards: Array) -> Array:
    values = torch.from_numpy(rewards.copy())  # float32 mean and the n - 1 deviation, in torch as published
    deviation = values.std()
    if not torch.isfinite(deviation) or deviation == 0:
        raise UserError("reward_tune=normalize divides by the rewards' deviation, which is zero in this set")
    return ((values - values.mean()) / deviation).numpy()


def _iql_locomotion(rewards: Array, not_dones: Array) -> Array:
    """r · 1000 / (highest − lowest return), IQL's scaling for locomotion.

    As published, an episode ends at a terminal only: what a time limit cut off is counted with the episode
    that follows in the file, and what comes after the last terminal is left out. A set without two different
    such returns (every HalfCheetah set: it never terminates) has no scale.
    """
    returns = _returns(rewards, not_dones[:, 0] == 0)
    spread = np.float32(returns.max() - returns.min()) if len(returns) else np.float32(0)
    if not spread > 0:
        raise UserError(
            "reward_tune=iql_locomotion needs two episodes that ended in a terminal with different returns, "
            f"and this set has {len(returns)} terminals; use another reward_tune"
        )
    return rewards / spread * np.float32(1000)


def _iql_returns(rewards: Array, ends: Array) -> Array:
    """r · 1000 / (highest − lowest return), as IQL's own code counts episodes: a time limit ends one too."""
    returns = _returns(rewards, ends)
    spread = np.float32(returns.max() - returns.min()) if len(returns) else np.float32(0)
    if not spread > 0:
        raise UserError(
            "reward_tune=iql_returns needs two episodes with different returns, and this set has "
            f"{len(returns)} episodes; use another reward_tune"
        )
    return rewards / spread * np.float32(1000)


EPISODE_ROWS = 1000  # the time limit of D4RL's locomotion


def _return_range(rewards: Array, not_dones: Array) -> Array:
    """r · 1000 / (highest − lowest return) as QGPO's `return_range(data, 1000)` counts: an episode ends at a terminal
    or as the 1,000th row since the last end, wherever its time limit was; the rest of the file is left out.
    """
    ends, since = not_dones[:, 0] == 0, 0
    for stop in [*np.flatnonzero(ends).tolist(), len(ends)]:
        ends[since + EPISODE_ROWS - 1 : stop : EPISODE_ROWS] = True
        since = stop + 1
    returns = _returns(rewards, ends, np.float64)
    if len(returns) == 0 or returns.max() == returns.min():
        raise UserError(
            "reward_tune=return_range needs two episodes with different returns, and this set has "
            f"{len(returns)} that end in a terminal or after {EPISODE_ROWS:,} rows; use another reward_tune"
        )
    return rewards / np.float32(returns.max() - returns.min()) * np.float32(1000)


def _returns(rewards: Array, ends: Array, dtype: type = np.float32) -> Array:
    """Returns of the episodes, each with a last row where `ends` [N] is true; what follows the last is left out."""
    stops = np.flatnonzero(ends) + 1
    starts = np.concatenate([[0], stops])[:-1]
    # Added in file order, by default in float32: what the published loop's running sum rounds to.
    return np.array(
        [np.add.accumulate(rewards[i:j, 0], dtype=dtype)[-1] for i, j in zip(starts, stops, strict=True)],
        dtype=dtype,
    )


# Name -> function of (rewards [N, 1], not_dones [N, 1], ends [N]) that returns new rewards [N, 1].
_TUNES = {
    "no": lambda rewards, *_: rewards,
    "normalize": lambda rewards, *_: _normalize(rewards),
    "iql_locomotion": lambda rewards, not_dones, _: _iql_locomotion(rewards, not_dones),
    "iql_returns": lambda rewards, _, ends: _iql_returns(rewards, ends),
    "return_range": lambda rewards, not_dones, _: _return_range(rewards, not_dones),
    "iql_antmaze": lambda rewards, *_: rewards - np.float32(1),
    "cql_antmaze": lambda rewards, *_: (rewards - np.float32(0.5)) * np.float32(4),
    "antmaze": lambda rewards, *_: (rewards - np.float32(0.25)) * np.float32(2),
}
REWARD_TUNES = tuple(_TUNES)


def tune_rewards(reward_tune: str, rewards: Array, not_dones: Array, ends: Array | None = None) -> Array:
    """Rewards [N, 1] as the learner sees them; UserError for an unknown name or a set that has no scale.

    `ends` [N] is true in an episode's last row (`Dataset.ends`); without it, terminals alone end one.
    """
    if reward_tune not in _TUNES:
        raise UserError(f"unknown reward_tune {reward_tune!r}; known: {', '.join(REWARD_TUNES)}")
    return _TUNES[reward_tune](rewards, not_dones, not_dones[:, 0] == 0 if ends is None else ends)


# --------------------------------------------------------------------------------------------------
# On the training device
# --------------------------------------------------------------------------------------------------
_ROWS_AT_ONCE = 1 << 16


class Table:
    """All transitions as one float32 tensor [N, state | action | reward | next state | not done] on a device.

    One packed row a transition makes a batch a single gather. The table has the bytes of the arrays and no
    more; it is filled through a staging block of 65,536 rows, so no third copy ever exists.
    """

    def __init__(self, dataset: Dataset, device: torch.device | str) -> None:
        columns = dataset.columns
        self.size, self.state_dim, self.action_dim = dataset.size, dataset.state_dim, dataset.action_dim
        self._widths = {name: array.shape[1] for name, array in columns.items()}
        self.width = sum(self._widths.values())
        self.ends = torch.from_numpy(dataset.ends).to(device)  # [N] bool, see `Dataset.ends`
        self.rows = torch.empty(self.size, self.width, dtype=torch.float32, device=device)
        staging = torch.empty(min(self.size, _ROWS_AT_ONCE), self.width)
        for start in range(0, self.size, _ROWS_AT_ONCE):
            stop = min(start + _ROWS_AT_ONCE, self.size)
            block = staging[: stop - start]
            np.concatenate([array[start:stop] for array in columns.values()], axis=1, out=block.numpy())
            self.rows[start:stop].copy_(block)

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def block(self, start: int, stop: int) -> dict[str, torch.Tensor]:
        """Rows start .. stop - 1 as five views by name, each [stop - start, d]."""
        parts = self.rows[start:stop].split(tuple(self._widths.values()), dim=1)
        return dict(zip(self._widths, parts, strict=True))

    def draw_indices(self, generators: Sequence[torch.Generator], batch_size: int, steps: int) -> torch.Tensor:
        """Rows for `steps` batches of S = len(generators) seeds: int64 [steps, S, batch_size] on the device.

        Uniform with replacement, as published. Seed k's rows come from generators[k] alone, in one call, so
        seed k sees the same batches alone as in company. On the CPU one call for n steps draws what n calls
        for one step do; a CUDA generator promises no such thing, so a resumed run must draw in blocks of the
        same length.
        """
        draws = [
            torch.randint(self.size, (steps, batch_size), generator=generator, device=generator.device)
            for generator in generators
        ]
        return torch.stack(draws, dim=1).to(self.device)

    def gather(self, indices: torch.Tensor, out: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The batch at `indices` [S, B]: states, actions, rewards, next_states, not_dones, each [S, B, d].

        One gather and five views of its result, no synchronisation. `out` [S · B, width] receives the rows
        where a captured graph needs its batch at a fixed address.
        """
        rows = torch.index_select(self.rows, 0, indices.reshape(-1), out=out)
        parts = rows.view(*indices.shape, self.width).split(tuple(self._widths.values()), dim=-1)
        return dict(zip(self._widths, parts, strict=True))

    def sample(self, generators: Sequence[torch.Generator], batch_size: int) -> dict[str, torch.Tensor]:
        """One batch of every seed: `draw_indices` for one step, then `gather`."""
        return self.gather(self.draw_indices(generators, batch_size, steps=1)[0])


class Columns:
    """Numbers that an agent made of every transition for itself: one float32 buffer [S, N, width] on a device.

    `views[name]` [S, N, d] are written in place, so that graphs captured over the buffer stay valid.
    """

    def __init__(self, widths: Mapping[str, int], seeds: int, size: int, device: torch.device | str) -> None:
        self._widths = dict(widths)
        self.rows = torch.zeros(seeds, size, sum(widths.values()), device=device)
        self.views = self._named(self.rows)
        self._first_rows = torch.arange(seeds, device=device).mul_(size).unsqueeze(1)

    def _named(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip(self._widths, rows.split(tuple(self._widths.values()), dim=-1), strict=True))

    def gather(self, indices: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each seed's own rows at `indices` [S, B], by name, [S, B, d]: one gather, as `Table.gather`."""
        rows = torch.index_select(self.rows.flatten(0, 1), 0, (indices + self._first_rows).reshape(-1))
        return self._named(rows.view(*indices.shape, -1))
