"""Both planners repeat recorded outputs of the published code, and a planner with a mistake does not.

`fixtures/planners_*.npz` are the recordings of jannerm/diffuser (7ea4228) and anuragajay/decision-diffuser (01ce528),
whose outputs they hold beside the rule that makes weights and inputs of a seed; no weights are stored.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.parts import windows
from benchmarks.fidelity import planners
from tests.recordings import FIXTURES

DIFFUSER, DECISION_DIFFUSER = (FIXTURES / f"planners_{name}.npz" for name in ("diffuser", "decision_diffuser"))


def shares(path: Path) -> dict[str, float]:
    """Each case's largest error as a share of its bound."""
    return {line.case: line.error / line.bound for line in planners.replay(path)}


@pytest.mark.parametrize(("path", "cases"), [(DIFFUSER, 16), (DECISION_DIFFUSER, 10)])
def test_every_recorded_case_is_repeated(path: Path, cases: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert planners.main([str(path)]) == 0
    out = capsys.readouterr().out
    assert out.count(" of ") == cases and "BEYOND" not in out


def altered(path: Path, to: Path, key: str, change: Callable[[np.ndarray], np.ndarray]) -> Path:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    arrays[key] = change(arrays[key])
    np.savez(to, **arrays)
    return to


@pytest.mark.slow
def test_a_wrong_number_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def one_weight(values: np.ndarray) -> np.ndarray:
        values[5] += 2e-5
        return values

    path = altered(DIFFUSER, tmp_path / "one.npz", "train/ema/model.final_conv.1.weight", one_weight)
    assert planners.main([str(path)]) == 1
    assert "worst ema/model.final_conv.1.weight  BEYOND" in capsys.readouterr().out
    path = altered(DIFFUSER, tmp_path / "nan.npz", "loss/loss", lambda value: value * np.nan)
    assert planners.main([str(path)]) == 1
    path = altered(DIFFUSER, tmp_path / "shape.npz", "value_small/out", lambda value: value[:-1])
    assert planners.main([str(path)]) == 1


def test_a_file_that_is_no_recording_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.npz").write_text("no numbers")
    for path in (tmp_path / "text.npz", tmp_path / "missing.npz", FIXTURES / "physics.npz"):
        assert planners.main([str(path)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def without_first(*arguments: Any) -> torch.Tensor:
    """The loss of the noise over the steps that are not pinned."""
    steps = arguments[2].shape[2]
    return windows.noise_loss(*arguments) * steps / (steps - 1)


@pytest.mark.parametrize(
    ("path", "cases", "name", "mistake"),
    [
        (DIFFUSER, ["guided", "guided_strong"], "Guide", lambda a, b, c, d: windows.Guide(a, b, c + 1, d)),
        (DIFFUSER, ["guided", "guided_strong"], "Guide", lambda a, b, c, d: windows.Guide(a, b, c, not d)),
        (DIFFUSER, ["loss", "train"], "loss_weights", lambda *sizes: windows.loss_weights(*sizes).clamp(max=9)),
        (DECISION_DIFFUSER, ["loss", "train"], "noise_loss", without_first),
        (DECISION_DIFFUSER, ["chain", "chain_strong"], "TEMPERATURE", 1.0),
    ],
)
def test_a_mistake_breaks_its_cases(
    path: Path, cases: list[str], name: str, mistake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planners, name, mistake)
    found = shares(path)
    assert all(found[case] > 1 for case in cases) and max(found.values()) > 100, found


pytestmark = pytest.mark.slow  # the whole file: seconds per test
