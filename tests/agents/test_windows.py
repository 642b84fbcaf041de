"""Networks over windows, normalisers and sampling: against plain PyTorch modules, NumPy, and themselves one by one."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from agents.parts.parameters import Sizes
from agents.parts.unet import TemporalUNet, TemporalValue, multipliers
from agents.parts.windows import (
    CDFNormalizer,
    GaussianNormalizer,
    Guide,
    WindowProcess,
    conditioned_plans,
    guided_plans,
    pinned,
)

S, A, H, DIM, MULTS = 3, 2, 4, 32, (1, 4)


def generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def unet(seeds: list[int], attention: bool = False, conditioned: bool = False, channels: int = S + A) -> TemporalUNet:
    network = TemporalUNet(Sizes(S, A, seeds=len(seeds)), channels, H, DIM, MULTS, attention, conditioned)
    network.initialize(generators(seeds))
    return network


def value(seeds: list[int]) -> TemporalValue:
    network = TemporalValue(Sizes(S, A, seeds=len(seeds)), S + A, H, DIM, MULTS)
    network.initialize(generators(seeds))
    return network


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def double_precision() -> Iterator[None]:
    """Where two results differ by the order of sums alone, which differs between processors, they are all but equal."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("attention", [False, True])
def test_a_seed_is_alone_what_it_is_in_company(attention: bool) -> None:
    x, t = randn(3, 5, H, S + A), torch.tensor([[0, 1, 2, 3, 4]]).expand(3, 5)
    for make in (lambda seeds: unet(seeds, attention), value):
        three, alone = make([0, 1, 2]), make([1])
        together = three(x, three.time_embedding(t))
        single = alone(x[1:2], alone.time_embedding(t[1:2]))
        torch.testing.assert_close(together[1:2], single, rtol=0, atol=1e-13)
        assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_conditions_at_once_are_conditions_one_by_one() -> None:
    network, x, e = unet([0, 1], conditioned=True), randn(2, 5, H, S + A), randn(2, 3, 5, 2 * DIM)
    together = network.under(x, e)
    assert together.shape == (2, 3, 5, H, S + A)
    for k in range(3):
        torch.testing.assert_close(together[:, k], network(x, e[:, k]), rtol=1e-5, atol=1e-6)
    shared = network.under(x, e[:, :, :1])  # one embedding for all rows
    torch.testing.assert_close(shared[:, 1], network(x, e[:, 1, :1].expand(-1, 5, -1)), rtol=1e-5, atol=1e-6)


def test_initial_weights_are_pytorchs() -> None:
    weights = unet([0], attention=True).parameters
    for name, layer in {
        "model.downs.0.0.blocks.0.block.0": nn.Conv1d(S + A, DIM, 5),
        "model.ups.0.3.conv": nn.ConvTranspose1d(DIM, DIM, 4),
        "model.time_mlp.1": nn.Linear(DIM, 4 * DIM),
    }.items():
        for kind in ("weight", "bias"):
            here, there = weights[f"{name}.{kind}"][0], getattr(layer, kind)
            assert here.shape == there.shape
            assert float(here.detach().abs().max()) == pytest.approx(float(there.detach().abs().max()), rel=0.25)
            assert here.detach().abs().max() <= 1 / math.sqrt(layer.weight[0].numel())
    assert (weights["model.mid_attn.fn.norm.g"] == 1).all() and (weights["model.mid_attn.fn.norm.b"] == 0).all()
    assert (weights["model.final_conv.0.block.2.weight"] == 1).all()


def test_parameters_are_as_many_as_published() -> None:
    def count(network: TemporalUNet | TemporalValue) -> int:
        return network.parameters.flat.shape[1]

    hopper, cheetah = Sizes(11, 3), Sizes(17, 6)
    assert count(TemporalUNet(hopper, 14, 32, 32, (1, 2, 4, 8))) == 3_956_302
    assert count(TemporalValue(hopper, 14, 32, 32, (1, 2, 4, 8))) == 2_294_817
    assert count(TemporalUNet(cheetah, 23, 4, 32, (1, 4, 8), attention=True)) == 4_114_423
    assert count(TemporalValue(cheetah, 23, 4, 32, (1, 4, 8))) == 2_180_833
    assert count(TemporalUNet(hopper, 11, 100, 128, (1, 4, 8), conditioned=True)) == 59_804_942 - 72_451


