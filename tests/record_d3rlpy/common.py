"""What the recordings of d3rlpy share. They need an environment of their own: `pip install d3rlpy==2.8.1`.

(d3rlpy pins gymnasium 1.0.0, which this project cannot use.) The tests read the recorded files alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from d3rlpy.torch_utility import TorchMiniBatch

FIXTURES = Path(__file__).parents[1] / "fixtures"
ROWS, STATE_DIM, ACTION_DIM, HIDDEN = 8, 4, 2, 16


def batch(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random transitions under this project's names."""
    return {
        "states": torch.randn(ROWS, STATE_DIM, generator=generator),
        "actions": torch.rand(ROWS, ACTION_DIM, generator=generator) * 1.9 - 0.95,
        "next_states": torch.randn(ROWS, STATE_DIM, generator=generator),
        "rewards": torch.randn(ROWS, 1, generator=generator),
        "not_dones": (torch.rand(ROWS, 1, generator=generator) > 0.3).float(),
    }


def minibatch(rows: dict[str, torch.Tensor]) -> TorchMiniBatch:
    """The same transitions as d3rlpy takes them."""
    return TorchMiniBatch(
        observations=rows["states"],
        actions=rows["actions"],
        rewards=rows["rewards"],
        next_observations=rows["next_states"],
        next_actions=torch.zeros_like(rows["actions"]),
        returns_to_go=torch.zeros_like(rows["rewards"]),
        terminals=1 - rows["not_dones"],
        intervals=torch.ones_like(rows["rewards"]),
        device="cpu",
    )


def weights(module: torch.nn.Module, prefix: str) -> dict[str, np.ndarray]:
    """The linear layers of a module in order, as `<prefix>.0`, `<prefix>.2`, ..."""
    layers = [layer for layer in module.modules() if isinstance(layer, torch.nn.Linear)]
    named = {f"{prefix}.{2 * i}": layer for i, layer in enumerate(layers)}
    return {
        f"{name}.{kind}": getattr(layer, kind).detach().numpy().copy()
        for name, layer in named.items()
        for kind in ("weight", "bias")
    }


def save(name: str, config: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Write `fixtures/d3rlpy_<name>.npz`."""
    np.savez_compressed(FIXTURES / f"d3rlpy_{name}.npz", config=json.dumps(config), **arrays)


def flat(prefix: str, arrays: dict[str, Any]) -> dict[str, np.ndarray]:
    """`<prefix>/<name>` for each array."""
    return {f"{prefix}/{name}": np.array(value) for name, value in arrays.items()}
