"""What every agent offers, and the little that all share: one optimiser, averages, random numbers, states.

An agent's update is a pure function of (parameters, batch, draws). It reads no file, environment or clock, and never
waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from agents.networks import Parameters

__all__ = [
    "Adam",
    "Agent",
    "Rng",
    "Transitions",
    "average",
    "best_candidates",
    "blocks",
    "candidates_best",
    "candidates_softmax",
    "cosine_decay",
    "exponentials",
    "integers",
    "keep_masks",
    "normals",
    "uniforms",
]

# Candidate actions of all seeds that are computed at once. On one core 2,048 candidates of DTQL take a third of the
# time per candidate that 65,536 take, and DiffCPS's half of what 16,000 take: their activations stay in the cache.
CHUNK = {"cpu": 2**11, "gpu": 2**18}

# Rows of the whole table that a plan handles at once. The random numbers of a plan are drawn so many rows at a time,
# so the number is the same on every device and for any number of seeds.
PLAN_ROWS = 512

Rng = torch.Generator | Sequence[torch.Generator]
Batch = Mapping[str, Tensor]
Draws = Mapping[str, Tensor]


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


class Adam:
    """Adam (Kingma & Ba 2015) over one buffer of parameters [M, P], each seed's gradient clipped by its own norm.

    The published code clips every network's gradient at `grad_norm` (DEVIATIONS 5; the paper names no clipping).
    """

    def __init__(self, parameters: Parameters, seeds: int, learning_rate: float, grad_norm: float) -> None:
        self.flat, self.seeds, self.base_rate, self.grad_norm = (
            parameters.flat,
            seeds,
            learning_rate,
            grad_norm,
        )
        device = parameters.flat.device
        self.rate = torch.tensor(float(learning_rate), device=device)
        options = {"fused": True, "capturable": device.type == "cuda"}
        self._adam = torch.optim.Adam([self.flat], lr=self.rate, **options)
        # It would warn of steps that are not captured, and a capture is always preceded by some.
        self._adam._warned_capturable_if_run_uncaptured = True
        self._allocate()

    def _allocate(self) -> None:
        """Create the moments before the first step, so that a captured graph finds them in place."""
        on = self.flat.device if self.flat.is_cuda else "cpu"
        self._adam.state[self.flat] = {
            "step": torch.zeros((), dtype=torch.float32, device=on),
            "exp_avg": torch.zeros_like(self.flat),
            "exp_avg_sq": torch.zeros_like(self.flat),
        }

    def step(self, gradient: Tensor) -> Tensor:
        """Clip `gradient` [M, P] per seed, apply it, and return each seed's norm before clipping [S]."""
        per_seed = gradient.view(self.seeds, -1)
        norms = per_seed.norm(dim=1)
        if self.grad_norm > 0:
            per_seed.mul_((self.grad_norm / (norms + 1e-6)).clamp(max=1.0).unsqueeze(1))
        self.flat.grad = gradient
        self._adam.step()
        return norms

    def reset(self) -> None:
        """Forget all steps taken: the optimiser as it was at first."""
        for value in self._adam.state[self.flat].values():
            value.zero_()

    def set_rate(self, factor: float) -> None:
        """Use `factor` times the learning rate from the next step on."""
        self.rate.fill_(self.base_rate * factor)

    def state_dict(self) -> dict[str, Any]:
        """Moments with the seeds axis first, and the number of steps taken."""
        state = self._adam.state[self.flat]
        moments = {k: state[k].view(self.seeds, -1).clone() for k in ("exp_avg", "exp_avg_sq")}
        return {**moments, "steps": int(state["step"])}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Write a saved state in place."""
        state = self._adam.state[self.flat]
        for k in ("exp_avg", "exp_avg_sq"):
            state[k].copy_(saved[k].view_as(state[k]))
        state["step"].fill_(saved["steps"])


def cosine_decay(optimizers: Iterable[Adam], clock: Tensor, last: int) -> None:
    """Set each rate to half a cosine of its start, which ends at zero at step `last`, and move `clock` [] on by one.

    For a rate that changes at every update: a captured graph holds the clock, not a number.
    """
    factor = 0.5 + 0.5 * torch.cos(clock.clamp(0, last) * (math.pi / last))
    for optimizer in optimizers:
        torch.mul(factor, optimizer.base_rate, out=optimizer.rate)
    clock.add_(1)


@torch.no_grad()
def average(target: Parameters, online: Parameters, weight: float | Tensor) -> None:
    """target <- (1 - weight) target + weight online, in place; with weight 0 the target keeps every bit."""
    target.flat.lerp_(online.flat, weight)


def _generators(rng: Rng, seeds: int) -> Sequence[torch.Generator]:
    """One generator a seed; a single one serves all seeds, in order."""
    if isinstance(rng, torch.Generator):
        return [rng] * seeds
    if len(rng) != seeds:
        raise ValueError(f"{seeds} seeds need {seeds} generators, not {len(rng)}")
    return rng


def normals(rng: Rng, seeds: int, steps: int, shape: Sequence[int]) -> Tensor:
    """Standard normals [steps, S, *shape], drawn seed by seed so that a seed sees the same alone and in company."""
    drawn = [torch.randn(steps, *shape, generator=g, device=g.device) for g in _generators(rng, seeds)]
    return torch.stack(drawn, dim=1)


def uniforms(rng: Rng, seeds: int, steps: int, shape: Sequence[int]) -> Tensor:
    """Uniform numbers in [0, 1), [steps, S, *shape]."""
    drawn = [torch.rand(steps, *shape, generator=g, device=g.device) for g in _generators(rng, seeds)]
    return torch.stack(drawn, dim=1)


def exponentials(rng: Rng, seeds: int, shape: Sequence[int]) -> Tensor:
    """Standard exponentials [S, *shape]."""
    drawn = [torch.empty(*shape, device=g.device).exponential_(generator=g) for g in _generators(rng, seeds)]
    return torch.stack(drawn)


def integers(rng: Rng, seeds: int, steps: int, high: int, shape: Sequence[int]) -> Tensor:
    """Integers [steps, S, *shape] in 0 .. high - 1."""
    drawn = [torch.randint(high, (steps, *shape), generator=g, device=g.device) for g in _generators(rng, seeds)]
    return torch.stack(drawn, dim=1)


def keep_masks(rng: Rng, seeds: int, steps: int, dropout: float, shape: Sequence[int]) -> Tensor:
    """What a dropout of this rate keeps, bool [steps, S, *shape]."""
    kept = [
        torch.empty(steps, *shape, dtype=torch.bool, device=g.device).bernoulli_(1 - dropout, generator=g)
        for g in _generators(rng, seeds)
    ]
    return torch.stack(kept, dim=1)


def candidates_softmax(values: Tensor, actions: Tensor, exponential: Tensor) -> Tensor:
    """One of C actions a state with probability softmax(values): values, exponential [S, N, C], actions [S, N, C, A].

    value - log(exponential) is value + a Gumbel variable, whose argmax has that distribution: no host round trip.
    """
    return candidates_best(values - exponential.log(), actions)


def candidates_best(values: Tensor, actions: Tensor) -> Tensor:
    """The action of the greatest value: values [S, N, C], actions [S, N, C, A] -> [S, N, A]."""
    index = values.argmax(dim=2)[:, :, None, None].expand(-1, -1, 1, actions.shape[3])
    return actions.gather(2, index).squeeze(2)


def blocks(size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive blocks of `PLAN_ROWS` of `size` rows, the last one perhaps shorter."""
    for start in range(0, size, PLAN_ROWS):
        yield start, min(start + PLAN_ROWS, size)


