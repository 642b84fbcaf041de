"""Policies in one step: Gaussians, a deterministic one, and BCQ's shift of an action. One member per seed.

Every Gaussian has one interface: `mean, log_std = policy(states)`, then `policy.actions(mean, log_std, noise)` and
`policy.log_density(mean, log_std, actions)`, the density of a / max_action. Noise with an axis
more, [S, B, R, A], gives R actions of each state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from agents.parts.layers import Chain, chain, entering, head, layer, layer_shapes, named
from agents.parts.parameters import Network, Parameters, Sizes

LOG_STD = (-5.0, 2.0)  # bounds of a policy's log deviation


def normal_log_density(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log density of x [..., A] under a diagonal normal [...]."""
    deviations = (x - mean) / log_std.exp()
    return (-0.5 * deviations.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(dim=-1)


def _shifted(mean: Tensor, log_std: Tensor, noise: Tensor) -> Tensor:
    """mean + deviation * noise [S, B, A]; or of R draws per state, [S, B, R, A]."""
    if noise.dim() > mean.dim():
        mean, log_std = mean.unsqueeze(2), log_std.unsqueeze(2)
    return mean + log_std.exp() * noise


class BoxGaussian(Chain):
    """A normal distribution over a / max_action: mean tanh(f(s)); a sample is cut to the action box. ReLU layers.

    own_std: the deviation is exp(g(s)), else one number a dimension whatever the state. dropout: share of the hidden
    units that `kept` leaves out.
    """

    def __init__(self, sizes: Sizes, widths: Sequence[int], own_std: bool = True, dropout: float = 0.0) -> None:
        self.max_action, self.widths, self.own_std, self.dropout = sizes.max_action, list(widths), own_std, dropout
        extra = {} if own_std else {"log_std": (sizes.action_dim,)}
        super().__init__([sizes.state_dim, *widths, (1 + own_std) * sizes.action_dim], sizes, extra=extra)

    def __call__(self, states: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """states [S, B, state_dim] -> mean [S, B, A] and log deviation [S, B or 1, A] of a / max_action.

        kept: what dropout keeps of the hidden layers, bool [S, B, sum of widths]; None: everything.
        """
        p, x = self.parameters, states
        parts = kept.split(self.widths, dim=-1) if kept is not None else ()
        for i, name in enumerate(self.names[:-1]):
            x = layer(x, p[f"{name}.weight"], p[f"{name}.bias"], self.activation)
            x = x * parts[i] / (1 - self.dropout) if parts else x
        out = head(x, p[f"{self.names[-1]}.weight"], p[f"{self.names[-1]}.bias"])
        mean, log_std = out.chunk(2, dim=-1) if self.own_std else (out, p["log_std"].unsqueeze(1))
        return torch.tanh(mean), log_std.clamp(*LOG_STD)

    def actions(self, mean: Tensor, log_std: Tensor, noise: Tensor | None = None) -> Tensor:
        """The action that standard normal `noise` gives, cut to the box; without noise the mean."""
        scaled = mean if noise is None else _shifted(mean, log_std, noise).clamp(-1, 1)
        return scaled * self.max_action

    def log_density(self, mean: Tensor, log_std: Tensor, actions: Tensor) -> Tensor:
        """Log density of a / max_action [S, B]; actions [S, B, A]."""
        return normal_log_density(actions / self.max_action, mean, log_std)


class TanhGaussian(Chain):
    """max_action * tanh(mean + deviation * noise), mean and deviation functions of the state. ReLU layers."""

    MARGIN = 1e-3  # beyond the box, so that an action on its edge has a finite likelihood

    def __init__(self, sizes: Sizes, widths: Sequence[int]) -> None:
        self.max_action = sizes.max_action
        super().__init__([sizes.state_dim, *widths, 2 * sizes.action_dim], sizes)

    def __call__(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """states [S, B, state_dim] -> mean and bounded log deviation before the tanh, each [S, B, A]."""
        mean, log_std = self.through(states).chunk(2, dim=-1)
        return mean, log_std.clamp(*LOG_STD)

    def raw_actions(self, mean: Tensor, log_std: Tensor, noise: Tensor) -> Tensor:
        """The action before the tanh."""
        return _shifted(mean, log_std, noise)

    def squashed(self, raw: Tensor) -> Tensor:
        """The action in the box that a raw one stands for."""
        return torch.tanh(raw) * self.max_action

    def actions(self, mean: Tensor, log_std: Tensor, noise: Tensor | None = None) -> Tensor:
        """The action that standard normal `noise` gives; without noise the one of the mean."""
        return self.squashed(mean if noise is None else _shifted(mean, log_std, noise))

    def sample(self, mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The actions that standard normal `noise` [..., A] gives, and their log densities [...] over the unit box."""
        raw = _shifted(mean, log_std, noise)
        return self.squashed(raw), self._squashed_density(mean, log_std, raw)

    def log_density(self, mean: Tensor, log_std: Tensor, actions: Tensor) -> Tensor:
        """Log density of a / max_action [S, B]; beyond 1 - 1e-6 of the box an action counts as there."""
        inside = (actions / self.max_action).clamp(-1 + 1e-6, 1 - 1e-6)
        return self._squashed_density(mean, log_std, torch.atanh(inside))

    def _squashed_density(self, mean: Tensor, log_std: Tensor, raw: Tensor) -> Tensor:
        """Log density of tanh(raw): the normal's, less log tanh'(raw) = 2 (log 2 - raw - softplus(-2 raw))."""
        if raw.dim() > mean.dim():
            mean, log_std = mean.unsqueeze(2), log_std.unsqueeze(2)
        squash = 2 * (math.log(2) - raw - functional.softplus(-2 * raw))
        return normal_log_density(raw, mean, log_std) - squash.sum(dim=-1)

    def published_log_likelihood(self, mean: Tensor, log_std: Tensor, actions: Tensor) -> Tensor:
        """Log density of atanh(a / (max_action + margin)) [S, B]; as DTQL has it, without the tanh's own density."""
        return normal_log_density(torch.atanh(actions / (self.max_action + self.MARGIN)), mean, log_std)


class DeterministicActor(Chain):
    """max_action * tanh(f(s)) over ReLU layers named l1, l2 ..."""

    def __init__(self, sizes: Sizes, widths: Sequence[int]) -> None:
        self.max_action = sizes.max_action
        names = [f"l{k + 1}" for k in range(len(widths) + 1)]
        super().__init__([sizes.state_dim, *widths, sizes.action_dim], sizes, names=names)

    def __call__(self, states: Tensor) -> Tensor:
        """states [S, B, state_dim] -> actions [S, B, A]."""
        return torch.tanh(self.through(states)) * self.max_action


class Perturbation(Network):
    """a + phi max_action tanh(f(s, a)), cut to the action box (BCQ; Fujimoto et al. 2019)."""

    def __init__(self, sizes: Sizes, widths: Sequence[int], phi: float) -> None:
        self.max_action, self.phi = sizes.max_action, phi
        self.names = [f"l{k + 1}" for k in range(len(widths) + 1)]
        shapes = layer_shapes(self.names, [sizes.state_dim + sizes.action_dim, *widths, sizes.action_dim])
        self.parameters = Parameters(shapes, sizes.seeds, sizes.device)

    def __call__(self, states: Tensor, actions: Tensor) -> Tensor:
        """states [S, B, state_dim], actions [S, B * R, A], R for each state side by side -> [S, B * R, A]."""
        p = self.parameters
        x, first = entering(states, actions, p["l1.weight"], p["l1.bias"])
        out = chain(x, [first, *named(p, self.names[1:])], torch.relu)
        shift = self.phi * self.max_action * torch.tanh(out)
        return (actions + shift).clamp(-self.max_action, self.max_action)
