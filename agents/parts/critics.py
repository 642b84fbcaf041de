"""Critics: twin Q functions of states and actions, and V."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from agents.parts.layers import (
    FLAX_EPSILON,
    Activation,
    Chain,
    Layers,
    chain,
    entering,
    head,
    hidden,
    layer_norm,
    layer_shapes,
    mish,
    named,
)
from agents.parts.parameters import Network, Parameters, Sizes

# Rows that a critic learns from at once on a CPU where there are several actions per state. What a layer gives for
# CQL's 7,936 rows, 16 MiB, would go to memory and back at every layer; for 1,024 rows it stays in the cache.
ROWS = 2**10


class TwinCritic(Network):
    """Q1 and Q2: hidden layers of these widths over [state | action]. Members 2 k and 2 k + 1 are seed k's pair.

    norm: a layer normalisation before each activation, as DTQL has them. names: what the published code calls the two
    `nn.Sequential`s; a single name counts layers through both, as TD3's l1 ... l6. action_first: published critics
    read [action | state].
    """

    def __init__(
        self,
        sizes: Sizes,
        widths: Sequence[int],
        activation: Activation = mish,
        norm: bool = False,
        names: tuple[str, ...] = ("q1_model", "q2_model"),
        action_first: bool = False,
    ) -> None:
        self.activation = activation
        stride = 3 if norm else 2  # linear, normalisation, activation: places in an `nn.Sequential`
        self.layers = [str(stride * i) for i in range(len(widths) + 1)]
        self.norms = [str(stride * i + 1) for i in range(len(widths))] if norm else []
        shapes = layer_shapes(self.layers, [sizes.state_dim + sizes.action_dim, *widths, 1])
        for name, width in zip(self.norms, widths if norm else (), strict=True):
            shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
        self.parameters = Parameters(shapes, 2 * sizes.seeds, sizes.device)
        self.published = [self._published_names(names, i) for i in (0, 1)]
        self.shift = sizes.action_dim if action_first else 0

    def _published_names(self, names: tuple[str, ...], critic: int) -> dict[str, str]:
        """The name of each parameter of critic 0 or 1 -> its published name."""
        if len(names) == 2:
            return {name: f"{names[critic]}.{name}" for name in self.parameters.shapes}
        counted = {layer: f"{names[0]}{1 + i + critic * len(self.layers)}" for i, layer in enumerate(self.layers)}
        return {name: f"{counted[name.split('.')[0]]}.{name.split('.')[1]}" for name in self.parameters.shapes}

    def __call__(self, states: Tensor, actions: Tensor) -> Tensor:
        """states [S, B, state_dim], actions [S, B * R, action_dim] -> values [S, 2, B * R].

        R actions of a state stand side by side; the state's share of the first layer is computed once for them.
        """
        pieces = [self._value(self.parameters.tensors, _pair(s), _pair(a)) for s, a in _pieces(states, actions)]
        values = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
        return values.unflatten(0, (states.shape[0], 2))

    def first(self, states: Tensor, actions: Tensor) -> Tensor:
        """Q1 alone, in half of the time: states [S, B, state_dim], actions [S, B * R, action_dim] -> [S, B * R]."""
        inner = self._hidden({name: t[::2] for name, t in self.parameters.tensors.items()}, states, actions)
        # The last layer of both: alone, a single critic's has another order of summing, so not the digits of the pair.
        pair = inner.repeat_interleave(2, dim=0)
        return self._last(self.parameters.tensors, pair)[::2]

    def one(self, choice: Tensor, states: Tensor, actions: Tensor) -> Tensor:
        """The critic that `choice` [S] (0 or 1) names, as a function of the actions alone: -> [S, B].

        Its weights are gathered and detached, so a gradient goes to the actions only and through one critic only.
        """
        seeds = states.shape[0]
        rows = 2 * torch.arange(seeds, device=choice.device) + choice
        chosen = {name: t.detach()[rows] for name, t in self.parameters.tensors.items()}
        return self._value(chosen, states, actions)

    def _value(self, p: Mapping[str, Tensor], states: Tensor, actions: Tensor) -> Tensor:
        x, layers = self._layers(p, states, actions)
        return chain(x, layers, self.activation, self._norms(p)).squeeze(-1)

    def _hidden(self, p: Mapping[str, Tensor], states: Tensor, actions: Tensor) -> Tensor:
        """What the last layer reads [M, B * R, width]."""
        x, layers = self._layers(p, states, actions)
        return hidden(x, layers[:-1], self.activation, self._norms(p))

    def _layers(self, p: Mapping[str, Tensor], states: Tensor, actions: Tensor) -> tuple[Tensor, Layers]:
        x, first = entering(states, actions, p["0.weight"], p["0.bias"])
        return x, [first, *named(p, self.layers[1:])]

    def _norms(self, p: Mapping[str, Tensor]) -> Layers:
        return [(p[f"{name}.weight"], p[f"{name}.bias"]) for name in self.norms]

    def _last(self, p: Mapping[str, Tensor], inner: Tensor) -> Tensor:
        last = self.layers[-1]
        return head(inner, p[f"{last}.weight"], p[f"{last}.bias"]).squeeze(-1)

    def seed_state(self, seed: int) -> dict[str, Tensor]:
        """Seed number `seed`'s pair under the published names."""
        state: dict[str, Tensor] = {}
        for i, names in enumerate(self.published):
            own = self.parameters.member_state(2 * seed + i)
            own["0.weight"] = own["0.weight"].roll(self.shift, dims=-1)
            state |= {published: own[name] for name, published in names.items()}
        return state

    def load_seed(self, seed: int, state: Mapping[str, Tensor]) -> None:
        """Write seed number `seed`'s pair from published names. Raises ValueError as `Parameters.load_member`."""
        for i, names in enumerate(self.published):
            missing = [published for published in names.values() if published not in state]
            if missing:
                raise ValueError(f"the weights lack {missing[0]!r}; they have {', '.join(state)}")
            own = {name: torch.as_tensor(state[published]) for name, published in names.items()}
            own["0.weight"] = own["0.weight"].roll(-self.shift, dims=-1)
            self.parameters.load_member(2 * seed + i, own)


