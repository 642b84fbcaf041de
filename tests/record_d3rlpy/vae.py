"""What the recordings of BCQ and BEAR share: the autoencoder's weights, and its decoder with the tanh put right.

d3rlpy 2.8.1 has the meaning of the decoder's `with_squash` reversed: True, the default, leaves the tanh out. So its BCQ
and BEAR reconstruct actions without the tanh that the official code has, and its BEAR compares the policy's actions
before the tanh with the behaviour model's after it. `put_right` gives the flag the meaning of its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from d3rlpy.models.torch.imitators import VAEDecoder

LAYERS = ("l1", "l2", "l3")


def put_right() -> None:
    """Let d3rlpy's decoder apply the tanh where `with_squash` is True, and leave it out where it is False."""
    reversed_forward = VAEDecoder.forward

    def forward(self: Any, x: Any, latent: Any, with_squash: bool) -> torch.Tensor:
        return reversed_forward(self, x, latent, not with_squash)

    VAEDecoder.forward = forward


def layers(modules: Sequence[torch.nn.Module], names: Sequence[str]) -> dict[str, np.ndarray]:
    """The linear layers of some modules, in order, under these names."""
    linear = [layer for module in modules for layer in module.modules() if isinstance(layer, torch.nn.Linear)]
    return {
        f"{name}.{kind}": getattr(layer, kind).detach().numpy().copy()
        for name, layer in zip(names, linear, strict=True)
        for kind in ("weight", "bias")
    }


def networks(modules: Any, actors: dict[str, torch.nn.Module], actor_layers: Sequence[str]) -> dict[str, np.ndarray]:
    """All weights under their published names."""
    state = {f"{name}/{n}": w for name, actor in actors.items() for n, w in layers([actor], actor_layers).items()}
    names = [f"l{i + 1}" for i in range(6)]
    for kind, pair in (("critic", modules.q_funcs), ("critic_target", modules.targ_q_funcs)):
        state |= {f"{kind}/{n}": w for n, w in layers(list(pair), names).items()}
    both = [modules.vae_encoder, modules.vae_decoder]
    vae = layers(both, ("e1", "e2", "mean", "log_std", "d1", "d2", "d3"))
    return state | {f"vae/{n}": w for n, w in vae.items()}
