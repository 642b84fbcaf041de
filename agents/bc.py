"""Behaviour cloning with a Gaussian: the policy that makes the data's actions most likely.

    max_theta  E[log N(a; tanh f_theta(s), exp g_theta(s))]      over the data's (s, a), actions divided by the box

The deviation depends on the state, so the policy says how sure it is; but one Gaussian has one mode: where the data
have several actions for a state, it covers what lies between them. Evaluated by its mean, unless `sample_actions`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from agents.parts.agent import Agent, Batch, Draws, Outcome
from agents.parts.draws import Rng, normals
from agents.parts.policies import BoxGaussian


class BC(Agent):
    """The agent of `--algo bc`; `config` is a `hyperparameters.BCConfig`."""

    METRICS = ("bc_loss", "mse", "actor_grad_norm")
    COMPILED = ("policy_loss",)

    def build(self) -> None:
        c = self.config
        self.actor = self.learn("actor", BoxGaussian(self.sizes, [c.hidden_dim] * 2), c.learning_rate)

    def _draw(self, rng: Rng, batch_size: int, steps: int) -> dict[str, Tensor]:
        return {}  # maximum likelihood needs no random numbers beside the batch

    # --- The update -------------------------------------------------------------------------------------

    def gradient_step(self, batch: Batch, draws: Draws, step: int) -> dict[str, Tensor]:
        return self.descend("actor", self.policy_loss(batch, draws))

    def policy_loss(self, batch: Batch, draws: Draws) -> Outcome:
        """The negative log-likelihood of the data's actions; also their squared distance from the mean [S]."""
        mean, log_std = self.actor(batch["states"])
        loss = -self.actor.log_density(mean, log_std, batch["actions"]).mean(dim=1)
        mse = (self.actor.actions(mean, log_std) - batch["actions"]).square().mean(dim=(1, 2))
        return loss, {"bc_loss": loss.detach(), "mse": mse.detach()}

    # --- Acting -----------------------------------------------------------------------------------------

    def act_draws(self, rng: Rng, states: int) -> dict[str, Tensor]:
        return {"noise": normals(rng, self.num_seeds, 1, (states, self.action_dim))[0]}

    def actions_for(self, states: Tensor, noise: Mapping[str, Tensor]) -> Tensor:
        """The policy's mean, or with `sample_actions` a sample of it."""
        return self.actor.actions(*self.actor(states), noise["noise"] if self.config.sample_actions else None)
