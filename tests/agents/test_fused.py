"""Layers in bfloat16 as one operation: their numbers and gradients, and machines that cannot compile them."""

from __future__ import annotations

import itertools
import subprocess
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from agents.parts import fused

ACTIVATIONS = {"identity": lambda z: z, "relu": torch.relu, "mish": functional.mish, "swish": functional.silu}
# Sums of bfloat16 numbers that are rounded once more: a relative 2^-9 for each rounding on the way.
NEAR = 0.012


@pytest.fixture(params=[False, True], ids=["in pairs", "in floats"])
def compiled(request: pytest.FixtureRequest) -> Iterator[bool]:
    """The library, with each of its two ways to multiply: whether it is in floats."""
    fused.prepare()
    if not fused.ready:
        pytest.skip("neither AVX512-BF16 nor AVX2, or no C++ compiler, or what PyTorch uses better")
    torch.ops.diffcps.in_floats(request.param)
    yield request.param
    torch.ops.diffcps.in_floats(fused.in_floats())


@dataclass
class Given:
    """One chain's tensors, leaves of its graph."""

    x: Tensor
    weights: list[Tensor]
    offsets: list[Tensor]
    norms: list[tuple[Tensor, Tensor]]
    head: bool

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, *self.weights, *self.offsets, *(t for norm in self.norms for t in norm)]

    def run(self, kind: str) -> Tensor:
        return fused.chain(self.x, list(zip(self.weights, self.offsets, strict=True)), kind, self.head, self.norms)

    def exact(self) -> Given:
        """The same in double precision, with the weights and rows that bfloat16 has, all but the head's."""
        inner = len(self.weights) - self.head
        weights = [_double(w.bfloat16() if i < inner else w) for i, w in enumerate(self.weights)]
        norms = [(_double(scale), _double(shift)) for scale, shift in self.norms]
        return Given(_double(self.x.bfloat16()), weights, [_double(c) for c in self.offsets], norms, self.head)

    def plainly(self, kind: str) -> Tensor:
        """What `run` computes, in double precision; rounded where it rounds, as if that were exact."""
        x = self.x
        for i, (weight, offset) in enumerate(zip(self.weights, self.offsets, strict=True)):
            z = x @ weight.mT + offset
            if self.head and i == len(self.weights) - 1:
                return z
            z = _rounded(z)
            if self.norms:
                scale, shift = self.norms[i]
                z = functional.layer_norm(z, z.shape[-1:]) * scale.unsqueeze(1) + shift.unsqueeze(1)
            x = _rounded(ACTIVATIONS[kind](z))
        return x


def _double(t: Tensor) -> Tensor:
    return t.detach().double().requires_grad_()


def _rounded(t: Tensor) -> Tensor:
    return t + (t.bfloat16().double() - t).detach()


def make(
    widths: tuple[int, ...], head: bool, normed: bool = False, members: int = 2, rows: int = 17, part: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Given:  # fmt: skip
    """A chain of these widths, its weights slices of wider ones. part: an offset for each row of the first layer."""
    g = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    layers = list(itertools.pairwise(widths))
    weights = [(leaf(members, out, fan_in + 3)[:, :, 3:] / fan_in**0.5).requires_grad_() for fan_in, out in layers]
    offsets = [leaf(members, 1, out).requires_grad_() for _, out in layers]
    if part:
        offsets[0] = leaf(members, rows, widths[1]).to(dtype).requires_grad_()
    inner = widths[1 : len(widths) - head] if normed else ()
    norms = [((1 + 0.1 * leaf(members, w)).requires_grad_(), leaf(members, w).requires_grad_()) for w in inner]
    return Given(leaf(members, rows, widths[0]).to(dtype).requires_grad_(), weights, offsets, norms, head)


SHAPES = [
    make((256, 256), False),
    make((6, 256, 256, 6), True, members=3, rows=256, part=True),
    make((6, 64, 64, 6), True, rows=40, part=True, dtype=torch.bfloat16),
    make((39, 33, 65, 129), False),
    make((39, 33, 65, 1), True, dtype=torch.bfloat16),
    make((16, 1), False, rows=1),
    make((23, 70, 70, 1), True, rows=2500),  # more rows than are summed at once
    make((5, 7, fused.MOST_LAST), True, members=1, rows=9),
    make((23, 256, 256, 1), True, normed=True),
    make((39, 33, 65, 129), False, normed=True),
]


def slopes(given: Given, out: Tensor, towards: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out, given.leaves, towards.to(out.dtype)))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("kind", list(ACTIVATIONS))
@pytest.mark.parametrize("given", SHAPES, ids=lambda given: "-".join(str(w.shape[1]) for w in given.weights))
def test_numbers_and_gradients_are_those_of_double_precision(given: Given, kind: str) -> None:
    exact = given.exact()
    out, wanted = given.run(kind), exact.plainly(kind)
    assert out.dtype == (torch.float32 if given.head else torch.bfloat16)
    towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    found = slopes(given, out, towards)
    assert (out - wanted).norm() <= NEAR * wanted.norm()
    for leaf, near, far in zip(given.leaves, found, slopes(exact, wanted, towards), strict=True):
        assert near.dtype == leaf.dtype and near.shape == leaf.shape
        # What a normalisation takes away, a shift of all, has a gradient of rounding errors alone.
        floor = 1e-2 * far.numel() ** 0.5 if given.norms else 0.0
        assert (near - far).norm() <= NEAR * far.norm() + floor


