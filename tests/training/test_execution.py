"""Every way of running the updates gives the same numbers, and metrics and random numbers keep their order."""

from __future__ import annotations

import dataclasses
import io
import warnings
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hyperparameters
from agents import AGENTS
from agents.parts.draws import normals
from tests import small
from utils.errors import UserError
from utils.runs import checkpoint
from utils.seeding import torch_generators
from utils.training import runner
from utils.training.runner import CapturedActions, Runner, acting, choose_mode


def make_runner(mode: str, seeds: list[int], device: str = "cpu", algo: str = "diffcps", **settings: Any) -> Runner:
    fields = {field.name for field in dataclasses.fields(hyperparameters.CONFIGS[algo])}
    early = {"ema_start": 20, "warmup_steps": 20, "hidden_dim": 64, "vae_hidden_dim": 32}  # where an agent has them
    if "plan_actions" in fields or "support_actions" in fields:  # a behaviour model is sampled for the whole table
        early |= {"hidden_dim": 32, "diffusion_steps": 3, "support_actions": 2}
    settings = {name: value for name, value in early.items() if name in fields} | settings
    config = hyperparameters.get(algo, "hopper-medium-v2", **settings)
    agent = AGENTS[algo](11, 3, 1.0, config, seeds, device)
    table = small.dataset().to(device)
    return Runner(agent, table, 32, torch_generators(seeds, "training", device), mode)


def parameters(run: Runner) -> torch.Tensor:
    return torch.cat([p.flat.view(run.agent.num_seeds, -1) for p in run.agent.networks.values()], dim=1)


def test_choice_of_mode() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda:0")
    assert choose_mode("auto", cpu, 1_000)[0] == "eager"
    assert choose_mode("auto", cpu, 2_000_000)[0] == "compile"
    assert choose_mode("auto", cuda, 10)[0] == "graph"
    assert choose_mode("eager", cuda, 10)[0] == "eager"
    with pytest.raises(ValueError, match="needs a CUDA device"):
        choose_mode("graph", cpu, 10)
    with pytest.raises(ValueError, match="known: auto, eager, compile, graph"):
        choose_mode("fast", cpu, 10)


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["diffcps", "dtql"])  # the losses of the others are made of the same parts
def test_compiled_equals_eager(algo: str) -> None:
    short = {"diffusion_steps": 2} if algo == "diffcps" else {}  # a shorter chain compiles faster
    eager, compiled = (
        make_runner("eager", [0, 3], algo=algo, **short),
        make_runner("compile", [0, 3], algo=algo, **short),
    )
    if compiled.mode == "eager":
        pytest.skip("torch.compile does not work on this machine (no C++ compiler?)")
    eager.run(50)
    compiled.run(50)
    a, b = parameters(eager), parameters(compiled)
    assert (a - b).norm() <= 1e-5 * a.norm()
    expected, got = eager.metrics(), compiled.metrics()
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_compiled_actions_equal_the_agents_for_any_number_of_states() -> None:
    run = make_runner("eager", [0, 3], diffusion_steps=2, action_candidates=4)
    states, active = torch.randn(2, 6, 11), torch.tensor([[True] * 6, [True, False] * 3])
    rngs = lambda: torch_generators([0, 3], "acting", "cpu")  # noqa: E731
    eager = [run.agent.act(states[:, :n], rngs()) for n in (6, 2, 1)] + [run.agent.act(states, rngs(), active)]
    act = acting(run.agent, "compile")
    compiled = [act(states[:, :n], rngs()) for n in (6, 2, 1)] + [act(states, rngs(), active)]
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_failed_compilation_is_one_warning_and_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler\nlong trace")

    monkeypatch.setattr(torch, "compile", broken)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = make_runner("compile", [0])
    messages = [str(w.message) for w in caught if "compile" in str(w.message)]
    assert messages == ["torch.compile failed, critic_loss and policy_loss stay uncompiled: no compiler"]
    run.run(4)
    assert run.mode == "eager" and run.agent.step == 4
    assert torch.equal(parameters(run), parameters(ran("eager", 4)))


def ran(mode: str, steps: int) -> Runner:
    run = make_runner(mode, [0])
    run.run(steps)
    return run


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


