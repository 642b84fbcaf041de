"""What training needs of an agent, of transitions and of environments, and no more: nothing here imports one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from utils.data.windows import Wanted

Generators = Sequence[torch.Generator]
# (states [S, E, state_dim], generators, active [S, E]) -> actions [S, E, action_dim]
Policy = Callable[[Tensor, Generators, Tensor | None], Tensor]


class Weights(Protocol):
    """All parameters of one network in one tensor."""

    @property
    def flat(self) -> Tensor: ...


class WholeTable(Protocol):
    """All N transitions, in file order and without a seeds axis, as an agent's plan reads them."""

    size: int

    @property
    def ends(self) -> Tensor: ...  # [N] bool: the trajectory ends with this transition
    def block(self, start: int, stop: int) -> dict[str, Tensor]: ...  # rows start .. stop - 1, each [stop - start, d]


class Batches(Protocol):
    """What batches are drawn from, on the device: transitions, or windows (`utils.data.windows.WindowTable`)."""

    size: int

    @property
    def device(self) -> torch.device: ...
    def draw_indices(self, generators: Generators, batch_size: int, steps: int) -> Tensor: ...  # [steps, S, B]
    def gather(self, indices: Tensor) -> dict[str, Tensor]: ...  # [S, B] -> each [S, B, ...]


class Transitions(WholeTable, Batches, Protocol):
    """A dataset on the device (`utils.data.dataset.Table`)."""


class Learner(Protocol):
    """An agent (`agents/`), S seeds at once."""

    step: int  # gradient steps taken; below 0 in a pretraining

    @property
    def seeds(self) -> Sequence[int]: ...
    @property
    def num_seeds(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def state_dim(self) -> int: ...
    @property
    def action_dim(self) -> int: ...
    @property
    def networks(self) -> Mapping[str, Weights]: ...

    # --- What a run shows
    @property
    def first_step(self) -> int: ...
    @property
    def METRICS(self) -> Sequence[str]: ...
    @property
    def SHOWN(self) -> Sequence[str]: ...  # those of them that the progress bar shows
    def cost(self, config: Any, state_dim: int, action_dim: int) -> str: ...  # what acting costs, in a line, or ""

    # --- The update
    @property
    def not_due(self) -> Tensor: ...  # what `update` returns, this very tensor, for a metric that was not due
    @property
    def COMPILED(self) -> Sequence[str]: ...  # names of the losses worth compiling
    @property
    def period(self) -> int: ...  # steps after which the pattern of updates repeats, within a phase
    def phase(self, step: int) -> int: ...
    def schedule(self, step: int) -> tuple[float, ...]: ...
    def prepare(self) -> None: ...
    def updating(self) -> AbstractContextManager[object]: ...  # surrounds the losses and their gradients
    def draw(self, rng: Generators, batch_size: int, steps: int) -> dict[str, Tensor]: ...
    def shared(self, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]: ...  # the batch as the losses see it
    def update(self, batch: Mapping[str, Tensor], draws: Mapping[str, Tensor]) -> dict[str, Tensor]: ...

    # --- Numbers made of the whole table
    @property
    def planned(self) -> Mapping[str, int]: ...
    @property
    def PLAN_REPEATS(self) -> bool: ...
    @property
    def windows(self) -> Wanted | None: ...
    def observe(self, transitions: Any) -> None: ...
    def plan_step(self, step: int) -> int | None: ...
    def plan(self, transitions: WholeTable, rng: Generators, columns: Mapping[str, Tensor]) -> None: ...

    # --- Acting
    @property
    def ACTS_BY_DATA(self) -> bool: ...  # whether a trained agent has to `observe` its data again
    @property
    def ACTS_COMPILED(self) -> bool: ...  # whether compiling the policy pays
    def act(self, states: Tensor, rng: Generators, active: Tensor | None = None) -> Tensor: ...
    def act_draws(self, rng: Sequence[torch.Generator | None], states: int) -> dict[str, Tensor]: ...
    def actions_for(self, states: Tensor, noise: Mapping[str, Tensor]) -> Tensor: ...
    def actions_in_chunks(self, states: Tensor, noise: Mapping[str, Tensor]) -> Tensor: ...

    # --- State
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, saved: Mapping[str, Any]) -> None: ...
    def load_published(self, networks: Mapping[str, Any]) -> None: ...
    def published_state(self) -> list[dict[str, Any]]: ...  # each seed's weights by name


class Environments(Protocol):
    """N lockstep environments (`utils.environments.make_lockstep`)."""

    @property
    def num_envs(self) -> int: ...
    @property
    def state_dim(self) -> int: ...
    @property
    def action_dim(self) -> int: ...
    @property
    def max_action(self) -> float: ...
    @property
    def max_episode_steps(self) -> int: ...
    @property
    def unstable(self) -> np.ndarray: ...  # [N] how often each simulation blew up so far
    def reset(self, rngs: Sequence[np.random.Generator]) -> np.ndarray: ...  # states [N, state_dim]
    def step(
        self, actions: np.ndarray, running: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]: ...  # states, rewards, terminated, truncated


class Watched(Environments, Protocol):
    """Environments that can be looked at."""

    @property
    def fps(self) -> float: ...  # control steps in a simulated second
    def frame(self) -> np.ndarray: ...  # row 0 as it is now, uint8 [height, width, 3]
    def close(self) -> None: ...
