"""Records updates of d3rlpy's BEAR: `python bear.py` in this folder, in an environment with d3rlpy 2.8.1.

Where d3rlpy departs from the authors' code in D4RL-Evaluations, the recording keeps to the latter:

- The decoder is put right (see vae.py).
- The policy's value term is that of the first of the actions whose discrepancy is taken; d3rlpy draws another. Here
  both draws are the same numbers (`Noise(same_first=True)`).
- d3rlpy adds the entropy of soft actor-critic, here with a temperature of 10^-30.
- d3rlpy's step of the multiplier leaves minus the discrepancy's gradient on the policy, where it cancels the policy's
  own, and takes the policy's learning rate. That step is left out; the tests have the multiplier's in closed form.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from common import ACTION_DIM, HIDDEN, STATE_DIM, batch, flat, minibatch, save
from d3rlpy.algos import BEARConfig
from d3rlpy.models.encoders import VectorEncoderFactory
from noise import Noise
from vae import networks, put_right

SETTINGS = {
    "learning_rate": 1e-3,
    "critic_learning_rate": 2e-3,
    "vae_learning_rate": 3e-3,
    "discount": 0.97,
    "tau": 0.05,
    "min_weight": 0.7,
    "mmd_sigma": 3.0,
    "mmd_samples": 4,
    "mmd_threshold": 0.05,
    "warmup_steps": 2,
    "hidden_dim": HIDDEN,
    "vae_hidden_dim": HIDDEN,
}
ALPHA, UPDATES = 1.7, 4  # two updates of the warm-up, two after it


def weights(modules: Any) -> dict[str, np.ndarray]:
    """All weights; the policy's mean and deviation are two layers here."""
    return networks(modules, {"actor": modules.policy}, ("l1", "l2", "mean", "log_std"))


def record(kernel: str) -> None:
    """Make the file of one kernel."""
    torch.manual_seed(11)
    encoder = VectorEncoderFactory(hidden_units=[HIDDEN, HIDDEN])
    algo = BEARConfig(
        actor_learning_rate=SETTINGS["learning_rate"],
        critic_learning_rate=SETTINGS["critic_learning_rate"],
        imitator_learning_rate=SETTINGS["vae_learning_rate"],
        actor_encoder_factory=encoder,
        critic_encoder_factory=encoder,
        imitator_encoder_factory=encoder,
        gamma=SETTINGS["discount"],
        tau=SETTINGS["tau"],
        lam=SETTINGS["min_weight"],
        alpha_threshold=SETTINGS["mmd_threshold"],
        mmd_kernel=kernel,
        mmd_sigma=SETTINGS["mmd_sigma"],
        n_mmd_action_samples=SETTINGS["mmd_samples"],
        warmup_steps=SETTINGS["warmup_steps"],
        initial_alpha=ALPHA,
        initial_temperature=1e-30,
        n_action_samples=10,
    ).create()
    algo.create_impl((STATE_DIM,), ACTION_DIM)
    impl = algo.impl
    impl._modules = dataclasses.replace(impl.modules, alpha_optim=None)
    with torch.no_grad():  # a target that lags behind
        for parameter in impl.modules.targ_q_funcs.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    generator, noise = torch.Generator().manual_seed(12), Noise(13, same_first=True)
    arrays = flat("before", weights(impl.modules))
    for k in range(UPDATES):
        rows = batch(generator)
        with noise.used() as drawn:
            metrics = impl.inner_update(minibatch(rows), k)
        warm = k < SETTINGS["warmup_steps"]
        vae_noise, next_action_noise, *_, code_noise, policy_noise = drawn
        assert len(drawn) == (4 if warm else 5)
        # d3rlpy has the samples of a state one batch apart: to [rows, samples, ...].
        samples = (SETTINGS["mmd_samples"], len(rows["states"]), 2 * ACTION_DIM)
        draws = {
            "vae_noise": vae_noise,
            "next_action_noise": next_action_noise.transpose(0, 1),
            "code_noise": code_noise.view(samples).transpose(0, 1).flatten(0, 1),
            "policy_noise": policy_noise.transpose(0, 1),
        }
        arrays |= flat(f"batch/{k}", rows) | flat(f"metrics/{k}", metrics) | flat(f"draws/{k}", draws)
    states = batch(generator)["states"]
    with noise.used() as drawn:
        actions = impl.inner_predict_best_action(states)
    arrays |= flat("act", {"states": states, "noise": drawn[0], "actions": actions})
    config = {**SETTINGS, "mmd_kernel": kernel, "updates": UPDATES, "log_alpha": math.log(ALPHA)}
    save(f"bear_{kernel}", config, arrays | flat("after", weights(impl.modules)))


def main() -> None:
    """Make the files."""
    put_right()
    for kernel in ("gaussian", "laplacian"):
        record(kernel)


if __name__ == "__main__":
    main()
