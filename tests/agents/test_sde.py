"""The continuous diffusion against closed forms: for Gaussian data the noise to predict is known, and the flow too."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from agents.parts.parameters import Sizes, gradients
from agents.parts.sde import (
    END,
    ScoreNetwork,
    Solver,
    denoising_loss,
    fourier_features,
    score_init,
    signal_and_spread,
    solver_orders,
)

MEAN, DEVIATION = 0.4, 0.3  # of the Gaussian data


def exact_noise(solver: Solver) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """E[eps | x_t] = sigma_t (x_t - alpha_t m) / (alpha_t^2 s^2 + sigma_t^2) for data N(m, s^2)."""
    signal, spread = signal_and_spread(torch.linspace(1, END, len(solver.times) + 1, dtype=torch.float64))

    def noise(x: torch.Tensor, i: int) -> torch.Tensor:
        return spread[i] * (x - signal[i] * MEAN) / (signal[i] ** 2 * DEVIATION**2 + spread[i] ** 2)

    return noise


def moments(steps: int, order: int, data: bool) -> tuple[float, float]:
    """Mean and deviation of the samples: the flow of a Gaussian is affine, so two starts say all."""
    solver = Solver(steps, order, data)
    low, high = solver.sample(exact_noise(solver), torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    return low, high - low


def exact_moments() -> tuple[float, float]:
    """x_END = alpha_END m + (x_1 - alpha_1 m) sqrt(var_END / var_1), and x_1 ~ N(0, 1)."""
    signal, spread = signal_and_spread(torch.tensor([1.0, END], dtype=torch.float64))
    variance = signal**2 * DEVIATION**2 + spread**2
    slope = (variance[1] / variance[0]).sqrt()
    return float(signal[1] * MEAN - slope * signal[0] * MEAN), float(slope)


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("order", [2, 3])
def test_samples_of_a_gaussian_have_its_mean_and_deviation(order: int, data: bool) -> None:
    exact = np.array(exact_moments())
    np.testing.assert_allclose(exact, [MEAN, DEVIATION], atol=0.002)  # t = 1 is not quite noise, END not quite data
    errors = [np.abs(np.array(moments(steps, order, data)) - exact) for steps in (15, 30, 60, 120, 240, 480)]
    # Evenly spaced times leave a long last stride: with the published 15 the samples are up to a fifth too narrow.
    assert errors[0][0] < 2e-4 and 0.045 < errors[0][1] < 0.065
    assert all((later < earlier).all() for earlier, later in itertools.pairwise(errors))
    assert errors[-1].max() < 2e-4 * (1 if order == 3 else 4)


@pytest.mark.parametrize("steps", [5, 10, 15, 20])
def test_few_steps_of_the_predicted_action_keep_near_the_deviation(steps: int) -> None:
    """What SfBC samples with; the predicted noise does worse with 5 and with 20 steps, even where it is exact."""
    errors = [abs(moments(steps, 3, data)[1] - DEVIATION) for data in (True, False)]
    assert errors[0] < 0.1 and (errors[1] > 0.14 or steps in (10, 15))


def test_an_error_of_the_network_at_the_start_grows_with_the_predicted_noise_alone() -> None:
    """5 steps, a noise network that is wrong by 0.01 at t = 1: the samples move by 5.5 or by 0.008."""
    moved = []
    for data in (False, True):
        solver = Solver(5, 3, data)
        exact, x = exact_noise(solver), torch.zeros(1, dtype=torch.float64)
        wrong = lambda x, i, exact=exact: exact(x, i) + (0.01 if i == 0 else 0.0)  # noqa: E731
        moved.append(abs(float(solver.sample(wrong, x) - solver.sample(exact, x))))
    assert moved[0] > 5 and moved[1] < 0.01


def test_a_network_with_the_exact_noise_of_one_point_samples_that_point() -> None:
    """Data without spread: predicting data, every stride is exact."""
    for steps in (1, 2, 3, 4, 5, 6, 7, 15, 20):
        solver = Solver(steps, order=2, data=True)
        signal, spread = signal_and_spread(torch.linspace(1, END, steps + 1, dtype=torch.float64))
        noise = lambda x, i, a=signal, s=spread: (x - a[i] * 0.7) / s[i]  # noqa: E731
        x = solver.sample(noise, torch.randn(5, dtype=torch.float64))
        torch.testing.assert_close(x, torch.full_like(x, 0.7), rtol=0, atol=4 * float(spread[-1]))


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 10, 15, 20])
def test_the_network_is_evaluated_so_often_at_evenly_spaced_times(steps: int, order: int) -> None:
    solver, seen = Solver(steps, order, data=False), []
    solver.sample(lambda x, i: seen.append(i) or torch.zeros_like(x), torch.ones(1))
    assert seen == list(range(steps)) and sum(solver_orders(steps, order)) == steps
    np.testing.assert_allclose(solver.times.numpy(), np.linspace(1, END, steps + 1)[:-1], rtol=1e-6)


def test_orders_are_the_published_ones() -> None:
    assert solver_orders(15, 3) == [3, 3, 3, 3, 2, 1] and solver_orders(16, 3) == [3] * 5 + [1]
    assert solver_orders(20, 3) == [3] * 6 + [2] and solver_orders(5, 3) == [3, 2]
    assert solver_orders(15, 2) == [2] * 7 + [1] and solver_orders(10, 2) == [2] * 4 + [1, 1]
    with pytest.raises(ValueError, match="diffusion_steps must be at least 1, not 0"):
        Solver(0, 2, data=True)


def test_signal_and_spread_closed_form() -> None:
    times = torch.tensor([1e-5, 0.5, 1.0])
    signal, spread = signal_and_spread(times)
    for t, a, s in zip(times.double().tolist(), signal.tolist(), spread.tolist(), strict=True):
        integral = 0.1 * t + 19.9 * t**2 / 2  # of beta
        assert a == pytest.approx(math.exp(-integral / 2), rel=1e-6)
        assert s == pytest.approx(math.sqrt(-math.expm1(-integral)), rel=1e-5)


def network(seeds: int = 2, state_dim: int = 5, action_dim: int = 3, hidden_dim: int = 12) -> ScoreNetwork:
    made = ScoreNetwork(Sizes(state_dim, action_dim, seeds=seeds), hidden_dim)
    score_init(made.parameters, [torch.Generator().manual_seed(seed) for seed in range(seeds)])
    return made


def plain_noise(p: dict[str, torch.Tensor], x: torch.Tensor, states: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """The network written out for one seed, row by row as published: -(sigma_t score)."""

    def affine(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    def block(name: str, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h = F.silu(affine(f"{name}.dense1.0", x)) + affine(f"{name}.time_mlp.1", F.silu(t))
        through = affine(f"{name}.modify_x", x) if f"{name}.modify_x.weight" in p else x
        return F.silu(affine(f"{name}.dense2.0", h)) + through

    angles = times[:, None] * p["embed.0.W"][None, :] * 2 * math.pi
    embedded = affine("embed.1", torch.cat([angles.sin(), angles.cos()], dim=1))
    embedded = torch.cat([F.silu(affine("pre_sort_condition.0.dense", states)), embedded], dim=1)
    t = affine("sort_t.2", F.silu(affine("sort_t.0", embedded)))
    d1 = block("down_block1", x, t)
    d2 = block("down_block2", d1, t)
    d3 = block("down_block3", d2, t)
    u3 = block("middle1", d3, t)
    u2 = block("up_block3", torch.cat([d3, u3], dim=1), t)
    u1 = block("up_block2", torch.cat([d2, u2], dim=1), t)
    return -affine("last", torch.cat([d1, u1], dim=1))


def test_the_network_equals_the_written_out_one() -> None:
    made = network()
    states, times, actions = torch.randn(2, 4, 5), torch.rand(2, 4), torch.randn(2, 12, 3)  # three actions per state
    got = made.noise(actions, made.state_part(states) + made.time_part(times))
    for seed in range(2):
        p = made.parameters.member_state(seed)
        rows = [x[seed].repeat_interleave(3, dim=0) for x in (states, times)]
        torch.testing.assert_close(got[seed], plain_noise(p, actions[seed], *rows), rtol=1e-4, atol=1e-5)


def test_published_widths() -> None:
    shapes = network(hidden_dim=256).parameters.shapes
    assert shapes["down_block1.dense1.0.weight"] == (512, 3) and shapes["down_block2.dense1.0.weight"] == (256, 512)
    assert shapes["down_block3.dense1.0.weight"] == (128, 256) and shapes["up_block3.dense1.0.weight"] == (256, 256)
    assert shapes["up_block2.dense1.0.weight"] == (512, 512) and shapes["last.weight"] == (3, 1024)
    assert shapes["sort_t.0.weight"] == (128, 64) and shapes["embed.0.W"] == (16,)
    assert "up_block2.modify_x.weight" not in shapes and "middle1.modify_x.weight" not in shapes
    with pytest.raises(ValueError, match="hidden_dim must be even"):
        network(hidden_dim=25)


def test_frequencies_are_wide_differ_between_seeds_and_do_not_learn() -> None:
    made = network()
    w = made.parameters["embed.0.W"]
    assert 15 < w.std() < 50 and not torch.equal(w[0], w[1])
    loss = denoising_loss(made, torch.rand(2, 8, 3), torch.randn(2, 8, 5), torch.rand(2, 8), torch.randn(2, 8, 3))
    gradient = gradients(loss, [made.parameters])[0]
    assert loss.shape == (2,) and not gradient[:, :16].any() and (gradient[:, 16:] != 0).float().mean() > 0.99
    features = fourier_features(torch.tensor([[0.25, 0.5]]), torch.tensor([[1.0, 2.0]]))
    torch.testing.assert_close(features[0, 0], torch.tensor([1.0, 0.0, 0.0, -1.0]), rtol=0, atol=1e-6)


def test_the_loss_is_zero_for_exact_noise_and_sums_over_dimensions() -> None:
    class Exact:
        """Knows that all actions are 0.5."""

        def state_part(self, states: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*states.shape[:2], 1)

        def time_part(self, times: torch.Tensor) -> torch.Tensor:
            return times.unsqueeze(-1)

        def noise(self, x: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
            signal, spread = signal_and_spread(part)
            return (x - signal * 0.5) / spread + self.error

        error = 0.0

    exact = Exact()
    arguments = torch.full((2, 6, 3), 0.5), torch.zeros(2, 6, 4), torch.rand(2, 6) * 0.9 + 0.1, torch.randn(2, 6, 3)
    torch.testing.assert_close(denoising_loss(exact, *arguments), torch.zeros(2), rtol=0, atol=1e-8)
    exact.error = 0.2
    torch.testing.assert_close(denoising_loss(exact, *arguments), torch.full((2,), 3 * 0.2**2))
