"""A stand-in for a capture on machines without a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from utils.training import capture


@pytest.fixture
def replayed_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a capture does to the agent, without a device: warm up, put back, then run again at every replay."""

    def captured(run: Callable[[], None], device: torch.device, restore: Callable[[], None]) -> Callable[[], None]:
        for _ in range(3):
            run()
        restore()
        return run

    monkeypatch.setattr(capture, "_captured", captured)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
