"""The diffusion of whole windows of a trajectory, as Diffuser (Janner et al. 2022) and Decision Diffuser (Ajay et al.
2023) have it: one schedule, the first observation pinned, and a normaliser for each.

Diffusion steps count from 0, t = T - 1 is all noise. Everything but the schedule's variances is float32, as published.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from agents.parts.diffusion import beta_schedule
from agents.parts.layers import MLP
from agents.parts.parameters import Parameters
from agents.parts.unet import TemporalUNet, TemporalValue

MAX_PATH_LENGTH = 1000  # steps of the published table of episodes; no episode may be longer
LEAST_VARIANCE = 1e-20  # whose logarithm is taken, as published


@dataclass(frozen=True)
class Windows:
    """What an agent asks of the data instead of single transitions: windows of `horizon` steps and their returns.

    A batch then holds observations [S, B, H, s], actions [S, B, H, a], both normalised, and returns [S, B, 1]: the sum
    of discount^k r from the window's first step to its episode's end, `penalty` added where that is a terminal.
    """

    horizon: int
    discount: float
    penalty: float
    max_path_length: int = MAX_PATH_LENGTH


class WindowRows(Protocol):
    """The table of windows, as an agent observes it (`utils.data.windows.WindowTable`)."""

    @property
    def observations(self) -> Tensor: ...  # [N, s] of all complete episodes, as recorded, without padding
    @property
    def actions(self) -> Tensor: ...  # [N, a]
    @property
    def returns(self) -> Tensor: ...  # [W, 1] of all windows
    def normalize(self, observations: Callable[[Tensor], Tensor], actions: Callable[[Tensor], Tensor]) -> None:
        """Give out what these make of the rows [n, d], padding included, from now on."""
        ...


class WindowProcess:
    """The schedule of T steps: abar_i = cos^2((i / T + 0.008) / 1.008 * pi / 2), and what follows from it, each [T]."""

    def __init__(self, steps: int, device: torch.device | str = "cpu") -> None:
        self.steps = steps
        betas = beta_schedule("cosine", steps).float()
        alphas = 1 - betas
        cumprod = alphas.cumprod(0)
        previous = torch.cat([torch.ones(1), cumprod[:-1]])
        variance = betas * (1 - previous) / (1 - cumprod)
        named = {
            "betas": betas,
            "alphas_cumprod": cumprod,
            "alphas_cumprod_prev": previous,
            "sqrt_alphas_cumprod": cumprod.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - cumprod).sqrt(),
            "sqrt_recip_alphas_cumprod": (1 / cumprod).sqrt(),
            "sqrt_recipm1_alphas_cumprod": (1 / cumprod - 1).sqrt(),
            "posterior_variance": variance,
            "posterior_log_variance_clipped": variance.clamp(min=LEAST_VARIANCE).log(),
            "posterior_mean_coef1": betas * previous.sqrt() / (1 - cumprod),
            "posterior_mean_coef2": (1 - previous) * alphas.sqrt() / (1 - cumprod),
        }
        self.buffers = {name: value.to(device) for name, value in named.items()}  # under the published names

    def at(self, name: str, steps: Tensor) -> Tensor:
        """The numbers of `name` at steps [S, B], to be multiplied with windows: [S, B, 1, 1]."""
        return self.buffers[name][steps][:, :, None, None]

    def noised(self, x: Tensor, steps: Tensor, noise: Tensor) -> Tensor:
        """sqrt(abar_t) x + sqrt(1 - abar_t) noise: windows [S, B, H, C], steps [S, B]."""
        return self.at("sqrt_alphas_cumprod", steps) * x + self.at("sqrt_one_minus_alphas_cumprod", steps) * noise

    def back(self, clean: Tensor, x: Tensor, step: int, noise: Tensor | None) -> Tensor:
        """A sample of the posterior of the step before, given the clean windows and those at `step`; at 0 its mean.

        `noise` None: the mean.
        """
        b = self.buffers
        mean = b["posterior_mean_coef1"][step] * clean + b["posterior_mean_coef2"][step] * x
        if step == 0 or noise is None:
            return mean
        return mean + (0.5 * b["posterior_log_variance_clipped"][step]).exp() * noise


def pinned(x: Tensor, observation: Tensor) -> Tensor:
    """The same windows [S, B, H, C], whose first step has this observation [S, B, s] in its last s entries."""
    x = x.clone()
    x[:, :, 0, x.shape[3] - observation.shape[2] :] = observation
    return x


# --- Normalisers ------------------------------------------------------------------------------------------------------


class GaussianNormalizer:
    """(x - mean) / deviation per dimension, cut nowhere; the same numbers for every seed, in a checkpoint's form."""

    def __init__(self, dim: int, seeds: int, device: torch.device | str) -> None:
        self.parameters = Parameters({"mean": (dim,), "deviation": (dim,)}, seeds, device, trainable=False)
        self.parameters["deviation"].fill_(1.0)

    @property
    def mean(self) -> Tensor:
        return self.parameters["mean"][0]

    @property
    def deviation(self) -> Tensor:
        return self.parameters["deviation"][0]

    def fit(self, data: Tensor) -> None:
        """Take mean and deviation off the data, [N, d]. Raises ValueError for a dimension that is constant."""
        deviation = data.double().std(dim=0, correction=0)
        if not bool((deviation > 0).all()):
            raise ValueError("a Gaussian normaliser divides by the deviation, and a dimension of the data is constant")
        self.parameters["mean"].copy_(data.double().mean(dim=0))
        self.parameters["deviation"].copy_(deviation)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        return (x - self.mean) / self.deviation

    def inverse(self, y: Tensor) -> Tensor:
        """[..., d] -> [..., d] in the data's units."""
        return y * self.deviation + self.mean


