"""Episodes of all seeds in lockstep: one call of the policy per time step for seeds x episodes x candidates.

Returns stay as they are, a row per episode; every mean and normalised score is made from them later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from utils.errors import UserError
from utils.files import first_line
from utils.process import Abandoned, never
from utils.seeding import torch_generators
from utils.training.interfaces import Environments, Generators, Learner, Policy

EVAL_SEED_OFFSET = 100  # the published code evaluates every time from the environment seed `seed + 100`


@dataclass(frozen=True)
class Episodes:
    """returns [S, E] undiscounted, lengths [S, E] in steps, unstable [S, E]: ended by a simulation that blew up."""

    returns: np.ndarray
    lengths: np.ndarray
    unstable: np.ndarray


def environment_rngs(seeds: Sequence[int], evaluation: int, fresh: bool) -> list[np.random.Generator]:
    """The generator of each seed's episodes at evaluation number `evaluation` (0, 1, ...).

    Published scheme: the same environment seed, seed + 100, at every evaluation, so the test episodes are those on
    which the best checkpoint is chosen (D8). `fresh`: other start states every time, from (seed, number).
    """
    if fresh:
        return [np.random.default_rng([seed + EVAL_SEED_OFFSET, evaluation]) for seed in seeds]
    return [np.random.default_rng(seed + EVAL_SEED_OFFSET) for seed in seeds]


def acting_generators(seeds: Sequence[int], step: int, device: torch.device | str) -> list[torch.Generator]:
    """What each seed's policy draws from in the evaluation at a gradient step."""
    return torch_generators(seeds, f"acting at {step}", device)


def evaluate(
    act: Policy,
    environments: Environments,
    seeds: Sequence[int],
    rngs: Sequence[np.random.Generator],
    generators: Generators,
    device: torch.device | str,
    played: np.ndarray | None = None,
) -> Episodes:
    """One episode in each of S x E environments, row k E + e being episode e of seed number k.

    act: (states [S, E, state_dim], generators, active [S, E]) -> actions [S, E, action_dim]. rngs: one per seed, from
    which its episodes' start states are drawn in order, as successive resets of one environment draw them.
    Rewards are undiscounted and include the last step's. played [S] bool: seeds that are evaluated, all by default;
    the others' episodes have length 0. Raises ValueError where S does not divide the environments.
    """
    num_seeds = len(seeds)
    episodes, rest = divmod(environments.num_envs, num_seeds)
    if rest or episodes == 0:
        raise ValueError(f"{environments.num_envs} environments cannot be shared out among {num_seeds} seeds")
    unstable_before = environments.unstable.copy()
    states = environments.reset([rng for rng in rngs for _ in range(episodes)])
    returns = np.zeros(environments.num_envs)
    lengths = np.zeros(environments.num_envs, dtype=np.int64)
    running = np.repeat(np.ones(num_seeds, dtype=bool) if played is None else played, episodes)
    while running.any():
        inputs = torch.as_tensor(states, dtype=torch.float32).view(num_seeds, episodes, -1).to(device)
        active = torch.as_tensor(running).view(num_seeds, episodes).to(device)
        actions = act(inputs, generators, active).flatten(0, 1).cpu().numpy()  # the one wait for the device per step
        states, rewards, terminated, truncated = environments.step(actions, running)
        returns[running] += rewards[running]
        lengths += running
        running &= ~(terminated | truncated)
    shape = (num_seeds, episodes)
    unstable = environments.unstable - unstable_before
    return Episodes(returns.reshape(shape), lengths.reshape(shape), unstable.reshape(shape) > 0)


