"""How soon forms of DiffCPS's multiplier bring the policy's loss to a bound that tightens, and how far past it.

    python -m benchmarks.multipliers FILE.hdf5 [--steps 3000]

With --kappa auto: a policy is trained at slack 1, then all forms go on from that same state, on the same batches and
draws, at slack 0.2. e is the loss over kappa - 1, averaged over some 100 steps of the policy.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

import hyperparameters
from agents import AGENTS
from utils import tasks
from utils.data import d4rl
from utils.data.dataset import Table
from utils.options import Parser, command_line
from utils.seeding import torch_generators

BATCH, SMOOTHING, MET = 128, 0.01, 0.02


class Ascent:
    """Adam up lambda * violation by lambda, or up log(lambda) * violation by log(lambda), a rate per seed."""

    def __init__(self, start: Tensor, rates: Sequence[float], log: bool) -> None:
        self.names = [f"{'log ascent' if log else 'ascent'} {rate:g}" for rate in rates]
        self.rates, self.log, self.steps = torch.tensor(rates), log, 0
        self.value = (start.log() if log else start).repeat(len(rates))
        self.mean, self.square = torch.zeros_like(self.value), torch.zeros_like(self.value)

    def __call__(self, violation: Tensor, kappa: Tensor) -> Tensor:
        """The next lambda [S]."""
        self.steps += 1
        self.mean.lerp_(violation, 0.1)
        self.square.lerp_(violation**2, 0.001)
        slope = self.mean / (1 - 0.9**self.steps) / ((self.square / (1 - 0.999**self.steps)).sqrt() + 1e-8)
        self.value = (self.value + self.rates * slope).clamp(min=-7.0 if self.log else 0.0)
        return self.value.exp() if self.log else self.value


class PID:
    """lambda = (K_P e + I + K_D (change of e)_+)_+, I <- (I + K_I v)_+, v = violation / kappa (Stooke et al. 2020).

    As in its code, e is an exponential mean of v with rate 0.05; its change is that over ten steps.
    """

    def __init__(self, start: Tensor, gains: Sequence[tuple[float, float, float]]) -> None:
        self.names = [f"PID {p:g}, {i:g}, {d:g}" for p, i, d in gains]
        self.p, self.i, self.d = torch.tensor(gains).T
        self.integral, self.error = start.repeat(len(gains)), torch.zeros(len(gains))
        self.earlier: list[Tensor] = []

    def __call__(self, violation: Tensor, kappa: Tensor) -> Tensor:
        """The next lambda [S]."""
        error = violation / kappa
        self.error = self.error.lerp(error, 0.05 if self.earlier else 1.0)
        self.integral = (self.integral + self.i * error).clamp(min=0.0)
        self.earlier = [*self.earlier, self.error][-11:]
        rise = (self.error - self.earlier[0]).clamp(min=0.0)
        return (self.p * self.error + self.integral + self.d * rise).clamp(min=0.0)


class Compared(AGENTS["diffcps"]):  # type: ignore[misc]
    """DiffCPS with a form of the multiplier per group of seeds, and what became of each step."""

    forms: Sequence[Ascent | PID] = ()

    def ascend(self, name: str, violation: Tensor, scale: Tensor | float = 1.0) -> dict[str, Tensor]:
        if not self.forms:
            return super().ascend(name, violation, scale)
        kappa, sizes = self.kappa(), [len(form.names) for form in self.forms]
        pairs = zip(self.forms, violation.split(sizes), kappa.split(sizes), strict=True)
        self.lambda_.flat[:, 0] = torch.cat([form(v, k) for form, v, k in pairs])
        return {"error": violation / kappa, "lambda": self.lambda_()}


def agent(env_name: str, seeds: int, slack: float, hidden_dim: int) -> Compared:
    """So many copies of seed 0."""
    ascent = {"lambda_update": "ascent", "lambda_learning_rate": 3e-3, "lambda_anti_windup": True}  # before the forms
    free = {"kappa": "auto", "kappa_slack": slack, "lambda_min": 0.0}  # the floor of `auto` would hide the forms
    c = hyperparameters.get("diffcps", env_name, hidden_dim=hidden_dim, **free, **ascent)
    task = tasks.task(env_name)
    return Compared(task.state_dim, task.action_dim, 1.0, c, [0] * seeds)


def train(
    learner: Compared, alone: Compared, table: Table, generator: torch.Generator, steps: int
) -> list[dict[str, Tensor]]:
    """Every copy on the same batches and draws, those of the agent that is `alone`; the metrics of the steps in which
    the policy moved."""
    found, seeds = [], learner.num_seeds
    rows = table.draw_indices([generator], BATCH, steps)
    for row in rows:
        draws = {name: value.expand(seeds, *value.shape[1:]) for name, value in alone.draw([generator], BATCH).items()}
        learner.prepare()
        metrics = learner.gradient_step(table.gather(row.expand(seeds, -1)), draws, learner.step)
        learner.step += 1
        if "lambda" in metrics:
            found.append(metrics)
    return found


def compare(options: argparse.Namespace) -> None:
    """Print a line per form."""
    table, task, width = (
        d4rl.load(options.env_name, path=options.file).batches_to("cpu", None),
        options.env_name,
        options.hidden_dim,
    )
    (generator,) = torch_generators([0], "training", "cpu")
    first = agent(task, 1, 1.0, width)
    before = train(first, first, table, generator, options.steps)
    start = first.lambda_()
    forms = [
        Ascent(start, (3e-5, 3e-3, 1e-2, 3e-2), log=False),
        Ascent(start, (1e-2, 3e-2, 1e-1), log=True),
        PID(start, ((0, 2e-2, 0), (1, 2e-2, 0), (3, 2e-2, 0), (1, 5e-2, 0), (1, 2e-2, 3), (0, 1e-1, 0))),
    ]
    names = [name for form in forms for name in form.names]
    many = agent(task, len(names), 0.2, width)
    many.load_state_dict(_repeated(first.state_dict(), len(names)))
    many.forms = forms
    found = train(many, first, table, generator, options.steps)
    errors, lambdas = (torch.stack([metrics[name] for metrics in found]) for name in ("error", "lambda"))
    last = before[-len(before) // 4 :]
    print(
        f"before: lambda {start.item():.3f}, loss / clone's "
        f"{(sum(m['kl_loss'] for m in last) / sum(m['clone_loss'] for m in last)).item():.2f}"
    )  # type: ignore[union-attr]
    e = torch.zeros_like(errors)
    for k, error in enumerate(errors):
        e[k] = error if k == 0 else e[k - 1].lerp(error, max(SMOOTHING, 1 / (k + 1)))
    half = len(e) // 2
    print("| form, rate or gains | met after | furthest below | mean e, last half | its deviation | lambda |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for k, name in enumerate(names):
        met = next((n for n in range(20, len(e)) if e[n, k] <= MET), None)
        low = -e[met:, k].min().item() if met is not None else float("nan")
        tail, own = e[half:, k], lambdas[half:, k]
        print(f"| {name} | {met or '-'} | {100 * max(low, 0.0):.1f} % | {100 * tail.mean():+.1f} % | "
              f"{100 * tail.std():.1f} % | {own.mean():.3f} ± {own.std():.3f} |")  # fmt: skip


def _repeated(state: object, times: int) -> object:
    """A state of one seed for `times` of them."""
    if isinstance(state, dict):
        return {name: _repeated(value, times) for name, value in state.items()}
    return state.repeat(times, *[1] * (state.dim() - 1)) if isinstance(state, Tensor) else state


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m benchmarks.multipliers", description=__doc__)
    parser.add_argument("file", help="data in D4RL's format")
    parser.add_argument("--env_name", default="hopper-medium-v2", help="their task (%(default)s)")
    parser.add_argument("--steps", type=int, default=3000, help="before the bound tightens, and after it (%(default)s)")
    parser.add_argument("--hidden_dim", type=int, default=64, help="width of the networks (%(default)s)")
    compare(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(command_line("benchmarks.multipliers", lambda: main(sys.argv[1:])))
