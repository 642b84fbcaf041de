"""CQL(H): conservative Q-learning (Kumar et al. 2020, arXiv 2006.04779) in the form used on D4RL, as published.

    min_Q   sum_i E[(Q_i(s, a) - r - discount min Q'(s', a'))^2] + w E[log sum_a exp Q_i(s, a) - Q_i(s, a_data)]
    max_pi  E[min Q(s, a) - alpha log pi(a | s)],   alpha holds the policy's entropy at -action_dim

w is `min_q_weight`, or with `target_action_gap` >= 0 follows a Lagrange multiplier that holds the bracket there. For
the first `bc_steps` the policy clones the data. Numbers without a name are those of the official code
(aviralkumar2907/CQL, d4rl/rlkit/torch/sac/cql.py), whose order is kept: all gradients are taken before a step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from agents.parts.adam import Adam
from agents.parts.agent import Agent, Batch, Draws
from agents.parts.critics import TwinCritic
from agents.parts.draws import Rng, normals, uniforms
from agents.parts.losses import conservative_gap
from agents.parts.parameters import Parameters, average, default_init, shrink_layer
from agents.parts.policies import TanhGaussian
from agents.parts.published import required

LAYERS = 3  # hidden layers of every network
SAMPLES = 10  # actions a state of each of the three kinds in the sum over actions, and of the max-Q backup
MULTIPLIER_LIMIT = 1e6
CLONING, IMPROVING = 0, 1  # phases


class CQL(Agent):
    """The agent of `--algo cql`; `config` is a `hyperparameters.CQLConfig`."""

    METRICS = (
        "critic_loss", "conservative_loss", "actor_loss", "bc_loss", "alpha", "alpha_prime", "entropy", "q_mean",
        "critic_grad_norm", "actor_grad_norm",
    )  # fmt: skip
    COMPILED = ("critic_loss", "policy_loss", "cloning_loss")

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
        c, n, on = config, self.num_seeds, self.device
        self.actor = TanhGaussian(self.sizes, [c.hidden_dim] * LAYERS)
        self.critic = TwinCritic(self.sizes, [c.hidden_dim] * LAYERS, torch.relu)
        generators = self.init_generators()
        for network in (self.actor, self.critic):
            default_init(network.parameters, generators)
        shrink_layer(self.actor.parameters, "net.6", 1e-3)  # policies.py: init_w
        shrink_layer(self.critic.parameters, "6", 3e-3)  # rlkit's networks
        self.critic_target, self.constant_critic = self.critic.averaged(), self.critic.frozen()
        self.temperature = Parameters({"log_alpha": ()}, n, on, trainable=False)
        self.networks = {
            "actor": self.actor.parameters,
            "critic": self.critic.parameters,
            "critic_target": self.critic_target.parameters,
            "temperature": self.temperature,
        }
        self.optimizers = {
            "actor": Adam(self.actor.parameters, n, c.learning_rate, c.grad_norm),
            "critic": Adam(self.critic.parameters, n, c.critic_learning_rate, c.grad_norm),
            "temperature": Adam(self.temperature, n, c.learning_rate, c.grad_norm),
        }
        self.lagrange = c.target_action_gap >= 0
        if self.lagrange:
            self.multiplier = Parameters({"log_alpha_prime": ()}, n, on, trainable=False)
            self.networks["multiplier"] = self.multiplier
            self.optimizers["multiplier"] = Adam(self.multiplier, n, c.critic_learning_rate, c.grad_norm)

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

    # --- The update -----------------------------------------------------------------------------------

    def gradient_step(self, batch: Batch, draws: Draws, step: int) -> dict[str, Tensor]:
        metrics = {"entropy": self._step_temperature(batch, draws), "alpha": self.alpha()}
        improve = self.cloning_loss if self.phase(step) == CLONING else self.policy_loss
        loss, policy_metrics = improve(batch, draws)
        actor_gradient = self.actor.parameters.gradient(loss)
        metrics["alpha_prime"] = self.alpha_prime()
        loss, critic_metrics = self.critic_loss(batch, draws)
        critic_gradient = self.critic.parameters.gradient(loss)
        if self.lagrange:
            self._step_multiplier(critic_metrics["conservative_loss"])
        metrics["actor_grad_norm"] = self.optimizers["actor"].step(actor_gradient)
        metrics["critic_grad_norm"] = self.optimizers["critic"].step(critic_gradient)
        average(self.critic_target.parameters, self.critic.parameters, self.config.tau)
        return metrics | policy_metrics | critic_metrics

    def critic_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Both critics' squared errors, and what they give to sampled actions beyond the data's (eq. 4) [S].

        No entropy is backed up (the official code's `deterministic_backup`).
        """
        c, states = self.config, batch["states"]
        target = self._target(batch, draws)
        actions, log_density = self._sampled_actions(batch, draws)
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

    @torch.no_grad()
    def _target(self, batch: Batch, draws: Draws) -> Tensor:
        """r + discount min Q'(s', a') [S, B]; with `max_q_backup` each critic's best of several a'."""
        c, next_states = self.config, batch["next_states"]
        noise = draws["next_action_noise"].unflatten(1, (next_states.shape[1], -1))
        actions, _ = self._policy_actions(next_states, noise)
        values = self.critic_target(next_states, actions.flatten(1, 2)).unflatten(2, noise.shape[1:3])
        bootstrap = values.amax(dim=3).amin(dim=1)
        return batch["rewards"][..., 0] + c.discount * batch["not_dones"][..., 0] * bootstrap

    @torch.no_grad()
    def _sampled_actions(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor]:
        """Uniform actions and the policy's at s and s': [S, B, 3 R, A] and their log densities [S, B, 3 R].

        The densities are those of a / max_action: of the box [-1, 1]^A.
        """
        rows = batch["states"].shape[1]
        uniform = draws["random_actions"].unflatten(1, (rows, -1))
        kinds = [(uniform * self.max_action, torch.full_like(uniform[..., 0], -self.action_dim * math.log(2)))]
        for states, name in ((batch["next_states"], "next_noise"), (batch["states"], "current_noise")):
            kinds.append(self._policy_actions(states, draws[name].unflatten(1, (rows, -1))))
        actions, log_density = zip(*kinds, strict=True)
        return torch.cat(actions, dim=2), torch.cat(log_density, dim=2)

    def _policy_actions(self, states: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """R actions a state and their log densities: noise [S, B, R, A] -> [S, B, R, A], [S, B, R]."""
        mean, log_std = self.actor(states)
        return self.actor.sample(mean.unsqueeze(2), log_std.unsqueeze(2), noise)

    def policy_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """alpha log pi(a | s) - min Q(s, a), a ~ policy [S]."""
        mean, log_std = self.actor(batch["states"])
        actions, log_density = self.actor.sample(mean, log_std, draws["policy_noise"])
        values = self.constant_critic(batch["states"], actions).amin(dim=1)
        loss = (self.alpha().unsqueeze(1) * log_density - values).mean(dim=1)
        with torch.no_grad():
            likelihood = self.actor.log_density(mean, log_std, batch["actions"])
        return loss, {"actor_loss": loss.detach(), "bc_loss": -likelihood.mean(dim=1)}

    def cloning_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """alpha log pi(a | s) - log pi(a_data | s): the policy's loss of the first `bc_steps` [S]."""
        mean, log_std = self.actor(batch["states"])
        _, log_density = self.actor.sample(mean, log_std, draws["policy_noise"])
        likelihood = self.actor.log_density(mean, log_std, batch["actions"])
        loss = (self.alpha().unsqueeze(1) * log_density - likelihood).mean(dim=1)
        return loss, {"actor_loss": loss.detach(), "bc_loss": -likelihood.detach().mean(dim=1)}

    def alpha(self) -> Tensor:
        """The entropy's weight [S]."""
        return self.temperature.flat[:, 0].exp()

    def alpha_prime(self) -> Tensor:
        """The Lagrange multiplier [S]; 1 where there is none."""
        if not self.lagrange:
            return torch.ones(self.num_seeds, device=self.device)
        return self.multiplier.flat[:, 0].exp().clamp(max=MULTIPLIER_LIMIT)

    @torch.no_grad()
    def _step_temperature(self, batch: Batch, draws: Draws) -> Tensor:
        """Adam on -log alpha (log pi + target entropy), whose derivative is the policy's lack of entropy, -A wanted.

        Returns the entropy [S]; the policy's loss uses the new alpha.
        """
        _, log_density = self.actor.sample(*self.actor(batch["states"]), draws["policy_noise"])
        entropy = -log_density.mean(dim=1)
        self.optimizers["temperature"].step((entropy + self.action_dim).unsqueeze(1))
        return entropy

    def _step_multiplier(self, conservative: Tensor) -> None:
        """Adam on -alpha' (conservative term - gap), by log alpha': it grows while the term lies above the gap."""
        slope = self.alpha_prime() * (self.multiplier.flat[:, 0].exp() < MULTIPLIER_LIMIT)
        gradient = -slope * (conservative - self.config.target_action_gap)
        self.optimizers["multiplier"].step(gradient.unsqueeze(1))

    # --- Acting ---------------------------------------------------------------------------------------

    def act_draws(self, rng: Rng, states: int) -> dict[str, Tensor]:
        return {}

    def actions_for(self, states: Tensor, noise: Mapping[str, Tensor]) -> Tensor:
        """The policy without noise, as published."""
        mean, _ = self.actor(states)
        return torch.tanh(mean) * self.max_action

    # --- Weights by name ------------------------------------------------------------------------------

    def load_published(self, networks: Mapping[str, Mapping[str, Tensor]]) -> None:
        """`actor`, `critic` and perhaps `critic_target`, `temperature`, named as `published_state` names them.

        A missing average is copied from the critics. Raises ValueError for missing or misshapen weights.
        """
        actor, critic = required(networks, "actor"), required(networks, "critic")
        for seed in range(self.num_seeds):
            self.actor.parameters.load_member(seed, actor)
            self.critic.load_seed(seed, critic)
            self.critic_target.load_seed(seed, networks.get("critic_target", critic))
            for name in ("temperature", "multiplier"):
                if name in networks and name in self.networks:
                    self.networks[name].load_member(seed, networks[name])

    def published_state(self) -> list[dict[str, Any]]:
        """One dict a seed. The official code pickles whole modules: the names are ours."""
        return [
            {
                "actor": self.actor.parameters.member_state(seed),
                "critic": self.critic.seed_state(seed),
                "critic_target": self.critic_target.seed_state(seed),
                **{n: self.networks[n].member_state(seed) for n in ("temperature", "multiplier") if n in self.networks},
            }
            for seed in range(self.num_seeds)
        ]
