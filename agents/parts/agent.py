"""What every agent offers, and what all share: networks by name, the update's frame, acting, states.

An agent's update is a pure function of (parameters, batch, draws). It reads no file, environment or clock, and never
waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from agents.parts import precision as precisions
from agents.parts.adam import Adam, cosine_decay, learning_rate_factor
from agents.parts.draws import Rng
from agents.parts.multiplier import Multiplier
from agents.parts.parameters import Initializer, Network, Parameters, Sizes, gradients
from agents.parts.published import required, stripped
from agents.parts.windows import Windows

# Candidate actions of all seeds that are computed at once. On one core 2,048 candidates of DTQL take a third of the
# time per candidate that 65,536 take, and DiffCPS's half of what 16,000 take: their activations stay in the cache.
CHUNK = {"cpu": 2**11, "gpu": 2**18}

# Rows of the whole table that a plan handles at once. The random numbers of a plan are drawn so many rows at a time,
# so the number is the same on every device and for any number of seeds.
PLAN_ROWS = 512

Batch = Mapping[str, Tensor]
Draws = Mapping[str, Tensor]
Outcome = tuple[Tensor, dict[str, Tensor]]  # of a loss function: the loss [S], and metrics, each [S]
N = TypeVar("N", bound=Network)


class Transitions(Protocol):
    """All N transitions, in file order and without a seeds axis, as `Agent.plan` reads them."""

    size: int

    @property
    def ends(self) -> Tensor:
        """[N] bool: the trajectory ends with this transition, by the environment, a time limit or the file's end."""
        ...

    def block(self, start: int, stop: int) -> dict[str, Tensor]:
        """Rows start .. stop - 1: states, actions, rewards, next_states, not_dones, each [stop - start, d]."""
        ...


