"""Whether a constraint did anything, said of known metrics; and files of earlier versions, which have no word of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from utils.runs.constraint import Constraint, constraint_lines


def metrics(above: list[float], loss: float = 0.02, lambda_: float = 0.5, **more: list[float]) -> dict[str, np.ndarray]:
    rows = len(above)
    columns = {"step": np.arange(1, rows + 1) * 10.0, "kl_loss": np.full(rows, loss), "lambda": np.full(rows, lambda_)}
    columns |= {"lambda_violated": np.array(above), "lambda_at_bound": np.zeros(rows)}
    return columns | {name: np.array(values) for name, values in more.items()}


@pytest.mark.parametrize(
    ("columns", "settings", "line"),
    [
        (
            metrics([1.0, 0.4, 0.0, 0.005, 0.0, 0.0]), {"kappa": 0.06},
            "κ = 0.06 was not reached after step 20: the constraint did nothing (loss 0.02, λ 0.5 at the end)",
        ),
        (
            metrics([0.0, 0.0], lambda_=0.0, lambda_at_bound=[1.0, 1.0]), {"kappa": 0.06},
            "κ = 0.06 was never reached: the constraint did nothing (loss 0.02, λ 0 at the end, one of its bounds)",
        ),
        (
            metrics([1.0, 1.0, 1.0], loss=0.1, lambda_=3.0), {"kappa": 0.05},
            "κ = 0.05 was not met: the loss was 0.1 in the last half (λ 3 at the end)",
        ),
        (
            metrics([1.0, 1.0, 0.5, 0.46], kappa=[0.1, 0.05, 0.04, 0.03]), {"kappa": "auto"},
            "κ = 0.03 (auto) binds: the loss was above it at 48 % of the last half's steps (λ 0.5 at the end)",
        ),
        (  # an epoch in which the policy never moved is none
            metrics([1.0, np.nan, 0.3, 0.3], loss=0.1), {"kappa": 0.1},
            "κ = 0.1 binds: the loss was above it at 30 % of the last half's steps (λ 0.5 at the end)",
        ),
    ],
)  # fmt: skip
def test_the_line_of_a_constraint(columns: dict[str, np.ndarray], settings: dict[str, Any], line: str) -> None:
    assert constraint_lines({"0": Constraint.of(columns, settings)}) == [line]


def test_seeds_of_one_kind_share_a_line() -> None:
    idle, binding = metrics([1.0, 0.0, 0.0, 0.0], lambda_=0.2), metrics([0.5, 0.5, 0.5, 0.5])
    found = {seed: Constraint.of(columns, {"kappa": 0.06}) for seed, columns in enumerate((idle, binding, idle))}
    named = {str(seed): one for seed, one in found.items()}
    first, second = constraint_lines(named)
    assert first.startswith("seed 0, 2: κ = 0.06 was not reached after step 10: ") and "λ 0.2 at the end" in first
    assert second.startswith("seed 1: κ = 0.06 binds: the loss was above it at 50 %")
    (both,) = constraint_lines({"0": named["0"], "2": Constraint.of(metrics([0.0], lambda_=0.4), {"kappa": 0.06})})
    assert "λ 0.3 at the end" in both and not both.startswith("seed")


@pytest.mark.parametrize(
    ("columns", "settings"),
    [
        ({}, {"kappa": 0.05}),
        ({"step": np.array([10.0]), "kl_loss": np.array([1.0]), "lambda": np.array([1.0])}, {"kappa": 0.05}),
        (metrics([1.0]), {"eta": 1.0}),
        (metrics([1.0]), {"kappa": "0.05"}),
        (metrics([np.nan]), {"kappa": 0.05}),
        ({name: values[:0] for name, values in metrics([1.0]).items()}, {"kappa": 0.05}),
    ],
)
def test_what_has_no_constraint_has_no_line(columns: dict[str, np.ndarray], settings: dict[str, Any]) -> None:
    assert constraint_lines({"0": Constraint.of(columns, settings)}) == []
