"""Diffusion behaviour cloning: the denoising loss alone (the "bc" option of Diffusion-QL's code), as published.

    min_theta  L_d(theta) = E || eps - eps_theta(sqrt(alpha-bar_i) a + sqrt(1 - alpha-bar_i) eps, s, i) ||^2

The smallest agent here: a network, an optimiser, the numbers an update draws, the update, and how to act. The README's
"Add your own algorithm" walks through it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from agents.agent import Adam, Agent, Batch, Draws, Rng, integers, normals
from agents.diffusion import Diffusion
from agents.networks import NoiseNetwork, default_init
from agents.published import policy_weights, required

__all__ = ["DiffusionBC"]


class DiffusionBC(Agent):
    """The agent of `--algo diffusion_bc`; `config` is a `hyperparameters.DiffusionBCConfig`."""

    METRICS = ("bc_loss", "actor_grad_norm")
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
        self.diffusion = Diffusion(c.beta_schedule, c.diffusion_steps, self.max_action, self.device)
        self.actor = NoiseNetwork(state_dim, action_dim, c.diffusion_steps, n, self.device, c.hidden_dim)
        default_init(self.actor.parameters, self.init_generators())
        self.networks = {"actor": self.actor.parameters}
        self.optimizers = {"actor": Adam(self.actor.parameters, n, c.learning_rate, c.grad_norm)}

    def _draw(self, rng: Rng, batch_size: int, steps: int) -> dict[str, Tensor]:
        n = self.num_seeds
        return {
            "timesteps": integers(rng, n, steps, self.config.diffusion_steps, (batch_size,)),
            "noise": normals(rng, n, steps, (batch_size, self.action_dim)),
        }

    # --- The update -------------------------------------------------------------------------------------

    def gradient_step(self, batch: Batch, draws: Draws, step: int) -> dict[str, Tensor]:
        loss, metrics = self.policy_loss(batch, draws)
        metrics["actor_grad_norm"] = self.optimizers["actor"].step(self.actor.parameters.gradient(loss))
        return metrics

    def policy_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """The denoising loss of the data's actions [S]."""
        loss = self.diffusion.loss(self.actor, batch["actions"], batch["states"], draws["timesteps"], draws["noise"])
        return loss, {"bc_loss": loss.detach()}

    # --- Acting -----------------------------------------------------------------------------------------

    def act_draws(self, rng: Rng, states: int) -> dict[str, Tensor]:
        shape = (states, self.config.diffusion_steps, self.action_dim)
        return {"noise": normals(rng, self.num_seeds, 1, shape)[0]}

    def actions_for(self, states: Tensor, noise: Mapping[str, Tensor]) -> Tensor:
        """One sample of the policy a state: there is no critic to choose by."""
        return self.diffusion.sample(self.actor, states, noise["noise"].transpose(1, 2))

    # --- Published names --------------------------------------------------------------------------------

    def load_published(self, networks: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Weights as the published code saves them (`actor`).

        Raises ValueError for missing or misshapen weights, or a policy of another schedule.
        """
        actor = policy_weights(required(networks, "actor"), self.diffusion.betas)
        for seed in range(self.num_seeds):
            self.actor.parameters.load_member(seed, actor)

    def published_state(self) -> list[dict[str, Any]]:
        """One dict a seed: `actor` by published names."""
        return [{"actor": self.actor.parameters.member_state(seed)} for seed in range(self.num_seeds)]
