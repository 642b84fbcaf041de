"""Numerical faults, seed by seed: numbers that are not finite end a seed, values that run away are announced.

The seeds of a process share no number, so one that is lost costs the others nothing. It is looked for once per epoch,
when the metrics are read and the host waits for the device anyway: between two looks nothing is different, so a
captured graph runs as it is.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.runs.columns import METRICS_FILE, RUNAWAY, STOPPED
from utils.training.interfaces import Learner

# Returns are at most max |r| / (1 - discount). Critics overshoot that by some per cent when all is well; when they
# run away they grow without end, so any small factor finds them, soon after.
RUNAWAY_FACTOR = 10
Q_METRIC = "q_mean"
_SAID = 80  # characters of an event in its warning


def value_bound(rewards: np.ndarray, discount: float | None) -> float:
    """|Q| beyond which values have run away: `RUNAWAY_FACTOR` times the largest that `rewards` allow, at least 1.

    `rewards` as the learner sees them, any shape. Without a discount factor below 1 there is no such bound: infinity.
    """
    if discount is None or discount >= 1:
        return math.inf
    return max(1.0, RUNAWAY_FACTOR * float(np.abs(rewards).max()) / (1 - discount))


class Watch:
    """Which seeds of `agent` are still running, and the last finite state of those that are not.

    A stopped seed is put back to the state it had at the last look at which all its numbers were finite, then and at
    every look that follows: it goes on taking part in the batched products, whose other seeds keep every bit, but
    what it computes is thrown away.
    """

    def __init__(self, agent: Learner, bound: float) -> None:
        self.agent, self.bound = agent, bound
        self.running = np.ones(agent.num_seeds, dtype=bool)
        self.announced = np.zeros(agent.num_seeds, dtype=bool)  # seeds whose values have run away
        self._finite, self._looked = agent.state_dict(), agent.step

    def look(self, means: Mapping[str, np.ndarray]) -> list[str]:
        """Take a look at each metric's mean [S] and at the agent's state. What happened to each seed, mostly "".

        What happened is also said in a warning, in a line.
        """
        state, self._looked = self.agent.state_dict(), self.agent.step
        names = [name for name, _ in _tensors(state)]
        finite = torch.stack([_finite(tensor) for _, tensor in _tensors(state)]).cpu().numpy()  # [tensors, S]
        events = []
        for k in range(self.agent.num_seeds):
            bad = [name for name, values in means.items() if not math.isfinite(values[k])]
            bad += [name for name, row in zip(names, finite, strict=True) if not row[k]]
            events.append(self._event(k, bad, float(means[Q_METRIC][k]) if Q_METRIC in means else 0.0))
        for seed, event in zip(self.agent.seeds, events, strict=True):
            if event:
                warnings.warn(f"seed {seed}, step {self.agent.step:,}: {_short(event)}", stacklevel=3)
        if self.running.all():
            self._finite = state
        else:
            self._finite = _choose(torch.as_tensor(self.running), state, self._finite)
            self.agent.load_state_dict(self._finite)
        return events

    def _event(self, k: int, bad: Sequence[str], value: float) -> str:
        if not self.running[k]:
            return ""
        if bad:
            self.running[k] = False
            return f"{STOPPED}: not finite: {' '.join(bad)}"
        if abs(value) > self.bound and not self.announced[k]:
            self.announced[k] = True
            return f"{RUNAWAY}: {Q_METRIC} {value:.3g} beyond {self.bound:.3g}"
        return ""

    def state_dict(self) -> dict[str, Any]:
        """Flags per seed; between two looks also the finite state of the last."""
        flags = {"running": torch.as_tensor(self.running), "announced": torch.as_tensor(self.announced)}
        return flags if self.agent.step == self._looked else {**flags, "finite": self._finite, "looked": self._looked}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue, the agent having its state already."""
        self.running, self.announced = saved["running"].numpy().copy(), saved["announced"].numpy().copy()
        self._finite, self._looked = self.agent.state_dict(), self.agent.step
        if "finite" in saved:
            now = self._finite
            self.agent.load_state_dict(saved["finite"])  # which checks it, and brings it to the device
            self._finite, self._looked = self.agent.state_dict(), int(saved["looked"])
            self.agent.load_state_dict(now)


def _short(event: str) -> str:
    return event if len(event) <= _SAID else f"{event[:_SAID].rsplit(' ', 1)[0]} ... (all of it in {METRICS_FILE})"


def _tensors(state: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Tensor]]:
    """The floating-point tensors of nested dicts with their dotted names."""
    found = []
    for name, value in state.items():
        if isinstance(value, Mapping):
            found += _tensors(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor) and value.is_floating_point():
            found.append((prefix + name, value))
    return found


def _finite(tensor: Tensor) -> Tensor:
    """Whether all of a seed's numbers are [S]."""
    return tensor.flatten(1).isfinite().all(dim=1) if tensor.dim() > 1 else tensor.isfinite()


def _choose(running: Tensor, state: Any, kept: Any) -> Any:
    """`state` for the seeds that are running, `kept` for the others; plain values as in `state`."""
    if isinstance(state, Mapping):
        return {name: _choose(running, value, kept[name]) for name, value in state.items()}
    if not isinstance(state, Tensor):
        return state
    return torch.where(running.to(state.device).view(-1, *[1] * (state.dim() - 1)), state, kept)