def blocks(size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive blocks of `PLAN_ROWS` of `size` rows, the last one perhaps shorter."""
    for start in range(0, size, PLAN_ROWS):
        yield start, min(start + PLAN_ROWS, size)


class Agent:
    """Base of all agents. A subclass sets METRICS, names what learns in `build`, and writes `_draw`, `gradient_step`,
    `act_draws` and `actions_for`.

    `networks` and `optimizers` name everything that a checkpoint must hold. An agent whose batches need numbers made of
    the whole table (returns along trajectories, say) names them and their widths in `planned`, and writes `plan_step`
    and `plan`.
    """

    METRICS: tuple[str, ...] = ()
    SHOWN: tuple[str, ...] = ()  # metrics that the progress bar shows, too
    COMPILED: tuple[str, ...] = ()  # names of the losses, (batch, draws) -> (loss [S], metrics), worth compiling
    # A plan made of networks that no longer change is made again on resume, bit for bit, instead of being saved.
    PLAN_REPEATS = False
    # Whether acting needs what `observe` makes beside the networks, so that a trained agent has to see its data again.
    ACTS_BY_DATA = False
    ACTS_COMPILED = True  # whether acting is compiled, too, where the losses are
    windows: Windows | None = None  # what an agent that plans learns from, instead of single transitions

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        max_action: float,
        config: Any,
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
        precision: str = "float32",
    ) -> None:
        self.state_dim, self.action_dim, self.max_action = state_dim, action_dim, float(max_action)
        self.config, self.seeds, self.device = config, list(seeds), torch.device(device)
        self.num_seeds, self.precision = len(self.seeds), precision
        precisions.check(precision, self.device)
        if self.num_seeds == 0:
            raise ValueError("an agent needs at least one seed")
        self.sizes = Sizes(state_dim, action_dim, self.max_action, self.num_seeds, self.device)
        self.step = 0
        self.networks: dict[str, Parameters] = {}
        self.optimizers: dict[str, Adam] = {}
        self.planned: dict[str, int] = {}
        self.not_due = torch.full((self.num_seeds,), math.nan, device=self.device)  # what `update` gives for it
        self._prepared: tuple[float, ...] | None = None
        self._generators = self.init_generators()
        self._named: dict[str, Network] = {}
        self._published: dict[str, str] = {}  # name -> entry of the published weights, perhaps with "/prefix"
        self._sources: dict[str, str] = {}  # name of an average or a copy -> the network's that it is of
        # Numbers that change at a step: tensor, value, step, value before it.
        self._late: list[tuple[Tensor, float, int, float]] = []
        self._decaying: tuple[str, ...] | None = None  # see `decay_every_step`
        self._clock = torch.zeros((), device=self.device)
        self.build()
        if precision == "bfloat16":
            for name in self.COMPILED:
                setattr(self, name, precisions.bfloat16(getattr(self, name), self.device))

    def build(self) -> None:
        """Name the networks with `learn` and `average_of`, in the order in which their initial weights are drawn."""
        raise NotImplementedError

    # --- Naming what learns -----------------------------------------------------------------------------

    def learn(
        self,
        name: str,
        network: N,
        rate: float,
        init: Initializer | None = None,
        published: str | None = None,
        weight_decay: float = 0.0,
    ) -> N:
        """Initialise a network from each seed's own generator and give it an optimiser, both under `name`.

        init: other initial weights than the network's own. published: the entry of the published weights that has
        this network's, if it is not `name`; "critic/q0." means those of entry "critic" whose names begin with "q0.".
        """
        if init is None:
            network.initialize(self._generators)
        else:
            init(network.parameters, self._generators)
        self.optimizers[name] = Adam(network.parameters, self.num_seeds, rate, self.config.grad_norm, weight_decay)
        return self._name(name, network, published)

    def learn_beside(self, name: str, network: N, rate: float) -> N:
        """A second network like a learnt one, with an optimiser of its own, under `name`.

        It starts as a copy, so no random number is drawn; where published weights lack it, it has the first one's.
        """
        self._sources[name] = self._name_of(network)
        twin = network.copied()
        self.optimizers[name] = Adam(twin.parameters, self.num_seeds, rate, self.config.grad_norm)
        return self._name(name, twin, None)

    def average_of(
        self,
        name: str,
        online: N,
        decay: float,
        start: int | None = None,
        published: str | None = None,
        copies: bool = False,
    ) -> N:
        """An average of a learnt network under `name`, moved by `follow`; with a `start`, it stands still before it.

        copies: before its start `follow` copies the network instead.
        """
        source = self._name_of(online)
        twin = self._name(name, online.averaged(), published)
        twin.weight = 1 - decay if start is None else self.from_step(start, 1 - decay, float(copies))
        self._sources[name] = source
        return twin

    def _name(self, name: str, network: N, published: str | None) -> N:
        self.networks[name], self._named[name], self._published[name] = network.parameters, network, published or name
        return network

    def _name_of(self, network: Network) -> str:
        return next(name for name, named in self._named.items() if named is network)

    def from_step(self, start: int, value: float, before: float = 0.0) -> Tensor:
        """A number [] on the device that is `before` before step `start` and `value` from there on."""
        number = torch.full((), before, device=self.device)
        self._late.append((number, value, start, before))
        return number

    def decay_every_step(self, *names: str) -> None:
        """These networks' rates alone decay; under `lr_decay` at every update, where it calls `decay_rates`."""
        self._decaying = names

    def init_generators(self) -> list[torch.Generator]:
        """One CPU generator per seed for the initial weights: the same start on every device."""
        return [torch.Generator().manual_seed(seed) for seed in self.seeds]

    # --- What depends on the step number alone --------------------------------------------------------

    @property
    def first_step(self) -> int:
        """The step at which a run begins: 0, or below it with a pretraining, whose steps have negative numbers."""
        return -getattr(self.config, "pretrain_epochs", 0) * self.config.num_steps_per_epoch

    @property
    def period(self) -> int:
        """Number of steps after which the pattern of updates repeats."""
        return 1

    def phase(self, step: int) -> int:
        """Which updates are due may differ between phases of training; within one they repeat with `period`."""
        return 0

    def schedule(self, step: int) -> tuple[float, ...]:
        """The numbers that change over training at `step` (rates, weights of averages); see `apply_schedule`."""
        own = self._decaying is not None and self.config.lr_decay  # `decay_rates` sets the rates
        factor = 1.0 if own else learning_rate_factor(self.config, max(step, 0))
        return (factor, *(value if step >= start else before for _, value, start, before in self._late))

    def apply_schedule(self, values: tuple[float, ...]) -> None:
        """Write what `schedule` returned to the device tensors that the update reads."""
        for name in self.optimizers if self._decaying is None else self._decaying:
            self.optimizers[name].set_rate(values[0])
        for (number, *_), value in zip(self._late, values[1:], strict=False):
            number.fill_(value)

    def prepare(self) -> None:
        """Bring the scheduled tensors up to `self.step`; free when nothing changed."""
        values = self.schedule(self.step)
        if values != self._prepared:
            self.apply_schedule(values)
            self._prepared = values
        if self._decaying is not None and self.config.lr_decay:
            self._clock.fill_(self.step)

    # --- The update -----------------------------------------------------------------------------------

    def draw(self, rng: Rng, batch_size: int, steps: int | None = None) -> dict[str, Tensor]:
        """Every random number that one update needs, or with `steps` that many updates (a first axis more)."""
        drawn = self._draw(rng, batch_size, 1 if steps is None else steps)
        return drawn if steps is not None else {name: value[0] for name, value in drawn.items()}

    def _draw(self, rng: Rng, batch_size: int, steps: int) -> dict[str, Tensor]:
        raise NotImplementedError

    def gradient_step(self, batch: Batch, draws: Draws, step: int) -> dict[str, Tensor]:
        """One gradient step in place; `step` only decides what is due. Metrics [S] of what was due."""
        raise NotImplementedError

    def shared(self, batch: Batch) -> Batch:
        """A batch as the losses see it: with what several of them read and none changes, computed once."""
        return batch

    def update(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """One gradient step in place and `self.step` + 1. All of METRICS, each [S]; `not_due` where the part was not.

        `not_due` is one tensor of NaNs, so `value is agent.not_due` tells without waiting for the device.
        """
        self.prepare()
        with self.updating():
            metrics = self.gradient_step(batch, draws, self.step)
        self.step += 1
        return {name: metrics.get(name, self.not_due) for name in self.METRICS}

    def updating(self) -> AbstractContextManager[object]:
        """What surrounds losses and their gradients, so that their products have the update's precision."""
        return precisions.updating(self.precision)

    def descend(self, name: str, outcome: Outcome) -> dict[str, Tensor]:
        """One step of an optimiser down a loss [S]; the loss' metrics, and the gradient's norm before clipping."""
        return self.descend_together({name: outcome})

    def descend_together(self, outcomes: Mapping[str | tuple[str, ...], Outcome]) -> dict[str, Tensor]:
        """`descend` for several, all gradients taken before any step; a tuple of names has one loss in common."""
        metrics: dict[str, Tensor] = {}
        slopes: dict[str, Tensor] = {}
        for key, (loss, found) in outcomes.items():
            names = (key,) if isinstance(key, str) else key
            slopes |= zip(names, gradients(loss, [self.networks[name] for name in names]), strict=True)
            metrics |= found
        norms = {f"{name}_grad_norm": self.optimizers[name].step(slope) for name, slope in slopes.items()}
        return metrics | self._in_metrics(norms)

    def ascend(self, name: str, violation: Tensor, scale: Tensor | float = 1.0) -> dict[str, Tensor]:
        """One step of a `Multiplier` by its constraint's violation [S]; its new value, and the gradient's norm.

        scale: what the violation is compared with by multipliers that need it relative, the constraint's bound [S].
        Also, for METRICS that ask, 1 where the constraint was violated and where the new value is one of its bounds.
        """
        multiplier = self._named[name]
        assert isinstance(multiplier, Multiplier), name
        norm = multiplier.step(self.optimizers[name], violation, scale)
        found = {name: multiplier(), f"{name}_grad_norm": norm}
        if f"{name}_violated" in self.METRICS:
            found |= {f"{name}_violated": (violation > 0).float(), f"{name}_at_bound": multiplier.at_bound().float()}
        return self._in_metrics(found)

    def _in_metrics(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value for name, value in found.items() if name in self.METRICS}

    def decay_rates(self) -> None:
        """Under `lr_decay`, the rates named in `decay_every_step` for this update."""
        if self._decaying is not None and self.config.lr_decay:
            last = self.config.num_epochs * self.config.num_steps_per_epoch
            cosine_decay([self.optimizers[name] for name in self._decaying], self._clock, last)

    def act(self, states: Tensor, rng: Rng, active: Tensor | None = None) -> Tensor:
        """states [S, N, state_dim] -> actions [S, N, action_dim].

        `active` [S, N] bool: rows that matter; only they are computed, the rest come back as zeros. The random
        numbers are drawn for all N rows either way, so a row's action does not depend on which others are active.
        """
        noise = self.act_draws(rng, states.shape[1])
        with torch.no_grad():
            if active is None:
                return self.actions_in_chunks(states, noise)
            # A fixed number of rows per seed, padded: the batched products need one shape for all seeds.
            rows = active.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : int(active.sum(1).max())]
            seeds = torch.arange(states.shape[0], device=rows.device).unsqueeze(1)
            chosen = self.actions_in_chunks(states[seeds, rows], {k: v[seeds, rows] for k, v in noise.items()})
            actions = torch.zeros(*states.shape[:2], self.action_dim, device=states.device)
            actions[seeds, rows] = chosen
            return actions * active.unsqueeze(-1)

    def actions_in_chunks(self, states: Tensor, noise: Mapping[str, Tensor]) -> Tensor:
        """`actions_for`, so many states at a time that their candidates fit a CPU's cache and a GPU's memory."""
        at_once = max(1, CHUNK["cpu" if self.device.type == "cpu" else "gpu"] // (self.num_seeds * self.rows_per_state))
        with precisions.acting(self.precision):
            return self._actions_at_once(states, noise, at_once)

    def _actions_at_once(self, states: Tensor, noise: Mapping[str, Tensor], at_once: int) -> Tensor:
        if states.shape[1] <= at_once:
            return self.actions_for(states, noise)
        split = {name: value.split(at_once, dim=1) for name, value in noise.items()}
        parts = [
            self.actions_for(part.contiguous(), {name: value[i].contiguous() for name, value in split.items()})
            for i, part in enumerate(states.split(at_once, dim=1))
        ]
        return torch.cat(parts, dim=1)

    @property
    def rows_per_state(self) -> int:
        """Rows that a network takes for one state of one seed when acting."""
        return getattr(self.config, "action_candidates", 1)

    def act_draws(self, rng: Rng, states: int) -> dict[str, Tensor]:
        """The random numbers of `act` for N states, each [S, N, ...]; a generator that is None is PyTorch's own."""
        raise NotImplementedError

    def actions_for(self, states: Tensor, noise: Mapping[str, Tensor]) -> Tensor:
        """The policy as a pure function of states [S, N, state_dim] and the numbers of `act_draws`."""
        raise NotImplementedError

    @classmethod
    def cost(cls, config: Any, state_dim: int, action_dim: int) -> str:
        """What acting costs in these settings, in a line, where that is worth saying before a run; else "".

        Raises ValueError for sizes that do not fit.
        """
        return ""

    # --- Numbers made of the whole table ----------------------------------------------------------------

    def observe(self, transitions: Any) -> None:
        """Take what the agent needs to know of the data as a whole, such as the states' mean and deviation.

        Called before the first step, also of a resumed run; what is kept stands in `networks`, so that a checkpoint has
        it, or comes out the same again. `transitions`: `Transitions`, or for an agent with `windows` `WindowRows`.
        Raises ValueError for data that the algorithm cannot use.
        """

    def plan_step(self, step: int) -> int | None:
        """The step just before which the planned columns that `step` reads are made; None where it reads none.

        Depends on the step number alone, never falls, and changes at multiples of `period` only.
        """
        return None

    def plan(self, transitions: Transitions, rng: Rng, columns: Mapping[str, Tensor]) -> None:
        """Fill every column of `planned`, [S, N, width], in place; each batch then holds its rows as [S, B, width].

        Made with the networks as they are, without gradients, some rows at a time (`blocks`) so that memory stays
        bounded. `rng` is a stream of its own: planning changes no batch and no draw. It may wait for the device.
        """
        raise NotImplementedError

    # --- State ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that a bit-exact resume needs. Every tensor has the seeds axis first; the rest are plain values."""
        return {
            "networks": {n: p.flat.view(self.num_seeds, -1).clone() for n, p in self.networks.items()},
            "optimizers": {n: o.state_dict() for n, o in self.optimizers.items()},
            "step": self.step,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from `state_dict`. Raises ValueError where the networks or their sizes differ."""
        for name, parameters in self.networks.items():
            value = saved["networks"].get(name)
            if value is None or value.numel() != parameters.flat.numel():
                size = "missing" if value is None else tuple(value.shape)
                raise ValueError(f"the saved {name!r} is {size}; this agent's is {tuple(parameters.flat.shape)}")
        for name, parameters in self.networks.items():
            parameters.flat.copy_(saved["networks"][name].view_as(parameters.flat))
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(saved["optimizers"][name])
        self.step = int(saved["step"])
        self._prepared = None

    # --- Weights under published names ------------------------------------------------------------------

    def load_published(self, networks: Mapping[str, Any]) -> None:
        """Load weights under the published code's names, without the seeds axis, into every seed.

        A missing average or copy has those of the network that it is of. Raises ValueError for missing or misshapen
        ones.
        """
        for name, network in self._named.items():
            entry, _, prefix = self._published[name].partition("/")
            if entry not in networks and name in self._sources:
                entry, _, prefix = self._published[self._sources[name]].partition("/")
            if entry not in networks and not network.required:
                continue
            weights = required(networks, entry)
            for seed in range(self.num_seeds):
                network.load_seed(seed, stripped(weights, prefix))

    def published_state(self) -> list[dict[str, Any]]:
        """Each seed's weights under the published code's names."""
        return [self._published_seed(seed) for seed in range(self.num_seeds)]

    def _published_seed(self, seed: int) -> dict[str, Any]:
        state: dict[str, Any] = {}
        for name, network in self._named.items():
            entry, _, prefix = self._published[name].partition("/")
            own = network.seed_state(seed)
            if isinstance(own, Mapping):
                own = {**state.get(entry, {}), **{f"{prefix}{key}": value for key, value in own.items()}}
            state[entry] = own
        return state
