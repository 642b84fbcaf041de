"""DTQL's published update written the plain way: a yardstick of `benchmarks.training`, and a second implementation.

As `benchmarks.plain`: `nn.Module`s, one seed, PyTorch's own layers and Adam, and `.item()` where the published code
reads a number. Nothing is shared with `agents`.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.plain import TimeEmbedding, mlp


class NormalizedCritics(nn.Module):
    """Twin critics with layer normalisation, and a value function, under the published names."""

    def __init__(self, state_dim: int, action_dim: int) -> None:
        super().__init__()
        self.q1_model, self.q2_model = (_normalized(state_dim + action_dim) for _ in range(2))
        self.v_model = mlp([state_dim, 256, 256, 256, 1])

    def forward(self, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([states, actions], dim=-1)
        return self.q1_model(x), self.q2_model(x)

    def lesser(self, states: Tensor, actions: Tensor) -> Tensor:
        return torch.min(*self(states, actions))


def _normalized(width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in in (width, 256, 256):
        layers += [nn.Linear(fan_in, 256), nn.LayerNorm(256), nn.Mish()]
    return nn.Sequential(*layers, nn.Linear(256, 1))


class _Layers(nn.Module):
    """Linear, then three times linear and Mish, then linear: no activation after the first."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        hidden = [layer for _ in range(3) for layer in (nn.Linear(256, 256), nn.Mish())]
        self.layers = nn.ModuleList([nn.Linear(width, 256), *hidden, nn.Linear(256, out)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Denoiser(nn.Module):
    """Karras et al.'s preconditioned denoiser of actions under the published names."""

    def __init__(self, state_dim: int, action_dim: int, config: Any) -> None:
        super().__init__()
        self.embed = nn.Sequential(TimeEmbedding(), nn.Linear(16, 32), nn.Mish(), nn.Linear(32, 16))
        self.layers = _Layers(state_dim + action_dim + 16, action_dim)
        self.config = config

    def levels(self, number: int, device: torch.device) -> Tensor:
        """Truncated log-logistic noise levels."""
        bounds = torch.tensor([self.config.sigma_min, self.config.sigma_max], dtype=torch.float64, device=device)
        center = math.log(self.config.sigma_data)
        low, high = ((bounds.log() - center) / 0.5).sigmoid()
        uniform = torch.rand(number, dtype=torch.float64, device=device) * (high - low) + low
        return (uniform.logit() * 0.5 + center).exp().float()

    def loss(self, actions: Tensor, states: Tensor, sigma: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """The weighted squared error of the clipped denoised actions."""
        sigma = self.levels(len(actions), actions.device) if sigma is None else sigma
        noise = torch.randn_like(actions) if noise is None else noise
        s, data = sigma[:, None], self.config.sigma_data
        total = s**2 + data**2
        x = actions + noise * s
        raw = self.layers(torch.cat([x / total**0.5, states, self.embed(torch.log(sigma) / 4)], dim=-1))
        c_out = s * data / total**0.5
        denoised = (c_out * raw + data**2 / total * x).clamp(-self.config.clip_denoised, self.config.clip_denoised)
        return ((denoised - actions) / c_out).pow(2).mean()


class OneStepPolicy(nn.Module):
    """The tanh-Gaussian policy under the published names."""

    def __init__(self, state_dim: int, action_dim: int, max_action: float) -> None:
        super().__init__()
        sizes = [state_dim, 256, 256, 256]
        layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
        self.net = nn.Sequential(*layers, nn.Linear(256, 2 * action_dim))
        self.max_action = max_action
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                nn.init.orthogonal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, states: Tensor) -> torch.distributions.Normal:
        mean, log_std = self.net(states).chunk(2, dim=-1)
        return torch.distributions.Normal(mean, log_std.clamp(-5, 2).exp())

    def sample(self, states: Tensor, noise: Tensor | None = None) -> Tensor:
        normal = self(states)
        z = normal.rsample() if noise is None else normal.mean + normal.stddev * noise
        return torch.tanh(z) * self.max_action

    def log_prob(self, states: Tensor, actions: Tensor) -> Tensor:
        return self(states).log_prob(torch.arctanh(actions / (self.max_action + 1e-3))).sum(-1)


class PlainDTQL:
    """DTQL, one seed. `config` is the dataclass that the project's own agent takes; `step` counts as the agent's."""

    def __init__(
        self, algo: str, state_dim: int, action_dim: int, max_action: float, config: Any, device: torch.device
    ) -> None:
        if algo != "dtql":
            raise ValueError(f"this is dtql's plain form, not {algo!r}'s")
        self.config, self.step = config, 0
        self.critic = NormalizedCritics(state_dim, action_dim).to(device)
        self.bc_actor = Denoiser(state_dim, action_dim, config).to(device)
        self.distill_actor = OneStepPolicy(state_dim, action_dim, max_action).to(device)
        self.critic_target = copy.deepcopy(self.critic)
        self.distill_actor_target = copy.deepcopy(self.distill_actor)
        rates = {"critic": config.critic_learning_rate, "bc_actor": config.learning_rate}
        rates["distill_actor"] = config.learning_rate
        self.optimizers = {n: torch.optim.Adam(getattr(self, n).parameters(), lr=rate) for n, rate in rates.items()}
        last = config.num_epochs * config.num_steps_per_epoch
        self.schedulers = [
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=last) for optimizer in self.optimizers.values()
        ]

    def load_published(self, networks: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Weights by published names."""
        for name, state in networks.items():
            getattr(self, name).load_state_dict(state)

    def train_step(self, batch: Mapping[str, Tensor], draws: Mapping[str, Tensor] | None = None) -> dict[str, float]:
        """One gradient step; `draws` as the agent takes them, without the seeds axis."""
        draws = draws or {}
        critic_loss = self._critic_loss(batch)
        self._apply("critic", critic_loss)
        states, actions = batch["states"], batch["actions"]
        bc_loss = self.bc_actor.loss(actions, states, draws.get("bc_sigma"), draws.get("bc_noise"))
        self._apply("bc_actor", bc_loss)
        metrics = {"critic_loss": critic_loss.item(), "bc_loss": bc_loss.item()}
        if self.step >= 0:
            metrics |= self._policy_step(batch, draws)
            self._averages()
            if self.config.lr_decay:
                for scheduler in self.schedulers:
                    scheduler.step()
        self.step += 1
        return metrics

    def _critic_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        config, states, actions = self.config, batch["states"], batch["actions"]
        with torch.no_grad():
            q = self.critic.lesser(states, actions)
            next_v = self.critic.v_model(batch["next_states"])
        difference = q - self.critic.v_model(states)
        weight = torch.where(difference > 0, config.expectile, 1 - config.expectile)
        value_loss = (weight * difference**2).mean()
        target = batch["rewards"] + batch["not_dones"] * config.discount * next_v
        q1, q2 = self.critic(states, actions)
        return value_loss + nn.functional.mse_loss(q1, target) + nn.functional.mse_loss(q2, target)

    def _policy_step(self, batch: Mapping[str, Tensor], draws: Mapping[str, Tensor]) -> dict[str, float]:
        config, states = self.config, batch["states"]
        own = self.distill_actor.sample(states, draws.get("policy_noise"))
        distill_loss = self.bc_actor.loss(own, states, draws.get("distill_sigma"), draws.get("distill_noise"))
        q_loss = -self.critic.lesser(states, own).mean()
        gamma_loss = torch.zeros((), device=states.device)
        if config.gamma != 0:
            gamma_loss = -self.distill_actor.log_prob(states, batch["actions"]).mean()
        loss = config.alpha * distill_loss + q_loss + config.gamma * gamma_loss
        self._apply("distill_actor", loss)
        parts = {"distill_loss": distill_loss, "q_loss": q_loss, "gamma_loss": gamma_loss, "actor_loss": loss}
        return {name: value.item() for name, value in parts.items()}

    def _apply(self, name: str, loss: Tensor) -> None:
        self.optimizers[name].zero_grad()
        loss.backward()
        self.optimizers[name].step()

    @torch.no_grad()
    def _averages(self) -> None:
        config = self.config
        kinds = [(self.critic_target, self.critic, config.tau)]
        if self.step % config.ema_interval == 0 and self.step >= config.ema_start:
            kinds.append((self.distill_actor_target, self.distill_actor, 1 - config.ema_decay))
        for target, online, weight in kinds:
            for old, new in zip(target.parameters(), online.parameters(), strict=True):
                old.copy_(weight * new + (1 - weight) * old)

    def act(self, state: np.ndarray) -> np.ndarray:
        """One state at a time with `action_candidates` candidates, as the published evaluation does."""
        device = next(self.critic.parameters()).device
        states = torch.as_tensor(state, dtype=torch.float32, device=device).reshape(1, -1)
        states = states.repeat_interleave(self.config.action_candidates, dim=0)
        with torch.no_grad():
            actions = self.distill_actor.sample(states)
            values = self.critic_target.lesser(states, actions).flatten()
            choice = torch.multinomial(values.softmax(0), 1)
        return actions[choice].cpu().numpy().flatten()
