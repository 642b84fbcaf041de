"""Parameters with a leading axis of independent members: weights [M, out, in]; and networks, functions over them.

A member is one network of one seed: a noise network has M = S members, a twin critic M = 2 S. All parameters of a
kind stand in one buffer [M, P] whose slices are the layers, so that clipping, Adam and averaging are a few kernels
however many layers and seeds there are. Weights keep the names that the published code gives them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Sizes:
    """What every network of an agent is made for."""

    state_dim: int
    action_dim: int
    max_action: float = 1.0  # actions lie in [-max_action, max_action]
    seeds: int = 1
    device: torch.device | str = "cpu"


class Parameters:
    """All parameters of one kind of network in one buffer.

    `flat` is [M, P]; `self[name]` is a slice of it, [M, *shape], and a leaf that autograd can differentiate by. Write
    to `flat` (or a slice) in place only: the slices, and graphs captured over them, stay valid.
    """

    def __init__(self, shapes: Shapes, members: int, device: torch.device | str, trainable: bool = True) -> None:
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.members = members
        self.trainable = trainable
        self.flat = torch.zeros(members, sum(math.prod(s) for s in self.shapes.values()), device=device)
        self.tensors: dict[str, Tensor] = {}
        offset = 0
        for name, shape in self.shapes.items():
            size = math.prod(shape)
            leaf = self.flat[:, offset : offset + size].unflatten(1, shape) if shape else self.flat[:, offset]
            self.tensors[name] = leaf.detach().requires_grad_(trainable)
            offset += size

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def averaged(self, trainable: bool = False) -> Parameters:
        """A copy, which takes no gradients unless `trainable`: the start of a target or an average."""
        twin = Parameters(self.shapes, self.members, self.flat.device, trainable)
        twin.flat.copy_(self.flat)
        return twin

    def frozen(self) -> Parameters:
        """The same numbers, shared and not copied, without gradients: for a loss of what passes through a network."""
        twin = copy.copy(self)
        twin.trainable, twin.tensors = False, {name: t.detach() for name, t in self.tensors.items()}
        return twin

    def member_state(self, member: int) -> dict[str, Tensor]:
        """One member's parameters by name, detached copies without the members axis."""
        return {name: t[member].detach().clone() for name, t in self.tensors.items()}

    def load_member(self, member: int, state: Mapping[str, Tensor]) -> None:
        """Write one member's parameters. Raises ValueError for a missing name or a wrong shape."""
        with torch.no_grad():
            for name, shape in self.shapes.items():
                if name not in state:
                    raise ValueError(f"the weights lack {name!r}; they have {', '.join(state)}")
                value = torch.as_tensor(state[name])
                if tuple(value.shape) != shape:
                    raise ValueError(f"{name!r} has shape {tuple(value.shape)}, this network needs {shape}")
                self.tensors[name][member].copy_(value)


def gradients(loss: Tensor, kinds: Sequence[Parameters]) -> list[Tensor]:
    """d sum(loss) / d parameters of several kinds in one backward pass, each one new tensor [M, P].

    Members are independent, so the sum mixes nothing.
    """
    leaves = [t for p in kinds for t in p.tensors.values()]
    flat = iter(torch.autograd.grad(loss, leaves, grad_outputs=torch.ones_like(loss)))
    return [torch.cat([next(flat).reshape(p.members, -1) for _ in p.tensors], dim=1) for p in kinds]


# --- Initial weights: a seed's members draw from its own generator, so it starts alike alone and in company -----------

Initializer = Callable[[Parameters, Sequence[torch.Generator]], None]


