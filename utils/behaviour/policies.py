"""Behaviour policies: small files of weights, and their forward pass in plain NumPy.

A policy file is a `.npz` whose arrays are, by `kind`:

- `linear`: `weight [A, S]`, `mean [S]`, `std [S]`: a = clip(W (s - mean) / std, -1, 1);
- `network`: `weight_0 [H, S], bias_0 [H], ...`: relu between the layers, tanh after the last. With
  `log_std_weight [A, H]` and `log_std_bias [A]` it is the tanh-Gaussian policy of soft actor-critic.

`info` holds a JSON text with what is known of the policy (environment, search, environment steps, return).
Weights are computed in float64, so a file in float16 gives the same actions on every call and batch of one machine.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from utils.errors import UserError
from utils.files import atomic_write

LOG_STD_RANGE = (-20.0, 2.0)
"""Where soft actor-critic keeps the logarithm of its standard deviation (D4RL's rlkit: the same)."""

# module of the policy class in a stable-baselines3 file -> (algorithm, whether its policy is a distribution)
_STABLE_BASELINES3 = {
    "stable_baselines3.sac.policies": ("SAC", True),
    "stable_baselines3.td3.policies": ("TD3", False),
    "stable_baselines3.common.policies": ("PPO", True),
}


class Policy(Protocol):
    """What collecting needs of a policy."""

    @property
    def info(self) -> dict[str, Any]:
        """What is known of the policy, as plain values."""
        ...

    def act(self, states: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        """States [N, S] -> actions [N, A] in [-1, 1].

        With `rng` a policy that is a distribution is sampled; one that is a function gives the same as without.
        """
        ...


@dataclass
class UniformPolicy:
    """D4RL's *random*: uniform actions in the box [-1, 1]^A; without `rng` their mean, zero."""

    action_dim: int
    info: dict[str, Any] = field(default_factory=lambda: {"kind": "uniform"})

    def act(self, states: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        shape = (len(states), self.action_dim)
        return np.zeros(shape) if rng is None else rng.uniform(-1.0, 1.0, shape)


@dataclass
class NoisyPolicy:
    """clip(a + σ·N(0, 1), -1, 1) of another policy's deterministic action a."""

    policy: Policy
    sigma: float

    @property
    def info(self) -> dict[str, Any]:
        return {**self.policy.info, "action_noise": self.sigma}

    def act(self, states: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        actions = self.policy.act(states)
        if rng is None:
            return actions
        return np.clip(actions + self.sigma * rng.standard_normal(actions.shape), -1.0, 1.0)


@dataclass
class LinearPolicy:
    """a = clip(W (s - mean) / std, -1, 1), what augmented random search finds (Mania et al., 2018)."""

    weight: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def sizes(self) -> tuple[int, int]:
        """(state_dim, action_dim)."""
        return self.weight.shape[1], self.weight.shape[0]

    def act(self, states: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        return np.clip(((states - self.mean) / self.std) @ self.weight.T, -1.0, 1.0)

    def arrays(self) -> dict[str, np.ndarray]:
        return {"weight": self.weight, "mean": self.mean, "std": self.std}


@dataclass
class NetworkPolicy:
    """A relu network with tanh at its end; tanh-Gaussian where a layer for log σ is there.

    weights [out, in] and biases [out], first layer first; the layer for log σ stands on the last hidden one.
    """

    weights: list[np.ndarray]
    biases: list[np.ndarray]
    log_std_weight: np.ndarray | None = None
    log_std_bias: np.ndarray | None = None
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def sizes(self) -> tuple[int, int]:
        """(state_dim, action_dim)."""
        return self.weights[0].shape[1], self.weights[-1].shape[0]

    def act(self, states: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        hidden = states
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            hidden = np.maximum(hidden @ weight.T + bias, 0.0)
        mean = hidden @ self.weights[-1].T + self.biases[-1]
        if rng is None or self.log_std_weight is None or self.log_std_bias is None:
            return np.tanh(mean)
        log_std = np.clip(hidden @ self.log_std_weight.T + self.log_std_bias, *LOG_STD_RANGE)
        return np.tanh(mean + np.exp(log_std) * rng.standard_normal(mean.shape))

    def arrays(self) -> dict[str, np.ndarray]:
        arrays: dict[str, np.ndarray] = {}
        for k, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            arrays[f"weight_{k}"], arrays[f"bias_{k}"] = weight, bias
        if self.log_std_weight is not None and self.log_std_bias is not None:
            arrays["log_std_weight"], arrays["log_std_bias"] = self.log_std_weight, self.log_std_bias
        return arrays


class StableBaselines3Policy:
    """A policy that stable-baselines3 saved (SAC, TD3, DDPG, PPO or A2C with a box of actions)."""

    def __init__(self, path: Path) -> None:
        """Load a `.zip` of stable-baselines3, which may hold pickled Python: load only files that you trust.

        UserError where the package is missing, or the file is none of its, or has another kind of actions.
        """
        try:
            import stable_baselines3
        except ImportError as error:
            raise UserError(f"{path} needs stable-baselines3: pip install stable-baselines3") from error
        name, self._is_distribution = _stable_baselines3_algorithm(path)
        try:
            self._model = getattr(stable_baselines3, name).load(path, device="cpu")
        except Exception as error:  # whatever unpickling a foreign file raises, the user gets one line
            raise UserError(f"{path} cannot be loaded as a stable-baselines3 {name} policy: {error}") from error
        self.info: dict[str, Any] = {"kind": "stable-baselines3", "algorithm": name}

    @property
    def sizes(self) -> tuple[int, int]:
        """(state_dim, action_dim)."""
        state_shape, action_shape = self._model.observation_space.shape, self._model.action_space.shape
        return int(np.prod(state_shape)), int(np.prod(action_shape))

    def act(self, states: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        import torch

        sample = rng is not None and self._is_distribution
        with torch.random.fork_rng(devices=[]):  # its noise comes from torch's global generator
            if rng is not None and sample:
                torch.manual_seed(int(rng.integers(1 << 31)))
            actions, _ = self._model.predict(states.astype(np.float32), deterministic=not sample)
        return np.clip(actions.astype(np.float64), -1.0, 1.0)


def _stable_baselines3_algorithm(path: Path) -> tuple[str, bool]:
    try:
        with zipfile.ZipFile(path) as archive:
            module = json.loads(archive.read("data"))["policy_class"]["__module__"]
    except (OSError, zipfile.BadZipFile, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a policy file of stable-baselines3: {error}") from error
    if module not in _STABLE_BASELINES3:
        known = ", ".join(sorted(name for name, _ in _STABLE_BASELINES3.values()))
        raise UserError(f"{path} holds a policy of {module}; known are {known}")
    return _STABLE_BASELINES3[module]


def save_policy(path: str | os.PathLike[str], policy: LinearPolicy | NetworkPolicy, dtype: type = np.float16) -> None:
    """Write a policy file, atomically; `dtype` is that of the weights."""
    path = Path(path)
    kind = "linear" if isinstance(policy, LinearPolicy) else "network"
    arrays: dict[str, Any] = {name: np.asarray(array, dtype) for name, array in policy.arrays().items()}
    info = json.dumps(policy.info, sort_keys=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    np.savez_compressed(content, kind=np.array(kind), info=np.array(info), **arrays)
    atomic_write(path, content.getbuffer())


def load_policy(path: str | os.PathLike[str]) -> LinearPolicy | NetworkPolicy | StableBaselines3Policy:
    """Read a linear or network `.npz`, or a `.zip` of stable-baselines3.

    UserError where the file is missing, is no policy file, or its layers do not fit together.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"no policy file {path}; give a linear or network .npz, or a stable-baselines3 .zip")
    if path.suffix == ".zip":
        return StableBaselines3Policy(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            stored = {name: file[name] for name in file.files}
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{path} is not a policy file (.npz): {error}") from error
    kind = str(stored.pop("kind", ""))
    try:
        info = json.loads(str(stored.pop("info", "{}")))
        arrays = {name: array.astype(np.float64) for name, array in stored.items()}
        if kind == "linear":
            policy: LinearPolicy | NetworkPolicy = LinearPolicy(**arrays, info=info)
        elif kind == "network":
            policy = _network(arrays, info)
        else:
            raise UserError(f"{path}: its kind is {kind!r}; known kinds are linear and network")
        _check(policy)
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise UserError(f"{path} is not a sound {kind} policy: {error}") from error
    return policy


def _network(arrays: dict[str, np.ndarray], info: dict[str, Any]) -> NetworkPolicy:
    layers = sum(name.startswith("weight_") for name in arrays)
    return NetworkPolicy(
        weights=[arrays[f"weight_{k}"] for k in range(layers)],
        biases=[arrays[f"bias_{k}"] for k in range(layers)],
        log_std_weight=arrays.get("log_std_weight"),
        log_std_bias=arrays.get("log_std_bias"),
        info=info,
    )


def _check(policy: LinearPolicy | NetworkPolicy) -> None:
    """A forward pass on zeros: shapes that do not fit, NaN and infinity show here and not while collecting."""
    state_dim, action_dim = policy.sizes
    actions = policy.act(np.zeros((1, state_dim)), np.random.default_rng(0))
    if actions.shape != (1, action_dim) or not all(np.isfinite(array).all() for array in policy.arrays().values()):
        raise ValueError(f"actions have shape {actions.shape[1:]} or weights are not finite")