class ValueNetwork(Chain):
    """V(s): hidden layers of these widths. A member per seed. norm: a layer normalisation of the states, as IDQL's."""

    def __init__(self, sizes: Sizes, widths: Sequence[int], activation: Activation = mish, norm: bool = False) -> None:
        self.norm = norm
        extra = {f"v_norm.{kind}": (sizes.state_dim,) for kind in ("weight", "bias")} if norm else None
        super().__init__([sizes.state_dim, *widths, 1], sizes, activation, "v_model", extra=extra)

    def __call__(self, states: Tensor) -> Tensor:
        """states [S, B, state_dim] -> values [S, B]."""
        if self.norm:
            p = self.parameters
            states = layer_norm(states, p["v_norm.weight"], p["v_norm.bias"], FLAX_EPSILON)
        return self.through(states).squeeze(-1)


def _pieces(states: Tensor, actions: Tensor) -> list[tuple[Tensor, Tensor]]:
    """So many states at a time, with their actions, that a CPU's cache holds what a layer gives for them.

    Only where a gradient is wanted: acting has pieces of its own (`Agent.actions_in_chunks`).
    """
    repeats = actions.shape[1] // states.shape[1]
    at_once = max(1, ROWS // repeats)
    if repeats == 1 or states.shape[1] <= at_once or states.device.type != "cpu" or not torch.is_grad_enabled():
        return [(states, actions)]
    return list(zip(states.split(at_once, dim=1), actions.split(at_once * repeats, dim=1), strict=True))


def _pair(x: Tensor) -> Tensor:
    """[S, B, d] -> [2 S, B, d]: the same rows for both critics of a seed."""
    return x.unsqueeze(1).expand(-1, 2, -1, -1).flatten(0, 1)