def test_floats_are_multiplied_where_asked_for(compiled: bool) -> None:
    """The processor's product of pairs takes 2^-130, below the normal numbers, for 0."""
    x, weight = torch.full((1, 1, 2), 2.0**-130).bfloat16(), torch.full((1, 1, 2), 2.0**100)
    out = fused.chain(x, [(weight, torch.zeros(1, 1, 1))], "identity")
    assert out.item() == (0.0 if fused.extensions() == fused.PAIRS and not compiled else 2.0**-29)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("kind", ["relu", "mish", "swish"])
def test_activations_far_from_zero(kind: str) -> None:
    z = torch.tensor([-1e30, -200.0, -88.0, -20.0, -1e-3, 0.0, 1e-3, 20.0, 89.0, 1e38]).view(1, -1, 1)
    x, one = z.bfloat16().requires_grad_(), torch.ones(1, 1, 1)
    out = fused.chain(x, [(one, torch.zeros(1, 1, 1))], kind)
    (slope,) = torch.autograd.grad(out, x, torch.ones_like(out))
    wide = x.detach().double().requires_grad_()
    wanted = ACTIVATIONS[kind](wide)
    (far,) = torch.autograd.grad(wanted, wide, torch.ones_like(wanted))
    torch.testing.assert_close(out.double(), wanted, rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(slope.double(), far, rtol=1e-2, atol=1e-6)
    for bad in (float("nan"), float("inf")):
        broken = fused.chain(torch.full_like(x, bad), [(one, torch.zeros(1, 1, 1))], kind)
        assert not broken.isfinite().any()


@pytest.mark.usefixtures("compiled")
def test_no_digit_depends_on_gradients_being_wanted_or_on_threads() -> None:
    given = make((6, 256, 256, 6), True, members=1, rows=256, part=True)
    out = given.run("mish")
    with torch.no_grad():
        assert torch.equal(given.run("mish"), out)
    alone = slopes(given, out, torch.ones_like(out))
    torch.set_num_threads(2)
    try:
        again = given.run("mish")
        together = slopes(given, again, torch.ones_like(again))
    finally:
        torch.set_num_threads(1)
    assert torch.equal(again, out)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.usefixtures("compiled")
def test_gradients_that_are_not_wanted_are_not_made() -> None:
    given = make((6, 32, 1), True)
    frozen = Given(given.x, *([t.detach() for t in ts] for ts in (given.weights, given.offsets)), [], True)
    whole = slopes(given, given.run("relu"), torch.ones(2, 17, 1))
    (alone,) = torch.autograd.grad(frozen.run("relu"), frozen.x, torch.ones(2, 17, 1))
    assert torch.equal(alone, whole[0])
    asked = [1, 0, 0, 0, 0]
    parameters = [*frozen.weights, *frozen.offsets]
    _, z = torch.ops.diffcps.chain(frozen.x, parameters, 2, 1, True, True)
    made = torch.ops.diffcps.chain_gradient(torch.ones(2, 17, 1), z, frozen.x, parameters, 2, 1, True, asked)
    assert [t.numel() > 0 for t in made] == [True, False, False, False, False]


@pytest.mark.usefixtures("compiled")
def test_what_does_not_fit_is_refused() -> None:
    x, weight, offset = torch.zeros(1, 4, 3), torch.zeros(1, 5, 3), torch.zeros(1, 1, 5)
    for layers, message in (
        ([(torch.zeros(1, 5, 2), offset)], "weight of layer 0 does not fit"),
        ([(weight, torch.zeros(1, 1, 4))], "offset of layer 0 does not fit"),
        ([(weight.double(), offset)], "float32 or bfloat16, not double"),
        ([(weight.bfloat16(), offset)], "weights are float32, not c10::BFloat16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            fused.chain(x, layers, "relu")
    wide = fused.MOST_LAST + 1
    last = (torch.zeros(1, wide, 5), torch.zeros(1, 1, wide))
    with pytest.raises(RuntimeError, match=f"at most {fused.MOST_LAST} outputs"):
        fused.chain(x, [(weight, offset), last], "relu", head=True)


# --- Machines ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def unprepared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fused, "ready", False)
    fused._loaded.cache_clear()
    yield
    fused._loaded.cache_clear()


@pytest.mark.usefixtures("unprepared")
@pytest.mark.parametrize(
    "flags", [{"avx2"}, {*fused.PAIRS, "amx_bf16"}, {*fused.FLOATS, *fused.PAIRS} - {"avx512_bf16"}]
)
def test_another_processor_leaves_the_layers_to_pytorch(flags: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "processor", lambda: frozenset(flags))
    monkeypatch.setattr(fused, "_compiled", lambda: pytest.fail("compiled"))
    fused.prepare()
    assert fused.ready is False


@pytest.mark.parametrize(
    "flags, wanted, floats",
    [
        ({*fused.PAIRS, *fused.FLOATS}, fused.PAIRS, False),
        ({*fused.PAIRS, *fused.FLOATS, "GenuineIntel"}, fused.PAIRS, True),
        ({*fused.FLOATS, "AuthenticAMD"}, fused.FLOATS, True),
    ],
)
def test_each_processor_multiplies_in_its_own_way(
    flags: set[str], wanted: frozenset[str], floats: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "processor", lambda: frozenset(flags))
    assert fused.extensions() == wanted and fused.in_floats() is floats


@pytest.mark.usefixtures("unprepared")
@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "a script"])
@pytest.mark.parametrize("needed, cost", [(fused.PAIRS, "a quarter longer"), (fused.FLOATS, "seven times as long")])
def test_without_a_working_compiler_one_line_says_so(
    needed: frozenset[str], cost: str, compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "broken"
    script.write_text("#!/bin/sh\necho 'fatal error: no such header' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script) if compiler == "a script" else compiler)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(fused, "processor", lambda: needed)
    said = {"no-such-compiler": "No such file", "false": "the compiler failed", "a script": "no such header"}[compiler]
    with pytest.warns(UserWarning, match=f"no compiled layers in bfloat16 .*{said}.*{cost}"):
        fused.prepare()
    assert fused.ready is False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused.prepare()  # once is enough
    assert list((tmp_path / ".cache/diffcps/compiled").iterdir()) == []


def test_the_library_is_compiled_once_for_a_source_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> None:
        commands.append(command)
        Path(command[command.index("-o") + 1]).write_text("a library")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(fused, "processor", lambda: fused.PAIRS)
    first = fused._compiled()
    assert fused._compiled() == first and len(commands) == 1
    assert first.parent == tmp_path / ".cache/diffcps/compiled" and first.read_text() == "a library"
    monkeypatch.setattr(torch, "__version__", "2.99.0")  # it is made for one PyTorch
    assert fused._compiled() != first and len(commands) == 2
    monkeypatch.setattr(fused, "processor", lambda: fused.FLOATS)  # and for one kind of processor
    fused._compiled()
    assert len(commands) == 3 and "-mavx512bf16" in commands[1]
    assert {"-mavx2", "-mfma"} <= set(commands[2]) and not any("avx512" in word for word in commands[2])
    changed = tmp_path / "vectors.h"
    changed.write_text("// another")
    monkeypatch.setattr(fused, "VECTORS", changed)
    fused._compiled()
    assert len(commands) == 4
    monkeypatch.setattr("os.access", lambda *_: False)
    elsewhere = fused._compiled()
    assert elsewhere.exists() and tmp_path not in elsewhere.parents
