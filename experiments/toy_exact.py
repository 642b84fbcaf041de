"""What a diffusion chain of T steps makes of a bandit's data when its network makes no error at all.

For data a_1 ... a_M the best noise network is known in closed form: it predicts the mean of the noise given x,

    eps(x, i) = (x - sqrt(alpha-bar_i) E[a | x]) / sqrt(1 - alpha-bar_i),
    E[a | x] = sum_k w_k a_k,     w_k ~ exp(-|x - sqrt(alpha-bar_i) a_k|^2 / (2 (1 - alpha-bar_i))).

The chain that the agents use (agents/diffusion.py) draws with it what diffusion behaviour cloning tends to: what is
then still missing, few steps cause and no training mends.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from agents.diffusion import Diffusion
from utils import bandit

__all__ = ["exact_actions"]


class ExactNetwork:
    """Stands in for agents.networks.NoiseNetwork of one seed: the condition is the step's number."""

    def __init__(self, diffusion: Diffusion, data: Tensor) -> None:
        self.diffusion, self.data = diffusion, data  # [M, 2]

    def time_part(self) -> Tensor:
        """Step numbers [1, T, 1]."""
        return torch.arange(self.diffusion.steps, dtype=torch.float32).view(1, -1, 1)

    def state_part(self, states: Tensor) -> Tensor:
        """Zeros [1, B, 1]: there is one state."""
        return torch.zeros(1, states.shape[1], 1)

    def noise(self, actions: Tensor, condition: Tensor) -> Tensor:
        """The noise's mean given noisy actions [1, B, 2], all of one step."""
        step = int(condition[0, 0, 0])
        signal, spread = self.diffusion.signal[step], self.diffusion.spread[step]
        distances = torch.cdist(actions[0], signal * self.data)
        weights = (-(distances**2) / (2 * spread**2)).softmax(dim=1)
        return ((actions[0] - signal * (weights @ self.data)) / spread).unsqueeze(0)


def exact_actions(task: str, T: int, number: int, seed: int) -> np.ndarray:
    """Actions [number, 2] of the chain of T steps with the exact network of a bandit's data; published schedule."""
    box = bandit.find(task).max_action
    diffusion = Diffusion("vp", T, box, "cpu")
    network = ExactNetwork(diffusion, torch.tensor(bandit.load(task).actions[::2]))
    noise = torch.randn(1, T, number, 2, generator=torch.Generator().manual_seed(seed))
    return diffusion.sample(network, torch.zeros(1, number, 1), noise)[0].numpy()  # type: ignore[arg-type]
