"""How an agent's updates are run: eagerly, compiled, or as a captured CUDA graph. All give the same numbers.

`Runner` owns the order of things that every mode shares: random numbers are drawn in blocks of a few periods, seed
by seed, so a block holds the same numbers in every mode, alone and in company. Nothing here waits for the device
until metrics are read. This is the only file that compiles or captures.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from utils.data.dataset import Columns
from utils.errors import UserError
from utils.files import first_line
from utils.seeding import torch_generators

__all__ = ["COMPILE_PAYS_FROM", "MODES", "CapturedActions", "Runner", "acting", "choose_mode", "forget_compiled"]

MODES = ("auto", "eager", "compile", "graph")

# On a CPU compiling costs about 70 s and saves about 3 ms a step (two-core AMD EPYC, benchmarks.training).
COMPILE_PAYS_FROM = 25_000

_BLOCK = 20  # steps whose random numbers are drawn at once; rounded up to a whole number of periods
_WARM_UP = 3  # periods run before a capture, as CUDA graphs ask for
PLAN_SHOWN_AFTER = 5  # seconds after which a plan shows its progress, on a terminal
_CAPTURING = threading.Lock()  # PyTorch allows one capture at a time in a process


class Learner(Protocol):
    """What is needed of an agent."""

    COMPILED: Sequence[str]
    step: int
    seeds: Sequence[int]
    num_seeds: int
    device: torch.device
    planned: Mapping[str, int]
    PLAN_REPEATS: bool

    @property
    def period(self) -> int: ...
    def phase(self, step: int) -> int: ...
    def schedule(self, step: int) -> tuple[float, ...]: ...
    def prepare(self) -> None: ...
    def observe(self, transitions: Any) -> None: ...
    def plan_step(self, step: int) -> int | None: ...
    def plan(self, transitions: Any, rng: Sequence[torch.Generator], columns: Mapping[str, Tensor]) -> None: ...
    def draw(self, rng: Sequence[torch.Generator], batch_size: int, steps: int) -> dict[str, Tensor]: ...
    def gradient_step(
        self, batch: Mapping[str, Tensor], draws: Mapping[str, Tensor], step: int
    ) -> dict[str, Tensor]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, saved: Mapping[str, Any]) -> None: ...


class Transitions(Protocol):
    """What is needed of a dataset on the device (`utils.data.dataset.Table`); `observe` and `plan` read more of it."""

    size: int

    @property
    def device(self) -> torch.device: ...

    def draw_indices(self, generators: Sequence[torch.Generator], batch_size: int, steps: int) -> Tensor: ...
    def gather(self, indices: Tensor) -> dict[str, Tensor]: ...


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


class Runner:
    """Runs updates of `agent` on batches of `table`.

    `generators`: one a seed on the table's device; rows and draws come from it. `mode`: eager, compile or graph.
    """

    def __init__(
        self, agent: Learner, table: Transitions, batch_size: int, generators: Sequence[torch.Generator], mode: str
    ) -> None:
        self.agent, self.table, self.batch_size, self.generators = agent, table, batch_size, list(generators)
        self.block = agent.period * math.ceil(_BLOCK / agent.period)
        self.mode = mode
        self._position = self.block  # steps of the block that are used up
        self._before_block = [g.get_state() for g in self.generators]
        self._indices: Tensor | None = None
        self._draws: dict[str, Tensor] = {}
        self._graphs: dict[int, _CapturedPeriod] = {}
        agent.observe(table)
        self._plan = _Plan(agent, table) if agent.planned else None
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        if mode in ("compile", "graph"):
            self._compile()

    # --- Running -----------------------------------------------------------------------------------

    def run(self, steps: int) -> None:
        """`steps` gradient steps; their metrics are added to what `metrics` returns next."""
        while steps > 0:
            self._refill()
            done = self._run_some(min(steps, self.block - self._position))
            self._position += done
            steps -= done

    def metrics(self) -> dict[str, Tensor]:
        """Each metric's mean [S] over the steps since the last call at which it was due. Starts anew."""
        means = {name: total / self._counts[name] for name, total in self._sums.items() if self._counts[name]}
        for total in self._sums.values():
            total.zero_()
        self._counts = dict.fromkeys(self._counts, 0)
        return means

    def _refill(self) -> None:
        if self._position < self.block and self._indices is not None:
            return
        if self._position >= self.block:
            self._before_block = [g.get_state() for g in self.generators]
            self._position = 0
        self._indices = self.table.draw_indices(self.generators, self.batch_size, self.block)
        self._draws = self.agent.draw(self.generators, self.batch_size, self.block)

    def _run_some(self, steps: int) -> int:
        """Up to `steps` steps from the current block; returns how many."""
        agent, period = self.agent, self.agent.period
        if self._plan is not None:
            self._plan.refresh(agent.step)
        whole = self.mode == "graph" and agent.step % period == 0 and steps >= period
        if whole and self._constant(agent.step, period):
            self._replay(agent.step, period)
            return period
        agent.prepare()
        at = self._position
        batch = self.batch(self._indices[at])
        metrics = agent.gradient_step(batch, {name: value[at] for name, value in self._draws.items()}, agent.step)
        agent.step += 1
        with torch.no_grad():
            for name, value in metrics.items():
                self._sum(name, value).add_(value)
                self._counts[name] += 1
        return 1

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """The transitions at `indices` [S, B], with the columns that the agent planned, each [S, B, d]."""
        batch = self.table.gather(indices)
        return batch if self._plan is None else batch | self._plan.columns.gather(indices)

    def _sum(self, name: str, like: Tensor) -> Tensor:
        if name not in self._sums:
            self._sums[name], self._counts[name] = torch.zeros_like(like), 0
        return self._sums[name]

    # --- Compiling and capturing -------------------------------------------------------------------

    def _compile(self) -> None:
        """Compile the agent's losses; on any failure keep them as they are, in one clear line."""
        if not _compiled(self.agent, self.agent.COMPILED, self._try_losses, dynamic=False) and self.mode == "compile":
            self.mode = "eager"

    def _try_losses(self) -> None:
        """Run each compiled loss once, forward and backward, on throw-away numbers; no parameter changes."""
        throw_away = [torch.Generator(device=g.device).manual_seed(0) for g in self.generators]
        batch = self.batch(self.table.draw_indices(throw_away, self.batch_size, 1)[0])
        draws = {name: value[0] for name, value in self.agent.draw(throw_away, self.batch_size, 1).items()}
        for name in self.agent.COMPILED:
            loss, _ = getattr(self.agent, name)(batch, draws)
            loss.sum().backward()

    def _constant(self, step: int, steps: int) -> bool:
        """Whether nothing scheduled, and no phase, changes within these steps."""
        last = step + steps - 1
        agent = self.agent
        return agent.phase(step) == agent.phase(last) and agent.schedule(step) == agent.schedule(last)

    def _replay(self, step: int, period: int) -> None:
        phase = self.agent.phase(step)
        if phase not in self._graphs:
            self._graphs[phase] = _CapturedPeriod(self.agent, self.batch, self._indices[:period], self._draws)
        self.agent.prepare()
        at = slice(self._position, self._position + period)
        graph = self._graphs[phase]
        graph.replay(self._indices[at], {name: value[at] for name, value in self._draws.items()})
        self.agent.step += period
        for name, total in graph.sums.items():
            self._sum(name, total).add_(total)
            self._counts[name] += graph.counts[name]

    # --- State -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Generators as they stood before the current block, how much of it is used up, and the plan."""
        used_up = self._position >= self.block
        states = [g.get_state() for g in self.generators] if used_up else self._before_block
        state = {"generators": torch.stack(list(states)), "position": self._position}
        return state if self._plan is None else {**state, "plan": self._plan.state_dict()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue exactly: a block that was begun is drawn again and its used part skipped.

        Raises UserError where the saved plan was made of another number of transitions.
        """
        if self._plan is not None:
            self._plan.load_state_dict(saved["plan"])
        self._before_block = [state.clone() for state in saved["generators"]]
        for generator, state in zip(self.generators, self._before_block, strict=True):
            generator.set_state(state)
        self._position, self._indices = int(saved["position"]), None


class _Counted:
    """Transitions that move a progress bar by the rows that are read: sampling for each row can take hours on a CPU."""

    def __init__(self, table: Any, bar: tqdm[Any]) -> None:
        self._table, self._bar = table, bar
        self.size, self.ends = table.size, table.ends

    def block(self, start: int, stop: int) -> dict[str, Tensor]:
        self._bar.update(stop - start)
        return self._table.block(start, stop)


class _Plan:
    """The columns that an agent makes of the whole table, and the step for which they were made."""

    def __init__(self, agent: Learner, table: Transitions) -> None:
        self.agent, self.table = agent, table
        self.columns = Columns(agent.planned, agent.num_seeds, table.size, table.device)
        self.generators = torch_generators(agent.seeds, "planning", table.device)
        self._before = [g.get_state() for g in self.generators]
        self._made_for: int | None = None

    def refresh(self, step: int) -> None:
        """Make the columns that `step` reads, unless they are those at hand."""
        wanted = self.agent.plan_step(step)
        if wanted is None or wanted == self._made_for:
            return
        self._before = [g.get_state() for g in self.generators]
        with torch.no_grad(), tqdm(desc="plan", unit=" rows", delay=PLAN_SHOWN_AFTER, leave=False, disable=None) as bar:
            self.agent.plan(_Counted(self.table, bar), self.generators, self.columns.views)
        self._made_for = wanted

    def state_dict(self) -> dict[str, Any]:
        """The columns and the generators; of a plan that can be repeated only the generators as they were before it."""
        if self._made_for is None or self.agent.PLAN_REPEATS:
            return {"generators": torch.stack(self._before)}
        return {
            "generators": torch.stack([g.get_state() for g in self.generators]),
            "columns": self.columns.rows.to("cpu", copy=True),
            "made_for": self._made_for,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue exactly; a plan that was not saved is made at the next step."""
        self._before = [state.clone() for state in saved["generators"]]
        for generator, state in zip(self.generators, self._before, strict=True):
            generator.set_state(state)
        self._made_for = saved.get("made_for")
        if self._made_for is not None:
            there, here = tuple(saved["columns"].shape), tuple(self.columns.rows.shape)
            if there != here:
                raise UserError(
                    f"the checkpoint's plan is for {there[1]:,} transitions, the dataset has {here[1]:,}; "
                    "resume with the dataset that the run began with"
                )
            self.columns.rows.copy_(saved["columns"])


class _CapturedPeriod:
    """One period of gradient steps as a CUDA graph over fixed buffers. Built between two steps of a run."""

    def __init__(
        self,
        agent: Learner,
        batch: Callable[[Tensor], dict[str, Tensor]],
        indices: Tensor,
        draws: Mapping[str, Tensor],
    ) -> None:
        self.agent, self.batch, self.first = agent, batch, agent.step
        self.indices = indices.clone()
        self.draws = {name: value[: len(indices)].clone() for name, value in draws.items()}
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        saved = agent.state_dict()
        agent.prepare()

        def restore() -> None:  # warming up trains: put everything back as it was
            agent.load_state_dict(saved)
            agent.prepare()

        self._replay = _captured(self._run, agent.device, restore)

    def _run(self) -> None:
        """The period, as it is captured: what is due follows from the step numbers it was built at."""
        for total in self.sums.values():
            total.zero_()
        self.counts = {}
        for k, rows in enumerate(self.indices):
            draws = {name: value[k] for name, value in self.draws.items()}
            metrics = self.agent.gradient_step(self.batch(rows), draws, self.first + k)
            with torch.no_grad():
                for name, value in metrics.items():
                    if name not in self.sums:  # in the warm-up only: what is made here would be captured
                        self.sums[name] = torch.zeros_like(value)
                    self.sums[name].add_(value)
                    self.counts[name] = self.counts.get(name, 0) + 1

    def replay(self, indices: Tensor, draws: Mapping[str, Tensor]) -> None:
        """Run the period on these rows and draws; `sums` holds its metrics' sums afterwards, over `counts` steps."""
        self.indices.copy_(indices)
        for name, value in draws.items():
            self.draws[name].copy_(value)
        self._replay()


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


def _compiled(agent: Any, names: Sequence[str], trial: Callable[[], None], dynamic: bool) -> bool:
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


def acting(agent: Any, mode: str) -> Callable[..., Tensor]:
    """`agent.act`, run in `mode`. Compiled or captured, the policy gives the same actions within rounding."""
    if agent.device.type == "cuda" and mode == "graph":
        return CapturedActions(agent)
    if mode == "compile":

        def trial() -> None:
            # Two counts of rows: the compiled policy must take any, since ended episodes drop out.
            rngs = [torch.Generator(device=agent.device).manual_seed(0) for _ in range(agent.num_seeds)]
            for rows in (5, 3):
                agent.act(torch.zeros(agent.num_seeds, rows, agent.state_dim, device=agent.device), rngs)

        _compiled(agent, ("actions_for",), trial, dynamic=True)
    return agent.act


class CapturedActions:
    """`agent.act` with the policy as a CUDA graph; one graph for each number of states."""

    def __init__(self, agent: Any) -> None:
        self.agent = agent
        self._policies: dict[int, _CapturedPolicy] = {}

    def __call__(self, states: Tensor, rng: Sequence[torch.Generator], active: Tensor | None = None) -> Tensor:
        """As `agent.act`; `active` is not used, since a captured policy computes every row."""
        noise = self.agent.act_draws(rng, states.shape[1])
        if states.shape[1] not in self._policies:
            self._policies[states.shape[1]] = _CapturedPolicy(self.agent, states, noise)
        return self._policies[states.shape[1]](states, noise)


class _CapturedPolicy:
    """The policy for one number of states as a CUDA graph over fixed buffers."""

    def __init__(self, agent: Any, states: Tensor, noise: Mapping[str, Tensor]) -> None:
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
