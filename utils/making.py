"""Agents made: at their first step, with published weights, or, before a checkpoint is loaded, for a trained run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from utils.errors import user_errors
from utils.runs import checkpoint
from utils.training.interfaces import Learner

SIZES = ("state_dim", "action_dim", "max_action")  # what an agent is made for, in the order of its arguments
Agents = Mapping[str, Callable[..., Learner]]  # by algorithm, as `agents.AGENTS`


def make_agent(
    kind: Callable[..., Learner],
    sizes: tuple[int, int, float],
    config: Any,
    seeds: Sequence[int],
    device: torch.device,
    precision: str = "float32",
    published: Sequence[str] | None = None,
) -> Learner:
    """An agent at its first step, or at step 0 with published weights, NAME=FILE each.

    sizes: as in SIZES. Raises UserError for settings or weights that it refuses.
    """
    with user_errors():
        agent = kind(*sizes, config, seeds, device, precision)
        if published:
            agent.load_published(checkpoint.load_named(published, agent.published_state()[0]))
        agent.step = 0 if published else agent.first_step  # which is below 0 with a pretraining
        return agent