class Planner(AGENTS["diffusion_bc"]):
    """Behaviour cloning with a planned column: where the policy's weights stand, plus noise; weights its loss."""

    READS = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.planned = {"mark": 1, "index": 1}
        self.plans: list[int] = []

    @property
    def period(self) -> int:
        return 4

    def plan_step(self, step: int) -> int | None:
        return None if step < 8 else step // 16 * 16 if step >= 16 else 8

    def plan(self, transitions: Any, rng: Any, columns: Any) -> None:
        self.plans.append(self.step)
        noise = normals(rng, self.num_seeds, 1, (transitions.size, 1))[0]
        columns["mark"].copy_(noise + self.actor.parameters.flat.square().mean(dim=1).view(-1, 1, 1))
        columns["index"].copy_(torch.arange(transitions.size).view(1, -1, 1))

    def policy_loss(self, batch: Any, draws: Any) -> Any:
        loss, metrics = super().policy_loss(batch, draws)
        return (loss * (1 + batch["mark"].mean(dim=(1, 2))) if self.READS else loss), metrics


class RepeatingPlanner(Planner):
    """Its plan is made once, of a network that does not move afterwards: the initial one."""

    PLAN_REPEATS = True

    def plan_step(self, step: int) -> int | None:
        return None if step < 8 else 8

    def plan(self, transitions: Any, rng: Any, columns: Any) -> None:
        super().plan(transitions, rng, columns)
        columns["mark"].copy_(normals(rng, self.num_seeds, 1, (transitions.size, 1))[0])


def planning(mode: str, seeds: list[int], kind: type[Planner] = Planner, rows: int = 400) -> Runner:
    agent = kind(11, 3, 1.0, hyperparameters.get("diffusion_bc", "hopper-medium-v2", hidden_dim=64), seeds)
    table = small.dataset(rows).to("cpu")
    return Runner(agent, table, 32, torch_generators(seeds, "training", "cpu"), mode)


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


@pytest.mark.usefixtures("replayed_eagerly")
def test_planned_columns_are_seen_by_a_captured_period() -> None:
    eager, graph = planning("eager", [0, 3]), planning("graph", [0, 3])
    eager.run(70)
    graph.run(70)
    assert graph._graphs and torch.equal(parameters(eager), parameters(graph))


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


# --- Captured graphs: their logic on the CPU, with a stand-in for the capture itself ---------------


@pytest.fixture
def replayed_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a capture does to the agent, without a device: warm up, put back, then run again at every replay."""

    def captured(run: Any, device: torch.device, restore: Any) -> Any:
        for _ in range(3):
            run()
        restore()
        return run

    monkeypatch.setattr(runner, "_captured", captured)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.slow
@pytest.mark.usefixtures("replayed_eagerly")
@pytest.mark.parametrize("algo", list(AGENTS))
@pytest.mark.parametrize("start", ["first", "7", "ema"])
def test_periods_in_fixed_buffers_equal_single_steps(algo: str, start: str) -> None:
    """From the first step (or pretraining), from within a period, and across the start of the policy's average."""
    # A short pretraining ends within the run.
    pretrained = hasattr(hyperparameters.CONFIGS[algo], "pretrain_epochs")
    short = {"pretrain_epochs": 1, "num_steps_per_epoch": 40} if pretrained else {}
    eager, graph = make_runner("eager", [0, 3], algo=algo, **short), make_runner("graph", [0, 3], algo=algo, **short)
    for run in (eager, graph):
        run.agent.step = {"first": run.agent.first_step, "7": 7, "ema": 11}[start]
        run.run(70)
    assert graph.agent.step == eager.agent.step and graph._graphs
    assert torch.equal(parameters(eager), parameters(graph))
    expected, got = eager.metrics(), graph.metrics()
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)
    graph.run(20)  # the sums start anew
    eager.run(20)
    torch.testing.assert_close(graph.metrics()["q_mean" if "q_mean" in expected else "bc_loss"],
                               eager.metrics()["q_mean" if "q_mean" in expected else "bc_loss"])  # fmt: skip


@pytest.mark.usefixtures("replayed_eagerly")
def test_a_captured_policy_reads_its_buffers() -> None:
    run = make_runner("eager", [0, 3])
    act = CapturedActions(run.agent)
    for seed in range(2):
        states = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(seed))
        expected = run.agent.act(states, torch_generators([seed, 3], "acting", "cpu"))
        assert torch.equal(act(states, torch_generators([seed, 3], "acting", "cpu")), expected)
        with torch.no_grad():
            run.agent.networks["actor"].flat.add_(0.01)  # weights that change in place are seen


