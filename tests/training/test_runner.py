"""Metrics, random numbers and plans keep their order, however a run is cut up and whoever trains beside."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from tests.training.making import (
    Planner,
    RepeatingPlanner,
    make_runner,
    parameters,
    planning,
    ran,
)
from utils.errors import UserError
from utils.runs import checkpoint


def test_a_seed_sees_the_same_alone_and_in_company() -> None:
    alone, company = make_runner("eager", [3]), make_runner("eager", [0, 3, 5])
    alone.run(100)
    company.run(100)
    torch.testing.assert_close(parameters(company)[1:2], parameters(alone), rtol=1e-4, atol=2e-5)
    a = parameters(alone)
    assert (parameters(company)[1:2] - a).norm() < 1e-5 * a.norm()


@pytest.mark.parametrize("pieces", [[45], [20, 25], [7, 13, 25], [1] * 45])
def test_how_a_run_is_cut_up_changes_nothing(pieces: list[int]) -> None:
    whole, cut = ran("eager", 45), make_runner("eager", [0])
    for steps in pieces:
        cut.run(steps)
    assert torch.equal(parameters(whole), parameters(cut)) and cut.agent.step == 45


@pytest.mark.parametrize("at", [0, 13, 20, 33])
def test_state_continues_bit_for_bit(at: int) -> None:
    whole, first, second = ran("eager", 50), make_runner("eager", [0]), make_runner("eager", [0])
    first.run(at)
    second.agent.load_state_dict(first.agent.state_dict())
    second.load_state_dict(first.state_dict())
    second.run(50 - at)
    assert torch.equal(parameters(whole), parameters(second))


def test_metrics_are_means_over_the_steps_at_which_they_were_due() -> None:
    run, by_hand = make_runner("eager", [0, 1]), make_runner("eager", [0, 1])
    seen: dict[str, list[torch.Tensor]] = {}
    original = by_hand.agent.gradient_step

    def spy(*arguments: Any) -> dict[str, torch.Tensor]:
        metrics = original(*arguments)
        for name, value in metrics.items():
            seen.setdefault(name, []).append(value.clone())
        return metrics

    by_hand.agent.gradient_step = spy
    run.run(20)
    by_hand.run(20)
    means = run.metrics()
    assert len(seen["critic_loss"]) == 20 and len(seen["kl_loss"]) == 10
    for name, values in seen.items():
        torch.testing.assert_close(means[name], torch.stack(values).mean(dim=0))
    assert run.metrics() == {}


# --- Numbers made of the whole table ---------------------------------------------------------------


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.usefixtures("replayed_eagerly")
def test_a_plan_is_made_when_it_is_due_and_its_rows_are_those_of_the_batch(mode: str) -> None:
    run = planning(mode, [0, 3])
    seen = []
    plain = run.agent.gradient_step
    run.agent.gradient_step = lambda batch, draws, step: (
        seen.append((run.agent.step, batch)) or plain(batch, draws, step)
    )
    for steps in (3, 20, 30):
        run.run(steps)
    assert run.agent.plans == [8, 16, 32, 48]
    buffer = run.table.rows
    assert any(step > 8 for step, _ in seen)
    for step, batch in seen:
        rows = batch["index"][..., 0].long()
        assert torch.equal(buffer[rows][..., :11], batch["states"]) if step >= 8 else not batch["mark"].any()


def test_planning_changes_no_batch_and_no_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Planner, "READS", False)
    with_plan, without = planning("eager", [0, 3]), make_runner("eager", [0, 3], algo="diffusion_bc")
    with_plan.run(40)
    without.run(40)
    assert with_plan.agent.plans == [8, 16, 32]
    assert torch.equal(parameters(with_plan), parameters(without))
    assert "plan" not in without.state_dict()


def test_a_seed_plans_alike_alone_and_in_company() -> None:
    alone, company = planning("eager", [3]), planning("eager", [0, 3, 5])
    alone.run(40)
    company.run(40)
    a, b = alone._plan.columns.views["mark"][0], company._plan.columns.views["mark"]
    torch.testing.assert_close(a, b[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(a, b[0], atol=0.1)
    torch.testing.assert_close(parameters(company)[1:2], parameters(alone), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", [Planner, RepeatingPlanner])
@pytest.mark.parametrize("at", [0, 5, 8, 9, 16, 30])
def test_a_plan_continues_bit_for_bit(kind: type[Planner], at: int) -> None:
    whole, first, second = (planning("eager", [0, 3], kind) for _ in range(3))
    whole.run(50)
    first.run(at)
    file = io.BytesIO()
    torch.save(checkpoint.split({"runner": first.state_dict(), "agent": first.agent.state_dict()}, 2), file)
    file.seek(0)
    first.run(20)  # what is saved does not change with the run that goes on
    saved = checkpoint.join(torch.load(file, weights_only=True))
    assert ("columns" in saved["runner"]["plan"]) == (at > 8 and kind is Planner)
    second.agent.load_state_dict(saved["agent"])
    second.load_state_dict(saved["runner"])
    second.run(50 - at)
    assert torch.equal(parameters(whole), parameters(second))
    assert torch.equal(whole._plan.columns.rows, second._plan.columns.rows)


def test_a_plan_for_another_dataset_is_refused() -> None:
    first, other = planning("eager", [0]), planning("eager", [0], rows=300)
    first.run(9)
    with pytest.raises(UserError, match="plan is for 400 transitions, the dataset has 300"):
        other.load_state_dict(first.state_dict())
