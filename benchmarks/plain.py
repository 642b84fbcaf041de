"""The published updates written the plain way: the yardstick of `benchmarks.training`, and a second implementation.

`nn.Module`s, one seed, PyTorch's own Mish and Adam, batches copied from the host, a NumPy coin, and `.item()` where
the published code reads a number: what a user of the published code runs. Nothing is shared with `agents`.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class TimeEmbedding(nn.Module):
    """Sines and cosines of the step number, 16 wide."""

    def forward(self, steps: Tensor) -> Tensor:
        frequencies = torch.exp(torch.arange(8, device=steps.device) * (-math.log(10000) / 7))
        angles = steps[:, None] * frequencies[None]
        return torch.cat((angles.sin(), angles.cos()), dim=-1)


def mlp(sizes: Iterable[int]) -> nn.Sequential:
    """Linear layers with Mish between them."""
    sizes = list(sizes)
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.Mish()]
    return nn.Sequential(*layers[:-1])


class NoiseModel(nn.Module):
    """Noise predictor under the published names."""

    def __init__(self, state_dim: int, action_dim: int) -> None:
        super().__init__()
        self.time_mlp = nn.Sequential(TimeEmbedding(), nn.Linear(16, 32), nn.Mish(), nn.Linear(32, 16))
        self.mid_layer = nn.Sequential(*mlp([state_dim + action_dim + 16, 256, 256, 256]), nn.Mish())
        self.final_layer = nn.Linear(256, action_dim)

    def forward(self, x: Tensor, steps: Tensor, states: Tensor) -> Tensor:
        return self.final_layer(self.mid_layer(torch.cat([x, self.time_mlp(steps), states], dim=1)))


class DiffusionPolicy(nn.Module):
    """Reverse chain and denoising loss; draws come in from outside, or from the global generator when None."""

    def __init__(self, state_dim: int, action_dim: int, max_action: float, steps: int) -> None:
        super().__init__()
        self.model = NoiseModel(state_dim, action_dim)
        self.action_dim, self.max_action, self.steps = action_dim, max_action, steps
        i = np.arange(1, steps + 1)
        alphas = torch.tensor(np.exp(-0.1 / steps - 0.5 * 9.9 * (2 * i - 1) / steps**2), dtype=torch.float32)
        level = torch.cumprod(alphas, 0)
        before = torch.cat([torch.ones(1), level[:-1]])
        rows = {
            "signal": level.sqrt(),
            "spread": (1 - level).sqrt(),
            "clean_x": (1 / level).sqrt(),
            "clean_noise": (1 / level - 1).sqrt(),
            "mean_clean": (1 - alphas) * before.sqrt() / (1 - level),
            "mean_x": (1 - before) * alphas.sqrt() / (1 - level),
            "log_variance": ((1 - alphas) * (1 - before) / (1 - level)).clamp(min=1e-20).log(),
        }
        for name, values in rows.items():
            self.register_buffer(name, values, persistent=False)

    def sample(self, states: Tensor, noise: Tensor | None = None) -> Tensor:
        batch = len(states)
        x = torch.randn(batch, self.action_dim, device=states.device) if noise is None else noise[0]
        for k, i in enumerate(reversed(range(self.steps)), start=1):
            steps = torch.full((batch,), i, device=states.device, dtype=torch.long)
            predicted = self.model(x, steps, states)
            clean = self.clean_x[steps][:, None] * x - self.clean_noise[steps][:, None] * predicted
            clean = clean.clamp(-self.max_action, self.max_action)
            mean = self.mean_clean[steps][:, None] * clean + self.mean_x[steps][:, None] * x
            added = torch.randn_like(x) if noise is None else noise[min(k, self.steps - 1)]
            x = mean + (steps != 0).float()[:, None] * (0.5 * self.log_variance[steps][:, None]).exp() * added
        return x.clamp(-self.max_action, self.max_action)

    def loss(self, actions: Tensor, states: Tensor, steps: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        steps = torch.randint(0, self.steps, (len(actions),), device=actions.device) if steps is None else steps
        noise = torch.randn_like(actions) if noise is None else noise
        diffused = self.signal[steps][:, None] * actions + self.spread[steps][:, None] * noise
        return nn.functional.mse_loss(self.model(diffused, steps, states), noise)


class Critics(nn.Module):
    """Twin critics under the published names."""

    def __init__(self, state_dim: int, action_dim: int) -> None:
        super().__init__()
        self.q1_model = mlp([state_dim + action_dim, 256, 256, 256, 1])
        self.q2_model = mlp([state_dim + action_dim, 256, 256, 256, 1])

    def forward(self, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([states, actions], dim=-1)
        return self.q1_model(x), self.q2_model(x)


class HostSampler:
    """Batches picked on the host and copied to the device, as the published sampler does."""

    def __init__(self, columns: Mapping[str, np.ndarray], device: torch.device) -> None:
        self.columns = {name: torch.from_numpy(np.array(value)) for name, value in columns.items()}
        self.device = device

    def sample(self, batch_size: int) -> dict[str, Tensor]:
        rows = torch.randint(0, len(self.columns["rewards"]), (batch_size,))
        return {name: value[rows].to(self.device) for name, value in self.columns.items()}


class PlainDiffusionLearner:
    """DiffCPS, Diffusion-QL or diffusion behaviour cloning (`algo`), one seed.

    `config` is the same dataclass that the project's own agent takes.
    """

    def __init__(
        self, algo: str, state_dim: int, action_dim: int, max_action: float, config: Any, device: torch.device
    ) -> None:
        self.algo, self.config, self.max_action, self.step = algo, config, max_action, 0
        self.actor = DiffusionPolicy(state_dim, action_dim, max_action, config.diffusion_steps).to(device)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=config.learning_rate)
        if algo == "diffusion_bc":
            return
        self.critic = Critics(state_dim, action_dim).to(device)
        self.ema, self.critic_target = copy.deepcopy(self.actor), copy.deepcopy(self.critic)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=config.critic_learning_rate)
        if algo == "diffcps":
            self.multiplier = torch.tensor(float(config.lambda_init), device=device, requires_grad=True)
            self.lambda_optimizer = torch.optim.Adam([self.multiplier], lr=config.lambda_learning_rate)

    def load_published(self, networks: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Weights by published names for actor, critic, ema, critic_target."""
        for name, state in networks.items():
            getattr(self, name).load_state_dict(state)

    def train_step(self, batch: Mapping[str, Tensor], draws: Mapping[str, Tensor] | None = None) -> dict[str, float]:
        """One gradient step; `draws` as the agents take them, without the seeds axis."""
        draws = draws or {}
        if self.algo == "diffusion_bc":
            self.step += 1
            return self._policy_step(batch, draws)
        metrics = {"critic_loss": self._critic_step(batch, draws.get("next_action_noise"))}
        if self.step % getattr(self.config, "policy_interval", 1) == 0:
            metrics |= self._policy_step(batch, draws)
        if self.step % self.config.ema_interval == 0 and self.step >= self.config.ema_start:
            _average(self.ema, self.actor, 1 - self.config.ema_decay)
        _average(self.critic_target, self.critic, self.config.tau)
        self.step += 1
        return metrics

    def _critic_step(self, batch: Mapping[str, Tensor], noise: Tensor | None) -> float:
        config, states = self.config, batch["next_states"]
        if config.max_q_backup:
            states = states.repeat_interleave(10, dim=0)
        next_actions = self.ema.sample(states, noise)
        values = self.critic_target(states, next_actions)
        if config.max_q_backup:
            values = tuple(q.view(-1, 10).max(dim=1, keepdim=True)[0] for q in values)
        target = (batch["rewards"] + batch["not_dones"] * config.discount * torch.min(*values)).detach()
        q1, q2 = self.critic(batch["states"], batch["actions"])
        loss = nn.functional.mse_loss(q1, target) + nn.functional.mse_loss(q2, target)
        self._apply(loss, self.critic_optimizer, self.critic.parameters())
        return loss.item()

    def _policy_step(self, batch: Mapping[str, Tensor], draws: Mapping[str, Tensor]) -> dict[str, float]:
        states = batch["states"]
        bc_loss = self.actor.loss(batch["actions"], states, draws.get("timesteps"), draws.get("noise"))
        if self.algo == "diffusion_bc":
            self._apply(bc_loss, self.actor_optimizer, self.actor.parameters())
            return {"bc_loss": bc_loss.item()}
        q1, q2 = self.critic(states, self.actor.sample(states, draws.get("policy_noise")))
        coin = int(draws["critic_choice"]) if draws else int(np.random.uniform() > 0.5)
        q_loss = -q2.mean() / q1.abs().mean().detach() if coin else -q1.mean() / q2.abs().mean().detach()
        if self.algo == "diffusion_ql":
            loss = bc_loss + self.config.eta * q_loss
            self._apply(loss, self.actor_optimizer, self.actor.parameters())
            return {"bc_loss": bc_loss.item(), "q_loss": q_loss.item(), "actor_loss": loss.item()}
        bounds = (self.config.lambda_min, self.config.lambda_max)
        loss = self.multiplier.clamp(*bounds).detach() * bc_loss + q_loss
        self._apply(loss, self.actor_optimizer, self.actor.parameters())
        multiplier_loss = (self.config.kappa - bc_loss).detach() * self.multiplier
        self._apply(multiplier_loss, self.lambda_optimizer, [self.multiplier])
        used = self.multiplier.clamp(*bounds).item()
        return {"kl_loss": bc_loss.item(), "actor_loss": loss.item(), "lambda": used}

    def _apply(self, loss: Tensor, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
        optimizer.zero_grad()
        loss.backward()
        if self.config.grad_norm > 0:
            nn.utils.clip_grad_norm_(list(parameters), max_norm=self.config.grad_norm)
        optimizer.step()

    def act(self, state: np.ndarray) -> np.ndarray:
        """One state at a time with `action_candidates` candidates, as the published evaluation does."""
        device = next(self.actor.parameters()).device
        states = torch.as_tensor(state, dtype=torch.float32, device=device).reshape(1, -1)
        if self.algo == "diffusion_bc":
            with torch.no_grad():
                return self.actor.sample(states).cpu().numpy().flatten()
        states = states.repeat_interleave(self.config.action_candidates, dim=0)
        with torch.no_grad():
            actions = self.actor.sample(states)
            values = torch.min(*self.critic_target(states, actions)).flatten()
            choice = torch.multinomial(values.softmax(0), 1)
        return actions[choice].cpu().numpy().flatten()


@torch.no_grad()
def _average(target: nn.Module, online: nn.Module, weight: float) -> None:
    for old, new in zip(target.parameters(), online.parameters(), strict=True):
        old.copy_(weight * new + (1 - weight) * old)
