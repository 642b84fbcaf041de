"""Reads what `record_d3rlpy/` recorded of d3rlpy 2.8.1 (github.com/takuseno/d3rlpy)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FIXTURES = Path(__file__).parent / "fixtures"


class Recording:
    """One recorded case: its settings, and arrays by `<group>/<name>`."""

    def __init__(self, name: str, case: str = "") -> None:
        with np.load(FIXTURES / f"d3rlpy_{name}.npz") as file:
            self.config: dict[str, Any] = json.loads(str(file["config"]))
            self.arrays = {key.removeprefix(f"{case}/"): file[key] for key in file.files if key.startswith(case)}

    def group(self, prefix: str, seeds: int | None = None) -> dict[str, Tensor]:
        """The arrays of one group as float32 tensors; with `seeds`, behind a seeds axis of that length."""
        found = {k.removeprefix(f"{prefix}/"): v for k, v in self.arrays.items() if k.startswith(f"{prefix}/")}
        tensors = {name: torch.as_tensor(value, dtype=torch.float32) for name, value in found.items()}
        return tensors if seeds is None else {n: t.expand(seeds, *t.shape).clone() for n, t in tensors.items()}

    def networks(self, prefix: str) -> dict[str, dict[str, Tensor]]:
        """The weights of one moment, a dict a network."""
        nested: dict[str, dict[str, Tensor]] = {}
        for name, value in self.group(prefix).items():
            network, _, weight = name.partition("/")
            nested.setdefault(network, {})[weight] = value
        return nested

    def assert_networks(self, state: dict[str, Any], prefix: str, unlike: tuple[str, ...] = ()) -> None:
        """Every weight lies within 1e-4 of the recorded one, relative to its array's largest entry."""
        for network, weights in self.networks(prefix).items():
            for name, value in weights.items():
                if name not in unlike:
                    bound = 1e-4 * float(value.abs().max())
                    torch.testing.assert_close(
                        state[network][name], value, rtol=1e-4, atol=bound, msg=lambda m, n=name: f"{n}: {m}"
                    )
