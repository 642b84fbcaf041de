"""IDQL: implicit diffusion Q-learning (Hansen-Estruch et al. 2023, arXiv 2304.10573), as published.

    min_phi    E || eps - eps_phi(a^i, s, i) ||^2                          a diffusion model of the data's policy mu
    min_psi    E[ L2^expectile(min Q'(s, a) - V_psi(s)) ]                  critics as in implicit Q-learning
    min_theta  E[ (r + discount V(s') - Q_theta(s, a))^2 ]

V solves the expectile's equation for the policy proportional to mu(a | s) |expectile - 1(Q(s, a) < V(s))|. That
implicit policy is sampled by weighting candidates from the diffusion model, or the best candidate is taken, as the
official evaluation does. Numbers without a name are those of the official code at the version that the paper's scores
come from (philippe-eecs/IDQL 89bb493, jaxrl5/agents/ddpm_iql).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from agents.parts.adam import Adam, cosine_decay
from agents.parts.agent import Agent, Batch, Draws
from agents.parts.critics import TwinCritic, ValueNetwork
from agents.parts.diffusion import Diffusion, ResidualNoiseNetwork
from agents.parts.draws import Rng, candidates_best, candidates_softmax, exponentials, integers, keep_masks, normals
from agents.parts.losses import expectile_loss, implicit_policy_weights
from agents.parts.parameters import average, xavier_init
from agents.parts.published import required

LAYERS = 2  # hidden layers of Q and V


class IDQL(Agent):
    """The agent of `--algo idql`; `config` is a `hyperparameters.IDQLConfig`."""

    METRICS = (
        "bc_loss", "value_loss", "critic_loss", "q_mean",
        "actor_grad_norm", "value_grad_norm", "critic_grad_norm",
    )  # fmt: skip
    COMPILED = ("policy_loss", "value_loss", "critic_loss")

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
        self.diffusion = Diffusion(c.beta_schedule, c.diffusion_steps, self.max_action, on)
        self.actor = ResidualNoiseNetwork(self.sizes, c.diffusion_steps, c.hidden_dim, c.residual_blocks, c.dropout)
        self.critic = TwinCritic(self.sizes, [c.hidden_dim] * LAYERS, torch.relu)
        self.value = ValueNetwork(self.sizes, [c.hidden_dim] * LAYERS, torch.relu)
        generators = self.init_generators()
        self.actor.initialize(generators)
        for network in (self.critic, self.value):
            xavier_init(network.parameters, generators)
        self.ema, self.critic_target = self.actor.averaged(), self.critic.averaged()
        self.clock = torch.zeros((), device=on)
        self.networks = {
            "actor": self.actor.parameters,
            "critic": self.critic.parameters,
            "value": self.value.parameters,
            "ema": self.ema.parameters,
            "critic_target": self.critic_target.parameters,
        }
        self.optimizers = {
            "actor": Adam(self.actor.parameters, n, c.learning_rate, c.grad_norm),
            "critic": Adam(self.critic.parameters, n, c.critic_learning_rate, c.grad_norm),
            "value": Adam(self.value.parameters, n, c.critic_learning_rate, c.grad_norm),
        }

    def schedule(self, step: int) -> tuple[float, ...]:
        """Rate factor of the policy; `lr_decay`'s is computed at every update instead."""
        return (1.0,) if self.config.lr_decay else super().schedule(step)

    def apply_schedule(self, values: tuple[float, ...]) -> None:
        self.optimizers["actor"].set_rate(values[0])  # the critics' rate stays

    def prepare(self) -> None:
        super().prepare()
        if self.config.lr_decay:
            self.clock.fill_(self.step)

    def _draw(self, rng: Rng, batch_size: int, steps: int) -> dict[str, Tensor]:
        c, n = self.config, self.num_seeds
        drawn = {
            "timesteps": integers(rng, n, steps, c.diffusion_steps, (batch_size,)),
            "noise": normals(rng, n, steps, (batch_size, self.action_dim)),
        }
        if c.dropout > 0:
            drawn["kept"] = keep_masks(rng, n, steps, c.dropout, (batch_size, c.residual_blocks * c.hidden_dim))
        return drawn

    # --- The update -----------------------------------------------------------------------------------

    def gradient_step(self, batch: Batch, draws: Draws, step: int) -> dict[str, Tensor]:
        c = self.config
        if c.lr_decay:
            cosine_decay([self.optimizers["actor"]], self.clock, c.num_epochs * c.num_steps_per_epoch)
        loss, metrics = self.policy_loss(batch, draws)
        metrics["actor_grad_norm"] = self.optimizers["actor"].step(self.actor.parameters.gradient(loss))
        average(self.ema.parameters, self.actor.parameters, 1 - c.ema_decay)
        rows = {name: value[:, : c.critic_batch_size] for name, value in batch.items()}
        loss, value_metrics = self.value_loss(rows, draws)
        metrics["value_grad_norm"] = self.optimizers["value"].step(self.value.parameters.gradient(loss))
        loss, critic_metrics = self.critic_loss(rows, draws)
        metrics["critic_grad_norm"] = self.optimizers["critic"].step(self.critic.parameters.gradient(loss))
        average(self.critic_target.parameters, self.critic.parameters, c.tau)
        return metrics | value_metrics | critic_metrics

    def policy_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """The denoising loss of the data's actions, summed over an action's dimensions as published [S]."""
        network = self.actor.dropping(draws["kept"]) if "kept" in draws else self.actor
        loss = self.diffusion.loss(network, batch["actions"], batch["states"], draws["timesteps"], draws["noise"])
        loss = loss * self.action_dim
        return loss, {"bc_loss": loss.detach()}

    def value_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Expectile loss of min Q' - V [S]."""
        q = self.critic_target(batch["states"], batch["actions"]).amin(dim=1)
        loss = expectile_loss(q - self.value(batch["states"]), self.config.expectile).mean(dim=1)
        return loss, {"value_loss": loss.detach()}

    def critic_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Both critics' squared errors against r + discount V(s') [S]."""
        with torch.no_grad():
            bootstrap = self.value(batch["next_states"])
            target = batch["rewards"][..., 0] + self.config.discount * batch["not_dones"][..., 0] * bootstrap
        errors = self.critic(batch["states"], batch["actions"]) - target.unsqueeze(1)
        loss = errors.square().mean(dim=2).sum(dim=1)
        return loss, {"critic_loss": loss.detach(), "q_mean": target.mean(dim=1)}

    # --- Acting ---------------------------------------------------------------------------------------

    def act_draws(self, rng: Rng, states: int) -> dict[str, Tensor]:
        c, n = self.config, self.num_seeds
        shape = (states, c.diffusion_steps, c.action_candidates, self.action_dim)
        noise = {"noise": normals(rng, n, 1, shape)[0]}
        if not c.greedy_action:
            noise["exponential"] = exponentials(rng, n, (states, c.action_candidates))
        return noise

    def actions_for(self, states: Tensor, noise: Mapping[str, Tensor]) -> Tensor:
        """Of `action_candidates` actions from the averaged diffusion model the best, or one by the implicit policy."""
        chain = noise["noise"].transpose(1, 2).flatten(2, 3)  # [S, T, N C, A]
        actions = self.diffusion.ancestral(self.ema, states, chain)
        values = self.critic_target(states, actions).amin(dim=1).unflatten(1, (states.shape[1], -1))
        actions = actions.unflatten(1, (states.shape[1], -1))
        if self.config.greedy_action:
            return candidates_best(values, actions)
        weights = implicit_policy_weights(values - self.value(states).unsqueeze(2), self.config.expectile)
        return candidates_softmax(weights.log(), actions, noise["exponential"])

    # --- Weights by name ------------------------------------------------------------------------------

    def load_published(self, networks: Mapping[str, Mapping[str, Tensor]]) -> None:
        """`actor`, `critic` (with V) and perhaps `ema`, `critic_target`, named as `published_state` names them.

        Missing averages are copied from the online networks. Raises ValueError for missing or misshapen weights.
        """
        actor, critic = required(networks, "actor"), required(networks, "critic")
        for seed in range(self.num_seeds):
            self.actor.parameters.load_member(seed, actor)
            self.ema.parameters.load_member(seed, networks.get("ema", actor))
            self.critic.load_seed(seed, critic)
            self.value.parameters.load_member(seed, critic)
            self.critic_target.load_seed(seed, networks.get("critic_target", critic))

    def published_state(self) -> list[dict[str, Any]]:
        """One dict a seed. The official code is JAX and saves nothing in PyTorch's form: the names are ours."""
        return [
            {
                "actor": self.actor.parameters.member_state(seed),
                "ema": self.ema.parameters.member_state(seed),
                "critic": self.critic.seed_state(seed) | self.value.parameters.member_state(seed),
                "critic_target": self.critic_target.seed_state(seed),
            }
            for seed in range(self.num_seeds)
        ]
