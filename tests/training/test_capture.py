"""Compiled and captured updates and policies give the plain ones' numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hyperparameters
from agents import AGENTS
from tests.training.making import make_runner, parameters, planning, ran
from utils.seeding import torch_generators
from utils.training import capture
from utils.training.capture import CapturedActions, acting, choose_mode


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


# --- Captured graphs: their logic on the CPU, with a stand-in for the capture itself ---------------


@pytest.mark.slow
@pytest.mark.usefixtures("replayed_eagerly")
@pytest.mark.parametrize("algo", list(AGENTS))
@pytest.mark.parametrize("start", ["first", "7", "ema"])
def test_periods_in_fixed_buffers_equal_single_steps(algo: str, start: str) -> None:
    """From the first step (or pretraining), from within a period, and across the start of the policy's average."""
    # A short pretraining ends within the run.
    config = hyperparameters.CONFIGS[algo]
    short = {"pretrain_epochs": 1, "num_steps_per_epoch": 40} if hasattr(config, "pretrain_epochs") else {}
    if hasattr(config, "horizon"):
        short |= {"hidden_dim": 16, "dim_mults": "1,2", "diffusion_steps": 2}
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
def test_planned_columns_are_seen_by_a_captured_period() -> None:
    eager, graph = planning("eager", [0, 3]), planning("graph", [0, 3])
    eager.run(70)
    graph.run(70)
    assert graph._graphs and torch.equal(parameters(eager), parameters(graph))


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


# --- Graphs that cannot be had, or are wrong ------------------------------------------------------------------------


def nothing(run: Callable[[], None]) -> Callable[[], None]:
    """As a capture on the wrong stream: an empty graph."""
    return lambda: None


def twice(run: Callable[[], None]) -> Callable[[], None]:
    """As a capture that finds the optimiser somewhere else than it will be: another update than the eager one."""
    return lambda: (run(), run())  # type: ignore[func-returns-value]


def raising(run: Callable[[], None]) -> Callable[[], None]:
    run()
    raise RuntimeError("operation not permitted when stream is capturing\nlong trace")


def captured_as(kind: Callable[[Callable[[], None]], Callable[[], None]]) -> Any:
    """A stand-in for the capture that warms up, puts back and gives what `kind` makes of the period."""

    def captured(run: Callable[[], None], device: torch.device, restore: Callable[[], None]) -> Callable[[], None]:
        run()
        restore()
        return kind(run)

    return captured


@pytest.mark.parametrize(("kind", "said"), [
    (nothing, "is not what the same steps make of it eagerly"),
    (twice, "is not what the same steps make of it eagerly"),
    (raising, "operation not permitted when stream is capturing"),
])  # fmt: skip
@pytest.mark.parametrize("mode", ["compile", "eager"])
def test_training_goes_on_without_a_graph_that_is_wrong(
    kind: Any, said: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the next best mode, from the untouched state, with one line."""
    monkeypatch.setattr(capture, "_captured", captured_as(kind))
    works = lambda function, **_: function  # noqa: E731
    monkeypatch.setattr(torch, "compile", works if mode == "compile" else None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = make_runner("graph", [0, 3])
        run.run(45)
    (line,) = [str(w.message) for w in caught if "graph" in str(w.message)]
    assert line.startswith(f"no CUDA graph, execution is {mode}: ") and said in line and "\n" not in line
    assert run.mode == mode and not run._graphs
    eager = make_runner("eager", [0, 3])
    eager.run(45)
    assert torch.equal(parameters(run), parameters(eager))
    got = run.metrics()
    assert all(torch.equal(got[name], value) for name, value in eager.metrics().items())


@pytest.mark.usefixtures("replayed_eagerly")
def test_a_graph_that_fails_in_a_later_phase_costs_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pretraining is captured, what follows cannot be."""
    short = {"pretrain_epochs": 1, "num_steps_per_epoch": 40}
    graph, eager = (make_runner(mode, [0, 3], algo="dtql", **short) for mode in ("graph", "eager"))
    for run in (graph, eager):
        run.agent.step = run.agent.first_step
    graph.run(20)
    assert graph.mode == "graph"
    del graph._graphs[1]  # captured when the runner was made: the agent stood at step 0 then
    monkeypatch.setattr(capture, "_captured", captured_as(raising))
    with pytest.warns(UserWarning, match="execution is compile: operation not permitted"):
        graph.run(60)
    eager.run(80)
    assert graph.mode == "compile" and torch.equal(parameters(graph), parameters(eager))
    expected = eager.metrics()
    for name, value in graph.metrics().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_rounding_is_no_wrong_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounding(run: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            run()
            with torch.no_grad():
                for network in runs[-1].networks.values():
                    network.flat.mul_(1 + 1e-7)

        return replay

    runs: list[Any] = []
    monkeypatch.setattr(capture, "_captured", captured_as(rounding))
    run = make_runner("eager", [0, 3])
    runs.append(run.agent)
    run.mode = "graph"
    run.run(20)
    assert run.mode == "graph" and run._graphs


@pytest.mark.parametrize(("kind", "said"), [
    (nothing, "does not give the actions"), (raising, "operation not permitted"),
])  # fmt: skip
def test_a_policy_acts_without_a_graph_that_is_wrong(kind: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "_captured", captured_as(kind))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    run = make_runner("eager", [0, 3])
    act, rngs = CapturedActions(run.agent), torch_generators([0, 3], "acting", "cpu")
    expected = torch_generators([0, 3], "acting", "cpu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            states = torch.randn(2, 5, 11)
            assert torch.equal(act(states, rngs), run.agent.act(states, expected))
    (line,) = [str(w.message) for w in caught if "graph" in str(w.message)]
    assert line.startswith("the policy runs without a CUDA graph: ") and said in line


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
    replay = capture._captured(lambda: log.append("run"), torch.device("cuda:1"), lambda: log.append("restore"))
    replay()
    side, current, capturing = "side of cuda:1", "current of cuda:1", "capture, thread_local, side of cuda:1"
    assert log == [
        "enter cuda:1", f"{side} waits for {current}",
        f"enter {side}", "run", "run", "run", f"leave {side}", f"{current} waits for {side}", "restore",
        f"enter {capturing}", "run", f"leave {capturing}", "leave cuda:1", "replay",
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
        capture.forget_compiled()
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
