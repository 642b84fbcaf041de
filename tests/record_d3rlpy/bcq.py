"""Records a few updates of d3rlpy's BCQ: `python bcq.py` in this folder, in an environment with d3rlpy 2.8.1.

The decoder is put right first (see vae.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from common import ACTION_DIM, HIDDEN, STATE_DIM, batch, flat, minibatch, save
from d3rlpy.algos import BCQConfig
from d3rlpy.models.encoders import VectorEncoderFactory
from noise import Noise
from vae import LAYERS, networks, put_right

SETTINGS = {
    "learning_rate": 1e-3,
    "critic_learning_rate": 2e-3,
    "vae_learning_rate": 3e-3,
    "discount": 0.97,
    "tau": 0.05,
    "phi": 0.1,
    "min_weight": 0.7,
    "hidden_dim": HIDDEN,
    "vae_hidden_dim": HIDDEN,
}
UPDATES = 3


def weights(modules: Any) -> dict[str, np.ndarray]:
    """All weights under their published names."""
    return networks(modules, {"actor": modules.policy, "actor_target": modules.targ_policy}, LAYERS)


def main() -> None:
    """Make the file."""
    put_right()
    torch.manual_seed(8)
    encoder = VectorEncoderFactory(hidden_units=[HIDDEN, 3 * HIDDEN // 4])
    algo = BCQConfig(
        actor_learning_rate=SETTINGS["learning_rate"],
        critic_learning_rate=SETTINGS["critic_learning_rate"],
        imitator_learning_rate=SETTINGS["vae_learning_rate"],
        actor_encoder_factory=encoder,
        critic_encoder_factory=encoder,
        imitator_encoder_factory=VectorEncoderFactory(hidden_units=[HIDDEN, HIDDEN]),
        gamma=SETTINGS["discount"],
        tau=SETTINGS["tau"],
        lam=SETTINGS["min_weight"],
        action_flexibility=SETTINGS["phi"],
        n_action_samples=10,
        rl_start_step=0,
    ).create()
    algo.create_impl((STATE_DIM,), ACTION_DIM)
    modules = algo.impl.modules
    with torch.no_grad():  # targets that lag behind
        for target in (modules.targ_q_funcs, modules.targ_policy):
            for parameter in target.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    generator, noise = torch.Generator().manual_seed(9), Noise(10)
    arrays = flat("before", weights(modules))
    for k in range(UPDATES):
        rows = batch(generator)
        with noise.used() as drawn:
            metrics = algo.impl.inner_update(minibatch(rows), k)
        names = ("vae_noise", "next_code_noise", "code_noise")
        arrays |= flat(f"batch/{k}", rows) | flat(f"metrics/{k}", metrics)
        arrays |= flat(f"draws/{k}", dict(zip(names, drawn, strict=True)))
    states = batch(generator)["states"]
    with noise.used() as drawn:
        actions = algo.impl.inner_predict_best_action(states).detach()
    arrays |= flat("act", {"states": states, "code_noise": drawn[0], "actions": actions})
    save("bcq", {**SETTINGS, "updates": UPDATES}, arrays | flat("after", weights(modules)))


if __name__ == "__main__":
    main()