def test_a_capture_uses_the_device_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with several devices the capture's own default stream would be another device's."""
    log: list[str] = []

    @contextmanager
    def entered(name: str) -> Any:
        log.append(f"enter {name}")
        yield
        log.append(f"leave {name}")

    stream = lambda name: SimpleNamespace(name=name, wait_stream=lambda s: log.append(f"{name} waits for {s.name}"))  # noqa: E731
    stand_ins = {
        "device": lambda device: entered(str(device)),
        "Stream": lambda device: stream(f"side of {device}"),
        "current_stream": lambda device: stream(f"current of {device}"),
        "stream": lambda s: entered(s.name),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: log.append("replay")),
        "graph": lambda graph, stream, capture_error_mode: entered(f"capture, {capture_error_mode}, {stream.name}"),
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    replay = runner._captured(lambda: log.append("run"), torch.device("cuda:1"), lambda: log.append("restore"))
    replay()
    side, current, capture = "side of cuda:1", "current of cuda:1", "capture, thread_local, side of cuda:1"
    assert log == [
        "enter cuda:1", f"{side} waits for {current}",
        f"enter {side}", "run", "run", "run", f"leave {side}", f"{current} waits for {side}", "restore",
        f"enter {capture}", "run", f"leave {capture}", "leave cuda:1", "replay",
    ]  # fmt: skip


@pytest.mark.parametrize("algo", list(AGENTS))
def test_nothing_captured_waits_for_the_device(algo: str) -> None:
    """Operations whose result or size the host must read cannot be captured; none is part of an update or a policy."""
    waiting = {"_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "equal", "is_nonzero"}
    seen: set[str] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = function.__name__
            seen.add(name if name == "repeat_interleave.Tensor" else name.split(".")[0])
            return function(*args, **(kwargs or {}))

    everything = {"lr_decay": True, "gamma": 1.0} if algo == "dtql" else {}
    if algo == "iql":
        everything = {"dropout": 0.1}
    if algo in ("diffcps", "diffusion_ql"):
        everything = {"max_q_backup": True, "diffusion_steps": 2}
    run = make_runner("eager", [0, 3], algo=algo, **everything)
    run._refill()
    states, noise = torch.randn(2, 5, 11), run.agent.act_draws(run.generators, 5)
    with Watch():
        for k in range(run.agent.period):
            draws = {name: value[k] for name, value in run._draws.items()}
            run.agent.gradient_step(run.batch(run._indices[k]), draws, k)
        with torch.no_grad():
            run.agent.actions_in_chunks(states, noise)
    assert {"bmm", "_fused_adam_"} <= seen
    assert not seen & (waiting | {"repeat_interleave.Tensor"})


@pytest.mark.slow
def test_many_agents_can_be_compiled_one_after_the_other() -> None:
    """More than the eight forms of one function that PyTorch keeps."""
    compiled = 0

    def counting(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        nonlocal compiled
        compiled += 1
        return graph.forward

    def doubled(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    for size in range(1, 11):
        runner.forget_compiled()
        assert torch.compile(doubled, backend=counting, dynamic=False)(torch.ones(size)).tolist() == [2.0] * size
    assert compiled == 10


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@cuda
@pytest.mark.parametrize("algo", list(AGENTS))
def test_graph_equals_eager(algo: str) -> None:
    eager, graph = make_runner("eager", [0, 3], "cuda", algo), make_runner("graph", [0, 3], "cuda", algo)
    eager.run(100)
    graph.run(100)
    a, b = parameters(eager), parameters(graph)
    assert (a - b).norm() <= 1e-4 * a.norm()
    expected, got = eager.metrics(), graph.metrics()
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-2, atol=1e-4)


@cuda
def test_captured_actions_equal_the_agents() -> None:
    run = make_runner("eager", [0, 3], "cuda")
    states = torch.randn(2, 5, 11, device="cuda")
    expected = run.agent.act(states, torch_generators([0, 3], "acting", "cuda"))
    got = CapturedActions(run.agent)(states, torch_generators([0, 3], "acting", "cuda"))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
