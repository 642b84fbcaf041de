"""Compiled losses and captured CUDA graphs: the only file that compiles or captures.

Each stands in for the plain form and gives its numbers, compiled ones within rounding: `CapturedPeriod` for a period
of updates, `acting` for `agent.act`, `compile_methods` for a method.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from utils.files import first_line
from utils.training.interfaces import Generators, Learner, Policy

MODES = ("auto", "eager", "compile", "graph")

# On a CPU compiling costs about 70 s and saves about 3 ms a step (two-core AMD EPYC, benchmarks.training).
COMPILE_PAYS_FROM = 25_000

_WARM_UP = 3  # periods run before a capture, as CUDA graphs ask for
_CAPTURING = threading.Lock()  # PyTorch allows one capture at a time in a process


def choose_mode(mode: str, device: torch.device, steps: int) -> tuple[str, str]:
    """The mode to use and, in a few words, why. Raises ValueError for an unknown one or `graph` without CUDA."""
    if mode not in MODES:
        raise ValueError(f"unknown execution {mode!r}; known: {', '.join(MODES)}")
    if mode == "graph" and device.type != "cuda":
        raise ValueError(f"execution 'graph' needs a CUDA device, this run uses {device}; use compile, eager or auto")
    if mode != "auto":
        return mode, "as asked"
    if device.type == "cuda":
        return "graph", "a CUDA device"
    if steps >= COMPILE_PAYS_FROM:
        return "compile", f"a CPU run of {steps:,} steps, long enough to repay compiling"
    return "eager", f"a CPU run of {steps:,} steps, too short to repay compiling"


class CapturedPeriod:
    """One period of `agent.update` as a CUDA graph over fixed buffers. Built between two steps of a run.

    Which updates are due is captured as it is at the step it was built at: good for every period of the same phase.
    """

    def __init__(
        self,
        agent: Learner,
        batch: Callable[[Tensor], Mapping[str, Tensor]],
        indices: Tensor,
        draws: Mapping[str, Tensor],
    ) -> None:
        self.agent, self.batch, self.first = agent, batch, agent.step
        self.indices, self.draws = indices.clone(), {name: value.clone() for name, value in draws.items()}
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        saved = agent.state_dict()
        agent.prepare()

        def restore() -> None:  # warming up trains: put everything back as it was
            agent.load_state_dict(saved)
            agent.prepare()

        self._replay = _captured(self._run, agent.device, restore)
        agent.step = self.first  # the capture itself moved it, and nothing else

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
        self.indices.copy_(indices)
        for name, value in draws.items():
            self.draws[name].copy_(value)
        self._replay()
        self.agent.step = self.first + len(self.indices)


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
    """`agent.act` with the policy as a CUDA graph; one graph for each number of states."""

    def __init__(self, agent: Learner) -> None:
        self.agent = agent
        self._policies: dict[int, _CapturedPolicy] = {}

    def __call__(self, states: Tensor, rng: Generators, active: Tensor | None = None) -> Tensor:
        """As `agent.act`; `active` is not used, since a captured policy computes every row."""
        noise = self.agent.act_draws(rng, states.shape[1])
        if states.shape[1] not in self._policies:
            self._policies[states.shape[1]] = _CapturedPolicy(self.agent, states, noise)
        return self._policies[states.shape[1]](states, noise)


class _CapturedPolicy:
    """The policy for one number of states as a CUDA graph over fixed buffers."""

    def __init__(self, agent: Learner, states: Tensor, noise: Mapping[str, Tensor]) -> None:
        self.states = states.clone()
        self.noise = {name: value.clone() for name, value in noise.items()}
        self.actions = torch.zeros(*states.shape[:2], agent.action_dim, device=states.device)

        def run() -> None:
            with torch.no_grad():
                self.actions.copy_(agent.actions_in_chunks(self.states, self.noise))

        self._replay = _captured(run, agent.device, restore=lambda: None)

    def __call__(self, states: Tensor, noise: Mapping[str, Tensor]) -> Tensor:
        self.states.copy_(states)
        for name, value in noise.items():
            self.noise[name].copy_(value)
        self._replay()
        return self.actions.clone()
