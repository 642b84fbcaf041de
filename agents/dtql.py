"""DTQL: diffusion trusted Q-learning (Chen et al. 2024, arXiv 2405.19690), as published.

    min_phi    L(phi; a ~ data)                            the behaviour policy: a denoiser
    min_theta  alpha L(phi; a ~ policy) - E[min Q(s, a)] - gamma E[log policy(a | s)]      the one-step policy

The second L is the trust region: what the denoiser would send elsewhere lies outside of the data. Q and V are learnt
as in implicit Q-learning, without the policy. Gradient steps are counted from the published training loop's first
update; the pretraining before it, of denoiser and critics alone, has the negative numbers from `first_step` on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from agents.parts.adam import Adam, cosine_decay, learning_rate_factor
from agents.parts.agent import Agent, Batch, Draws
from agents.parts.critics import TwinCritic, ValueNetwork
from agents.parts.draws import Rng, candidates_softmax, exponentials, normals
from agents.parts.edm import EDM, EDMNetwork
from agents.parts.losses import expectile_loss
from agents.parts.parameters import average, default_init, gradients, orthogonal_init
from agents.parts.policies import TanhGaussian
from agents.parts.published import required

PRETRAINING, TRAINING = 0, 1  # phases


class DTQL(Agent):
    """The agent of `--algo dtql`; `config` is a `hyperparameters.DTQLConfig`."""

    METRICS = (
        "bc_loss", "distill_loss", "q_loss", "gamma_loss", "actor_loss", "critic_loss", "q_mean",
        "bc_grad_norm", "actor_grad_norm", "critic_grad_norm",
    )  # fmt: skip
    COMPILED = ("critic_loss", "behaviour_loss", "policy_loss")

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
        self.edm = EDM(c.sigma_min, c.sigma_max, c.sigma_data, c.clip_denoised)
        self.critic = TwinCritic(self.sizes, [c.hidden_dim] * 3, norm=True)
        self.value = ValueNetwork(self.sizes, [c.hidden_dim] * 3)
        self.bc_actor = EDMNetwork(self.sizes, c.hidden_dim)
        self.distill_actor = TanhGaussian(self.sizes, [c.hidden_dim] * 3)
        generators = self.init_generators()
        for network in (self.critic, self.value, self.bc_actor):
            default_init(network.parameters, generators)
        orthogonal_init(self.distill_actor.parameters, generators)
        self.critic_target, self.value_target = self.critic.averaged(), self.value.averaged()
        self.distill_actor_target = self.distill_actor.averaged()
        self.constant_critic, self.constant_bc_actor = self.critic.frozen(), self.bc_actor.frozen()
        self.ema_weight = torch.zeros((), device=self.device)
        self.clock = torch.zeros((), device=self.device)
        self.networks = {
            "critic": self.critic.parameters,
            "value": self.value.parameters,
            "bc_actor": self.bc_actor.parameters,
            "distill_actor": self.distill_actor.parameters,
            "critic_target": self.critic_target.parameters,
            "value_target": self.value_target.parameters,
            "distill_actor_target": self.distill_actor_target.parameters,
        }
        rates = {"critic": c.critic_learning_rate, "value": c.critic_learning_rate}
        self.optimizers = {
            name: Adam(self.networks[name], n, rates.get(name, c.learning_rate), c.grad_norm)
            for name in ("critic", "value", "bc_actor", "distill_actor")
        }

    @property
    def first_step(self) -> int:
        return -self.config.pretrain_epochs * self.config.num_steps_per_epoch

    @property
    def period(self) -> int:
        return self.config.ema_interval

    def phase(self, step: int) -> int:
        return PRETRAINING if step < 0 else TRAINING

    def schedule(self, step: int) -> tuple[float, ...]:
        """Rate factor but for `lr_decay`'s, and the weight of the policy's average: 0 until `ema_start`."""
        factor = 1.0 if self.config.lr_decay else learning_rate_factor(self.config, max(step, 0))
        return factor, 1 - self.config.ema_decay if step >= self.config.ema_start else 0.0

    def apply_schedule(self, values: tuple[float, ...]) -> None:
        super().apply_schedule(values)
        self.ema_weight.fill_(values[1])

    def prepare(self) -> None:
        super().prepare()
        if self.config.lr_decay:
            self.clock.fill_(self.step)

    def _draw(self, rng: Rng, batch_size: int, steps: int) -> dict[str, Tensor]:
        n, A = self.num_seeds, self.action_dim
        return {
            "bc_sigma": self.edm.noise_levels(rng, n, steps, (batch_size,)),
            "bc_noise": normals(rng, n, steps, (batch_size, A)),
            "policy_noise": normals(rng, n, steps, (batch_size, A)),
            "distill_sigma": self.edm.noise_levels(rng, n, steps, (batch_size,)),
            "distill_noise": normals(rng, n, steps, (batch_size, A)),
        }

    # --- The update: Algorithm 1 ----------------------------------------------------------------------

    def gradient_step(self, batch: Batch, draws: Draws, step: int) -> dict[str, Tensor]:
        c = self.config
        if c.lr_decay:  # as published here: stepped at every update after the pretraining, of every network
            cosine_decay(self.optimizers.values(), self.clock, c.num_epochs * c.num_steps_per_epoch)
        loss, metrics = self.critic_loss(batch, draws)
        critic, value = gradients(loss, [self.critic.parameters, self.value.parameters])
        metrics["critic_grad_norm"] = self.optimizers["critic"].step(critic)
        self.optimizers["value"].step(value)
        loss, behaviour_metrics = self.behaviour_loss(batch, draws)
        metrics["bc_grad_norm"] = self.optimizers["bc_actor"].step(self.bc_actor.parameters.gradient(loss))
        metrics |= behaviour_metrics
        if self.phase(step) == PRETRAINING:
            return metrics
        loss, policy_metrics = self.policy_loss(batch, draws)
        gradient = self.distill_actor.parameters.gradient(loss)
        metrics["actor_grad_norm"] = self.optimizers["distill_actor"].step(gradient)
        if step % c.ema_interval == 0:
            average(self.distill_actor_target.parameters, self.distill_actor.parameters, self.ema_weight)
        average(self.critic_target.parameters, self.critic.parameters, c.tau)
        average(self.value_target.parameters, self.value.parameters, c.tau)
        return metrics | policy_metrics

    def critic_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Expectile loss of min Q - V, and both critics' squared errors against r + gamma V(s') [S]."""
        c, states = self.config, batch["states"]
        with torch.no_grad():
            bootstrap = self.value(batch["next_states"])
            target = batch["rewards"][..., 0] + c.discount * batch["not_dones"][..., 0] * bootstrap
        q = self.critic(states, batch["actions"])
        value_loss = expectile_loss(q.detach().amin(dim=1) - self.value(states), c.expectile).mean(dim=1)
        loss = value_loss + (q - target.unsqueeze(1)).square().mean(dim=2).sum(dim=1)
        return loss, {"critic_loss": loss.detach(), "q_mean": target.mean(dim=1)}

    def behaviour_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """The denoising loss of the data's actions [S]."""
        loss = self.edm.loss(self.bc_actor, batch["actions"], batch["states"], draws["bc_sigma"], draws["bc_noise"])
        return loss, {"bc_loss": loss.detach()}

    def policy_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """alpha times the denoising loss of the policy's own actions - min Q - gamma log-likelihood of the data [S]."""
        c, states, sigma = self.config, batch["states"], draws["distill_sigma"]
        mean, log_std = self.distill_actor(states)
        actions = self.distill_actor.actions(mean, log_std, draws["policy_noise"])
        distill_loss = self.edm.loss(self.constant_bc_actor, actions, states, sigma, draws["distill_noise"])
        q_loss = -self.constant_critic(states, actions).amin(dim=1).mean(dim=1)
        gamma_loss = torch.zeros_like(q_loss)
        if c.gamma > 0:
            gamma_loss = -self.distill_actor.published_log_likelihood(mean, log_std, batch["actions"]).mean(dim=1)
        loss = c.alpha * distill_loss + q_loss + c.gamma * gamma_loss
        parts = {"distill_loss": distill_loss, "q_loss": q_loss, "gamma_loss": gamma_loss, "actor_loss": loss}
        return loss, {name: part.detach() for name, part in parts.items()}

    # --- Acting ---------------------------------------------------------------------------------------

    def act_draws(self, rng: Rng, states: int) -> dict[str, Tensor]:
        n, candidates = self.num_seeds, self.config.action_candidates
        noise = normals(rng, n, 1, (states, candidates, self.action_dim))[0]
        return {"noise": noise, "exponential": exponentials(rng, n, (states, candidates))}

    def actions_for(self, states: Tensor, noise: Mapping[str, Tensor]) -> Tensor:
        """One of `action_candidates` actions a state, by softmax of the target critics' minimum.

        The published code clips the chosen action to [-1, 1] and scales it to the box once more, which changes
        nothing in D4RL's boxes; it is left out.
        """
        mean, log_std = self.distill_actor(states)
        actions = self.distill_actor.actions(mean.unsqueeze(2), log_std.unsqueeze(2), noise["noise"])
        values = self.critic_target(states, actions.flatten(1, 2)).amin(dim=1)
        return candidates_softmax(values.view(actions.shape[:3]), actions, noise["exponential"])

    # --- Published names ------------------------------------------------------------------------------

    def load_published(self, networks: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Weights as the published code saves them: `critic` (with V), `bc_actor`, `distill_actor`.

        Missing averages (`critic_target`, `distill_actor_target`) are copied from the online networks. Raises
        ValueError for missing or misshapen weights.
        """
        critic, actor = required(networks, "critic"), required(networks, "distill_actor")
        target = networks.get("critic_target", critic)
        for seed in range(self.num_seeds):
            self.critic.load_seed(seed, critic)
            self.value.parameters.load_member(seed, critic)
            self.critic_target.load_seed(seed, target)
            self.value_target.parameters.load_member(seed, target)
            self.bc_actor.parameters.load_member(seed, required(networks, "bc_actor"))
            self.distill_actor.parameters.load_member(seed, actor)
            average_actor = networks.get("distill_actor_target", actor)
            self.distill_actor_target.parameters.load_member(seed, average_actor)

    def published_state(self) -> list[dict[str, Any]]:
        """One dict a seed: `critic`, `critic_target`, `bc_actor`, `distill_actor`, `distill_actor_target`."""
        return [
            {
                "critic": self.critic.seed_state(seed) | self.value.parameters.member_state(seed),
                "critic_target": self.critic_target.seed_state(seed) | self.value_target.parameters.member_state(seed),
                "bc_actor": self.bc_actor.parameters.member_state(seed),
                "distill_actor": self.distill_actor.parameters.member_state(seed),
                "distill_actor_target": self.distill_actor_target.parameters.member_state(seed),
            }
            for seed in range(self.num_seeds)
        ]