def best_candidates(values: Tensor, actions: Tensor) -> Tensor:
    """The action of greatest value among C a state: values [S, N, C], actions [S, N, C, A] -> [S, N, A]."""
    index = values.argmax(dim=2)[:, :, None, None].expand(-1, -1, 1, actions.shape[3])
    return actions.gather(2, index).squeeze(2)


class Agent:
    """Base of all agents. A subclass sets METRICS and writes `draw`, `gradient_step` and `act`.

    `networks` and `optimizers` name everything that a checkpoint must hold; both are filled by the constructor.
    An agent whose batches need numbers made of the whole table (returns along trajectories, say) names them and their
    widths in `planned`, and writes `plan_step` and `plan`.
    """

    METRICS: tuple[str, ...] = ()
    SHOWN: tuple[str, ...] = ()  # those of METRICS that the progress bar shows
    COMPILED: tuple[str, ...] = ()  # names of the losses, (batch, draws) -> (loss [S], metrics), worth compiling
    # A plan made of networks that no longer change is made again on resume, bit for bit, instead of being saved.
    PLAN_REPEATS = False

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        max_action: float,
        config: Any,
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> None:
        self.state_dim, self.action_dim, self.max_action = state_dim, action_dim, float(max_action)
        self.config, self.seeds, self.device = config, list(seeds), torch.device(device)
        self.num_seeds = len(self.seeds)
        if self.num_seeds == 0:
            raise ValueError("an agent needs at least one seed")
        self.step = 0
        self.networks: dict[str, Parameters] = {}
        self.optimizers: dict[str, Adam] = {}
        self.planned: dict[str, int] = {}
        self.not_due = torch.full((self.num_seeds,), math.nan, device=self.device)
        self._prepared: tuple[float, ...] | None = None

    def init_generators(self) -> list[torch.Generator]:
        """One CPU generator a seed for the initial weights: the same start on every device."""
        return [torch.Generator().manual_seed(seed) for seed in self.seeds]

    # --- What depends on the step number alone --------------------------------------------------------

    @property
    def first_step(self) -> int:
        """The step at which a run begins: 0, or below it with a pretraining, whose steps have negative numbers."""
        return 0

    @property
    def period(self) -> int:
        """Number of steps after which the pattern of updates repeats."""
        return 1

    def phase(self, step: int) -> int:
        """Which updates are due may differ between phases of training; within one they repeat with `period`."""
        return 0

    def schedule(self, step: int) -> tuple[float, ...]:
        """The numbers that change over training at `step` (rates, weights of averages); see `apply_schedule`."""
        return (learning_rate_factor(self.config, step),)

    def apply_schedule(self, values: tuple[float, ...]) -> None:
        """Write what `schedule` returned to the device tensors that the update reads."""
        for optimizer in self.optimizers.values():
            optimizer.set_rate(values[0])

    def prepare(self) -> None:
        """Bring the scheduled tensors up to `self.step`; free when nothing changed."""
        values = self.schedule(self.step)
        if values != self._prepared:
            self.apply_schedule(values)
            self._prepared = values

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

    def update(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """One gradient step in place and `self.step` + 1. All of METRICS, each [S]; NaN where the part was not due."""
        self.prepare()
        metrics = self.gradient_step(batch, draws, self.step)
        self.step += 1
        return {name: metrics.get(name, self.not_due) for name in self.METRICS}

    def act(self, states: Tensor, rng: Rng, active: Tensor | None = None) -> Tensor:
        """states [S, N, state_dim] -> actions [S, N, action_dim].

        `active` [S, N] bool: rows that matter; only they are computed, the rest come back as zeros. The random
        numbers are drawn for all N rows either way, so a row's action does not depend on which others are active.
        """
        noise = self.act_draws(rng, states.shape[1])
        with torch.no_grad():
            if active is None:
                return self.actions_in_chunks(states, noise)
            # A fixed number of rows a seed, padded: the batched products need one shape for all seeds.
            rows = active.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : int(active.sum(1).max())]
            seeds = torch.arange(states.shape[0], device=rows.device).unsqueeze(1)
            chosen = self.actions_in_chunks(states[seeds, rows], {k: v[seeds, rows] for k, v in noise.items()})
            actions = torch.zeros(*states.shape[:2], self.action_dim, device=states.device)
            actions[seeds, rows] = chosen
            return actions * active.unsqueeze(-1)

    def actions_in_chunks(self, states: Tensor, noise: Mapping[str, Tensor]) -> Tensor:
        """`actions_for`, so many states at a time that their candidates fit a CPU's cache and a GPU's memory."""
        candidates = self.num_seeds * getattr(self.config, "action_candidates", 1)
        at_once = max(1, CHUNK["cpu" if self.device.type == "cpu" else "gpu"] // candidates)
        if states.shape[1] <= at_once:
            return self.actions_for(states, noise)
        split = {name: value.split(at_once, dim=1) for name, value in noise.items()}
        parts = [
            self.actions_for(part.contiguous(), {name: value[i].contiguous() for name, value in split.items()})
            for i, part in enumerate(states.split(at_once, dim=1))
        ]
        return torch.cat(parts, dim=1)

    def act_draws(self, rng: Rng, states: int) -> dict[str, Tensor]:
        """The random numbers of `act` for N states, each [S, N, ...]."""
        raise NotImplementedError

    def actions_for(self, states: Tensor, noise: Mapping[str, Tensor]) -> Tensor:
        """The policy as a pure function of states [S, N, state_dim] and the numbers of `act_draws`."""
        raise NotImplementedError

    # --- Numbers made of the whole table ----------------------------------------------------------------

    def observe(self, transitions: Transitions) -> None:
        """Take what the agent needs to know of the data as a whole, such as the states' mean and deviation.

        Called once, before the first step; what is kept stands in `networks`, so that a checkpoint has it.
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

    def load_published(self, networks: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Load weights under the published code's names, without the seeds axis, into every seed."""
        raise NotImplementedError

    def published_state(self) -> list[dict[str, Any]]:
        """Each seed's weights under the published code's names."""
        raise NotImplementedError


def learning_rate_factor(config: Any, step: int) -> float:
    """Cosine decay of every learning rate at a gradient step.

    `lr_decay` is the published form (DEVIATIONS 9): stepped once an evaluation interval, over a horizon counted in
    epochs, so that 2000 epochs end at 0.999 of the start. `lr_decay_full` is stepped every epoch and ends at zero.
    """
    if config.lr_decay and config.lr_decay_full:
        raise ValueError("lr_decay and lr_decay_full exclude each other; choose one")
    if not (config.lr_decay or config.lr_decay_full):
        return 1.0
    epochs = step // config.num_steps_per_epoch
    done = epochs // config.eval_interval if config.lr_decay else min(epochs, config.num_epochs)
    return 0.5 * (1 + math.cos(math.pi * done / config.num_epochs))