@pytest.mark.parametrize(
    ("text", "message"), [("2,4", "begin with 1"), ("1,x", "begin with 1"), ("", "begin with 1"), ("1,0", "begin")]
)
def test_multipliers_are_positive_and_begin_with_one(text: str, message: str) -> None:
    assert multipliers("1, 2,4") == (1, 2, 4)
    with pytest.raises(ValueError, match=message):
        multipliers(text)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="horizon 10 cannot be halved 2 times"):
        TemporalUNet(Sizes(S, A), S, 10, DIM, (1, 2, 4))
    with pytest.raises(ValueError, match="at most 8, not 16"):
        TemporalValue(Sizes(S, A), S, 16, DIM, (1, 4))
    with pytest.raises(ValueError, match="multiple of 8"):
        TemporalUNet(Sizes(S, A), S, 4, 20, (1, 2))


def test_the_gaussian_normaliser() -> None:
    data = randn(200, 4) * torch.tensor([1.0, 2.0, 0.1, 9.0]) + 3
    norm = GaussianNormalizer(4, 2, "cpu")
    assert torch.equal(norm(data), data)
    norm.fit(data)
    normed = norm(data)
    torch.testing.assert_close(normed.mean(0), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(normed.std(0, correction=0), torch.ones(4))
    torch.testing.assert_close(norm.inverse(normed), data, rtol=1e-5, atol=1e-5)
    data[:, 2] = 1.0
    with pytest.raises(ValueError, match="constant"):
        norm.fit(data)


def test_the_cdf_normaliser_is_numpys_interpolation() -> None:
    rng = np.random.default_rng(0)
    data = rng.standard_normal((300, 4)).astype(np.float32)
    data[:, 1] = data[:, 1].round(1)
    data[:, 2] = 0.5
    norm = CDFNormalizer(4, "cpu")
    inside = torch.rand(2, 7, 4) * 2 - 1
    torch.testing.assert_close(norm(inside), inside)
    norm.fit(torch.from_numpy(data))
    x, y = (rng.uniform(-4, 4, (3, 20, 4)).astype(np.float32), rng.uniform(-1.3, 1.3, (3, 20, 4)).astype(np.float32))
    there, back = norm(torch.from_numpy(x)).numpy(), norm.inverse(torch.from_numpy(y)).numpy()
    for d in range(4):
        values, counts = np.unique(data[:, d], return_counts=True)
        share = counts.cumsum() / len(data)
        if len(values) == 1:
            assert (there[..., d] == x[..., d]).all() and (back[..., d] == y[..., d]).all()
            continue
        wanted = 2 * np.interp(x[..., d].clip(values[0], values[-1]), values, share) - 1
        np.testing.assert_allclose(there[..., d], wanted, atol=2e-6)
        wanted = np.interp(((y[..., d] + 1) / 2).clip(share[0], 1), share, values)
        np.testing.assert_allclose(back[..., d], wanted, atol=2e-5)


def test_pinning_copies() -> None:
    x, c = torch.zeros(1, 2, H, S + A), torch.ones(1, 2, S)
    assert pinned(x, c)[:, :, 0, A:].eq(1).all() and pinned(x, c).sum() == 2 * S and x.sum() == 0


def test_plans_of_several_states_are_those_of_one_state_at_a_time() -> None:
    seeds, process = [0, 1], WindowProcess(3)
    observation, noise = randn(2, 6, S), randn(2, 6, 3, H, S + A, seed=1)
    diffusion, values = unet(seeds).averaged(), value(seeds).averaged()
    guide = Guide(0.5, 2, 1, True)
    with torch.no_grad():
        x, scores = guided_plans(diffusion, values, process, guide, observation, noise)
        for row in range(6):
            at = slice(row, row + 1)
            one, score = guided_plans(diffusion, values, process, guide, observation[:, at], noise[:, at])
            torch.testing.assert_close(x[:, at], one, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(scores[:, at], score, rtol=1e-4, atol=1e-5)
        unguided, _ = guided_plans(diffusion, values, process, Guide(0.0, 2, 1, True), observation, noise)
        assert (x - unguided).abs().max() > 1e-4
        assert torch.equal(x[:, :, 0, A:], observation) and not x.requires_grad
        decides, noise = unet(seeds, conditioned=True, channels=S).averaged(), noise[..., :S]
        plans = conditioned_plans(decides, process, 0.9, 1.2, 0.5, observation, noise)
        for row in range(6):
            at = slice(row, row + 1)
            one = conditioned_plans(decides, process, 0.9, 1.2, 0.5, observation[:, at], noise[:, at])
            torch.testing.assert_close(plans[:, at], one, rtol=1e-3, atol=1e-4)
        assert torch.equal(plans[:, :, 0], observation) and plans[:, :, 1:].abs().max() < 10
