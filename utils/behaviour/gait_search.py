"""AntMaze's goal-directed gait: an open-loop oscillator tuned by the cross-entropy method, then cloned.

The ant has four equal legs, a quarter turn apart. So one leg's movement, as a function of a phase and of the goal's
direction seen from that leg, is a gait in any direction; diagonal legs move together (a trot). Ten numbers describe
it. A small network then learns to tell its actions from the ant's state alone, which makes the behaviour Markov.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import pairwise

import gymnasium
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec
from tqdm import tqdm

from utils.behaviour.navigation import ACTION_NOISE, gait_features, yaw
from utils.behaviour.policies import NetworkPolicy, Policy
from utils.environments.antmaze import AntMazeEnv
from utils.environments.lockstep import LockstepEnvs

LEG_ANGLES = np.deg2rad([45.0, 135.0, 225.0, 315.0])
"""Where legs 1 to 4 point, from the torso's x axis."""
LEG_PHASES = np.array([0.0, np.pi, 0.0, np.pi])
ANKLE_SIGNS = np.array([1.0, -1.0, -1.0, 1.0])
"""The sign with which each ankle's angle points its foot downwards."""
ACTUATORS = np.array([6, 7, 0, 1, 2, 3, 4, 5])
"""Joint of each actuator: the model lists leg 4's motors first."""


@dataclass
class Gait:
    """The oscillator's numbers: radians, and gains from radians to actions."""

    frequency: float = 0.75  # a control step (0.1 s)
    hip_amplitude: float = 0.4
    reach_amplitude: float = 0.3  # of the ankle, for legs that point along the way
    lift_amplitude: float = 0.3  # of the ankle, for all legs
    ankle_center: float = 0.9
    reach_phase: float = 0.0
    lift_phase: float = 0.0
    stiffness: float = 1.5
    damping: float = 0.3
    hip_phase: float = 0.0


# How far the cross-entropy method looks from the numbers above at first, in the order of the fields.
SPREAD = np.array([0.25, 0.2, 0.2, 0.2, 0.2, 0.7, 0.7, 1.0, 0.2, 0.4])


@dataclass(frozen=True)
class GaitSettings:
    iterations: int = 25
    population: int = 32
    elite: int = 8
    trials: int = 4  # random directions and starts that each candidate walks in
    walk_steps: int = 80
    clone_walks: int = 400
    clone_walk_steps: int = 200
    clone_updates: int = 20_000
    batch_size: int = 256
    learning_rate: float = 2e-3
    width: int = 64


class _OpenAnt(AntMazeEnv):
    """AntMaze's ant without walls, its goal out of reach."""

    def _walls(self) -> list:
        return []

    def reset_model(self) -> np.ndarray:
        observation = super().reset_model()
        self.target_goal = [1e6, 1e6]
        return observation


def open_envs(num_envs: int) -> LockstepEnvs:
    """Ants on open ground, at AntMaze's start; nothing ends their walk but 1,000 steps."""
    spec = EnvSpec(
        "diffcps/OpenAnt-v0",
        entry_point=_OpenAnt,  # type: ignore[arg-type]  # called with the kwargs below
        max_episode_steps=1000,
        disable_env_checker=True,
        kwargs={"maze": "umaze", "goal_every_reset": False},
    )
    return LockstepEnvs(gymnasium.make(spec), num_envs)


def gait_actions(numbers: np.ndarray, phases: np.ndarray, directions: np.ndarray, states: np.ndarray) -> np.ndarray:
    """Actions [N, 8] of gaits [N, 10] (in `Gait`'s order) at phases [N] towards angles [N] of the world."""
    columns = dict(zip([f.name for f in fields(Gait)], numbers.T[:, :, None], strict=True))
    ahead = (directions - yaw(states))[:, None] - LEG_ANGLES  # the way, seen from each leg [N, 4]
    phase = phases[:, None] + LEG_PHASES
    hips = columns["hip_amplitude"] * np.sin(ahead) * np.cos(phase + columns["hip_phase"])
    ankles = (
        columns["ankle_center"]
        - columns["reach_amplitude"] * np.cos(ahead) * np.cos(phase + columns["reach_phase"])
        - columns["lift_amplitude"] * np.sin(phase + columns["lift_phase"])
    )
    targets = np.stack([hips, ANKLE_SIGNS * ankles], axis=2).reshape(len(states), 8)
    torques = columns["stiffness"] * (targets - states[:, 7:15]) - columns["damping"] * states[:, 21:29]
    return np.clip(torques[:, ACTUATORS], -1.0, 1.0)


@dataclass
class Walk:
    """A walk of N ants over T steps: features [T, N, 28], the gait's actions [T, N, 8]; per ant, what it achieved."""

    features: np.ndarray
    labels: np.ndarray
    progress: np.ndarray  # metres towards the direction
    drift: np.ndarray  # metres across it
    upright: np.ndarray  # cosine of the torso's tilt at the end


