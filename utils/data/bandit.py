"""The paper's toy problems: bandits with one state and actions in the plane, as a Dataset and as environments.

Every episode is one step: the only state is 0, an action earns its reward, and that is the end (`not_dones` is 0).

bandit-circle-v0     DiffCPS, section 3.1 and appendix: 5,000 actions on the unit circle plus Gaussian noise of 0.05
                     per coordinate; reward 1
bandit-gaussians-v0  Diffusion-QL's: 2,500 actions around each corner (+-0.8, +-0.8), deviation 0.05 per coordinate;
                     rewards of mean 3, 0, 1.5 and 5 by corner, deviation 0.5

The paper says "N(0, 0.05)" and not of what: 0.05 is taken as the deviation of both coordinates. Diffusion-QL's numbers
are those of its published toy code, which clips actions to the box [-1, 1]; the circle's box is [-1.2, 1.2], radius 1
and four deviations, so that it holds the data. (DTQL's own toy problem is another: 25 modes.)

Evaluation asks the data's distribution, not the nearest data point: an action earns the mean reward of its place where
it lies within three deviations of the circle or of a mode, and 0 elsewhere. The data themselves score a little under
100 percent on the circle: 0.3 percent of them lie farther out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from utils.data.dataset import Dataset
from utils.errors import UserError

Array = np.ndarray

DATA_SEED = 0
"""Of NumPy's default generator that makes the data; the algorithms' seeds are others."""
DEVIATION = 0.05
"""Of the data's actions around the circle or their mode, in each coordinate."""
REACH = 3 * DEVIATION
"""How far from there an action still earns a reward at evaluation."""

CORNERS = np.array([[-0.8, 0.8], [-0.8, -0.8], [0.8, 0.8], [0.8, -0.8]])
CORNER_REWARDS = np.array([3.0, 0.0, 1.5, 5.0])
REWARD_DEVIATION = 0.5


@dataclass(frozen=True)
class Bandit:
    """A task: its data, the reward of actions [N, 2] -> [N] at evaluation, and the largest such reward."""

    env_name: str
    max_action: float  # actions lie in [-max_action, max_action] in both coordinates
    make: Callable[[np.random.Generator], tuple[Array, Array]]  # -> actions [N, 2], rewards [N]
    reward: Callable[[Array], Array]
    best_reward: float


def _make_circle(rng: np.random.Generator) -> tuple[Array, Array]:
    angle = rng.uniform(0, 2 * np.pi, 5000)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return circle + DEVIATION * rng.standard_normal(circle.shape), np.ones(len(circle))


def _circle_reward(actions: Array) -> Array:
    return (np.abs(np.linalg.norm(actions, axis=1) - 1) <= REACH).astype(np.float64)


def _make_gaussians(rng: np.random.Generator) -> tuple[Array, Array]:
    mode = np.repeat(np.arange(len(CORNERS)), 2500)
    actions = CORNERS[mode] + DEVIATION * rng.standard_normal((len(mode), 2))
    return actions, CORNER_REWARDS[mode] + REWARD_DEVIATION * rng.standard_normal(len(mode))


def _gaussians_reward(actions: Array) -> Array:
    distances = np.linalg.norm(actions[:, None] - CORNERS, axis=2)
    return np.where(distances.min(axis=1) <= REACH, CORNER_REWARDS[distances.argmin(axis=1)], 0.0)


BANDITS = {
    bandit.env_name: bandit
    for bandit in (
        Bandit("bandit-circle-v0", 1 + 4 * DEVIATION, _make_circle, _circle_reward, 1.0),
        Bandit("bandit-gaussians-v0", 1.0, _make_gaussians, _gaussians_reward, 5.0),
    )
}


def ids() -> tuple[str, ...]:
    """The tasks' names."""
    return tuple(BANDITS)


def find(env_name: str) -> Bandit:
    """The bandit of that name. Raises UserError for an unknown one."""
    if env_name not in BANDITS:
        raise UserError(f"no bandit {env_name!r}; known: {', '.join(BANDITS)}")
    return BANDITS[env_name]


def load(env_name: str) -> Dataset:
    """The data of a bandit, made anew: the same numbers every time. Raises UserError for an unknown name."""
    bandit = find(env_name)
    actions, rewards = bandit.make(np.random.default_rng(DATA_SEED))
    actions = np.clip(actions, -bandit.max_action, bandit.max_action).astype(np.float32)
    rewards = rewards.astype(np.float32)[:, None]
    nothing = np.zeros((len(actions), 1), dtype=np.float32)
    info = {
        "rows": len(actions),
        "bytes": actions.nbytes + rewards.nbytes,
        "sha256": hashlib.sha256(actions.tobytes() + rewards.tobytes()).hexdigest(),
        "data_seed": DATA_SEED,
        "behaviour_score": float(normalized_score(env_name, bandit.reward(actions)).mean()),
    }
    return Dataset(nothing, actions, rewards, nothing, nothing, env_name, "bandit", info)


def make_lockstep(env_name: str, num_envs: int) -> BanditEnvs:
    """So many environments of a bandit. Raises UserError for an unknown name or less than one environment."""
    if num_envs < 1:
        raise UserError(f"num_envs is {num_envs}; at least one is needed")
    return BanditEnvs(find(env_name), num_envs)


def normalized_score(env_name: str, returns: Array) -> Array:
    """Returns in percent of the best mean reward. Raises UserError for an unknown name."""
    return 100.0 * np.asarray(returns) / find(env_name).best_reward


class BanditEnvs:
    """N environments with one state, 0, whose episodes end after one action; see `lockstep.LockstepEnvs`."""

    state_dim, action_dim, max_episode_steps = 1, 2, 1

    def __init__(self, bandit: Bandit, num_envs: int) -> None:
        self.bandit, self.num_envs, self.max_action = bandit, num_envs, bandit.max_action
        self.unstable = np.zeros(num_envs, dtype=np.int64)

    def reset(self, rngs: Sequence[np.random.Generator]) -> Array:
        """States [N, 1], all zero: there is nothing to draw. Raises UserError for another number of generators."""
        if len(rngs) != self.num_envs:
            raise UserError(f"reset got {len(rngs)} generators for {self.num_envs} environments")
        return np.zeros((self.num_envs, 1))

    def step(self, actions: Array, running: Array) -> tuple[Array, Array, Array, Array]:
        """Rewards of actions [N, 2], clipped to the box, where `running` [N], else 0; every running row terminates.

        Returns states [N, 1], rewards [N], terminated [N], truncated [N]. Raises UserError for a running row's action
        that is not finite, or a wrong shape.
        """
        actions, running = np.asarray(actions, dtype=np.float64), np.asarray(running, dtype=bool)
        if actions.shape != (self.num_envs, 2) or running.shape != (self.num_envs,):
            raise UserError(f"step got actions {actions.shape} and running {running.shape}; "
                            f"expected {(self.num_envs, 2)} and {(self.num_envs,)}")  # fmt: skip
        if not np.isfinite(actions[running]).all():
            raise UserError("an action is NaN or infinite; the run has diverged: try a smaller learning_rate")
        rewards = np.where(running, self.bandit.reward(actions.clip(-self.max_action, self.max_action)), 0.0)
        return np.zeros((self.num_envs, 1)), rewards, running.copy(), np.zeros(self.num_envs, dtype=bool)

    def close(self) -> None:
        """Nothing to end."""
