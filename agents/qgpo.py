"""QGPO: Q-guided policy optimisation by contrastive energy prediction (Lu et al. 2023, arXiv 2304.12824).

    pi(a | s)  proportional to  mu(a | s) exp(beta Q(s, a)),      mu: a diffusion model of the data's actions
    Q <- r + gamma sum_j softmax_j(beta_q Q(s', a'_j)) Q(s', a'_j)                       in-support softmax backup
    f <- min -E_t sum_i softmax_i(beta Q(s, a_i)) log softmax_i(f(a_i^t, s, t))          in-support contrastive loss

a_i, a'_j are the support actions: `support_actions` samples of mu for every state of the data, drawn once. The loss'
optimum is the energy of the diffused actions up to a constant, log E[exp(beta Q(s, a)) | a^t], so that sampling mu with
`guidance_scale` times its gradient added to the score draws from pi where the scale is 1.

As in the official code (ChenDRAG/CEP-energy-guided-diffusion) mu is trained first, in steps with negative numbers and
whole batches; Q and f learn from the first `critic_batch_size` rows of a batch, and after `critic_epochs` f alone. The
clipped double Q of its target network labels the support. A checkpoint holds no support actions: mu does not change
any more, so they are drawn again, the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from agents.parts.adam import Adam, learning_rate_factor
from agents.parts.agent import Agent, Batch, Draws, Transitions, blocks
from agents.parts.critics import TwinCritic
from agents.parts.draws import Rng, normals, uniforms
from agents.parts.parameters import average, default_init
from agents.parts.published import required
from agents.parts.sde import EnergyNetwork, ScoreNetwork, Solver, denoising_loss, score_init, signal_and_spread

PRETRAINING, TRAINING, ENERGY_ALONE = 0, 1, 2  # phases
EARLIEST = 1e-3  # least time of both losses, as published


class QGPO(Agent):
    """The agent of `--algo qgpo`; `config` is a `hyperparameters.QGPOConfig`."""

    METRICS = (
        "bc_loss", "critic_loss", "energy_loss", "q_mean", "actor_grad_norm", "critic_grad_norm", "energy_grad_norm"
    )  # fmt: skip
    COMPILED = ("behaviour_loss", "critic_loss", "energy_loss")
    PLAN_REPEATS = True

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
        self.solver = Solver(c.diffusion_steps, order=2, data=True, device=self.device)
        self.spread = signal_and_spread(self.solver.times.double())[1].tolist()
        self.actor = ScoreNetwork(self.sizes, c.hidden_dim)
        self.critic = TwinCritic(self.sizes, [c.hidden_dim] * 3, torch.relu)
        self.energy = EnergyNetwork(self.sizes, c.hidden_dim)
        generators = self.init_generators()
        score_init(self.actor.parameters, generators)
        default_init(self.critic.parameters, generators)
        score_init(self.energy.parameters, generators)
        self.critic_target = self.critic.averaged()
        self.networks = {
            "actor": self.actor.parameters,
            "critic": self.critic.parameters,
            "critic_target": self.critic_target.parameters,
            "energy": self.energy.parameters,
        }
        self.optimizers = {
            "actor": Adam(self.actor.parameters, n, c.learning_rate, c.grad_norm),
            "critic": Adam(self.critic.parameters, n, c.critic_learning_rate, c.grad_norm),
            "energy": Adam(self.energy.parameters, n, c.critic_learning_rate, c.grad_norm),
        }
        width = c.support_actions * action_dim
        self.planned = {"support": width, "next_support": width}

    @property
    def first_step(self) -> int:
        return -self.config.pretrain_epochs * self.config.num_steps_per_epoch

    def phase(self, step: int) -> int:
        if step < 0:
            return PRETRAINING
        return TRAINING if step < self.config.critic_epochs * self.config.num_steps_per_epoch else ENERGY_ALONE

    def schedule(self, step: int) -> tuple[float, ...]:
        return (learning_rate_factor(self.config, max(step, 0)),)

    def _draw(self, rng: Rng, batch_size: int, steps: int) -> dict[str, Tensor]:
        c, n, rows = self.config, self.num_seeds, min(batch_size, self.config.critic_batch_size)
        return {
            "times": EARLIEST + (1 - EARLIEST) * uniforms(rng, n, steps, (batch_size,)),
            "noise": normals(rng, n, steps, (batch_size, self.action_dim)),
            "energy_times": EARLIEST + (1 - EARLIEST) * uniforms(rng, n, steps, (rows,)),
            "energy_noise": normals(rng, n, steps, (rows, c.support_actions, self.action_dim)),
        }

    # --- Numbers made of the whole table ----------------------------------------------------------------

    def plan_step(self, step: int) -> int | None:
        return None if step < 0 else 0

    def plan(self, transitions: Transitions, rng: Rng, columns: Mapping[str, Tensor]) -> None:
        """The support: samples of the behaviour model, without guidance, for every state and every next state."""
        n = self.num_seeds
        for start, stop in blocks(transitions.size):
            rows = transitions.block(start, stop)
            for column, states in (("support", rows["states"]), ("next_support", rows["next_states"])):
                noise = normals(rng, n, 1, (stop - start, self.config.support_actions, self.action_dim))[0]
                actions = self.solver.actions(self.actor, states.expand(n, -1, -1), noise.flatten(1, 2))
                columns[column][:, start:stop] = actions.view(n, stop - start, -1)

    # --- The update: Algorithm 1 ------------------------------------------------------------------------

    def gradient_step(self, batch: Batch, draws: Draws, step: int) -> dict[str, Tensor]:
        if self.phase(step) == PRETRAINING:
            loss, metrics = self.behaviour_loss(batch, draws)
            metrics["actor_grad_norm"] = self.optimizers["actor"].step(self.actor.parameters.gradient(loss))
            return metrics
        batch, metrics = {name: value[:, : self.config.critic_batch_size] for name, value in batch.items()}, {}
        if self.phase(step) == TRAINING:
            loss, metrics = self.critic_loss(batch, draws)
            metrics["critic_grad_norm"] = self.optimizers["critic"].step(self.critic.parameters.gradient(loss))
            average(self.critic_target.parameters, self.critic.parameters, self.config.tau)
        loss, energy_metrics = self.energy_loss(batch, draws)
        metrics["energy_grad_norm"] = self.optimizers["energy"].step(self.energy.parameters.gradient(loss))
        return metrics | energy_metrics

    def behaviour_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """The denoising loss of the data's actions [S]."""
        loss = denoising_loss(self.actor, batch["actions"], batch["states"], draws["times"], draws["noise"])
        return loss, {"bc_loss": loss.detach()}

    def support_values(self, states: Tensor, support: Tensor) -> Tensor:
        """min(Q1, Q2) of the target critics: states [S, B, state_dim], support [S, B, M A] -> [S, B, M]."""
        actions = support.unflatten(2, (-1, self.action_dim))
        values = self.critic_target(states, actions.flatten(1, 2)).amin(dim=1)
        return values.view(actions.shape[:3])

    def critic_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean of both critics' squared errors against r + gamma softmax(beta_q Q)-weighted Q over the support [S]."""
        c = self.config
        with torch.no_grad():
            values = self.support_values(batch["next_states"], batch["next_support"])
            bootstrap = ((c.beta_q * values).softmax(dim=2) * values).sum(dim=2)
            target = batch["rewards"][..., 0] + c.discount * batch["not_dones"][..., 0] * bootstrap
        errors = self.critic(batch["states"], batch["actions"]) - target.unsqueeze(1)
        loss = errors.square().mean(dim=(1, 2))
        return loss, {"critic_loss": loss.detach(), "q_mean": target.mean(dim=1)}

    def energy_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy between softmax(beta Q) of the support and softmax f of the same, diffused to one time [S]."""
        states, support = batch["states"], batch["support"]
        with torch.no_grad():
            labels = (self.config.beta * self.support_values(states, support)).softmax(dim=2)
        times = draws["energy_times"]
        signal, spread = (x[..., None, None] for x in signal_and_spread(times))
        diffused = signal * support.view_as(draws["energy_noise"]) + spread * draws["energy_noise"]
        part = self.energy.state_part(states) + self.energy.time_part(times)
        logits = self.energy(diffused.flatten(1, 2), part).view_as(labels)
        loss = -(labels * logits.log_softmax(dim=2)).sum(dim=2).mean(dim=1)
        return loss, {"energy_loss": loss.detach()}

    # --- Acting -----------------------------------------------------------------------------------------

    def act_draws(self, rng: Rng, states: int) -> dict[str, Tensor]:
        return {"noise": normals(rng, self.num_seeds, 1, (states, self.action_dim))[0]}

    def actions_for(self, states: Tensor, noise: Mapping[str, Tensor]) -> Tensor:
        """One sample a state of the behaviour model, guided: the score plus `guidance_scale` times grad f."""
        times = self.solver.times.expand(states.shape[0], -1)
        part, parts = self.actor.state_part(states), self.actor.time_part(times)
        energy_part, energy_parts = self.energy.state_part(states), self.energy.time_part(times)

        def guided(x: Tensor, i: int) -> Tensor:
            predicted = self.actor.noise(x, part + parts[:, i : i + 1])
            gradient = self.energy.gradient(x, energy_part + energy_parts[:, i : i + 1])
            return predicted - self.config.guidance_scale * self.spread[i] * gradient

        return self.solver.sample(guided, noise["noise"]).clamp(-self.max_action, self.max_action)

    # --- Published names --------------------------------------------------------------------------------

    def load_published(self, networks: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Weights as the published code saves them: `actor` (behavior_ckpt600.pth), `critic` (critic_ckpt100.pth).

        The latter has Q (q0), its average (q0_target) and f (qt). Raises ValueError for missing or misshapen weights.
        """
        critic = required(networks, "critic")
        for seed in range(self.num_seeds):
            self.actor.parameters.load_member(seed, required(networks, "actor"))
            self._load_critic(self.critic, seed, critic, "q0.")
            self._load_critic(self.critic_target, seed, critic, "q0_target.")
            own = {name.removeprefix("qt."): value for name, value in critic.items() if name.startswith("qt.")}
            self.energy.parameters.load_member(seed, own)

    def published_state(self) -> list[dict[str, Any]]:
        """One dict a seed: `actor`, `critic` by published names."""
        return [
            {
                "actor": self.actor.parameters.member_state(seed),
                "critic": {
                    **self._critic_state(self.critic, seed, "q0."),
                    **self._critic_state(self.critic_target, seed, "q0_target."),
                    **{f"qt.{name}": value for name, value in self.energy.parameters.member_state(seed).items()},
                },
            }
            for seed in range(self.num_seeds)
        ]

    def _critic_state(self, critic: TwinCritic, seed: int, prefix: str) -> dict[str, Tensor]:
        """Published critics read [action | state], these [state | action]."""
        state = {}
        for name, value in critic.seed_state(seed).items():
            moved = value.roll(self.action_dim, dims=-1) if name.endswith("_model.0.weight") else value
            state[prefix + name.replace("_model", "")] = moved
        return state

    def _load_critic(self, critic: TwinCritic, seed: int, state: Mapping[str, Tensor], prefix: str) -> None:
        own = {}
        for name in critic.seed_state(seed):
            published = prefix + name.replace("_model", "")
            if published in state:
                value = torch.as_tensor(state[published])
                own[name] = value.roll(-self.action_dim, dims=-1) if name.endswith("_model.0.weight") else value
        critic.load_seed(seed, own)