class CDFNormalizer:
    """Each dimension by the data's distribution function, to [-1, 1]; linear between the data's distinct values.

    A dimension without two values is left as it is. Before `fit` the identity on [-1, 1].
    """

    def __init__(self, dim: int, device: torch.device | str) -> None:
        ends = torch.tensor([-1.0, 1.0], device=device).expand(dim, 2)
        self._keep(ends.contiguous(), ((ends + 1) / 2).contiguous(), torch.full((dim,), 1, device=device))

    def _keep(self, values: Tensor, shares: Tensor, last: Tensor) -> None:
        """values, shares [d, K]: the points of each dimension's function; beyond its `last` one infinite."""
        self.values, self.shares, self.last = values, shares, last

    def fit(self, data: Tensor) -> None:
        """Take the functions off the data, [N, d]."""
        each = [column.unique(return_counts=True) for column in data.T]
        longest = max(2, *(len(values) for values, _ in each))
        values = torch.full((len(each), longest), torch.inf, device=data.device)
        shares = torch.full_like(values, torch.inf)
        for d, (found, counts) in enumerate(each):
            values[d, : len(found)] = found
            shares[d, : len(found)] = counts.cumsum(0).double().div(len(data)).float()
        self._keep(values, shares, torch.tensor([len(found) - 1 for found, _ in each], device=data.device))

    def __call__(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d] in [-1, 1]; what lies beyond the data is cut to their ends."""
        return self._through(x, self.values, self.shares, lambda share: 2 * share - 1)

    def inverse(self, y: Tensor) -> Tensor:
        """[..., d] -> [..., d] in the data's range."""
        return self._through((y + 1) / 2, self.shares, self.values, lambda value: value, otherwise=y)

    def _through(
        self,
        x: Tensor,
        here: Tensor,
        there: Tensor,
        after: Callable[[Tensor], Tensor],
        otherwise: Tensor | None = None,
    ) -> Tensor:
        columns = x.reshape(-1, x.shape[-1]).T.contiguous()
        final = self.last.unsqueeze(1)
        columns = torch.minimum(torch.maximum(columns, here[:, :1]), here.gather(1, final))
        above = torch.searchsorted(here, columns).clamp(min=1).minimum(final.clamp(min=1))
        x0, x1, y0, y1 = (table.gather(1, index) for table in (here, there) for index in (above - 1, above))
        found = after(y0 + (columns - x0) / (x1 - x0) * (y1 - y0)).T.reshape(x.shape)
        return torch.where(self.last == 0, x if otherwise is None else otherwise, found)


def loss_weights(horizon: int, channels: int, actions: int, first_action: float | None) -> Tensor:
    """Weights of a window's squared errors [H, C]: 1, and at the first step `first_action` for its actions.

    With None, where windows hold observations alone, the first step weighs nothing.
    """
    weights = torch.ones(horizon, channels)
    if first_action is None:
        weights[0] = 0.0
    else:
        weights[0, :actions] = first_action
    return weights


# --- Diffuser ---------------------------------------------------------------------------------------------------------


def clean_loss(
    unet: TemporalUNet, process: WindowProcess, x: Tensor, steps: Tensor, noise: Tensor, weights: Tensor, actions: int
) -> tuple[Tensor, Tensor]:
    """The squared error of the predicted clean windows [S], and that of their first action over its weight [S].

    x, noise: windows [S, B, H, actions + s], actions first. weights: [H, actions + s]. The first observation is pinned
    in what the network sees and in what it says, so it adds nothing.
    """
    first = x[:, :, 0, actions:]
    noisy = pinned(process.noised(x, steps, noise), first)
    error = (pinned(unet(noisy, unet.time_embedding(steps)), first) - x).square()
    first_action = error[:, :, 0, :actions] / weights[0, :actions]
    return (error * weights).mean(dim=(1, 2, 3)), first_action.detach().mean(dim=(1, 2))


def window_values(
    value: TemporalValue, process: WindowProcess, x: Tensor, steps: Tensor, noise: Tensor, actions: int
) -> Tensor:
    """The values of windows that were noised [S, B]."""
    noisy = pinned(process.noised(x, steps, noise), x[:, :, 0, actions:])
    return value(noisy, value.time_embedding(steps))


