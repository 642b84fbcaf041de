"""Records two updates of d3rlpy's IQL: `python iql.py` in this folder, in an environment with d3rlpy 2.8.1."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from common import ACTION_DIM, HIDDEN, STATE_DIM, batch, flat, minibatch, save, weights
from d3rlpy.algos import IQLConfig
from d3rlpy.models.encoders import VectorEncoderFactory

SETTINGS = {
    "learning_rate": 1e-3,
    "critic_learning_rate": 2e-3,
    "discount": 0.97,
    "tau": 0.05,
    "expectile": 0.8,
    "beta": 5.0,
    "hidden_dim": HIDDEN,
}
UPDATES = 3


def networks(modules: Any) -> dict[str, np.ndarray]:
    """All weights under this project's names; d3rlpy bounds the log deviation by a sigmoid: the bounded one is kept."""
    policy, log_std = modules.policy, modules.policy._logstd
    low, high = policy._min_logstd, policy._max_logstd
    bounded = (low + torch.sigmoid(log_std) * (high - low)).detach()
    state = {f"actor/{n}": w for n, w in weights(policy, "net").items()} | {"actor/log_std": bounded[0].numpy()}
    for kind, pair in (("critic", modules.q_funcs), ("critic_target", modules.targ_q_funcs)):
        for i, q in enumerate(pair):
            state |= {f"{kind}/{n}": w for n, w in weights(q, f"q{i + 1}_model").items()}
    return state | {f"critic/{n}": w for n, w in weights(modules.value_func, "v_model").items()}


def main() -> None:
    """Make the file."""
    torch.manual_seed(3)
    encoder = VectorEncoderFactory(hidden_units=[HIDDEN, HIDDEN])
    algo = IQLConfig(
        actor_learning_rate=SETTINGS["learning_rate"],
        critic_learning_rate=SETTINGS["critic_learning_rate"],
        actor_encoder_factory=encoder,
        critic_encoder_factory=encoder,
        value_encoder_factory=encoder,
        gamma=SETTINGS["discount"],
        tau=SETTINGS["tau"],
        expectile=SETTINGS["expectile"],
        weight_temp=SETTINGS["beta"],
    ).create()
    algo.create_impl((STATE_DIM,), ACTION_DIM)
    modules = algo.impl.modules
    with torch.no_grad():  # a target that lags behind, and biases that matter
        for parameter in modules.targ_q_funcs.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    generator = torch.Generator().manual_seed(5)
    arrays = flat("before", networks(modules))
    for k in range(UPDATES):
        rows = batch(generator)
        arrays |= flat(f"log_std/{k}", {"": networks(modules)["actor/log_std"]})
        metrics = algo.impl.inner_update(minibatch(rows), k)
        arrays |= flat(f"batch/{k}", rows) | flat(f"metrics/{k}", metrics)
    save("iql", {**SETTINGS, "updates": UPDATES}, arrays | flat("after", networks(modules)))


if __name__ == "__main__":
    main()
