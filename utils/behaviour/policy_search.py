"""Searches for behaviour policies that fit on one core: soft actor-critic and augmented random search.

Each is a generator of `Snapshot`, the policy as it stands every so often, from the first steps on.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from utils.behaviour.policies import LOG_STD_RANGE, LinearPolicy, NetworkPolicy, Policy
from utils.environments import make, make_lockstep
from utils.environments.lockstep import LockstepEnvs
from utils.files import atomic_write


@dataclass
class Snapshot:
    """A policy on the way: environment steps so far, and the mean return of its deterministic actions."""

    step: int
    policy: LinearPolicy | NetworkPolicy
    mean_return: float


def mean_return(envs: LockstepEnvs, policy: Policy, seed: int, noise: bool = False) -> float:
    """Mean undiscounted return of one episode in each environment, of the deterministic or the noisy policy."""
    rngs = [np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(envs.num_envs)]
    rng = np.random.default_rng(seed) if noise else None
    states, running, total = envs.reset(rngs), np.ones(envs.num_envs, dtype=bool), np.zeros(envs.num_envs)
    while running.any():
        states, rewards, terminated, truncated = envs.step(policy.act(states, rng), running)
        total += rewards
        running &= ~(terminated | truncated)
    return float(total.mean())


# --- Augmented random search (Mania et al., 2018, version V2-t) ---


@dataclass(frozen=True)
class ARSSettings:
    """Names of the paper's Algorithm 2: N directions, b best of them, step size α, exploration noise ν."""

    iterations: int = 120
    directions: int = 16
    best: int = 8
    step_size: float = 0.02
    noise: float = 0.025
    # what a step pays for not falling: taken off while searching (the paper's section 4), or standing still wins
    survival_bonus: float = 1.0
    snapshot_interval: int = 5
    eval_episodes: int = 10


class _RunningMoments:
    """Mean and variance of all states seen (Chan et al.'s update)."""

    def __init__(self, size: int) -> None:
        self.count, self.mean, self.squares = 0, np.zeros(size), np.zeros(size)

    def add(self, states: np.ndarray) -> None:
        count, mean = len(states), states.mean(0)
        delta, total = mean - self.mean, self.count + len(states)
        self.squares += np.square(states - mean).sum(0) + delta**2 * self.count * count / total
        self.mean = self.mean + delta * count / total
        self.count = total

    @property
    def std(self) -> np.ndarray:
        std = np.sqrt(self.squares / max(self.count, 1))
        return np.where(std < 1e-6, 1.0, std)  # a dimension that never moved is left as it is


def augmented_random_search(env_name: str, seed: int, settings: ARSSettings) -> Iterator[Snapshot]:
    """Random search over linear policies of normalised states; yields every `snapshot_interval` iterations."""
    s = settings
    rng = np.random.default_rng(seed)
    envs, eval_envs = make_lockstep(env_name, 2 * s.directions), make_lockstep(env_name, s.eval_episodes)
    weight = np.zeros((envs.action_dim, envs.state_dim))
    moments = _RunningMoments(envs.state_dim)
    for iteration in range(s.iterations + 1):
        if iteration % s.snapshot_interval == 0:
            policy = LinearPolicy(weight.copy(), moments.mean.copy(), moments.std.copy())
            yield Snapshot(moments.count, policy, mean_return(eval_envs, policy, seed=10_000))
        delta = rng.standard_normal((s.directions, *weight.shape))
        candidates = np.concatenate([weight + s.noise * delta, weight - s.noise * delta])
        returns = _returns_of_candidates(envs, candidates, moments, rng, s.survival_bonus).reshape(2, -1)
        best = np.argsort(-returns.max(0))[: s.best]
        scale = s.step_size / (s.best * (returns[:, best].std() + 1e-6))
        weight = weight + scale * np.tensordot(returns[0, best] - returns[1, best], delta[best], 1)


def _returns_of_candidates(
    envs: LockstepEnvs, weights: np.ndarray, moments: _RunningMoments, rng: np.random.Generator, bonus: float
) -> np.ndarray:
    """One episode of each weight [K, A, S] in its own environment; the states seen go into `moments`."""
    mean, std = moments.mean.copy(), moments.std
    states, running = envs.reset([rng] * envs.num_envs), np.ones(envs.num_envs, dtype=bool)
    returns, seen = np.zeros(envs.num_envs), []
    while running.any():
        seen.append(states[running])
        actions = np.clip(np.einsum("kas,ks->ka", weights, (states - mean) / std), -1.0, 1.0)
        states, rewards, terminated, truncated = envs.step(actions, running)
        returns += rewards - bonus * running
        running &= ~(terminated | truncated)
    moments.add(np.concatenate(seen))
    return returns


