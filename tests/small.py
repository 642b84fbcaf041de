"""Small things that several tests need: a D4RL-format file, a table, short settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor, nn

from utils.data.dataset import Dataset
from utils.data.rows import Rows

DIMS = {"hopper": (11, 3), "halfcheetah": (17, 6), "walker2d": (17, 6), "antmaze": (29, 8)}


def dataset(rows: int = 400, state_dim: int = 11, action_dim: int = 3, seed: int = 0) -> Dataset:
    """Random transitions."""
    rng = np.random.default_rng(seed)
    return Dataset(
        states=rng.standard_normal((rows, state_dim)),
        actions=rng.uniform(-0.9, 0.9, (rows, action_dim)),
        rewards=rng.standard_normal((rows, 1)),
        next_states=rng.standard_normal((rows, state_dim)),
        not_dones=(rng.random((rows, 1)) > 0.05).astype(np.float32),
        env_name="hopper-medium-v2",
        source="random",
        raw=lambda: episodes(rows, state_dim, action_dim, seed),
    )


def episodes(rows: int, state_dim: int, action_dim: int, seed: int = 0) -> Rows:
    """Random rows of whole episodes of 50 steps, every third of which ends in a terminal."""
    rng, ends = np.random.default_rng(seed), np.arange(1, rows + 1) % 50 == 0
    terminals = ends & (np.arange(rows) // 50 % 3 == 0)
    return Rows(
        observations=rng.standard_normal((rows, state_dim)).astype(np.float32),
        actions=rng.uniform(-0.9, 0.9, (rows, action_dim)).astype(np.float32),
        rewards=rng.standard_normal(rows).astype(np.float32),
        terminals=terminals,
        timeouts=ends & ~terminals,
    )


def batch(
    generator: torch.Generator, state_dim: int, action_dim: int, max_action: float, rows: int = 16
) -> dict[str, Tensor]:
    """Random transitions of one seed, [1, rows, d]; a tenth of them end an episode."""
    return {
        "states": torch.randn(1, rows, state_dim, generator=generator),
        "actions": (torch.rand(1, rows, action_dim, generator=generator) * 2 - 1) * max_action * 0.95,
        "next_states": torch.randn(1, rows, state_dim, generator=generator),
        "rewards": torch.randn(1, rows, 1, generator=generator),
        "not_dones": (torch.rand(1, rows, 1, generator=generator) > 0.1).float(),
    }


def windows(generator: torch.Generator, state_dim: int, action_dim: int, rows: int, horizon: int) -> dict[str, Tensor]:
    """Random normalised windows of one seed, [1, rows, horizon, d], and their returns [1, rows, 1]."""
    return {
        "observations": torch.randn(1, rows, horizon, state_dim, generator=generator),
        "actions": torch.randn(1, rows, horizon, action_dim, generator=generator),
        "returns": torch.randn(1, rows, 1, generator=generator),
    }


def plain_chain(sizes: Sequence[int], prefix: str, state: Mapping[str, Tensor]) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them, with `state`'s weights of that prefix."""
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    network = nn.Sequential(*layers[:-1])
    start = f"{prefix}."
    network.load_state_dict({n.removeprefix(start): v for n, v in state.items() if n.startswith(start)})
    return network


def d4rl_file(path: Path, env_name: str = "hopper-medium-v2", rows: int = 300, **changes: Any) -> Path:
    """A D4RL-format file of random numbers; `changes` replace or, where None, leave out a key."""
    rng = np.random.default_rng(1)
    state_dim, action_dim = DIMS[env_name.split("-")[0]]
    arrays: dict[str, Any] = {
        "observations": rng.standard_normal((rows, state_dim)).astype(np.float32),
        "actions": rng.uniform(-0.9, 0.9, (rows, action_dim)).astype(np.float32),
        "rewards": rng.random(rows).astype(np.float32),
        "terminals": rng.random(rows) < 0.02,
        "timeouts": np.arange(1, rows + 1) % 100 == 0,
    }
    arrays |= changes
    with h5py.File(path, "w") as file:
        for name, value in arrays.items():
            if value is not None:
                file[name] = value
    return path


SHORT = [
    "--num_epochs", "4", "--num_steps_per_epoch", "10", "--eval_interval", "2", "--eval_episodes", "2",
    "--batch_size", "16", "--action_candidates", "3", "--device", "cpu", "--quiet", "--threads", "1",
]  # fmt: skip
