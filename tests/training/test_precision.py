"""Updates in bfloat16 and TF32: near the float32 ones, and float32 wherever that matters."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hyperparameters
from agents import AGENTS
from agents.parts import fused, precision
from tests.training.making import make_runner, parameters
from utils.seeding import torch_generators
from utils.training.runner import Runner

# Of the gradient of one update from the float32 gradient, relative to its length. The greatest is TD3+BC's: 0.06.
GRADIENT, LOSS = 0.1, 0.02


@pytest.fixture(params=["PyTorch's layers", "fused layers"])
def layers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose layers multiply in bfloat16."""
    fused.prepare()
    if request.param == "PyTorch's layers":
        monkeypatch.setattr(fused, "prepare", lambda: None)
        monkeypatch.setattr(fused, "ready", False)
    elif not fused.ready:
        pytest.skip("no AVX512-BF16, or no C++ compiler")


def at_step(algo: str, precision: str, training: bool) -> Runner:
    """A runner at its first step, or past the phases that come before a run's long last one."""
    short = {"pretrain_epochs": 1} if hasattr(hyperparameters.CONFIGS[algo], "pretrain_epochs") else {}
    short |= {"bc_steps": 12} if algo == "cql" else {}
    run = make_runner("eager", [0, 3], algo=algo, precision=precision, **short)
    run.agent.step = 40 if training else run.agent.first_step
    return run