def walk(
    envs: LockstepEnvs,
    rng: np.random.Generator,
    steps: int,
    gaits: np.ndarray | None = None,
    policy: Policy | None = None,
    noise: float | np.ndarray = ACTION_NOISE,
    turn_every: int | None = None,
) -> Walk:
    """Walk every ant in a random direction, with gaits [N, 10] or with a policy of features.

    With `turn_every` an ant takes a new direction with that mean number of steps between.
    """
    count = envs.num_envs
    states = envs.reset([rng] * count)
    directions = rng.uniform(0, 2 * np.pi, count)
    phases = rng.uniform(0, 2 * np.pi, count)
    features, labels, progress, drift = [], [], np.zeros(count), np.zeros(count)
    for _ in range(steps):
        if turn_every is not None:
            turn = rng.random(count) < 1 / turn_every
            directions = np.where(turn, rng.uniform(0, 2 * np.pi, count), directions)
        heading = np.stack([np.cos(directions), np.sin(directions)], axis=1)
        features.append(gait_features(states, heading))
        if policy is not None:
            actions = policy.act(features[-1])
        elif gaits is not None:
            actions = gait_actions(gaits, phases, directions, states)
            phases = phases + gaits[:, 0]
        labels.append(actions)
        noisy = actions + np.reshape(noise, (-1, 1)) * rng.standard_normal(actions.shape)
        next_states, *_ = envs.step(np.clip(noisy, -1.0, 1.0), np.ones(count, dtype=bool))
        moved = next_states[:, :2] - states[:, :2]
        progress += (moved * heading).sum(1)
        drift += heading[:, 0] * moved[:, 1] - heading[:, 1] * moved[:, 0]
        states = next_states
    upright = 1 - 2 * np.square(states[:, 4:6]).sum(1)
    return Walk(np.array(features), np.array(labels), progress, np.abs(drift), upright)


def cross_entropy_method(settings: GaitSettings, rng: np.random.Generator, progress: bool = True) -> np.ndarray:
    """The gait [10] that walks furthest along its direction, without drifting or falling over."""
    s = settings
    envs = open_envs(s.population * s.trials)
    mean, std = np.array([getattr(Gait(), f.name) for f in fields(Gait)]), SPREAD
    for _ in (bar := tqdm(range(s.iterations), desc="gait", disable=not progress)):
        candidates = mean + std * rng.standard_normal((s.population, len(mean)))
        result = walk(envs, rng, s.walk_steps, np.repeat(candidates, s.trials, axis=0))
        # metres; three are taken off for an ant that lies on its side or back
        scores = (result.progress - 0.5 * result.drift - 3.0 * (result.upright < 0.3)).reshape(-1, s.trials).mean(1)
        elite = candidates[np.argsort(-scores)[: s.elite]]
        mean, std = elite.mean(0), elite.std(0) + 0.01
        bar.set_postfix(metres=f"{scores.mean():.1f}")
    envs.close()
    return mean


def clone(gait: np.ndarray, settings: GaitSettings, rng: np.random.Generator, progress: bool = True) -> NetworkPolicy:
    """A network from `gait_features` to the gait's actions, learnt from walks with turns and action noise."""
    s = settings
    envs = open_envs(50)
    features, labels = [], []
    for _ in tqdm(range(-(-s.clone_walks // envs.num_envs)), desc="walks to clone", disable=not progress):
        # several strengths of noise, so that the network has seen how the gait recovers
        noise = rng.choice([0.1, 0.2, 0.4], envs.num_envs)
        result = walk(envs, rng, s.clone_walk_steps, np.tile(gait, (envs.num_envs, 1)), noise=noise, turn_every=40)
        features.append(result.features.reshape(-1, result.features.shape[-1]))
        labels.append(result.labels.reshape(-1, result.labels.shape[-1]))
    envs.close()
    return _regress(np.concatenate(features), np.concatenate(labels), s, rng, progress)


def _regress(
    features: np.ndarray, labels: np.ndarray, s: GaitSettings, rng: np.random.Generator, progress: bool
) -> NetworkPolicy:
    generator = torch.Generator().manual_seed(int(rng.integers(1 << 31)))
    inputs, targets = torch.tensor(features, dtype=torch.float32), torch.tensor(labels, dtype=torch.float32)
    sizes = [inputs.shape[1], s.width, s.width, targets.shape[1]]
    weights, biases = [], []
    for fan_in, fan_out in pairwise(sizes):
        bound = fan_in**-0.5
        weights.append(torch.empty(fan_out, fan_in).uniform_(-bound, bound, generator=generator).requires_grad_())
        biases.append(torch.zeros(fan_out).requires_grad_())
    optimiser = torch.optim.Adam([*weights, *biases], s.learning_rate)
    for update in tqdm(range(s.clone_updates), desc="clone", disable=not progress):
        optimiser.param_groups[0]["lr"] = s.learning_rate * (1 - update / s.clone_updates)
        rows = torch.randint(len(inputs), (s.batch_size,), generator=generator)
        hidden = inputs[rows]
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            hidden = torch.relu(torch.nn.functional.linear(hidden, weight, bias))
        outputs = torch.tanh(torch.nn.functional.linear(hidden, weights[-1], biases[-1]))
        loss = (outputs - targets[rows]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return NetworkPolicy(
        [weight.detach().double().numpy() for weight in weights], [bias.detach().double().numpy() for bias in biases]
    )
