"""Reading weights as the published code saves them: its diffusion policies keep their schedule beside the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

BUFFERS = frozenset(
    {
        "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
        "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
    }
)  # fmt: skip


def policy_weights(state: Mapping[str, Tensor], betas: Tensor) -> dict[str, Tensor]:
    """A diffusion policy's weights by name, without the buffers that the published module keeps beside them.

    `betas` [T] are this agent's noise variances. Raises ValueError where the saved policy was trained with another
    number of steps or another schedule: its weights would be read at the wrong noise levels.
    """
    if "betas" in state:
        saved = torch.as_tensor(state["betas"]).flatten().to(betas)
        if len(saved) != len(betas):
            raise ValueError(
                f"the saved policy has {len(saved)} diffusion steps, this agent has {len(betas)}; "
                f"set diffusion_steps to {len(saved)}"
            )
        if not torch.allclose(saved, betas, rtol=1e-4):
            raise ValueError(
                "the saved policy was trained with another noise schedule; set beta_schedule to the one it had"
            )
    return {name: value for name, value in state.items() if name not in BUFFERS}


def required(networks: Mapping[str, Any], name: str) -> Any:
    """The weights of one network. Raises ValueError, naming what was given, where it is missing."""
    if name not in networks:
        raise ValueError(f"the published weights of {name!r} are missing; given: {', '.join(networks)}")
    return networks[name]


def stripped(weights: Any, prefix: str) -> Any:
    """The weights whose names begin with `prefix`, without it."""
    if not prefix:
        return weights
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