@dataclass(frozen=True)
class Guide:
    """How the value's gradient bends a plan at every step of the chain."""

    scale: float
    steps: int  # how often at every diffusion step
    stop: int  # diffusion steps below it are not bent
    by_variance: bool  # the gradient times the posterior's variance, published as scale_grad_by_std


def guided_plans(
    unet: TemporalUNet,
    value: TemporalValue,
    process: WindowProcess,
    guide: Guide,
    observation: Tensor,
    noise: Tensor,
    visit: Callable[[Tensor], None] = lambda x: None,
) -> tuple[Tensor, Tensor]:
    """Plans [S, B, H, C] of B normalised observations [S, B, s], and their values before the last step [S, B].

    noise [S, B, T, H, C]: the start, then what each step but the last adds. `visit` sees the windows of every step.
    As published the gradient is added before the reverse step, not to its mean (Algorithm 1 of the paper). Where it is
    not added the value is not asked either, but for the last one, by which plans are chosen.
    """
    times = torch.arange(process.steps, device=noise.device).expand(noise.shape[0], -1)
    unet_times, value_times = unet.time_embedding(times), value.time_embedding(times)
    variances = process.buffers["posterior_log_variance_clipped"].exp()
    x = pinned(noise[:, :, 0], observation)
    visit(x)
    values = x.new_zeros(x.shape[:2])
    for k, i in enumerate(reversed(range(process.steps))):
        at = slice(i, i + 1)
        if i >= guide.stop:
            step = guide.scale * variances[i] if guide.by_variance else guide.scale
            for _ in range(guide.steps):
                values, gradient = _value_and_gradient(value, x, value_times[:, at])
                x = pinned(x + step * gradient, observation)
        elif i == 0:
            values = value(x, value_times[:, at])
        added = noise[:, :, k + 1] if i else None
        x = pinned(process.back(unet(x, unet_times[:, at]), x, i, added), observation)
        visit(x)
    return x, values


def _value_and_gradient(value: TemporalValue, x: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        values = value(x, embedding.detach())
        (gradient,) = torch.autograd.grad(values.sum(), x)
    return values.detach(), gradient


# --- Decision Diffuser ------------------------------------------------------------------------------------------------


def noise_loss(
    unet: TemporalUNet, process: WindowProcess, x: Tensor, returns: Tensor, steps: Tensor, noise: Tensor, keep: Tensor
) -> Tensor:
    """The squared error of the predicted noise [S], 0 at the pinned first step, which is counted all the same.

    x, noise: windows of observations [S, B, H, s]; returns, scaled, and keep [S, B, 1]: which are shown.
    """
    noisy = pinned(process.noised(x, steps, noise), x[:, :, 0])
    shown = unet.returns_embedding(returns) * keep
    error = (unet(noisy, torch.cat([unet.time_embedding(steps), shown], dim=2)) - noise).square()
    return error[:, :, 1:].sum(dim=(1, 2, 3)) / error[0].numel()


def inverse_loss(inverse: MLP, observations: Tensor, actions: Tensor) -> Tensor:
    """The squared error of f(o_t, o_{t+1}) against a_t over all pairs of windows [S, B, H, d], padding included [S]."""
    pairs = torch.cat([observations[:, :, :-1], observations[:, :, 1:]], dim=3).flatten(1, 2)
    return (inverse(pairs) - actions[:, :, :-1].flatten(1, 2)).square().mean(dim=(1, 2))


def conditioned_plans(
    unet: TemporalUNet,
    process: WindowProcess,
    target: float,
    weight: float,
    temperature: float,
    observation: Tensor,
    noise: Tensor,
    visit: Callable[[Tensor], None] = lambda x: None,
) -> Tensor:
    """Windows of observations [S, B, H, s] that begin with these [S, B, s] and should earn `target`, a scaled return.

    noise [S, B, T, H, s]: the start, then what each step but the last adds; all of it is multiplied by `temperature`.
    The prediction is u + weight (k - u), k with the return, u without; both in one batch, the first convolutions once.
    """
    seeds = noise.shape[0]
    times = unet.time_embedding(torch.arange(process.steps, device=noise.device).expand(seeds, -1))
    wanted = unet.returns_embedding(times.new_full((seeds, 1, 1), target))
    conditions = torch.stack([torch.zeros_like(wanted), wanted], dim=1)  # [S, 2, 1, dim]
    b = process.buffers
    x = pinned(temperature * noise[:, :, 0], observation)
    visit(x)
    for k, i in enumerate(reversed(range(process.steps))):
        embedding = torch.cat([times[:, None, i : i + 1].expand(-1, 2, -1, -1), conditions], dim=3)
        without, with_return = unet.under(x, embedding).unbind(1)
        predicted = without + weight * (with_return - without)
        clean = b["sqrt_recip_alphas_cumprod"][i] * x - b["sqrt_recipm1_alphas_cumprod"][i] * predicted
        added = temperature * noise[:, :, k + 1] if i else None
        x = pinned(process.back(clean.clamp(-1, 1), x, i, added), observation)
        visit(x)
    return x
