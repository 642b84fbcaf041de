"""The behaviour model of BCQ and BEAR."""

from __future__ import annotations

import torch
from torch import Tensor

from agents.parts.layers import chain, entering, head, hidden, layer_shapes, named
from agents.parts.parameters import Network, Parameters, Sizes


class VariationalAutoencoder(Network):
    """A generative model of the data's actions: an action's latent code given the state, and back. One member per seed.

    Both ways two ReLU layers of width H. The code has twice the action's dimensions.
    """

    LOG_STD = (-4.0, 15.0)  # bounds of the code's log deviation
    CODES = 0.5  # codes drawn for sampling are cut at this: actions that the data make likely
    KL_WEIGHT = 0.5

    def __init__(self, sizes: Sizes, hidden_dim: int) -> None:
        state_dim, action_dim = sizes.state_dim, sizes.action_dim
        self.max_action, self.latent_dim = sizes.max_action, 2 * action_dim
        shapes = layer_shapes(["e1", "e2", "mean"], [state_dim + action_dim, hidden_dim, hidden_dim, self.latent_dim])
        shapes |= layer_shapes(["log_std"], [hidden_dim, self.latent_dim])
        shapes |= layer_shapes(["d1", "d2", "d3"], [state_dim + self.latent_dim, hidden_dim, hidden_dim, action_dim])
        self.parameters = Parameters(shapes, sizes.seeds, sizes.device)

    def encode(self, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """states [S, B, state_dim], actions [S, B, A] -> mean and log deviation of the code, each [S, B, 2 A]."""
        p = self.parameters
        x, first = entering(states, actions, p["e1.weight"], p["e1.bias"])
        inner = hidden(x, [first, *named(p, ["e2"])], torch.relu)
        mean = head(inner, p["mean.weight"], p["mean.bias"])
        return mean, head(inner, p["log_std.weight"], p["log_std.bias"]).clamp(*self.LOG_STD)

    def decode(self, states: Tensor, codes: Tensor) -> Tensor:
        """states [S, B, state_dim], codes [S, B * R, 2 A] -> actions before the tanh [S, B * R, A]."""
        p = self.parameters
        x, first = entering(states, codes, p["d1.weight"], p["d1.bias"])
        return chain(x, [first, *named(p, ["d2", "d3"])], torch.relu)

    def squashed(self, raw: Tensor) -> Tensor:
        """The actions in the box that `decode`'s numbers stand for."""
        return torch.tanh(raw) * self.max_action

    def sample(self, states: Tensor, noise: Tensor) -> Tensor:
        """Actions before the tanh from standard normal `noise` [S, B * R, 2 A], which is cut at `CODES`."""
        return self.decode(states, noise.clamp(-self.CODES, self.CODES))

    def loss(self, states: Tensor, actions: Tensor, noise: Tensor) -> Tensor:
        """Squared error of the decoded action + KL_WEIGHT KL(code || standard normal), means over dimensions [S]."""
        mean, log_std = self.encode(states, actions)
        decoded = self.squashed(self.decode(states, mean + log_std.exp() * noise))
        kl = -0.5 * (1 + 2 * log_std - mean.square() - (2 * log_std).exp())
        return ((decoded - actions).square().mean(dim=(1, 2))) + self.KL_WEIGHT * kl.mean(dim=(1, 2))
