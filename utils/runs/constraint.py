"""Whether a run's constraint did anything: DiffCPS's bound kappa on the denoising loss and its multiplier lambda."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Share of a policy's steps below which a bound counts as not reached; above 1 minus it, as not met.
FEW = 0.01
COLUMNS = ("kl_loss", "lambda", "lambda_violated", "lambda_at_bound")  # of metrics.csv


@dataclass(frozen=True)
class Constraint:
    """The last half of a seed's run; shares are of the policy's steps.

    kappa: at the end. above: share with a loss above kappa. at_bound: share with lambda at lambda_min or lambda_max.
    reached: the last step of the whole run up to which the loss was above kappa at more than `FEW` of them.
    """

    kappa: float
    auto: bool
    above: float
    at_bound: float
    loss: float
    lambda_: float
    reached: int

    @classmethod
    def of(cls, metrics: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> Constraint | None:
        """From the columns of `metrics.csv` and a run's settings; None where they have no constraint, as in files of
        earlier versions."""
        kappa = settings.get("kappa")
        auto = kappa == "auto"
        if not all(name in metrics for name in (*COLUMNS, "step")) or not (auto or isinstance(kappa, int | float)):
            return None
        due = np.isfinite(metrics["lambda_violated"])
        step, loss, lambda_, above, at_bound = (metrics[name][due] for name in ("step", *COLUMNS))
        bound = metrics["kappa"][due] if auto and "kappa" in metrics else np.full(len(step), np.nan if auto else kappa)
        if not len(step):
            return None
        half, often = len(step) // 2, np.flatnonzero(above > FEW)
        return cls(
            kappa=float(bound[-1]),
            auto=auto,
            above=float(above[half:].mean()),
            at_bound=float(at_bound[half:].mean()),
            loss=float(loss[half:].mean()),
            lambda_=float(lambda_[-1]),
            reached=int(step[often[-1]]) if len(often) else 0,
        )

    @property
    def kind(self) -> str:
        """idle: kappa was not reached; unmet: the loss stayed above it; else binding."""
        return "idle" if self.above < FEW else "unmet" if self.above > 1 - FEW else "binding"


def describe(constraints: Sequence[Constraint]) -> str:
    """The constraints of seeds that are of one kind, in a line: numbers are means over them."""
    first = constraints[0]
    kappa, loss, lambda_, above, at_bound = (
        float(np.mean([getattr(one, name) for one in constraints]))
        for name in ("kappa", "loss", "lambda_", "above", "at_bound")
    )
    bound = f"κ = {kappa:.3g}{' (auto)' if first.auto else ''}"
    at_end = f"λ {lambda_:.3g} at the end" + (", one of its bounds" if at_bound > 1 - FEW else "")
    if first.kind == "idle":
        reached = max(one.reached for one in constraints)
        since = f"not reached after step {reached:,}" if reached else "never reached"
        return f"{bound} was {since}: the constraint did nothing (loss {loss:.3g}, {at_end})"
    if first.kind == "unmet":
        return f"{bound} was not met: the loss was {loss:.3g} in the last half ({at_end})"
    return f"{bound} binds: the loss was above it at {100 * above:.0f} % of the last half's steps ({at_end})"


def constraint_lines(found: Mapping[str, Constraint | None]) -> list[str]:
    """A line on the constraints by seed; one per kind, with the seeds' names, where they are of several."""
    kinds: dict[str, list[str]] = {}
    for seed, one in found.items():
        if one is not None:
            kinds.setdefault(one.kind, []).append(seed)
    lines = []
    for seeds in kinds.values():
        text = describe([one for seed in seeds if (one := found[seed]) is not None])
        lines.append(text if len(kinds) == 1 else f"seed {', '.join(seeds)}: {text}")
    return lines
