"""What a sampler of T steps makes of a bandit's data when its network makes no error at all.

For data a_1 ... a_M and noise of level x = s a + d eps the best network is known in closed form: it predicts the mean
of the noise given x,

    eps(x) = (x - s E[a | x]) / d,     E[a | x] = sum_k w_k a_k,     w_k ~ exp(-|x - s a_k|^2 / (2 d^2)).

With it the chain of DQL, DiffCPS and diffusion BC (agents/diffusion.py) and SfBC's solver (agents/sde.py) draw what
cloning the data tends to. What is then still missing, few steps cause, and no training makes up for it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from agents.parts.diffusion import Diffusion
from agents.parts.sde import Solver, signal_and_spread
from utils.data import bandit

SOLVER_ORDER = 3  # SfBC's


def exact_noise(x: Tensor, signal: Tensor, spread: Tensor, data: Tensor) -> Tensor:
    """The mean of the noise given x [N, 2], for data [M, 2] and a noise level."""
    weights = (-(torch.cdist(x, signal * data) ** 2) / (2 * spread**2)).softmax(dim=1)
    return (x - signal * (weights @ data)) / spread


class ExactNetwork:
    """Stands in for agents.parts.diffusion.NoiseNetwork of one seed: the condition is the step's number."""

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
        level = self.diffusion.signal[step], self.diffusion.spread[step]
        return exact_noise(actions[0], *level, self.data).unsqueeze(0)


def _data(task: str) -> Tensor:
    """Every second action of the data: enough of them, at half the time."""
    return torch.tensor(bandit.load(task).actions[::2])


def chain_actions(task: str, T: int, number: int, seed: int) -> np.ndarray:
    """Actions [number, 2] of the chain of T steps with the published schedule."""
    diffusion = Diffusion("vp", T, bandit.find(task).max_action, "cpu")
    network = ExactNetwork(diffusion, _data(task))
    noise = torch.randn(1, T, number, 2, generator=torch.Generator().manual_seed(seed))
    return diffusion.sample(network, torch.zeros(1, number, 1), noise)[0].numpy()  # type: ignore[arg-type]


def solver_actions(task: str, T: int, number: int, seed: int) -> np.ndarray:
    """Actions [number, 2] of SfBC's solver with T evaluations, clipped to the box."""
    solver, data, box = Solver(T, SOLVER_ORDER, data=True), _data(task).double(), bandit.find(task).max_action
    signal, spread = signal_and_spread(solver.times.double())
    start = torch.randn(number, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    actions = solver.sample(lambda x, i: exact_noise(x, signal[i], spread[i], data), start)
    return actions.clamp(-box, box).numpy()
