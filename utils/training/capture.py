"""Compiled losses and captured CUDA graphs: the only file that compiles or captures.

Each stands in for the plain form and gives its numbers, compiled ones within rounding: `CapturedPeriod` for a period
of updates, `acting` for `agent.act`, `compile_methods` for a method. A graph proves itself before it is used: it is
replayed and compared with the same code run eagerly.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError
from utils.files import first_line
from utils.training.interfaces import Generators, Learner, Policy

MODES = ("auto", "eager", "compile", "graph")

# On a CPU compiling costs about 70 s and saves about 3 ms per step (two-core AMD EPYC, benchmarks.training).
COMPILE_PAYS_FROM = 25_000

_WARM_UP = 3  # periods run before a capture, as CUDA graphs ask for
# How far a replayed period may end from the eager one: a share of the way that the eager one went, and of its numbers.
# Equal kernels give equal bits; what was captured wrongly is off by the whole way.
_OF_THE_WAY, _OF_THE_NUMBERS = 1e-2, 1e-6
_METRICS_WITHIN: dict[str, Any] = {"rtol": 1e-2, "atol": 1e-4, "equal_nan": True}
_ACTIONS_WITHIN: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-3, "equal_nan": True}
_CAPTURING = threading.Lock()  # PyTorch allows one capture at a time in a process


def choose_mode(mode: str, device: torch.device, steps: int, kept: str | None = None) -> tuple[str, str]:
    """The mode to use and, in a few words, why; `kept`, that of a run which goes on, stays.

    Raises UserError for an unknown one or `graph` without CUDA.
    """
    if mode not in MODES:
        raise UserError(f"unknown execution {mode!r}; known: {', '.join(MODES)}")
    mode = kept or mode
    if mode == "graph" and device.type != "cuda":
        raise UserError(f"execution 'graph' needs a CUDA device, this run uses {device}; use compile, eager or auto")
    if mode != "auto":
        return mode, "as it began" if kept else "as asked"
    if device.type == "cuda":
        return "graph", "a CUDA device"
    if steps >= COMPILE_PAYS_FROM:
        return "compile", f"a CPU run of {steps:,} steps, long enough to repay compiling"
    return "eager", f"a CPU run of {steps:,} steps, too short to repay compiling"


class WrongCapture(Exception):
    """A graph that does something else than what was captured."""


class CapturedPeriod:
    """One period of `agent.update` as a CUDA graph over fixed buffers. Built between two steps of a run.

    Which updates are due is captured as it is at the step it was built at: good for every period of the same phase.
    The agent is afterwards as it was before, also where building raises: WrongCapture for a graph that does not repeat
    what the period does on these rows and draws, and whatever a capture raises.
    """

    def __init__(
        self,
        agent: Learner,
        batch: Callable[[Tensor], Mapping[str, Tensor]],
        indices: Tensor,
        draws: Mapping[str, Tensor],
    ) -> None:
        self.agent, self.batch, self.first = agent, batch, agent.step
        # Captured on other numbers than it is tried on: a graph that does not read its buffers is found out.
        self.indices, self.draws = indices.flip(-1), {name: value.flip(-1) for name, value in draws.items()}
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        saved = agent.state_dict()
        agent.prepare()

        def restore() -> None:  # warming up trains: put everything back as it was
            agent.load_state_dict(saved)
            agent.prepare()

        try:
            self._replay = _captured(self._run, agent.device, restore)
            self._fill(indices, draws)
            self._prove(saved, restore)
        finally:
            restore()

    def _prove(self, saved: Mapping[str, Any], restore: Callable[[], None]) -> None:
        """Raises WrongCapture unless a replay from `saved` leaves what the period run eagerly leaves."""
        outcomes = []
        for run in (self._replay, self._run):
            restore()
            run()
            sums = {name: total.clone() for name, total in self.sums.items()}
            outcomes.append((dict(_tensors(self.agent.state_dict())), sums))
        (replayed, replayed_sums), (eager, sums) = outcomes
        for name, start in _tensors(saved):
            if not _near(replayed[name], eager[name], start):
                raise WrongCapture(f"replayed, {name} is not what the same steps make of it eagerly")
        for name, total in sums.items():
            if not torch.allclose(replayed_sums[name], total, **_METRICS_WITHIN):
                raise WrongCapture(f"replayed, the metric {name} is not what it is eagerly")

    def _run(self) -> None:
        """The period, as it is captured."""
        self.agent.step = self.first
        for total in self.sums.values():
            total.zero_()
        self.counts = {}
        for k, rows in enumerate(self.indices):
            metrics = self.agent.update(self.batch(rows), {name: value[k] for name, value in self.draws.items()})
            with torch.no_grad():
                for name, value in metrics.items():
                    if value is self.agent.not_due:
                        continue
                    if name not in self.sums:  # in the warm-up only: what is made here would be captured
                        self.sums[name] = torch.zeros_like(value)
                    self.sums[name].add_(value)
                    self.counts[name] = self.counts.get(name, 0) + 1

    def replay(self, indices: Tensor, draws: Mapping[str, Tensor]) -> None:
        """Run the period from `agent.step` on, on these rows [period, S, B] and draws [period, ...].

        `sums` holds its metrics' sums [S] afterwards, over `counts` steps.
        """
        self.first = self.agent.step
        self.agent.prepare()
        self._fill(indices, draws)
        self._replay()
        self.agent.step = self.first + len(self.indices)

    def _fill(self, indices: Tensor, draws: Mapping[str, Tensor]) -> None:
        self.indices.copy_(indices)
        for name, value in draws.items():
            self.draws[name].copy_(value)


def _tensors(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a nested state under its dotted name."""
    for name, value in state.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, Mapping):
            yield from _tensors(value, f"{prefix}{name}.")


