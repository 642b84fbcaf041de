"""The bound kappa of a constraint on a policy's denoising loss: a number, or what a clone of the data attains."""

from __future__ import annotations

import torch
from torch import Tensor

from agents.parts.agent import Agent, Batch, Draws, Outcome
from agents.parts.diffusion import DiffusionPolicy
from agents.parts.parameters import Parameters

MEMORY = 200  # losses that the clone's mean remembers, once there are ten times as many
LOSS = "clone_loss"  # the clone's, as the agent's metrics and its list of losses worth compiling name it


class Bound:
    """kappa as a number: the same for every seed and step."""

    def __init__(self, agent: Agent, value: float) -> None:
        self._value = torch.full((agent.num_seeds,), value, device=agent.device)

    def __call__(self) -> Tensor:
        """kappa [S]."""
        return self._value

    def follow(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Bring kappa up to this step of the policy; metrics [S] of what that took."""
        return {}


class CloneBound(Bound):
    """kappa from a clone: the policy's network, trained by the denoising loss alone on the policy's batches and draws.

        kappa_n = (1 + slack min(1, n / opening)) m_n      m_n = m_(n-1) + w_n (L_n - m_(n-1))

    L_n is the clone's loss at its n-th step, w_n = max(10 / (9 + n), 1 / MEMORY): their running mean m_n begins with
    the first loss and remembers the last tenth of them, at most MEMORY, so that a fresh clone's large losses are soon
    forgotten. On hopper-medium (batches of 256) a single loss is off by 12 percent. The mean was off by 6 percent over
    steps 10 to 30, 3 up to 100, 1 from there on; one that begins as the mean of all losses is off by 50 up to step 400.
    opening: steps of the clone over which the slack grows from 0; with 0 it is there at once.

    The clone starts as a copy of the policy, so it costs no random number. It is `clone` among the agent's networks,
    the running mean `kappa`; both are part of every checkpoint.
    """

    def __init__(self, agent: Agent, policy: DiffusionPolicy, rate: float, slack: float, opening: float = 0.0) -> None:
        self.agent, self.slack, self.opening = agent, slack, opening
        self.clone = agent.learn_beside("clone", policy, rate)
        self.parameters = Parameters({"mean": (), "losses": ()}, agent.num_seeds, agent.device, trainable=False)
        agent.networks["kappa"] = self.parameters  # saved, but not learnt and not published
        agent.METRICS = (*agent.METRICS, "kappa", LOSS, "clone_grad_norm")
        agent.COMPILED = (*agent.COMPILED, LOSS)
        setattr(agent, LOSS, self.loss)  # where compiling replaces it

    def __call__(self) -> Tensor:
        opened = (self.parameters["losses"] / self.opening).clamp(max=1.0) if self.opening else 1.0
        return self.parameters["mean"] * (1 + self.slack * opened)

    def follow(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """One step of the clone, whose loss the running mean takes in."""
        metrics = self.agent.descend("clone", getattr(self.agent, LOSS)(batch, draws))
        self.take(metrics[LOSS])
        return {**metrics, "kappa": self()}

    def loss(self, batch: Batch, draws: Draws) -> Outcome:
        """The clone's denoising loss, on the policy's own time steps and noise [S]."""
        loss = self.clone.loss(batch["actions"], batch["states"], draws["timesteps"], draws["noise"])
        return loss, {LOSS: loss.detach()}

    @torch.no_grad()
    def take(self, loss: Tensor) -> None:
        """The running mean after one more loss [S], in place."""
        mean, losses = self.parameters["mean"], self.parameters["losses"]
        losses.add_(1)
        mean.lerp_(loss, (10 / (9 + losses)).clamp(min=1 / MEMORY))
