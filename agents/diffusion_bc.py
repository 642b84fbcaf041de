"""Diffusion behaviour cloning: the denoising loss alone (the "bc" option of Diffusion-QL's code), as published.

    min_theta  L_d(theta) = E || eps - eps_theta(sqrt(alpha-bar_i) a + sqrt(1 - alpha-bar_i) eps, s, i) ||^2

The smallest agent here: a network, an optimiser, the numbers an update draws, the update, and how to act. The page on
adding an algorithm in docs/ walks through it.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from agents.parts.agent import Agent, Batch, Draws, Outcome
from agents.parts.diffusion import DiffusionPolicy
from agents.parts.draws import Rng, integers, normals


class DiffusionBC(Agent):
    """The agent of `--algo diffusion_bc`; `config` is a `hyperparameters.DiffusionBCConfig`."""

    METRICS = ("bc_loss", "actor_grad_norm")
    COMPILED = ("policy_loss",)

    def build(self) -> None:
        c = self.config
        policy = DiffusionPolicy(self.sizes, c.beta_schedule, c.diffusion_steps, c.hidden_dim)
        self.actor = self.learn("actor", policy, c.learning_rate)

    def _draw(self, rng: Rng, batch_size: int, steps: int) -> dict[str, Tensor]:
        n = self.num_seeds
        return {
            "timesteps": integers(rng, n, steps, self.config.diffusion_steps, (batch_size,)),
            "noise": normals(rng, n, steps, (batch_size, self.action_dim)),
        }

    # --- The update -------------------------------------------------------------------------------------

    def gradient_step(self, batch: Batch, draws: Draws, step: int) -> dict[str, Tensor]:
        return self.descend("actor", self.policy_loss(batch, draws))

    def policy_loss(self, batch: Batch, draws: Draws) -> Outcome:
        """The denoising loss of the data's actions [S]."""
        loss = self.actor.loss(batch["actions"], batch["states"], draws["timesteps"], draws["noise"])
        return loss, {"bc_loss": loss.detach()}

    # --- Acting -----------------------------------------------------------------------------------------

    def act_draws(self, rng: Rng, states: int) -> dict[str, Tensor]:
        shape = (states, self.config.diffusion_steps, self.action_dim)
        return {"noise": normals(rng, self.num_seeds, 1, shape)[0]}

    def actions_for(self, states: Tensor, noise: Mapping[str, Tensor]) -> Tensor:
        """One sample of the policy per state: there is no critic to choose by."""
        return self.actor.sample(states, noise["noise"].transpose(1, 2))
