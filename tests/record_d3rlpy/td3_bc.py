"""Records a few updates of d3rlpy's TD3+BC: `python td3_bc.py` in this folder, in an environment with d3rlpy 2.8.1.

d3rlpy counts steps from 0 and moves the policy at even ones, the official code from 1: the step is passed as k + 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from common import ACTION_DIM, HIDDEN, STATE_DIM, batch, flat, minibatch, save, weights
from d3rlpy.algos import TD3PlusBCConfig
from d3rlpy.models.encoders import VectorEncoderFactory
from noise import Noise

SETTINGS = {
    "learning_rate": 1e-3,
    "critic_learning_rate": 2e-3,
    "discount": 0.97,
    "tau": 0.05,
    "target_noise": 0.6,
    "target_noise_clip": 0.5,
    "policy_interval": 2,
    "alpha": 2.0,
    "hidden_dim": HIDDEN,
}
UPDATES = 4


def networks(modules: Any) -> dict[str, np.ndarray]:
    """All weights: the actors' layers as net.0, net.2 ..., the critics' with q1_model and q2_model before them."""
    state = {}
    for kind, actor in (("actor", modules.policy), ("actor_target", modules.targ_policy)):
        state |= {f"{kind}/{n}": w for n, w in weights(actor, "net").items()}
    for kind, pair in (("critic", modules.q_funcs), ("critic_target", modules.targ_q_funcs)):
        for i, q in enumerate(pair):
            state |= {f"{kind}/{n}": w for n, w in weights(q, f"q{i + 1}_model").items()}
    return state


def main() -> None:
    """Make the file."""
    torch.manual_seed(4)
    encoder = VectorEncoderFactory(hidden_units=[HIDDEN, HIDDEN])
    algo = TD3PlusBCConfig(
        actor_learning_rate=SETTINGS["learning_rate"],
        critic_learning_rate=SETTINGS["critic_learning_rate"],
        actor_encoder_factory=encoder,
        critic_encoder_factory=encoder,
        gamma=SETTINGS["discount"],
        tau=SETTINGS["tau"],
        target_smoothing_sigma=SETTINGS["target_noise"],
        target_smoothing_clip=SETTINGS["target_noise_clip"],
        update_actor_interval=SETTINGS["policy_interval"],
        alpha=SETTINGS["alpha"],
    ).create()
    algo.create_impl((STATE_DIM,), ACTION_DIM)
    modules = algo.impl.modules
    with torch.no_grad():  # targets that lag behind
        for target in (modules.targ_q_funcs, modules.targ_policy):
            for parameter in target.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    generator, noise = torch.Generator().manual_seed(6), Noise(7)
    arrays = flat("before", networks(modules))
    for k in range(UPDATES):
        rows = batch(generator)
        with noise.used() as drawn:
            metrics = algo.impl.inner_update(minibatch(rows), k + 1)
        (target_noise,) = drawn
        arrays |= flat(f"batch/{k}", rows) | flat(f"metrics/{k}", metrics)
        arrays |= flat(f"draws/{k}", {"target_noise": target_noise})
    save("td3_bc", {**SETTINGS, "updates": UPDATES}, arrays | flat("after", networks(modules)))


if __name__ == "__main__":
    main()