def _members(
    parameters: Parameters, generators: Sequence[torch.Generator]
) -> Iterator[tuple[Tensor, str, tuple[int, ...], torch.Generator]]:
    """Each member's every parameter to be filled, its name, shape and the seed's generator, in order."""
    per_seed = parameters.members // len(generators)
    for member in range(parameters.members):
        for name, shape in parameters.shapes.items():
            yield parameters[name][member], name, shape, generators[member // per_seed]


@torch.no_grad()
def default_init(parameters: Parameters, generators: Sequence[torch.Generator]) -> None:
    """PyTorch's default: layers' weight and bias ~ U(-1/sqrt(in), 1/sqrt(in)), normalisations 1 and 0.

    in: the inputs of a unit, in a convolution [out, in, kernel] those at all places of the kernel.
    """
    bounds = {
        name.rsplit(".", 1)[0]: 1 / math.sqrt(math.prod(shape[1:]))
        for name, shape in parameters.shapes.items()
        if len(shape) >= 2
    }
    for own, name, shape, generator in _members(parameters, generators):
        bound = bounds.get(name.rsplit(".", 1)[0])
        if bound is None:  # a layer without a matrix is a normalisation
            own.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            drawn = torch.rand(shape, generator=generator, device=generator.device)
            own.copy_((2 * drawn - 1) * bound)


@torch.no_grad()
def orthogonal_init(parameters: Parameters, generators: Sequence[torch.Generator], gain: float = 1.0) -> None:
    """`gain` times orthogonal weights (Saxe et al. 2014), all else zero."""
    for own, _, shape, generator in _members(parameters, generators):
        value = torch.zeros(shape, device=generator.device)
        if len(shape) == 2:
            torch.nn.init.orthogonal_(value, gain, generator=generator)
        own.copy_(value)


@torch.no_grad()
def xavier_init(parameters: Parameters, generators: Sequence[torch.Generator]) -> None:
    """Matrices ~ U(+-sqrt(6 / (in + out))) (Glorot & Bengio 2010), biases 0, normalisations 1."""
    for own, name, shape, generator in _members(parameters, generators):
        value = torch.full(shape, 1.0 if name.endswith("weight") else 0.0)
        if len(shape) == 2:
            torch.nn.init.xavier_uniform_(value, generator=generator)
        own.copy_(value)


@torch.no_grad()
def rlkit_init(parameters: Parameters, generators: Sequence[torch.Generator], bound: float) -> None:
    """rlkit's (rlkit/torch/networks.py, `Mlp`): hidden weights ~ U(-1/sqrt(out), 1/sqrt(out)), hidden biases 0.1.

    Its `fanin_init` takes a matrix' rows for the fan in. The last layer, weight and bias, ~ U(-bound, bound).
    """
    last = next(reversed(parameters.shapes)).rsplit(".", 1)[0]
    for own, name, shape, generator in _members(parameters, generators):
        at_end = name.rsplit(".", 1)[0] == last
        if at_end or len(shape) == 2:
            drawn = torch.rand(shape, generator=generator, device=generator.device)
            own.copy_((2 * drawn - 1) * (bound if at_end else 1 / math.sqrt(shape[0])))
        else:
            own.fill_(0.1)


# --- Networks ---------------------------------------------------------------------------------------------------------


class Network:
    """A function over `parameters`; copies of it differ in those alone."""

    parameters: Parameters
    weight: float | Tensor = 0.0  # of an average: the online network's share in it at each `follow`
    required = True  # whether published weights must have it

    def initialize(self, generators: Sequence[torch.Generator]) -> None:
        """Initial weights, each seed's from its own generator."""
        default_init(self.parameters, generators)

    def averaged(self) -> Self:
        """The same network over a copy of the parameters that takes no gradients."""
        return self._over(self.parameters.averaged())

    def copied(self) -> Self:
        """The same network over a copy of the parameters that learns by itself."""
        return self._over(self.parameters.averaged(trainable=True))

    def frozen(self) -> Self:
        """The same network over the same parameters, taken as constants."""
        return self._over(self.parameters.frozen())

    def _over(self, parameters: Parameters) -> Self:
        twin = copy.copy(self)
        twin.parameters = parameters
        return twin

    @torch.no_grad()
    def follow(self, online: Network) -> None:
        """self <- (1 - weight) self + weight online, in place; with weight 0 every bit stays."""
        self.parameters.flat.lerp_(online.parameters.flat, self.weight)

    def seed_state(self, seed: int) -> Any:
        """Seed number `seed`'s weights under the published names."""
        return self.parameters.member_state(seed)

    def load_seed(self, seed: int, state: Any) -> None:
        """Write seed number `seed`'s weights from published names. Raises ValueError as `Parameters.load_member`."""
        self.parameters.load_member(seed, state)
