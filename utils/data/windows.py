"""Windows of whole episodes, for algorithms that plan: a table of the recorded rows, and of where windows begin.

The rows are those of the file, time limits included, which `qlearning_dataset` leaves out. A window is gathered from
them, so no row is stored twice; one row of zeros stands for all the padding behind an episode's end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from utils.data.rows import Rows
from utils.errors import UserError

Array = np.ndarray


class Wanted(Protocol):
    """The windows that an agent asks for."""

    @property
    def horizon(self) -> int: ...
    @property
    def discount(self) -> float: ...  # of the returns
    @property
    def penalty(self) -> float: ...  # added to the reward of a terminal
    @property
    def max_path_length(self) -> int: ...  # no episode may be longer


@dataclass(frozen=True)
class Episodes:
    """The complete episodes of a file, E of them, row after row.

    observations [N, s], actions [N, a], rewards [N] float32; lengths [E]; terminal [E] bool: ended by a terminal, else
    by a time limit. What follows the last marked end in the file is left out.
    """

    observations: Array
    actions: Array
    rewards: Array
    lengths: Array
    terminal: Array

    @property
    def firsts(self) -> Array:
        """[E] the first row of each."""
        return np.cumsum(self.lengths) - self.lengths

    def returns(self, discount: float, penalty: float) -> Array:
        """[N] the sum of discount^k r to the end of the episode; `penalty` is added to a terminal's reward."""
        rewards = self.rewards.astype(np.float64)
        rewards[(self.firsts + self.lengths - 1)[self.terminal]] += penalty
        returns = rewards.copy()
        # Backward through all episodes at once, those that are long enough: as many passes as the longest has rows.
        for back in range(1, int(self.lengths.max())):
            rows = (self.firsts + self.lengths - 1 - back)[self.lengths > back]
            returns[rows] += discount * returns[rows + 1]
        return returns.astype(np.float32)


def complete_episodes(rows: Rows, longest: int, name: object) -> Episodes:
    """The episodes of a file. Raises UserError, one line, for a set that the published code cannot take either.

    That is: without `timeouts`, with an episode of over `longest` steps, with one that has both a terminal and a
    timeout (a penalty for termination is then refused), or without any complete one.
    """
    if rows.timeouts is None:
        raise UserError(f"{name} has no 'timeouts': windows of whole episodes need them, to know where one ends")
    ends = np.flatnonzero(rows.terminals | rows.timeouts)
    if len(ends) == 0:
        raise UserError(f"{name} marks no end of an episode, by a terminal or a timeout; windows need complete ones")
    lengths = np.diff(ends, prepend=-1)
    if lengths.max() > longest:
        which = int(lengths.argmax())
        raise UserError(
            f"{name}: episode {which} has {lengths[which]:,} steps, the table of windows takes {longest:,}: "
            "are timeouts missing?"
        )
    both = np.flatnonzero(rows.terminals[ends] & rows.timeouts[ends])
    if len(both):
        raise UserError(
            f"{name}: row {ends[both[0]]:,} is both a terminal and a timeout, so what its return is remains open; "
            "mark one of them"
        )
    stop = ends[-1] + 1
    return Episodes(rows.observations[:stop], rows.actions[:stop], rows.rewards[:stop], lengths, rows.terminals[ends])


def window_starts(lengths: Array, horizon: int, longest: int, padding: bool = True) -> tuple[Array, Array]:
    """The windows as published: (episode, first step) of each, [W] twice, episode by episode.

    min(L - 1, longest - horizon) of them in an episode of L steps; without `padding` none goes beyond its end.
    """
    counts = np.minimum(lengths - 1, longest - horizon)
    if not padding:
        counts = np.minimum(counts, lengths - horizon)
    counts = counts.clip(min=0)
    episodes = np.repeat(np.arange(len(lengths)), counts)
    return episodes, np.arange(len(episodes)) - np.repeat(np.cumsum(counts) - counts, counts)


def rows_of(observations: Array, actions: Array, rewards: Array, steps: int = 1000) -> Rows:
    """These numbers as recorded rows, in episodes of `steps` that a time limit ends: for measurements."""
    ends = np.arange(1, len(observations) + 1) % min(steps, len(observations)) == 0
    return Rows(observations, actions, rewards.reshape(-1), np.zeros_like(ends), ends)


class WindowTable:
    """All windows of a set on a device: `draw_indices` and `gather` as `utils.data.dataset.Table`, of windows.

    size: number W of windows; observations [N, s], actions [N, a]: the rows as recorded; returns [W, 1].
    """

    def __init__(
        self,
        episodes: Episodes,
        wanted: Wanted,
        device: torch.device | str,
    ) -> None:
        """Raises UserError where no window fits."""
        horizon = wanted.horizon
        which, steps = window_starts(episodes.lengths, horizon, wanted.max_path_length)
        if len(which) == 0:
            raise UserError(f"no window of {horizon} steps fits: the longest episode has {episodes.lengths.max()}")
        self.size, self.horizon = len(which), horizon
        self.episodes, self.steps = which, steps  # [W] on the host
        first = episodes.firsts[which] + steps
        self._first = torch.from_numpy(first).to(device)
        self._stop = torch.from_numpy((episodes.firsts + episodes.lengths)[which]).to(device)
        self.returns = (
            torch.from_numpy(episodes.returns(wanted.discount, wanted.penalty)[first]).unsqueeze(1).to(device)
        )
        self._places = torch.arange(horizon, device=device)
        nothing = [np.zeros((1, part.shape[1]), np.float32) for part in (episodes.observations, episodes.actions)]
        # One row more than there are: the padding.
        self._observations = torch.from_numpy(np.concatenate([episodes.observations, nothing[0]])).to(device)
        self._actions = torch.from_numpy(np.concatenate([episodes.actions, nothing[1]])).to(device)
        self._rows = torch.cat([self._observations, self._actions], dim=1)

    @property
    def device(self) -> torch.device:
        return self._rows.device

    @property
    def observations(self) -> Tensor:
        return self._observations[:-1]

    @property
    def actions(self) -> Tensor:
        return self._actions[:-1]

    def normalize(self, observations: Callable[[Tensor], Tensor], actions: Callable[[Tensor], Tensor]) -> None:
        """From now on give out what these functions make of rows [n, d] as recorded, and of zeros for the padding."""
        self._rows = torch.cat([observations(self._observations), actions(self._actions)], dim=1)

    def draw_indices(self, generators: Sequence[torch.Generator], batch_size: int, steps: int) -> Tensor:
        """Windows for `steps` batches of S seeds, with replacement: int64 [steps, S, batch_size], as `Table` has it."""
        draws = [torch.randint(self.size, (steps, batch_size), generator=g, device=g.device) for g in generators]
        return torch.stack(draws, dim=1).to(self.device)

    def gather(self, indices: Tensor) -> dict[str, Tensor]:
        """The windows at `indices` [S, B]: observations [S, B, H, s], actions [S, B, H, a], returns [S, B, 1]."""
        places = self._first[indices].unsqueeze(2) + self._places
        places = torch.where(places < self._stop[indices].unsqueeze(2), places, len(self._rows) - 1)
        rows = torch.index_select(self._rows, 0, places.flatten()).view(*places.shape, -1)
        observations, actions = rows.split((self._observations.shape[1], self._actions.shape[1]), dim=3)
        return {"observations": observations, "actions": actions, "returns": self.returns[indices]}