def _near(replayed: Tensor, eager: Tensor, start: Tensor) -> bool:
    """Whether two outcomes of the same steps from `start` differ by rounding alone; NaNs must stand in both."""
    a, b, c = (x.double().nan_to_num() for x in (replayed, eager, start))
    most = _OF_THE_WAY * (b - c).norm() + _OF_THE_NUMBERS * b.norm()
    return torch.equal(replayed.isnan(), eager.isnan()) and bool((a - b).norm() <= most)


def _captured(run: Callable[[], None], device: torch.device, restore: Callable[[], None]) -> Callable[[], None]:
    """`run` as a CUDA graph: a function that replays it. It is run a few times first, then `restore` is called.

    Warm-up and capture share one stream of `device`: libraries set up their workspaces a stream, and the capture's own
    default stream belongs to whichever device is current, where a graph for another device would stay empty.
    """
    with torch.cuda.device(device):
        side, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                run()
        current.wait_stream(side)
        restore()
        graph = torch.cuda.CUDAGraph()
        # Another thread may use the device meanwhile, an evaluation beside training, but not capture.
        with _CAPTURING, torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            run()
    return graph.replay


def forget_compiled() -> None:
    """Drop all compiled code of this process, for the next agent.

    PyTorch compiles one method for 8 settings or shapes at most; a ninth agent of a kind would stay uncompiled.
    """
    torch.compiler.reset()


def compile_methods(agent: Learner, names: Sequence[str], trial: Callable[[], None], dynamic: bool) -> bool:
    """Replace these methods of `agent` by compiled ones, if `trial` then runs; else say why not, in one line."""
    plain = {name: getattr(agent, name) for name in names}
    try:
        for name, function in plain.items():
            setattr(agent, name, torch.compile(function, dynamic=dynamic))
        with warnings.catch_warnings():  # full float32 is meant: the published numerics
            warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
            trial()
    except Exception as error:  # whatever the compiler tool-chain raises: the run goes on without it
        for name, function in plain.items():
            setattr(agent, name, function)
        warnings.warn(f"torch.compile failed, {' and '.join(names)} stay uncompiled: {first_line(error)}", stacklevel=2)
        return False
    return True


def acting(agent: Learner, mode: str) -> Policy:
    """`agent.act`, run in `mode`. Compiled or captured, the policy gives the same actions within rounding."""
    if agent.device.type == "cuda" and mode == "graph":
        return CapturedActions(agent)
    if mode == "compile" and agent.ACTS_COMPILED:

        def trial() -> None:
            # Two counts of rows: the compiled policy must take any, since ended episodes drop out.
            rngs = [torch.Generator(device=agent.device).manual_seed(0) for _ in range(agent.num_seeds)]
            for rows in (5, 3):
                agent.act(torch.zeros(agent.num_seeds, rows, agent.state_dim, device=agent.device), rngs)

        compile_methods(agent, ("actions_for",), trial, dynamic=True)
    return agent.act


class CapturedActions:
    """`agent.act` with the policy as a CUDA graph; one graph for each number of states.

    Where capturing fails, or a graph is found wrong, the policy is compiled instead, with one line.
    """

    def __init__(self, agent: Learner) -> None:
        self.agent = agent
        self._policies: dict[int, _CapturedPolicy] = {}
        self._instead: Policy | None = None

    def __call__(self, states: Tensor, rng: Generators, active: Tensor | None = None) -> Tensor:
        """As `agent.act`; `active` is not used, since a captured policy computes every row."""
        if self._instead is not None:
            return self._instead(states, rng, active)
        noise = self.agent.act_draws(rng, states.shape[1])
        if states.shape[1] not in self._policies:
            try:
                self._policies[states.shape[1]] = _CapturedPolicy(self.agent, states, noise)
            except Exception as error:  # whatever a capture raises
                warnings.warn(f"the policy runs without a CUDA graph: {first_line(error)}", stacklevel=2)
                self._policies, self._instead = {}, acting(self.agent, "compile")
                with torch.no_grad():
                    return self.agent.actions_in_chunks(states, noise)  # of the numbers that are drawn already
        return self._policies[states.shape[1]](states, noise)


class _CapturedPolicy:
    """The policy for one number of states as a CUDA graph over fixed buffers.

    Raises WrongCapture where a replay does not give the actions that the policy gives for these states.
    """

    def __init__(self, agent: Learner, states: Tensor, noise: Mapping[str, Tensor]) -> None:
        # Captured on other numbers than it is tried on, as a period.
        self.states = states.flip(1)
        self.noise = {name: value.flip(1) for name, value in noise.items()}
        self.actions = torch.zeros(*states.shape[:2], agent.action_dim, device=states.device)

        def run() -> None:
            with torch.no_grad():
                self.actions.copy_(agent.actions_in_chunks(self.states, self.noise))

        self._replay = _captured(run, agent.device, restore=lambda: None)
        replayed = self(states, noise)
        run()
        if not torch.allclose(replayed, self.actions, **_ACTIONS_WITHIN):
            raise WrongCapture("replayed, the policy does not give the actions that it gives eagerly")

    def __call__(self, states: Tensor, noise: Mapping[str, Tensor]) -> Tensor:
        self.states.copy_(states)
        for name, value in noise.items():
            self.noise[name].copy_(value)
        self._replay()
        return self.actions.clone()
