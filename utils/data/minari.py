"""`--dataset minari:ID`: sets of the Minari library, with the environment that they name for evaluation.

Minari keeps an episode's last observation, so every recorded step becomes a transition with its true successor, one
cut off by a time limit too; `not_dones` is 0 at terminations alone. (D4RL's files lack that observation and drop the
step.) The package is optional: `requirements-optional.txt`.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from utils.data import d4rl
from utils.data.dataset import Dataset
from utils.data.download import MAX_BYTES
from utils.data.rows import ACTION_TOLERANCE, Rows
from utils.errors import UserError

Array = np.ndarray
PREFIX = "minari:"


def load(source: str) -> Dataset:
    """The transitions of a set, from Minari's cache, else downloaded by Minari.

    source: "minari:ID", for instance "minari:mujoco/hopper/medium-v0". Observations are flat boxes or dictionaries of
    them, joined in alphabetical order; actions a bounded box, scaled to [-1, 1] as in D4RL.
    Raises UserError without the package, for an unknown set, and for one that is not sound or not of this kind.
    """
    opened = _open(source)
    columns = _columns(source, opened)
    info = {
        "path": str(opened.storage.data_path),
        **_digest(Path(opened.storage.data_path)),
        "rows": len(columns["rewards"]),
        "minari_version": opened.minari_version,
    }
    return Dataset(
        states=columns["states"],
        actions=columns["actions"],
        rewards=columns["rewards"][:, None],
        next_states=columns["next_states"],
        not_dones=1 - columns["terminations"][:, None].astype(np.float32),
        env_name=opened.env_spec.id if opened.env_spec else source,
        source=source,
        info=info,
    )


def read_rows(source: str) -> Rows:
    """The recorded steps in D4RL's form, for `utils.describe`; truncations are its timeouts."""
    columns = _columns(source, _open(source))
    return Rows(
        observations=columns["states"],
        actions=columns["actions"],
        rewards=columns["rewards"],
        terminals=columns["terminations"],
        timeouts=columns["truncations"],
    )


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------
def _open(source: str) -> Any:
    """Minari's own object for a set, downloaded by Minari where it is not in its cache."""
    try:
        import minari
    except ImportError as error:
        raise UserError(
            f"{source} needs the minari package; install it with pip install 'minari[hdf5,arrow,hf]'"
        ) from error
    name = source.removeprefix(PREFIX)
    try:
        return minari.load_dataset(name)
    except FileNotFoundError:
        pass
    except Exception as error:  # Minari asserts and raises what its storages do
        raise UserError(f"{source} cannot be opened: {_one_line(error)}") from error
    try:
        size = minari.list_remote_datasets(prefix=name).get(name, {}).get("dataset_size")  # in MB, as its maker wrote
        if float(size or 0) * 1e6 > MAX_BYTES:
            raise UserError(f"{source} has {float(size) / 1000:,.1f} GB; sets of up to {MAX_BYTES >> 30} GiB are "
                            f"downloaded here, larger ones by 'minari download {name}'")  # fmt: skip
        return minari.load_dataset(name, download=True)
    except UserError:
        raise
    except Exception as error:  # whatever the cloud client of the day raises
        raise UserError(
            f"{source} is not in Minari's cache and cannot be downloaded ({_one_line(error)}); "
            "'minari list remote' names the sets there are, $MINARI_DATASETS_PATH says where they are kept"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def _unsound(source: str) -> Iterator[None]:
    """Minari's storages report damage as any of these."""
    try:
        yield
    except UserError:
        raise
    except (OSError, KeyError, IndexError, RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise UserError(f"{source} cannot be read: {_one_line(error)}") from error


def _columns(source: str, opened: Any) -> dict[str, Array]:
    """All steps of all episodes, one after another, into arrays of their final size."""
    state_dim = _width(source, opened.observation_space)
    low, high = _action_box(source, opened.action_space)
    with _unsound(source):
        size = opened.total_steps
        columns = {
            "states": np.empty((size, state_dim), np.float32),
            "actions": np.empty((size, len(low)), np.float32),
            "rewards": np.empty(size, np.float32),
            "next_states": np.empty((size, state_dim), np.float32),
            "terminations": np.empty(size, bool),
            "truncations": np.empty(size, bool),
        }
        start = 0
        for episode in opened.iterate_episodes():
            stop = start + len(episode.rewards)
            observations = flatten(episode.observations)
            if len(observations) != stop - start + 1 or stop > size:
                raise UserError(f"{source}: the lengths of episode {episode.id} do not fit together")
            columns["states"][start:stop] = observations[:-1]
            columns["next_states"][start:stop] = observations[1:]
            columns["actions"][start:stop] = _scaled(np.asarray(episode.actions), low, high)
            for name in ("rewards", "terminations", "truncations"):
                columns[name][start:stop] = np.asarray(getattr(episode, name)).reshape(-1)
            start = stop
    if start != size or size == 0:
        raise UserError(f"{source} holds {start} steps where its metadata says {size}; it must hold some, and those")
    for name in ("states", "next_states", "actions", "rewards"):
        if not np.isfinite([columns[name].min(), columns[name].max()]).all():
            raise UserError(f"{source}: {name} holds NaN or infinity; every number must be finite")
    if np.abs(columns["actions"]).max() > 1 + ACTION_TOLERANCE:
        raise UserError(f"{source}: actions leave the action box that the set itself names")
    return columns


def flatten(observations: Any) -> Array:
    """Observations [..., d] of a box, or of a dictionary of boxes joined by alphabetical key: float32."""
    if isinstance(observations, dict):
        return np.concatenate([flatten(observations[key]) for key in sorted(observations)], axis=-1)
    return np.asarray(observations, dtype=np.float32)


def _width(source: str, space: gymnasium.Space) -> int:
    if isinstance(space, gymnasium.spaces.Dict):
        return sum(_width(source, part) for part in space.spaces.values())
    if isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 1:
        return space.shape[0]
    raise UserError(f"{source} has observations {space}; vectors of numbers are needed")


def _action_box(source: str, space: gymnasium.Space) -> tuple[Array, Array]:
    if not (isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 1 and space.is_bounded()):
        raise UserError(f"{source} has actions {space}; a bounded box of vectors is needed")
    return space.low.astype(np.float64), space.high.astype(np.float64)


def _scaled(actions: Array, low: Array, high: Array) -> Array:
    """From the box [low, high] to [-1, 1]; exact where it is [-1, 1] already."""
    return 2 * (actions - low) / (high - low) - 1


def _digest(folder: Path) -> dict[str, Any]:
    """Bytes of all files of a set, and one SHA-256 over their names and contents, for `config.json`."""
    digest, size = hashlib.sha256(), 0
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()} {d4rl.file_sha256(path)}\n".encode())
        size += path.stat().st_size
    return {"bytes": size, "sha256": digest.hexdigest()}


# --------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class EnvironmentSpec:
    """The environment in which a set's policies are evaluated, and the returns that score 0 and 100 where known."""

    source: str
    spec: gymnasium.envs.registration.EnvSpec
    max_episode_steps: int
    min_score: float | None
    max_score: float | None


def environment_spec(source: str) -> EnvironmentSpec:
    """The set's evaluation environment where it names one apart, else the one it was collected in.

    Without a time limit of its own the environment gets the longest recorded episode's length.
    Raises UserError where the set names no environment, or one that cannot be made here.
    """
    opened = _open(source)
    try:
        environment = opened.recover_environment(eval_env=True)
    except (gymnasium.error.Error, ImportError, ValueError) as error:
        raise UserError(f"the environment of {source} cannot be made: {_one_line(error)}") from error
    spec = environment.spec
    environment.close()
    with _unsound(source):
        lengths = [int(entry["total_steps"]) for entry in opened.storage.get_episode_metadata(opened.episode_indices)]
    return EnvironmentSpec(source, spec, spec.max_episode_steps or max(lengths), *_reference_scores(opened))


def reference_scores(source: str) -> tuple[float, float] | None:
    """The returns that score 0 and 100, where the set has them."""
    low, high = _reference_scores(_open(source))
    return None if low is None or high is None else (low, high)


def _reference_scores(opened: Any) -> tuple[float | None, float | None]:
    metadata = opened.storage.metadata
    return metadata.get("ref_min_score"), metadata.get("ref_max_score")


def normalized_score(source: str, returns: Array) -> Array:
    """D4RL's percentage under the set's own reference scores; NaN where it has none."""
    low, high = reference_scores(source) or (np.nan, np.nan)
    return 100.0 * (returns - low) / (high - low)


def make_lockstep(source: str, num_envs: int, **kwargs: Any) -> MinariEnvs:
    """`num_envs` environments of a set, stepped together; UserError where they cannot be made.

    `kwargs` go on to each environment: `frame` needs `render_mode="rgb_array"`.
    """
    return MinariEnvs(environment_spec(source), num_envs, **kwargs)


class MinariEnvs:
    """N environments of any kind, one after another in this process, behind the interface of `LockstepEnvs`.

    States are float32 [N, state_dim], flattened as `load` does; actions lie in [-1, 1] and are scaled to the
    environment's box. A row that does not run is not stepped and keeps its last state.
    """

    max_action = 1.0

    def __init__(self, spec: EnvironmentSpec, num_envs: int, **kwargs: Any) -> None:
        if num_envs < 1:
            raise UserError(f"num_envs is {num_envs}; at least one environment is needed")
        self.env_name, self.num_envs = spec.spec.id, num_envs
        self.max_episode_steps = spec.max_episode_steps
        kwargs["max_episode_steps"] = spec.max_episode_steps
        try:
            self._envs = [gymnasium.make(spec.spec, **kwargs) for _ in range(num_envs)]
        except (gymnasium.error.Error, TypeError) as error:  # what an environment does not take
            raise UserError(f"the environment of {spec.source} cannot be made: {_one_line(error)}") from error
        self.state_dim = _width(spec.source, self._envs[0].observation_space)
        self._low, self._high = _action_box(spec.source, self._envs[0].action_space)
        self._type = self._envs[0].action_space.dtype
        self.action_dim = len(self._low)
        self.unstable = np.zeros(num_envs, dtype=np.int64)
        self._states = np.zeros((num_envs, self.state_dim), dtype=np.float32)

    def reset(self, rngs: Sequence[np.random.Generator]) -> Array:
        """Start an episode in every row -> states [N, state_dim]; row i is seeded by a draw from rngs[i]."""
        if len(rngs) != self.num_envs:
            raise UserError(f"reset got {len(rngs)} generators for {self.num_envs} environments")
        for row, (env, rng) in enumerate(zip(self._envs, rngs, strict=True)):
            self._states[row] = flatten(env.reset(seed=int(rng.integers(2**31)))[0])
        return self._states.copy()

    def step(self, actions: Array, running: Array) -> tuple[Array, Array, Array, Array]:
        """One step of the rows that run -> states [N, state_dim], rewards, terminated, truncated [N].

        actions [N, action_dim] in [-1, 1], clipped; running [N] bool. Raises UserError for NaN in a row that runs.
        """
        actions, running = np.asarray(actions, dtype=np.float64), np.asarray(running, dtype=bool)
        if not np.isfinite(actions[running]).all():
            raise UserError("an action is NaN or infinite")
        scaled = self._low + (np.clip(actions, -1, 1) + 1) / 2 * (self._high - self._low)
        rewards = np.zeros(self.num_envs)
        terminated, truncated = np.zeros((2, self.num_envs), dtype=bool)
        for row in np.flatnonzero(running):
            state, rewards[row], terminated[row], truncated[row], _ = self._envs[row].step(
                scaled[row].astype(self._type)
            )
            self._states[row] = flatten(state)
        return self._states.copy(), rewards, terminated, truncated

    @property
    def fps(self) -> float:
        """Frames that the environment means for a second of its time; 30 where it does not say."""
        return float(self._envs[0].metadata.get("render_fps", 30))

    def frame(self) -> Array:
        """Row 0 as it is now, uint8 [height, width, 3]. Raises UserError where the environment draws none."""
        try:
            frame = self._envs[0].render()
        except Exception as error:  # whatever a third party's environment, or OpenGL, may raise
            raise UserError(f"{self.env_name} cannot be drawn here: {_one_line(error)}") from error
        if not isinstance(frame, np.ndarray):
            raise UserError(f"{self.env_name} draws no frames")
        return frame

    def close(self) -> None:
        """Free the environments; they cannot be used afterwards."""
        for env in self._envs:
            env.close()
        self._envs = []
