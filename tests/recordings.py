"""Reads what other code computed over a few gradient steps, as `fixtures/` holds it.

`parity_*.npz`: the published code of DiffCPS, Diffusion-QL and DTQL. They hold outcomes only; `weights`, `batches` and
the draws make the inputs again, from one `RandomState` in this order.
`d3rlpy_*.npz`: d3rlpy 2.8.1 (github.com/takuseno/d3rlpy), written by `record_d3rlpy/`, with its inputs: `Recording`
reads them by group.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

FIXTURES = Path(__file__).parent / "fixtures"


def load(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The configuration and the outcome of a recorded case."""
    with np.load(FIXTURES / f"{name}.npz") as file:
        recorded = {key: file[key] for key in file.files}
    return json.loads(str(recorded.pop("config"))), recorded


def part(recorded: dict[str, np.ndarray], prefix: str) -> dict[str, torch.Tensor]:
    """What a recording holds under `<prefix>/`, by the rest of its names."""
    start = f"{prefix}/"
    return {name.removeprefix(start): _tensor(value) for name, value in recorded.items() if name.startswith(start)}


class Recording:
    """One case that d3rlpy recorded: its settings, and arrays by `<group>/<name>`."""

    def __init__(self, name: str, case: str = "") -> None:
        self.config, arrays = load(f"d3rlpy_{name}")
        self.arrays = {key.removeprefix(f"{case}/"): value for key, value in arrays.items() if key.startswith(case)}

    def group(self, prefix: str, seeds: int | None = None) -> dict[str, torch.Tensor]:
        """The arrays of one group as float32 tensors; with `seeds`, behind a seeds axis of that length."""
        tensors = part(self.arrays, prefix)
        return tensors if seeds is None else stacked(tensors, seeds)

    def networks(self, prefix: str) -> dict[str, dict[str, torch.Tensor]]:
        """The weights of one moment, by network."""
        nested: dict[str, dict[str, torch.Tensor]] = {}
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


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """What every recorded case names, under this project's words; the case's own coefficients come on top."""
    return {
        "learning_rate": config["lr"],
        "critic_learning_rate": config["critic_lr"],
        "discount": config["discount"],
        "tau": config["tau"],
        "ema_decay": config["ema_decay"],
        "ema_start": config["ema_start"],
        "ema_interval": config["ema_every"],
        "batch_size": config["batch_size"],
    }


def chain_settings(config: dict[str, Any]) -> dict[str, Any]:
    """`settings`, and what DiffCPS and Diffusion-QL share beyond them."""
    own = {"grad_norm": config["grad_norm"], "max_q_backup": config["max_q_backup"], "diffusion_steps": config["T"]}
    return settings(config) | own


def weights(config: dict[str, Any], rs: np.random.RandomState) -> dict[str, dict[str, torch.Tensor]]:
    """Normal weights scaled by 1 / sqrt(fan in); 64 stands in for a vector's."""
    networks = {}
    for network, shapes in config["shapes"].items():
        networks[network] = {
            name: _tensor(rs.standard_normal(shape) / np.sqrt(shape[1] if len(shape) == 2 else 64))
            for name, shape in shapes
        }
    return networks


def batches(config: dict[str, Any], rs: np.random.RandomState) -> list[dict[str, torch.Tensor]]:
    """One batch a step, without the seeds axis."""
    K, B, S, A = (config[k] for k in ("updates", "batch_size", "state_dim", "action_dim"))
    drawn = {
        "states": rs.standard_normal((K, B, S)),
        "actions": np.tanh(rs.standard_normal((K, B, A))) * config["max_action"] * 0.95,
        "next_states": rs.standard_normal((K, B, S)),
        "rewards": rs.standard_normal((K, B, 1)),
        "not_dones": rs.random_sample((K, B, 1)) > 0.05,
    }
    return [{name: _tensor(value[k]) for name, value in drawn.items()} for k in range(K)]


def chain_draws(config: dict[str, Any], rs: np.random.RandomState) -> list[dict[str, torch.Tensor]]:
    """Draws of DiffCPS and Diffusion-QL, one dict per step, without the seeds axis."""
    K, B, A, T = (config[k] for k in ("updates", "batch_size", "action_dim", "T"))
    R = 10 if config["max_q_backup"] else 1
    drawn = {
        "next_action_noise": rs.standard_normal((K, T, B * R, A)),
        "timesteps": rs.randint(0, T, (K, B)),
        "noise": rs.standard_normal((K, B, A)),
        "policy_noise": rs.standard_normal((K, T, B, A)),
        "critic_choice": rs.randint(0, 2, K),
    }
    integer = ("timesteps", "critic_choice")
    return [
        {n: torch.as_tensor(v[k]).long() if n in integer else _tensor(v[k]) for n, v in drawn.items()} for k in range(K)
    ]


def one_step_draws(config: dict[str, Any], rs: np.random.RandomState) -> list[dict[str, torch.Tensor]]:
    """Draws of DTQL, one dict per step, without the seeds axis."""
    K, B, A = (config[k] for k in ("updates", "batch_size", "action_dim"))
    drawn = {
        "bc_sigma": np.exp(rs.uniform(np.log(0.02), np.log(8), (K, B))),
        "bc_noise": rs.standard_normal((K, B, A)),
        "policy_noise": rs.standard_normal((K, B, A)),
        "distill_sigma": np.exp(rs.uniform(np.log(0.02), np.log(8), (K, B))),
        "distill_noise": rs.standard_normal((K, B, A)),
    }
    return [{n: _tensor(v[k]) for n, v in drawn.items()} for k in range(K)]


def assert_recorded(state: dict[str, dict[str, torch.Tensor]], recorded: dict[str, np.ndarray]) -> None:
    """Every parameter of a published state lies within 1e-4 of the recording, relative to its largest entry."""
    names = {f"after/{network}/{name}" for network, weights in state.items() for name in weights}
    assert names == {name for name in recorded if name.startswith("after/")}
    for network, weights in state.items():
        for name, value in weights.items():
            expected = recorded[f"after/{network}/{name}"]
            scale = expected[2]  # the largest entry: a relative bound on near-zero entries says nothing
            np.testing.assert_allclose(summary(value), expected, rtol=1e-4, atol=1e-4 * scale)


def stacked(per_step: dict[str, torch.Tensor], seeds: int) -> dict[str, torch.Tensor]:
    """The same numbers for every seed: a leading seeds axis."""
    return {name: value.expand(seeds, *value.shape).clone() for name, value in per_step.items()}


def summary(value: torch.Tensor) -> np.ndarray:
    """[norm, sum, max abs, first 24 entries, last 24 entries], as the recordings hold each parameter."""
    x = value.detach().double().flatten().numpy()
    return np.concatenate([[np.linalg.norm(x), x.sum(), np.abs(x).max()], x[:24], x[-24:]])


def _tensor(value: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(np.asarray(value, dtype=np.float32))
