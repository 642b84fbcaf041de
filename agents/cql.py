"""CQL(H): conservative Q-learning (Kumar et al. 2020, arXiv 2006.04779) in the form used on D4RL, as published.

    min_Q   sum_i E[(Q_i(s, a) - r - discount min Q'(s', a'))^2] + w E[log sum_a exp Q_i(s, a) - Q_i(s, a_data)]
    max_pi  E[min Q(s, a) - alpha log pi(a | s)],   alpha holds the policy's entropy at -action_dim

w is `min_q_weight`, or with `target_action_gap` >= 0 follows a Lagrange multiplier that holds the bracket there. For
the first `bc_steps` the policy clones the data. Numbers without a name are those of the official code
(aviralkumar2907/CQL, d4rl/rlkit/torch/sac/cql.py), whose order is kept: all gradients are taken before a step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from agents.parts.agent import Agent, Batch, Draws, Outcome
from agents.parts.critics import TwinCritic
from agents.parts.draws import Rng, normals, uniforms
from agents.parts.losses import conservative_gap, td_target
from agents.parts.multiplier import Multiplier
from agents.parts.parameters import rlkit_init
from agents.parts.policies import TanhGaussian

LAYERS = 3  # hidden layers of every network
SAMPLES = 10  # actions per state of each of the three kinds in the sum over actions, and of the max-Q backup
MULTIPLIER_LIMIT = 1e6
CLONING, IMPROVING = 0, 1  # phases


class CQL(Agent):
    """The agent of `--algo cql`; `config` is a `hyperparameters.CQLConfig`."""

    METRICS = (
        "critic_loss", "conservative_loss", "actor_loss", "bc_loss", "alpha", "alpha_prime", "entropy", "q_mean",
        "critic_grad_norm", "actor_grad_norm",
    )  # fmt: skip
    COMPILED = ("critic_loss", "policy_loss", "cloning_loss")

    def build(self) -> None:
        c, widths = self.config, [self.config.hidden_dim] * LAYERS
        actor_init, critic_init = partial(rlkit_init, bound=1e-3), partial(rlkit_init, bound=3e-3)  # their `init_w`
        self.actor = self.learn("actor", TanhGaussian(self.sizes, widths), c.learning_rate, actor_init)
        critic = TwinCritic(self.sizes, widths, torch.relu)
        self.critic = self.learn("critic", critic, c.critic_learning_rate, critic_init)
        self.critic_target = self.average_of("critic_target", self.critic, 1 - c.tau)
        self.constant_critic = self.critic.frozen()
        alpha = Multiplier(self.sizes, log=True, of_log=True)  # the entropy's weight
        self.alpha = self.learn("alpha", alpha, c.learning_rate, published="log_alpha")
        self.lagrange = c.target_action_gap >= 0
        self.alpha_prime = Multiplier(self.sizes, log=True, bounds=(0.0, MULTIPLIER_LIMIT))  # 1 unless it learns
        if self.lagrange:
            self.learn("alpha_prime", self.alpha_prime, c.critic_learning_rate, published="log_alpha_prime")

    def phase(self, step: int) -> int:
        return CLONING if step < self.config.bc_steps else IMPROVING

    def _draw(self, rng: Rng, batch_size: int, steps: int) -> dict[str, Tensor]:
        n, A, many = self.num_seeds, self.action_dim, batch_size * SAMPLES
        backup = many if self.config.max_q_backup else batch_size
        return {
            "next_action_noise": normals(rng, n, steps, (backup, A)),
            "policy_noise": normals(rng, n, steps, (batch_size, A)),
            "random_actions": uniforms(rng, n, steps, (many, A)) * 2 - 1,
            "current_noise": normals(rng, n, steps, (many, A)),
            "next_noise": normals(rng, n, steps, (many, A)),
        }

    # --- The update -------------------------------------------------------------------------------------

    def gradient_step(self, batch: Batch, draws: Draws, step: int) -> dict[str, Tensor]:
        entropy = self.entropy(batch, draws)
        metrics = {"entropy": entropy, "alpha_prime": self.alpha_prime()}  # as the critics' loss has it
        metrics |= self.ascend("alpha", -(entropy + self.action_dim))  # the policy's loss has the new one
        improve = self.cloning_loss if self.phase(step) == CLONING else self.policy_loss
        metrics |= self.descend_together({"actor": improve(batch, draws), "critic": self.critic_loss(batch, draws)})
        if self.lagrange:
            self.ascend("alpha_prime", metrics["conservative_loss"] - self.config.target_action_gap)
        self.critic_target.follow(self.critic)
        return metrics

    @torch.no_grad()
    def entropy(self, batch: Batch, draws: Draws) -> Tensor:
        """An estimate of the policy's entropy from one action per state [S]; alpha holds it at -action_dim."""
        _, log_density = self.actor.sample(*self.actor(batch["states"]), draws["policy_noise"])
        return -log_density.mean(dim=1)

    def policy_loss(self, batch: Batch, draws: Draws) -> Outcome:
        """alpha log pi(a | s) - min Q(s, a), a ~ policy [S]."""
        mean, log_std = self.actor(batch["states"])
        actions, log_density = self.actor.sample(mean, log_std, draws["policy_noise"])
        values = self.constant_critic(batch["states"], actions).amin(dim=1)
        loss = (self.alpha().unsqueeze(1) * log_density - values).mean(dim=1)
        with torch.no_grad():
            likelihood = self.actor.log_density(mean, log_std, batch["actions"])
        return loss, {"actor_loss": loss.detach(), "bc_loss": -likelihood.mean(dim=1)}

    def cloning_loss(self, batch: Batch, draws: Draws) -> Outcome:
        """alpha log pi(a | s) - log pi(a_data | s): the policy's loss of the first `bc_steps` [S]."""
        mean, log_std = self.actor(batch["states"])
        _, log_density = self.actor.sample(mean, log_std, draws["policy_noise"])
        likelihood = self.actor.log_density(mean, log_std, batch["actions"])
        loss = (self.alpha().unsqueeze(1) * log_density - likelihood).mean(dim=1)
        return loss, {"actor_loss": loss.detach(), "bc_loss": -likelihood.detach().mean(dim=1)}

    def critic_loss(self, batch: Batch, draws: Draws) -> Outcome:
        """Both critics' squared errors, and what they give to sampled actions beyond the data's (eq. 4) [S].

        No entropy is backed up (the official code's `deterministic_backup`).
        """
        c, states = self.config, batch["states"]
        target = self.target(batch, draws)
        actions, log_density = self.sampled_actions(batch, draws)
        candidates = torch.cat([batch["actions"].unsqueeze(2), actions], dim=2)  # the data's action first
        q = self.critic(states, candidates.flatten(1, 2)).unflatten(2, (states.shape[1], -1))
        data, sampled = q[..., 0], q[..., 1:]
        errors = (data - target.unsqueeze(1)).square().mean(dim=2)
        conservative = c.min_q_weight * conservative_gap(sampled, log_density.unsqueeze(1), data).mean(dim=2)
        penalty = conservative
        if self.lagrange:
            penalty = self.alpha_prime().unsqueeze(1) * (conservative - c.target_action_gap)
        loss = (errors + penalty).sum(dim=1)
        metrics = {"critic_loss": loss, "conservative_loss": conservative.mean(dim=1), "q_mean": target.mean(dim=1)}
        return loss, {name: value.detach() for name, value in metrics.items()}

    # --- What the critics' loss reads -------------------------------------------------------------------

    @torch.no_grad()
    def target(self, batch: Batch, draws: Draws) -> Tensor:
        """r + discount min Q'(s', a') [S, B]; with `max_q_backup` each critic's best of several a'."""
        next_states = batch["next_states"]
        noise = draws["next_action_noise"].unflatten(1, (next_states.shape[1], -1))
        actions = self.actor.actions(*self.actor(next_states), noise)
        values = self.critic_target(next_states, actions.flatten(1, 2)).unflatten(2, noise.shape[1:3])
        return td_target(batch, self.config.discount, values.amax(dim=3).amin(dim=1))

    @torch.no_grad()
    def sampled_actions(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor]:
        """Uniform actions and the policy's at s' and s: [S, B, 3 R, A] and their log densities [S, B, 3 R].

        The densities are those of a / max_action: of the box [-1, 1]^A.
        """
        rows = (batch["states"].shape[1], -1)
        uniform = draws["random_actions"].unflatten(1, rows)
        kinds = [(uniform * self.max_action, torch.full_like(uniform[..., 0], -self.action_dim * math.log(2)))]
        for states, name in ((batch["next_states"], "next_noise"), (batch["states"], "current_noise")):
            kinds.append(self.actor.sample(*self.actor(states), draws[name].unflatten(1, rows)))
        actions, log_density = zip(*kinds, strict=True)
        return torch.cat(actions, dim=2), torch.cat(log_density, dim=2)

    # --- Acting -----------------------------------------------------------------------------------------

    def act_draws(self, rng: Rng, states: int) -> dict[str, Tensor]:
        return {}

    def actions_for(self, states: Tensor, noise: Mapping[str, Tensor]) -> Tensor:
        """The policy without noise, as published."""
        return self.actor.actions(*self.actor(states))