class Evaluator:
    """Evaluates an agent at steps of its training, at once or, with a `snapshot`, beside it in a thread of its own.

    snapshot: a second agent of the same kind, into which the weights are copied when an evaluation begins; None
    evaluates `agent` itself while the caller waits. Both ways give the same episodes. One evaluation runs at a time.
    act: how the evaluated agent acts (`capture.acting`). What it draws follows from the seed and the step, not
    from earlier evaluations: it is the same alone and in company, and whatever became of other seeds. stop: looked at
    before every time step; once it is true what is being played is left, and stays under way, to be made again by a
    process that resumes. `share`: of the time steps that are played by now; None between evaluations.
    """

    def __init__(
        self,
        agent: Learner,
        snapshot: Learner | None,
        act: Policy,
        environments: Environments,
        fresh: bool,
        stop: Callable[[], bool] = never,
    ) -> None:
        self.agent, self.snapshot, self.act = agent, snapshot, act
        self.environments, self.fresh = environments, fresh
        self.share: float | None = None
        self._stop = stop
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="evaluation")
        self._begun: _Begun | None = None
        on_gpu = snapshot is not None and agent.device.type == "cuda"
        self._stream = torch.cuda.Stream(agent.device) if on_gpu else None

    def begin(self, played: np.ndarray | None = None) -> None:
        """Start evaluating the agent as it is now, the seeds in `played` [S]. The one before must be collected."""
        if self._begun is not None:
            raise RuntimeError("an evaluation is under way; collect it first")
        played = np.ones(self.agent.num_seeds, dtype=bool) if played is None else played.copy()
        if self.snapshot is not None:
            _copy({name: network.flat for name, network in self.agent.networks.items()}, self.snapshot)
        self._begin(self.agent.step, played)

    @property
    def beside(self) -> bool:
        """Whether training goes on meanwhile."""
        return self.snapshot is not None

    @property
    def under_way(self) -> bool:
        """Whether an evaluation has begun that was not collected yet."""
        return self._begun is not None

    def collect(self, wait: bool) -> tuple[int, Episodes] | None:
        """The step and episodes of the evaluation under way; None if there is none, it is not done and not waited for,
        or it was left. An error that the evaluation raised is raised here.
        """
        begun = self._begun
        if begun is None:
            return None
        if begun.weights is not None:
            self._play_again(begun, begun.weights)
        if not (wait or begun.future.done()):
            return None
        self._begun = None
        if (episodes := begun.future.result()) is None:
            self._begun = begun
            return None
        return begun.step, episodes

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """What `resume` needs to make the evaluation under way again: its step, seeds and weights; {} without one."""
        if self._begun is None:
            return {}
        evaluated, seeds = self.snapshot or self.agent, self.agent.num_seeds
        flats = self._begun.weights or {name: network.flat for name, network in evaluated.networks.items()}
        weights = {name: flat.view(seeds, -1).clone() for name, flat in flats.items()}
        return {"step": self._begun.step, "played": torch.as_tensor(self._begun.played), "networks": weights}

    @torch.no_grad()
    def resume(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Begin again what was under way when each seed was saved: its part of `state_dict`, {} where nothing was.

        Without a snapshot it is played when it is collected. The agent has its state already. Raises UserError where a
        state is not of this agent.
        """
        try:
            if not any(map(bool, states)):
                return
            (step,) = {int(state["step"]) for state in states if state}
            played = np.array([bool(state) and bool(state["played"]) for state in states])
            own = {name: network.flat.clone() for name, network in self.agent.networks.items()}
            weights = {name: flat.clone() for name, flat in own.items()}
            for k, state in enumerate(states):
                for name, flat in weights.items() if state else ():
                    flat.view(len(states), -1)[k].copy_(state["networks"][name].view(-1))
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            reason = first_line(error)
            raise UserError(f"the checkpoint's evaluation does not fit this run ({reason}); "
                            "use --overwrite or another --dir") from error  # fmt: skip
        if self.snapshot is None:
            self._begun = _Begun(step, played, Future(), weights)
            return
        _copy(weights, self.snapshot)
        self._begin(step, played)

    def _begin(self, step: int, played: np.ndarray) -> None:
        """Evaluate what the snapshot, or without one the agent, holds."""
        future: Future[Episodes | None]
        if self.snapshot is None:
            future = Future()
            future.set_result(self._play(step, played))
        else:
            if self._stream is not None:
                self._stream.wait_stream(torch.cuda.current_stream(self.agent.device))
            future = self._thread.submit(self._play, step, played)
        self._begun = _Begun(step, played, future)

    @torch.no_grad()
    def _play_again(self, begun: _Begun, weights: Mapping[str, torch.Tensor]) -> None:
        """Play what was resumed with its own weights, and give the agent those back that it has by now."""
        own = {name: network.flat.clone() for name, network in self.agent.networks.items()}
        _copy(weights, self.agent)
        try:
            episodes = self._play(begun.step, begun.played)
        finally:
            _copy(own, self.agent)
        if episodes is not None:
            begun.weights = None
        begun.future = Future()
        begun.future.set_result(episodes)

    def _play(self, step: int, played: np.ndarray) -> Episodes | None:
        """An evaluation's episodes; None where it was left before its end."""
        seeds, device, limit, done = self.agent.seeds, self.agent.device, self.environments.max_episode_steps, 0

        def act(states: torch.Tensor, rng: Generators, active: torch.Tensor | None) -> torch.Tensor:
            nonlocal done
            if self._stop():
                raise Abandoned
            self.share, done = done / limit, done + 1
            return self.act(states, rng, active)

        rngs = environment_rngs(seeds, step, self.fresh)
        generators = acting_generators(seeds, step, device)
        try:
            with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
                return evaluate(act, self.environments, seeds, rngs, generators, device, played)
        except Abandoned:
            return None
        finally:
            self.share = None

    def close(self) -> None:
        """Wait for what is under way, unless it is to stop, and end the thread."""
        self._thread.shutdown()


@dataclass
class _Begun:
    """An evaluation under way: of which step, which seeds [S] play, and what comes of it, None where it was left.

    weights: those of a resumed one that is still to be played in the agent's place.
    """

    step: int
    played: np.ndarray
    future: Future[Episodes | None]
    weights: Mapping[str, torch.Tensor] | None = None


@torch.no_grad()
def _copy(weights: Mapping[str, torch.Tensor], agent: Learner) -> None:
    for name, flat in weights.items():
        agent.networks[name].flat.copy_(flat)
