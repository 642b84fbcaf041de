"""IDQL: implicit diffusion Q-learning (Hansen-Estruch et al. 2023, arXiv 2304.10573), as published.

    min_phi    E || eps - eps_phi(a^i, s, i) ||^2                          a diffusion model of the data's policy mu
    min_psi    E[ L2^expectile(min Q'(s, a) - V_psi(s)) ]                  critics as in implicit Q-learning
    min_theta  E[ (r + discount V(s') - Q_theta(s, a))^2 ]

V solves the expectile's equation for the policy proportional to mu(a | s) |expectile - 1(Q(s, a) < V(s))|. That
implicit policy is sampled by weighting candidates from the diffusion model, or the best candidate is taken, as the
official evaluation does. The official code (philippe-eecs/IDQL) has two versions, see `--idql_version`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from agents.parts.agent import Agent, Batch, Draws, Outcome
from agents.parts.critics import TwinCritic, ValueNetwork
from agents.parts.diffusion import ResidualDiffusionPolicy
from agents.parts.draws import Rng, candidates_best, candidates_softmax, exponentials, integers, keep_masks, normals
from agents.parts.layers import ACTIVATIONS
from agents.parts.losses import expectile_loss, implicit_policy_weights, td_target, twin_error
from agents.parts.parameters import xavier_init

LAYERS = 2  # hidden layers of Q and V


class IDQL(Agent):
    """The agent of `--algo idql`; `config` is a `hyperparameters.IDQLConfig`."""

    METRICS = (
        "bc_loss", "value_loss", "critic_loss", "q_mean",
        "actor_grad_norm", "value_grad_norm", "critic_grad_norm",
    )  # fmt: skip
    COMPILED = ("policy_loss", "value_loss", "critic_loss")

    def build(self) -> None:
        c, widths = self.config, [self.config.hidden_dim] * LAYERS
        size = (c.diffusion_steps, c.hidden_dim, c.residual_blocks, c.dropout, c.time_frequencies)
        policy = ResidualDiffusionPolicy(self.sizes, c.beta_schedule, *size, ACTIVATIONS[c.activation])
        critic = TwinCritic(self.sizes, widths, torch.relu)
        value = ValueNetwork(self.sizes, widths, torch.relu, norm=c.value_norm)
        self.actor = self.learn("actor", policy, c.learning_rate, weight_decay=c.weight_decay)
        self.critic = self.learn("critic", critic, c.critic_learning_rate, xavier_init)
        self.value = self.learn("value", value, c.critic_learning_rate, xavier_init, published="critic")
        self.ema = self.average_of("ema", self.actor, c.ema_decay)
        self.critic_target = self.average_of("critic_target", self.critic, 1 - c.tau)
        self.decay_every_step("actor")  # the critics' rates stay

    def _draw(self, rng: Rng, batch_size: int, steps: int) -> dict[str, Tensor]:
        c, n = self.config, self.num_seeds
        drawn = {
            "timesteps": integers(rng, n, steps, c.diffusion_steps, (batch_size,)),
            "noise": normals(rng, n, steps, (batch_size, self.action_dim)),
        }
        if c.dropout > 0:
            drawn["kept"] = keep_masks(rng, n, steps, c.dropout, (batch_size, c.residual_blocks * c.hidden_dim))
        return drawn

    # --- The update -------------------------------------------------------------------------------------

    def gradient_step(self, batch: Batch, draws: Draws, step: int) -> dict[str, Tensor]:
        self.decay_rates()
        metrics = self.descend("actor", self.policy_loss(batch, draws))
        self.ema.follow(self.actor)
        if self.config.empty_step:
            self.optimizers["actor"].step(torch.zeros_like(self.actor.parameters.flat))
            self.ema.follow(self.actor)
        rows = {name: value[:, : self.config.critic_batch_size] for name, value in batch.items()}
        metrics |= self.descend("value", self.value_loss(rows, draws))
        metrics |= self.descend("critic", self.critic_loss(rows, draws))
        self.critic_target.follow(self.critic)
        return metrics

    def policy_loss(self, batch: Batch, draws: Draws) -> Outcome:
        """The denoising loss of the data's actions, summed over an action's dimensions as published [S]."""
        noise, kept = draws["noise"], draws.get("kept")
        loss = self.actor.loss(batch["actions"], batch["states"], draws["timesteps"], noise, kept) * self.action_dim
        return loss, {"bc_loss": loss.detach()}

    def value_loss(self, batch: Batch, draws: Draws) -> Outcome:
        """Expectile loss of min Q' - V [S]."""
        q = self.critic_target(batch["states"], batch["actions"]).amin(dim=1)
        loss = expectile_loss(q - self.value(batch["states"]), self.config.expectile).mean(dim=1)
        return loss, {"value_loss": loss.detach()}

    def critic_loss(self, batch: Batch, draws: Draws) -> Outcome:
        """Both critics' squared errors against r + discount V(s') [S]."""
        with torch.no_grad():
            target = td_target(batch, self.config.discount, self.value(batch["next_states"]))
        loss = twin_error(self.critic(batch["states"], batch["actions"]), target)
        return loss, {"critic_loss": loss.detach(), "q_mean": target.mean(dim=1)}

    # --- Acting -----------------------------------------------------------------------------------------

    def act_draws(self, rng: Rng, states: int) -> dict[str, Tensor]:
        c, n = self.config, self.num_seeds
        shape = (states, c.diffusion_steps, c.action_candidates, self.action_dim)
        noise = {"noise": normals(rng, n, 1, shape)[0]}
        if not c.greedy_action:
            noise["exponential"] = exponentials(rng, n, (states, c.action_candidates))
        return noise

    def actions_for(self, states: Tensor, noise: Mapping[str, Tensor]) -> Tensor:
        """Of `action_candidates` actions from the averaged diffusion model the best, or one by the implicit policy."""
        actions = self.ema.candidates(states, noise["noise"])
        values = self.critic_target(states, actions.flatten(1, 2)).amin(dim=1).view(actions.shape[:3])
        if self.config.greedy_action:
            return candidates_best(values, actions)
        weights = implicit_policy_weights(values - self.value(states).unsqueeze(2), self.config.expectile)
        return candidates_softmax(weights.log(), actions, noise["exponential"])
