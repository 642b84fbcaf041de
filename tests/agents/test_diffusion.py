"""The diffusion process against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from agents.parts.diffusion import Diffusion, NoiseNetwork, beta_schedule
from agents.parts.parameters import Sizes, gradients


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_variance_preserving_schedule_closed_form(steps: int) -> None:
    expected = [1 - math.exp(-0.1 / steps - 0.5 * 9.9 * (2 * i - 1) / steps**2) for i in range(1, steps + 1)]
    torch.testing.assert_close(beta_schedule("vp", steps), torch.tensor(expected).double(), rtol=1e-6, atol=0)
    # Whatever T is, the whole process destroys the same share of the signal: exp(-0.1 - 4.95).
    kept = (1 - beta_schedule("vp", steps)).prod().item()
    assert kept == pytest.approx(math.exp(-0.1 - 4.95), rel=1e-12)


def test_linear_and_cosine_schedules() -> None:
    assert beta_schedule("linear", 3).tolist() == pytest.approx([1e-4, 1.005e-2, 2e-2])
    level = lambda k: math.cos((k * 6 / 5 / 6 + 0.008) / 1.008 * math.pi / 2) ** 2  # noqa: E731
    expected = [min(1 - level(k) / level(k - 1), 0.999) for k in range(1, 6)]
    assert beta_schedule("cosine", 5).tolist() == pytest.approx(expected)
    with pytest.raises(ValueError, match="known: vp, linear, cosine"):
        beta_schedule("quadratic", 5)
    with pytest.raises(ValueError, match="at least 1"):
        beta_schedule("vp", 0)


class KnowsTheAnswer(NoiseNetwork):
    """Predicts the noise that leads back to `clean`, from the diffused action and the step alone."""

    def __init__(self, diffusion: Diffusion, clean: torch.Tensor) -> None:
        super().__init__(Sizes(1, clean.shape[-1], seeds=clean.shape[0]), diffusion.steps, 256)
        self.diffusion, self.clean = diffusion, clean

    def time_part(self) -> torch.Tensor:
        steps = torch.arange(self.diffusion.steps, dtype=torch.float32)
        return steps.view(1, -1, 1).expand(self.clean.shape[0], -1, 256)

    def state_part(self, states: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*states.shape[:2], 256)

    def noise(self, actions: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        i = condition[..., 0].long()
        signal, spread = self.diffusion.signal[i].unsqueeze(-1), self.diffusion.spread[i].unsqueeze(-1)
        return (actions - signal * self.clean) / spread


@pytest.mark.parametrize("schedule", ["vp", "linear", "cosine"])
def test_a_perfect_network_brings_back_the_action_and_has_no_loss(schedule: str) -> None:
    diffusion = Diffusion(schedule, 5, max_action=1.0, device="cpu")
    clean = torch.rand(2, 7, 3) * 1.8 - 0.9
    network = KnowsTheAnswer(diffusion, clean)
    noise = torch.randn(2, 5, 7, 3)
    states = torch.zeros(2, 7, 1)
    torch.testing.assert_close(diffusion.sample(network, states, noise), clean, rtol=1e-4, atol=1e-4)
    timesteps = torch.randint(0, 5, (2, 7))
    assert diffusion.loss(network, clean, states, timesteps, torch.randn(2, 7, 3)).max() < 1e-8


def test_the_last_step_adds_no_noise_and_the_action_box_holds() -> None:
    diffusion = Diffusion("vp", 3, max_action=0.5, device="cpu")
    network = KnowsTheAnswer(diffusion, torch.full((1, 4, 2), 0.7))  # outside the box
    states, noise = torch.zeros(1, 4, 1), torch.randn(1, 3, 4, 2)
    assert torch.allclose(diffusion.sample(network, states, noise), torch.full((1, 4, 2), 0.5))


def test_one_step_of_the_chain_is_the_gaussian_posterior() -> None:
    """With T = 2, given the clean action, x after one step ~ N(posterior mean, posterior variance)."""
    diffusion = Diffusion("vp", 2, max_action=1.0, device="cpu")
    b1, b2 = beta_schedule("vp", 2).tolist()
    a1, a12 = 1 - b1, (1 - b1) * (1 - b2)
    seen = []

    class Spy(KnowsTheAnswer):
        def noise(self, actions: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
            seen.append(actions.clone())
            return super().noise(actions, condition)

    clean = torch.full((1, 1, 1), 0.3)
    noise = torch.tensor([1.5, -0.7]).view(1, 2, 1, 1)
    diffusion.sample(Spy(diffusion, clean), torch.zeros(1, 1, 1), noise)
    mean = math.sqrt(a1) * b2 / (1 - a12) * 0.3 + math.sqrt(1 - b2) * (1 - a1) / (1 - a12) * 1.5
    deviation = math.sqrt(b2 * (1 - a1) / (1 - a12))
    assert seen[1].item() == pytest.approx(mean - 0.7 * deviation, rel=1e-5)


def test_the_chain_is_differentiable() -> None:
    diffusion = Diffusion("vp", 3, max_action=1.0, device="cpu")
    network = NoiseNetwork(Sizes(4, 2), 3, 256)
    with torch.no_grad():
        network.parameters.flat.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    actions = diffusion.sample(network, torch.randn(1, 8, 4), 0.3 * torch.randn(1, 3, 8, 2))
    assert gradients(actions.sum(dim=(1, 2)), [network.parameters])[0].abs().sum() > 0
