"""DTQL: diffusion trusted Q-learning (Chen et al. 2024, arXiv 2405.19690), as published.

    min_phi    L(phi; a ~ data)                            the behaviour policy: a denoiser
    min_theta  alpha L(phi; a ~ policy) - E[min Q(s, a)] - gamma E[log policy(a | s)]      the one-step policy

The second L is the trust region: what the denoiser would send elsewhere lies outside of the data. Q and V are learnt
as in implicit Q-learning, without the policy. Gradient steps are counted from the published training loop's first
update; the pretraining before it, of denoiser and critics alone, has the negative numbers from `first_step` on.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from agents.parts.agent import Agent, Batch, Draws, Outcome
from agents.parts.critics import TwinCritic, ValueNetwork
from agents.parts.draws import Rng, candidates_softmax, exponentials, normals
from agents.parts.edm import EDM, EDMPolicy
from agents.parts.losses import expectile_loss, td_target, twin_error
from agents.parts.parameters import orthogonal_init
from agents.parts.policies import TanhGaussian

PRETRAINING, TRAINING = 0, 1  # phases


class DTQL(Agent):
    """The agent of `--algo dtql`; `config` is a `hyperparameters.DTQLConfig`."""

    METRICS = (
        "bc_loss", "distill_loss", "q_loss", "gamma_loss", "actor_loss", "critic_loss", "q_mean",
        "bc_grad_norm", "actor_grad_norm", "critic_grad_norm",
    )  # fmt: skip
    COMPILED = ("critic_loss", "behaviour_loss", "policy_loss")

    def build(self) -> None:
        c, widths = self.config, [self.config.hidden_dim] * 3
        self.edm = EDM(c.sigma_min, c.sigma_max, c.sigma_data, c.clip_denoised)
        self.critic = self.learn("critic", TwinCritic(self.sizes, widths, norm=True), c.critic_learning_rate)
        self.value = self.learn("value", ValueNetwork(self.sizes, widths), c.critic_learning_rate, published="critic")
        denoiser = EDMPolicy(self.sizes, self.edm, c.hidden_dim)
        self.bc = self.learn("bc", denoiser, c.learning_rate, published="bc_actor")
        policy = TanhGaussian(self.sizes, widths)
        self.actor = self.learn("actor", policy, c.learning_rate, orthogonal_init, published="distill_actor")
        self.critic_target = self.average_of("critic_target", self.critic, 1 - c.tau)
        self.value_target = self.average_of("value_target", self.value, 1 - c.tau, published="critic_target")
        self.ema = self.average_of("ema", self.actor, c.ema_decay, c.ema_start, published="distill_actor_target")
        self.constant_critic, self.constant_bc = self.critic.frozen(), self.bc.frozen()
        self.decay_every_step("critic", "value", "bc", "actor")  # as published here: of every network

    @property
    def period(self) -> int:
        return self.config.ema_interval

    def phase(self, step: int) -> int:
        return PRETRAINING if step < 0 else TRAINING

    def _draw(self, rng: Rng, batch_size: int, steps: int) -> dict[str, Tensor]:
        n, A = self.num_seeds, self.action_dim
        return {
            "bc_sigma": self.edm.noise_levels(rng, n, steps, (batch_size,)),
            "bc_noise": normals(rng, n, steps, (batch_size, A)),
            "policy_noise": normals(rng, n, steps, (batch_size, A)),
            "distill_sigma": self.edm.noise_levels(rng, n, steps, (batch_size,)),
            "distill_noise": normals(rng, n, steps, (batch_size, A)),
        }

    # --- The update: Algorithm 1 ------------------------------------------------------------------------

    def gradient_step(self, batch: Batch, draws: Draws, step: int) -> dict[str, Tensor]:
        self.decay_rates()
        metrics = self.descend_together({("critic", "value"): self.critic_loss(batch, draws)})
        metrics |= self.descend("bc", self.behaviour_loss(batch, draws))
        if self.phase(step) == PRETRAINING:
            return metrics
        metrics |= self.descend("actor", self.policy_loss(batch, draws))
        if step % self.config.ema_interval == 0:
            self.ema.follow(self.actor)
        self.critic_target.follow(self.critic)
        self.value_target.follow(self.value)
        return metrics

    def critic_loss(self, batch: Batch, draws: Draws) -> Outcome:
        """Expectile loss of min Q - V, and both critics' squared errors against r + gamma V(s') [S]."""
        c, states = self.config, batch["states"]
        with torch.no_grad():
            target = td_target(batch, c.discount, self.value(batch["next_states"]))
        q = self.critic(states, batch["actions"])
        value_loss = expectile_loss(q.detach().amin(dim=1) - self.value(states), c.expectile).mean(dim=1)
        loss = value_loss + twin_error(q, target)
        return loss, {"critic_loss": loss.detach(), "q_mean": target.mean(dim=1)}

    def behaviour_loss(self, batch: Batch, draws: Draws) -> Outcome:
        """The denoising loss of the data's actions [S]."""
        loss = self.bc.loss(batch["actions"], batch["states"], draws["bc_sigma"], draws["bc_noise"])
        return loss, {"bc_loss": loss.detach()}

    def policy_loss(self, batch: Batch, draws: Draws) -> Outcome:
        """alpha times the denoising loss of the policy's own actions - min Q - gamma log-likelihood of the data [S]."""
        c, states, sigma = self.config, batch["states"], draws["distill_sigma"]
        mean, log_std = self.actor(states)
        actions = self.actor.actions(mean, log_std, draws["policy_noise"])
        distill_loss = self.constant_bc.loss(actions, states, sigma, draws["distill_noise"])
        q_loss = -self.constant_critic(states, actions).amin(dim=1).mean(dim=1)
        gamma_loss = torch.zeros_like(q_loss)
        if c.gamma > 0:
            gamma_loss = -self.actor.published_log_likelihood(mean, log_std, batch["actions"]).mean(dim=1)
        loss = c.alpha * distill_loss + q_loss + c.gamma * gamma_loss
        parts = {"distill_loss": distill_loss, "q_loss": q_loss, "gamma_loss": gamma_loss, "actor_loss": loss}
        return loss, {name: part.detach() for name, part in parts.items()}

    # --- Acting -----------------------------------------------------------------------------------------

    def act_draws(self, rng: Rng, states: int) -> dict[str, Tensor]:
        n, candidates = self.num_seeds, self.config.action_candidates
        noise = normals(rng, n, 1, (states, candidates, self.action_dim))[0]
        return {"noise": noise, "exponential": exponentials(rng, n, (states, candidates))}

    def actions_for(self, states: Tensor, noise: Mapping[str, Tensor]) -> Tensor:
        """One of `action_candidates` actions per state, by softmax of the target critics' minimum.

        The published code clips the chosen action to [-1, 1] and scales it to the box once more, which changes
        nothing in D4RL's boxes; it is left out.
        """
        mean, log_std = self.actor(states)
        actions = self.actor.actions(mean, log_std, noise["noise"])
        values = self.critic_target(states, actions.flatten(1, 2)).amin(dim=1)
        return candidates_softmax(values.view(actions.shape[:3]), actions, noise["exponential"])