def one_update(run: Runner, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every optimiser's gradient, and the metrics."""
    slopes: dict[str, Any] = {}
    for name, optimizer in run.agent.optimizers.items():

        def step(gradient: torch.Tensor, name: str = name, take: Any = optimizer.step) -> torch.Tensor:
            slopes.setdefault(name, gradient.clone())
            return take(gradient)

        monkeypatch.setattr(optimizer, "step", step)
    run.run(2 if run.agent.period == 2 else 1)  # TD3+BC's policy moves at the second step
    return slopes, run.metrics()


@pytest.mark.usefixtures("layers")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("algo", list(AGENTS))
def test_an_update_in_bfloat16_is_near_the_one_in_float32(
    algo: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact, mixed = (at_step(algo, precision, training) for precision in ("float32", "bfloat16"))
    (slopes, losses), (near, near_losses) = (one_update(run, monkeypatch) for run in (exact, mixed))
    assert slopes.keys() == near.keys() and losses.keys() == near_losses.keys()
    for name, slope in slopes.items():
        assert near[name].dtype == torch.float32
        assert (near[name] - slope).norm() <= GRADIENT * slope.norm(), name
    networks = [name for name in slopes if slopes[name][0].numel() > 1]
    assert any(not torch.equal(near[name], slopes[name]) for name in networks)  # the switch does something
    for name in (name for name in losses if name.endswith("_loss")):
        torch.testing.assert_close(near_losses[name], losses[name], rtol=LOSS, atol=LOSS, msg=name)


@pytest.mark.usefixtures("layers")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("algo", list(AGENTS))
def test_what_is_made_of_a_networks_output_is_float32(algo: str, training: bool) -> None:
    """Products are bfloat16, sums, means, extremes and exponents of a loss are not."""
    reductions = {"sum", "mean", "amin", "amax", "logsumexp", "_softmax", "_log_softmax", "norm", "exp", "log"}
    products = {"bmm", "baddbmm", "chain"}
    seen: list[tuple[str, torch.dtype]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = function.__name__.split(".")[0]
            seen.extend((name, x.dtype) for x in args if isinstance(x, torch.Tensor) and x.is_floating_point())
            made = function(*args, **(kwargs or {}))
            if name == "chain":  # of float32 weights, and with a head float32: bfloat16 is what is kept inside
                seen.append((name, made[1].dtype))
            return made

    run = at_step(algo, "bfloat16", training)
    run._refill()
    batch, draws = run.batch(run._indices[0]), {name: value[0] for name, value in run._draws.items()}
    for name in run.agent.COMPILED:
        with Watch():
            loss, metrics = getattr(run.agent, name)(batch, draws)
        assert {loss.dtype, *(value.dtype for value in metrics.values())} == {torch.float32}, name
    assert {torch.bfloat16} == {dtype for name, dtype in seen if name in products} - {torch.float32}
    assert {dtype for name, dtype in seen if name in reductions} == {torch.float32}
    state = run.agent.state_dict()
    kept = [value for part in (state["networks"], *state["optimizers"].values()) for value in part.values()]
    assert {value.dtype for value in kept if isinstance(value, torch.Tensor)} == {torch.float32}


def test_acting_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, mixed = (make_runner("eager", [0, 3], precision=name).agent for name in ("float32", "bfloat16"))
    states = torch.randn(2, 5, 11)
    rngs = lambda: torch_generators([0, 3], "acting", "cpu")  # noqa: E731
    assert torch.equal(exact.act(states, rngs()), mixed.act(states, rngs()))


@pytest.mark.slow
@pytest.mark.usefixtures("replayed_eagerly")
def test_a_captured_period_casts_the_weights_again_at_every_replay() -> None:
    eager, graph = (make_runner(mode, [0, 3], precision="bfloat16") for mode in ("eager", "graph"))
    for run in (eager, graph):
        run.run(70)
    assert graph._graphs and torch.equal(parameters(eager), parameters(graph))


@pytest.mark.slow
def test_compiled_bfloat16_is_as_near_to_float32_as_eager_bfloat16() -> None:
    exact, eager, compiled = (
        make_runner(mode, [0, 3], precision=name, diffusion_steps=2)
        for mode, name in (("eager", "float32"), ("eager", "bfloat16"), ("compile", "bfloat16"))
    )
    if compiled.mode == "eager":
        pytest.skip("torch.compile does not work on this machine (no C++ compiler?)")
    for run in (exact, eager, compiled):
        run.run(20)
    start = parameters(make_runner("eager", [0, 3], diffusion_steps=2))
    way = (parameters(exact) - start).norm()
    assert 0 < (parameters(compiled) - parameters(exact)).norm() <= 0.2 * way
    assert (parameters(eager) - parameters(exact)).norm() <= 0.2 * way


# --- What a machine has -----------------------------------------------------------------------------------------------


def test_precisions_that_a_device_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda:0")
    with pytest.raises(ValueError, match="known: float32, tf32, bfloat16"):
        precision.check("float16", cpu)
    with pytest.raises(ValueError, match="needs a CUDA device"):
        precision.check("tf32", cpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    precision.check("float32", cuda)
    for name in ("tf32", "bfloat16"):
        with pytest.raises(ValueError, match=f"Tesla T4 does not multiply in {name}"):
            precision.check(name, cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    precision.check("tf32", cuda)


def test_a_cpu_without_bfloat16_gets_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[bool] = []
    read = fused.processor.__wrapped__
    monkeypatch.setattr(fused, "prepare", lambda: prepared.append(True))
    others = [("fpu avx2", False), ("fpu fma avx2 avx512f", False)]
    for flags, fast in [("avx512f avx512_bf16", True), ("asimd bf16", True), ("fpu fma avx2", True), *others]:
        (tmp_path / "cpuinfo").write_text(f"flags\t: {flags}\n")
        named = read(tmp_path / "cpuinfo")
        monkeypatch.setattr(fused, "processor", lambda named=named: named)
        with warnings.catch_warnings() if fast else pytest.warns(UserWarning, match="has no bfloat16 products"):
            warnings.simplefilter("error" if fast else "always")
            precision.check("bfloat16", torch.device("cpu"))
    assert len(prepared) == 3
    assert read(tmp_path / "none") == frozenset()


def test_tf32_is_on_during_an_update_and_never_for_a_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The switch is the process': whoever acts meanwhile waits for the update to be queued."""
    monkeypatch.setattr(precision, "check", lambda *_: None)  # a CPU has none, but the switch
    agent = make_runner("eager", [0], precision="tf32").agent
    allowed = lambda: torch.backends.cuda.matmul.allow_tf32  # noqa: E731
    acted: list[bool] = []

    def policy(*_: Any) -> torch.Tensor:
        acted.append(allowed())
        return torch.zeros(1, 2, 3)

    monkeypatch.setattr(agent, "actions_for", policy)
    other = threading.Thread(target=lambda: agent.actions_in_chunks(torch.zeros(1, 2, 11), {}))
    with agent.updating():
        assert allowed()
        other.start()
        other.join(timeout=0.05)
        assert acted == []
    other.join()
    assert acted == [False] and not allowed()


# --- On a GPU -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["tf32", "bfloat16"])
@pytest.mark.parametrize("algo", list(AGENTS))
def test_on_cuda_a_graph_of_either_precision_is_its_eager_form(algo: str, name: str) -> None:
    eager, graph = (make_runner(mode, [0, 3], "cuda", algo, precision=name) for mode in ("eager", "graph"))
    for run in (eager, graph):
        run.run(40)
    assert graph.mode == "graph"
    a, b = parameters(eager), parameters(graph)
    assert (a - b).norm() <= 2e-2 * a.norm()  # the graph's losses are compiled: fewer roundings to bfloat16
    assert eager.metrics().keys() == graph.metrics().keys()