# --- Soft actor-critic (Haarnoja et al., 2018b: learned temperature, twin critics) ---


@dataclass(frozen=True)
class SACSettings:
    """Sizes are smaller than the paper's (256, batch 256): on one core that buys three times the steps."""

    steps: int = 1_000_000
    random_steps: int = 5_000
    snapshot_interval: int = 10_000
    checkpoint_interval: int = 50_000
    eval_episodes: int = 5
    actor_width: int = 128
    critic_width: int = 192
    batch_size: int = 128
    discount: float = 0.99
    tau: float = 0.005
    actor_learning_rate: float = 5e-4
    critic_learning_rate: float = 1e-3
    actor_interval: int = 2


class _Actor(torch.nn.Module):
    def __init__(self, state_dim: int, action_dim: int, width: int) -> None:
        super().__init__()
        self.hidden = torch.nn.ModuleList([torch.nn.Linear(state_dim, width), torch.nn.Linear(width, width)])
        self.mean = torch.nn.Linear(width, action_dim)
        self.log_std = torch.nn.Linear(width, action_dim)

    def forward(self, states: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Sampled actions [B, A] and their log-probabilities [B]."""
        h = states
        for layer in self.hidden:
            h = F.relu(layer(h))
        log_std = self.log_std(h).clamp(*LOG_STD_RANGE)
        before = self.mean(h) + log_std.exp() * noise
        # log(1 - tanh²u) in the form that does not overflow
        correction = 2.0 * (np.log(2.0) - before - F.softplus(-2.0 * before))
        log_prob = -0.5 * noise**2 - log_std - 0.5 * np.log(2.0 * np.pi) - correction
        return before.tanh(), log_prob.sum(-1)

    def export(self, dtype: type = np.float32) -> NetworkPolicy:
        arrays: dict[str, np.ndarray] = {
            name: value.detach().numpy().astype(dtype) for name, value in self.named_parameters()
        }
        return NetworkPolicy(
            weights=[arrays["hidden.0.weight"], arrays["hidden.1.weight"], arrays["mean.weight"]],
            biases=[arrays["hidden.0.bias"], arrays["hidden.1.bias"], arrays["mean.bias"]],
            log_std_weight=arrays["log_std.weight"],
            log_std_bias=arrays["log_std.bias"],
        )


class _TwinCritic(torch.nn.Module):
    """Two critics side by side in batched products: half the calls, which is what costs on small networks."""

    def __init__(self, input_dim: int, width: int) -> None:
        super().__init__()
        sizes = [input_dim, width, width, 1]
        self.weights, self.biases = torch.nn.ParameterList(), torch.nn.ParameterList()
        for fan_in, fan_out in pairwise(sizes):
            bound = fan_in**-0.5
            self.weights.append(torch.empty(2, fan_in, fan_out).uniform_(-bound, bound))
            self.biases.append(torch.empty(2, 1, fan_out).uniform_(-bound, bound))

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:
        """[B, S], [B, A] -> [2, B]."""
        h = torch.cat([states, actions], -1).expand(2, -1, -1)
        for k, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = torch.baddbmm(bias, h, weight)
            if k < 2:
                h = F.relu(h)
        return h.squeeze(-1)


class _SAC:
    """State of one search: networks, optimisers, replay memory, counters."""

    def __init__(self, state_dim: int, action_dim: int, settings: SACSettings, seed: int) -> None:
        torch.manual_seed(seed)
        self.settings = s = settings
        self.action_dim = action_dim
        self.rng = np.random.default_rng(seed)
        self.actor = _Actor(state_dim, action_dim, s.actor_width)
        self.critic = _TwinCritic(state_dim + action_dim, s.critic_width)
        self.target = _TwinCritic(state_dim + action_dim, s.critic_width).requires_grad_(False)
        self.target.load_state_dict(self.critic.state_dict())
        self.log_alpha = torch.zeros((), requires_grad=True)
        self.actor_optimiser = torch.optim.Adam(self.actor.parameters(), s.actor_learning_rate, fused=True)
        self.critic_optimiser = torch.optim.Adam(self.critic.parameters(), s.critic_learning_rate, fused=True)
        self.alpha_optimiser = torch.optim.Adam([self.log_alpha], s.actor_learning_rate)
        self.memory = torch.zeros(s.steps, 2 * state_dim + action_dim + 2)
        self.splits = [state_dim, action_dim, state_dim, 1, 1]
        self.step = 0

    def remember(
        self, state: np.ndarray, action: np.ndarray, next_state: np.ndarray, reward: float, terminated: bool
    ) -> None:
        row = np.concatenate([state, action, next_state, [reward, float(terminated)]]).astype(np.float32)
        self.memory[self.step] = torch.from_numpy(row)
        self.step += 1

    def update(self) -> None:
        s = self.settings
        batch = self.memory[torch.randint(self.step, (s.batch_size,))]
        states, actions, next_states, rewards, terminated = batch.split(self.splits, -1)
        noise = torch.randn(2, s.batch_size, self.action_dim)
        alpha = self.log_alpha.detach().exp()

        with torch.no_grad():
            next_actions, next_log_prob = self.actor(next_states, noise[0])
            next_values = self.target(next_states, next_actions).amin(0) - alpha * next_log_prob
            targets = rewards[:, 0] + s.discount * (1.0 - terminated[:, 0]) * next_values
        critic_loss = (self.critic(states, actions) - targets).square().mean(-1).sum()
        self.critic_optimiser.zero_grad()
        critic_loss.backward()
        self.critic_optimiser.step()
        torch._foreach_lerp_(list(self.target.parameters()), list(self.critic.parameters()), s.tau)

        if self.step % s.actor_interval == 0:
            self.critic.requires_grad_(False)
            new_actions, log_prob = self.actor(states, noise[1])
            actor_loss = (alpha * log_prob - self.critic(states, new_actions).amin(0)).mean()
            self.actor_optimiser.zero_grad()
            actor_loss.backward()
            self.actor_optimiser.step()
            self.critic.requires_grad_(True)
            # entropy target -|A|, as in the paper
            alpha_loss = -(self.log_alpha * (log_prob.detach().mean() - self.action_dim))
            self.alpha_optimiser.zero_grad()
            alpha_loss.backward()
            self.alpha_optimiser.step()

    def _parts(self) -> dict[str, Any]:
        names = ("actor", "critic", "target", "actor_optimiser", "critic_optimiser", "alpha_optimiser")
        return {name: getattr(self, name) for name in names}

    def save(self, path: Path) -> None:
        """Atomic: a search that is killed while it writes resumes from the file before."""
        state = {name: part.state_dict() for name, part in self._parts().items()}
        memory = self.memory[: self.step].clone()  # a slice would be saved with all the rows still to come
        state |= {"log_alpha": self.log_alpha.detach(), "step": self.step, "memory": memory}
        state |= {"rng": self.rng.bit_generator.state, "torch_rng": torch.get_rng_state()}
        content = io.BytesIO()
        torch.save(state, content)
        atomic_write(path, content.getbuffer())

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.log_alpha.data.copy_(state["log_alpha"])
        self.step = state["step"]
        self.memory[: self.step] = state["memory"]
        self.rng.bit_generator.state = state["rng"]
        torch.set_rng_state(state["torch_rng"])


def soft_actor_critic(
    env_name: str, seed: int, settings: SACSettings, checkpoint: Path | None = None
) -> Iterator[Snapshot]:
    """Yield a snapshot every `snapshot_interval` environment steps; one update per step.

    With `checkpoint` the whole state is kept there and an interrupted search goes on from it (a new episode
    begins at that point).
    """
    env, eval_envs = make(env_name), make_lockstep(env_name, settings.eval_episodes)
    search = _SAC(eval_envs.state_dim, eval_envs.action_dim, settings, seed)
    if checkpoint is not None and checkpoint.exists():
        search.load(checkpoint)
    acting = search.actor.export()
    state, _ = env.reset(seed=seed + search.step)
    while search.step < settings.steps:
        if search.step < settings.random_steps:
            action = search.rng.uniform(-1.0, 1.0, search.action_dim)
        else:
            action = acting.act(np.asarray(state, np.float32)[None], search.rng)[0]
        next_state, reward, terminated, truncated, _ = env.step(action)
        search.remember(state, action, next_state, float(reward), terminated)
        state = env.reset()[0] if terminated or truncated else next_state
        if search.step >= settings.random_steps:
            search.update()
            if search.step % settings.actor_interval == 0:
                acting = search.actor.export()
        if search.step % settings.snapshot_interval == 0:
            # float16 is what ships, so it is what is evaluated
            policy = search.actor.export(np.float16)
            yield Snapshot(search.step, policy, mean_return(eval_envs, policy, seed=10_000))
        if checkpoint is not None and search.step % settings.checkpoint_interval == 0:
            search.save(checkpoint)
