"""The order of things in training: random numbers in blocks, updates one after the other, metrics summed up.

Numbers are drawn in blocks of a few periods, seed by seed, so a block holds the same ones in every mode, alone and in
company. An update is `agent.update`, on a GPU a period of them as a captured graph (`capture.py`). Nothing here waits
for the device until metrics are read.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from utils.data.dataset import Columns
from utils.errors import UserError
from utils.files import first_line
from utils.process import Abandoned, never
from utils.seeding import torch_generators
from utils.training.capture import CapturedPeriod, compile_methods
from utils.training.interfaces import Batches, Generators, Learner, Transitions, WholeTable

_BLOCK = 20  # steps whose random numbers are drawn at once; rounded up to a whole number of periods


class Runner:
    """Runs updates of `agent` on batches of `table`.

    `generators`: one per seed on the table's device; rows and draws come from it. `mode`: eager, compile or graph;
    afterwards what is really used: compile where capturing failed, eager where compiling did.
    """

    def __init__(self, agent: Learner, table: Batches, batch_size: int, generators: Generators, mode: str) -> None:
        self.agent, self.table, self.batch_size, self.generators = agent, table, batch_size, list(generators)
        self.block = agent.period * math.ceil(_BLOCK / agent.period)
        self.mode, self._without_graphs = mode, "eager"
        self._position = self.block  # steps of the block that are used up
        self._before_block = [g.get_state() for g in self.generators]
        self._indices = torch.empty(0)
        self._draws: dict[str, Tensor] = {}
        self._drawn = False  # whether these two are the current block's
        self._graphs: dict[int, CapturedPeriod] = {}
        try:
            agent.observe(table)
        except ValueError as error:
            raise UserError(str(error)) from error
        self._plan = _Plan(agent, cast(Transitions, table)) if agent.planned else None
        self.unread = 0  # steps whose metrics `metrics` has not returned yet
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        if mode in ("compile", "graph"):
            compiled = compile_methods(agent, agent.COMPILED, self._try_losses, dynamic=False)
            self._without_graphs = "compile" if compiled else "eager"
            self.mode = self._without_graphs if mode == "compile" else mode
        if mode == "graph":
            self._try_graph()

    # --- Running -----------------------------------------------------------------------------------

    def run(self, steps: int, stop: Callable[[], bool] = never, pause: Callable[[], bool] = never) -> None:
        """`steps` gradient steps; their metrics are added to what `metrics` returns next.

        Fewer once one of the two is true between two steps or captured periods; `stop` also leaves a plan.
        """
        try:
            while steps > 0 and not stop():
                self._refill()
                done = self._run_some(min(steps, self.block - self._position), stop)
                self._position += done
                self.unread += done
                steps -= done
                if pause():
                    return
        except Abandoned:  # a plan, which is made anew
            pass

    def metrics(self) -> dict[str, Tensor]:
        """Each metric's mean [S] over the steps since the last call at which it was due. Starts anew."""
        means = {name: total / self._counts[name] for name, total in self._sums.items() if self._counts[name]}
        for total in self._sums.values():
            total.zero_()
        self._counts = dict.fromkeys(self._counts, 0)
        self.unread = 0
        return means

    @property
    def planned(self) -> int | None:
        """Rows that were read for the plan that is being made; None where none is."""
        reading = self._plan.reading if self._plan is not None else None
        return None if reading is None else reading.rows

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """The transitions (or windows) at `indices` [S, B], with the columns that the agent planned, each [S, B, d]."""
        batch = self.table.gather(indices)
        return batch if self._plan is None else batch | self._plan.columns.gather(indices)

    def _run_some(self, steps: int, stop: Callable[[], bool]) -> int:
        """Up to `steps` steps from the current block; returns how many."""
        agent, at = self.agent, self._position
        if self._plan is not None:
            self._plan.refresh(agent.step, stop)
        if self.mode == "graph" and steps >= agent.period and self._one_graph_holds(agent.step):
            period = slice(at, at + agent.period)
            if self._replay(self._indices[period], {name: draws[period] for name, draws in self._draws.items()}):
                return agent.period
        metrics = agent.update(self.batch(self._indices[at]), {name: draws[at] for name, draws in self._draws.items()})
        with torch.no_grad():
            for name, value in metrics.items():
                if value is not agent.not_due:
                    self._add(name, value, 1)
        return 1

    def _refill(self) -> None:
        if self._drawn and self._position < self.block:
            return
        if self._position >= self.block:
            self._before_block = [g.get_state() for g in self.generators]
            self._position = 0
        self._indices = self.table.draw_indices(self.generators, self.batch_size, self.block)
        self._draws = self.agent.draw(self.generators, self.batch_size, self.block)
        self._drawn = True

    def _add(self, name: str, value: Tensor, count: int) -> None:
        if name not in self._sums:
            self._sums[name], self._counts[name] = torch.zeros_like(value), 0
        self._sums[name].add_(value)
        self._counts[name] += count

    # --- Compiling and capturing -------------------------------------------------------------------

    def _try_losses(self) -> None:
        """Run each compiled loss once, forward and backward, on throw-away numbers; no parameter changes."""
        indices, drawn = self._throw_away(1)
        draws = {name: value[0] for name, value in drawn.items()}
        with self.agent.updating():
            batch = self.agent.shared(self.batch(indices[0]))
            for name in self.agent.COMPILED:
                loss, _ = getattr(self.agent, name)(batch, draws)
                loss.sum().backward()

    def _try_graph(self) -> None:
        """Capture the next whole period on throw-away numbers, so that `mode` is right from the start."""
        agent, step = self.agent, self.agent.step
        agent.step = math.ceil(step / agent.period) * agent.period
        if self._one_graph_holds(agent.step):
            self._graph(*self._throw_away(agent.period))
        agent.step = step

    def _throw_away(self, steps: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Rows and draws for so many steps, from generators of their own."""
        generators = [torch.Generator(device=g.device).manual_seed(0) for g in self.generators]
        indices = self.table.draw_indices(generators, self.batch_size, steps)
        return indices, self.agent.draw(generators, self.batch_size, steps)

    def _one_graph_holds(self, step: int) -> bool:
        """Whether a whole period begins at `step`, in which nothing scheduled, and no phase, changes."""
        agent, last = self.agent, step + self.agent.period - 1
        constant = agent.phase(step) == agent.phase(last) and agent.schedule(step) == agent.schedule(last)
        return step % agent.period == 0 and constant

    def _graph(self, indices: Tensor, draws: Mapping[str, Tensor]) -> CapturedPeriod | None:
        """The graph of this phase; None, with one line and another `mode` from now on, where none can be had."""
        phase = self.agent.phase(self.agent.step)
        if phase not in self._graphs:
            try:
                self._graphs[phase] = CapturedPeriod(self.agent, self.batch, indices, draws)
            except Exception as error:  # whatever a capture raises
                self.mode, self._graphs = self._without_graphs, {}
                warnings.warn(f"no CUDA graph, execution is {self.mode}: {first_line(error)}", stacklevel=2)
                return None
        return self._graphs[phase]

    def _replay(self, indices: Tensor, draws: Mapping[str, Tensor]) -> bool:
        """Run a whole period on these numbers; whether there is a graph for it."""
        graph = self._graph(indices, draws)
        if graph is None:
            return False
        graph.replay(indices, draws)
        for name, total in graph.sums.items():
            self._add(name, total, graph.counts[name])
        return True

    # --- State -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Generators as they stood before the current block, how much of it is used up, the metrics that were not
        read yet, and the plan."""
        used_up = self._position >= self.block
        states = [g.get_state() for g in self.generators] if used_up else self._before_block
        counts = {name: count for name, count in self._counts.items() if count}
        sums = {name: self._sums[name].clone() for name in counts}
        metrics = {"unread": self.unread, "sums": sums, "counts": counts}
        state = {"generators": torch.stack(list(states)), "position": self._position, **metrics}
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
        self._position, self._drawn = int(saved["position"]), False
        self.unread = int(saved.get("unread", 0))  # earlier versions saved at an epoch's end only
        self._counts = {name: int(count) for name, count in saved.get("counts", {}).items()}
        self._sums = {name: saved["sums"][name].to(self.agent.device, copy=True) for name in self._counts}
        if any(total.shape != (self.agent.num_seeds,) for total in self._sums.values()):
            raise ValueError("its metrics are not those of these seeds")


class _Counted:
    """Transitions that count the rows that are read: sampling for each row can take hours on a CPU."""

    def __init__(self, table: WholeTable, stop: Callable[[], bool]) -> None:
        self._table, self._stop = table, stop
        self.size, self.rows = table.size, 0

    @property
    def ends(self) -> Tensor:
        return self._table.ends

    def block(self, start: int, stop: int) -> dict[str, Tensor]:
        if self._stop():
            raise Abandoned
        self.rows += stop - start
        return self._table.block(start, stop)


class _Plan:
    """The columns that an agent makes of the whole table, and the step for which they were made."""

    def __init__(self, agent: Learner, table: Transitions) -> None:
        self.agent, self.table = agent, table
        self.columns = Columns(agent.planned, agent.num_seeds, table.size, table.device)
        self.generators = torch_generators(agent.seeds, "planning", table.device)
        self._before = [g.get_state() for g in self.generators]
        self._made_for: int | None = None
        self.reading: _Counted | None = None  # while it is made

    def refresh(self, step: int, stop: Callable[[], bool]) -> None:
        """Make the columns that `step` reads, unless they are those at hand. Raises Abandoned once `stop` is true."""
        wanted = self.agent.plan_step(step)
        if wanted is None or wanted == self._made_for:
            return
        self._before = [g.get_state() for g in self.generators]
        self.reading = _Counted(self.table, stop)
        try:
            with torch.no_grad():
                self.agent.plan(self.reading, self.generators, self.columns.views)
        except Abandoned:
            self._set_back()
            raise
        finally:
            self.reading = None
        self._made_for = wanted

    def _set_back(self) -> None:
        for generator, state in zip(self.generators, self._before, strict=True):
            generator.set_state(state)

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
        self._set_back()
        self._made_for = saved.get("made_for")
        if self._made_for is not None:
            there, here = tuple(saved["columns"].shape), tuple(self.columns.rows.shape)
            if there != here:
                raise UserError(
                    f"the checkpoint's plan is for {there[1]:,} transitions, the dataset has {here[1]:,}; "
                    "resume with the dataset that the run began with"
                )
            self.columns.rows.copy_(saved["columns"])
