"""Every stream of random numbers of a run from its seed, apart from each other and told by purpose."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch


def torch_generators(seeds: Sequence[int], purpose: str, device: torch.device | str) -> list[torch.Generator]:
    """One generator per seed on `device`; (seed, purpose) alone decides what it yields on one kind of device."""
    generators = []
    for seed in seeds:
        entropy = np.random.SeedSequence([seed, zlib.crc32(purpose.encode())])
        state = int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1))
        generators.append(torch.Generator(device=device).manual_seed(state))
    return generators
