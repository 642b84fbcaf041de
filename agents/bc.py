"""Behaviour cloning with a Gaussian: the policy that makes the data's actions most likely.

    max_theta  E[log N(a; tanh f_theta(s), exp g_theta(s))]      over the data's (s, a), actions divided by the box

The deviation depends on the state, so the policy says how sure it is; but one Gaussian has one mode: where the data
have several actions for a state, it covers what lies between them. Evaluated by its mean, unless `sample_actions`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from agents.agent import Adam, Agent, Batch, Draws, Rng, normals
from agents.networks import GaussianActor, default_init
from agents.published import required

__all__ = ["BC"]


class BC(Agent):
    """The agent of `--algo bc`; `config` is a `hyperparameters.BCConfig`."""

    METRICS = ("bc_loss", "mse", "actor_grad_norm")
    COMPILED = ("policy_loss",)

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        max_action: float,
        config: Any,
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(state_dim, action_dim, max_action, config, seeds, device)
        c, n = config, self.num_seeds
        self.actor = GaussianActor(state_dim, action_dim, self.max_action, n, self.device, c.hidden_dim)
        default_init(self.actor.parameters, self.init_generators())
        self.networks = {"actor": self.actor.parameters}
        self.optimizers = {"actor": Adam(self.actor.parameters, n, c.learning_rate, c.grad_norm)}

    def _draw(self, rng: Rng, batch_size: int, steps: int) -> dict[str, Tensor]:
        """Nothing: maximum likelihood needs no random numbers beside the batch."""
        return {}

    # --- The update -------------------------------------------------------------------------------------

    def gradient_step(self, batch: Batch, draws: Draws, step: int) -> dict[str, Tensor]:
        loss, metrics = self.policy_loss(batch, draws)
        metrics["actor_grad_norm"] = self.optimizers["actor"].step(self.actor.parameters.gradient(loss))
        return metrics

    def policy_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """The negative log-likelihood of the data's actions; also their squared distance from the mean [S]."""
        mean, log_std = self.actor(batch["states"])
        loss = -self.actor.log_likelihood(mean, log_std, batch["actions"]).mean(dim=1)
        mse = (self.actor.actions(mean, log_std) - batch["actions"]).square().mean(dim=(1, 2))
        return loss, {"bc_loss": loss.detach(), "mse": mse.detach()}

    # --- Acting -----------------------------------------------------------------------------------------

    def act_draws(self, rng: Rng, states: int) -> dict[str, Tensor]:
        return {"noise": normals(rng, self.num_seeds, 1, (states, self.action_dim))[0]}

    def actions_for(self, states: Tensor, noise: Mapping[str, Tensor]) -> Tensor:
        """The policy's mean, or with `sample_actions` a sample of it."""
        return self.actor.actions(*self.actor(states), noise["noise"] if self.config.sample_actions else None)

    # --- Published names --------------------------------------------------------------------------------

    def load_published(self, networks: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Weights as `published_state` gives them. Raises ValueError for missing or misshapen ones."""
        for seed in range(self.num_seeds):
            self.actor.parameters.load_member(seed, required(networks, "actor"))

    def published_state(self) -> list[dict[str, Any]]:
        """One dict a seed: `actor`, under the names of an `nn.Sequential` called net."""
        return [{"actor": self.actor.parameters.member_state(seed)} for seed in range(self.num_seeds)]
