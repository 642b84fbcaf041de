"""Records three updates of d3rlpy's CQL: `python cql.py` in this folder, in an environment with d3rlpy 2.8.1.

Two cases: a fixed weight, and a Lagrange multiplier. Random numbers are recorded where torch draws them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from common import ACTION_DIM, HIDDEN, ROWS, STATE_DIM, batch, flat, minibatch, save, weights
from d3rlpy.algos import CQLConfig
from d3rlpy.models.encoders import VectorEncoderFactory
from torch.distributions import normal

SETTINGS = {
    "learning_rate": 1e-3,
    "critic_learning_rate": 2e-3,
    "discount": 0.97,
    "tau": 0.05,
    "min_q_weight": 4.0,
    "hidden_dim": HIDDEN,
}
THRESHOLD = 0.5  # d3rlpy multiplies its threshold by the weight
UPDATES = 3


@contextmanager
def recorded() -> Iterator[list[torch.Tensor]]:
    """Every standard normal of a torch Normal and every `uniform_`, in order."""
    drawn: list[torch.Tensor] = []
    standard, uniform = normal._standard_normal, torch.Tensor.uniform_

    def keep(value: torch.Tensor) -> torch.Tensor:
        drawn.append(value.clone())
        return value

    normal._standard_normal = lambda *a, **k: keep(standard(*a, **k))
    torch.Tensor.uniform_ = lambda *a, **k: keep(uniform(*a, **k))
    try:
        yield drawn
    finally:
        normal._standard_normal, torch.Tensor.uniform_ = standard, uniform


def networks(modules: Any) -> dict[str, np.ndarray]:
    """All weights under this project's names: the policy's last layer holds mean and log deviation, one above other."""
    actor = weights(modules.policy, "net")  # two hidden layers, mean, log deviation
    state = {f"actor/{name}": value for name, value in actor.items()}
    for kind, pair in (("critic", modules.q_funcs), ("critic_target", modules.targ_q_funcs)):
        for i, q in enumerate(pair):
            state |= {f"{kind}/{name}": value for name, value in weights(q, f"q{i + 1}_model").items()}
    for kind in ("weight", "bias"):
        parts = [state.pop(f"actor/net.{i}.{kind}") for i in (6, 8)]
        state[f"actor/net.6.{kind}"] = np.concatenate(parts)
    state["temperature/log_alpha"] = next(modules.log_temp.parameters()).detach().numpy().copy()[0, 0]
    state["multiplier/log_alpha_prime"] = next(modules.log_alpha.parameters()).detach().numpy().copy()[0, 0]
    return state


def case(name: str, lagrange: bool) -> dict[str, np.ndarray]:
    """The arrays of one case, under `<name>/`."""
    torch.manual_seed(11)
    encoder = VectorEncoderFactory(hidden_units=[HIDDEN] * 3)
    algo = CQLConfig(
        actor_learning_rate=SETTINGS["learning_rate"],
        temp_learning_rate=SETTINGS["learning_rate"],
        critic_learning_rate=SETTINGS["critic_learning_rate"],
        alpha_learning_rate=SETTINGS["critic_learning_rate"] if lagrange else 0.0,
        actor_encoder_factory=encoder,
        critic_encoder_factory=encoder,
        gamma=SETTINGS["discount"],
        tau=SETTINGS["tau"],
        conservative_weight=SETTINGS["min_q_weight"],
        alpha_threshold=THRESHOLD if lagrange else 0.0,
    ).create()
    algo.create_impl((STATE_DIM,), ACTION_DIM)
    modules = algo.impl.modules
    with torch.no_grad():  # a target that lags behind
        for parameter in modules.targ_q_funcs.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    generator = torch.Generator().manual_seed(5)
    arrays = flat("before", networks(modules))
    for k in range(UPDATES):
        rows = batch(generator)
        with recorded() as drawn:
            metrics = algo.impl.inner_update(minibatch(rows), k)
        current, following, uniform, policy = drawn  # the target takes the policy's mean: nothing is drawn for it
        draws = {
            "current_noise": current.transpose(0, 1).reshape(-1, ACTION_DIM),
            "next_noise": following.transpose(0, 1).reshape(-1, ACTION_DIM),
            "random_actions": uniform,
            "policy_noise": policy,
            "next_action_noise": torch.zeros(ROWS, ACTION_DIM),
        }
        arrays |= flat(f"batch/{k}", rows) | flat(f"metrics/{k}", metrics) | flat(f"draws/{k}", draws)
        arrays |= flat(f"alphas/{k}", {n: v for n, v in networks(modules).items() if "alpha" in n})
    arrays |= flat("after", networks(modules))
    return {f"{name}/{key}": np.asarray(value, dtype=np.float32) for key, value in arrays.items()}


def main() -> None:
    """Make the file."""
    gap = THRESHOLD * SETTINGS["min_q_weight"]
    cases = case("fixed", lagrange=False) | case("lagrange", lagrange=True)
    save("cql", {**SETTINGS, "target_action_gap": gap, "updates": UPDATES}, cases)


if __name__ == "__main__":
    main()
