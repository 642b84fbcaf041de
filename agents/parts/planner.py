"""What algorithms that plan have in common: windows, an average of every network, published files, cost of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from agents.parts.agent import Agent, N
from agents.parts.draws import Rng, normals
from agents.parts.parameters import Sizes
from agents.parts.published import policy_weights
from agents.parts.unet import multipliers
from agents.parts.windows import WindowProcess, Windows


class Planner(Agent):
    """Diffuses windows of a trajectory and acts by the first step of a plan; every step plans anew."""

    channels: int  # numbers per step of a window

    def build(self) -> None:
        c = self.config
        self.mults = multipliers(c.dim_mults)
        self.windows = Windows(c.horizon, c.discount, c.termination_penalty)
        self.process = WindowProcess(c.diffusion_steps, self.device)
        if self.device.type == "cuda":  # by default PyTorch rounds a convolution's inputs to TF32, products it does not
            torch.backends.cudnn.allow_tf32 = False

    def average(self, name: str, online: N) -> N:
        """The average that plans are made with; until `ema_start` it is set equal to the network."""
        return self.average_of(f"{name}_ema", online, self.config.ema_decay, self.config.ema_start, copies=True)

    def named_averages(self, entry: str, name: str, online: N) -> N:
        """`average` of one of several networks that the published code keeps under one entry."""
        c = self.config
        return self.average_of(f"{name}_ema", online, c.ema_decay, c.ema_start, f"{entry}_ema", copies=True)

    @property
    def period(self) -> int:
        return self.config.ema_interval

    # --- Acting -----------------------------------------------------------------------------------------

    @property
    def plans(self) -> int:
        """Plans per state."""
        return getattr(self.config, "action_candidates", 1)

    @property
    def rows_per_state(self) -> int:
        return self.plans * self.config.horizon

    def act_draws(self, rng: Rng, states: int) -> dict[str, Tensor]:
        c = self.config
        shape = (states, self.plans, c.diffusion_steps, c.horizon, self.channels)
        return {"noise": normals(rng, self.num_seeds, 1, shape)[0]}

    # --- Weights under published names ------------------------------------------------------------------

    def load_published(self, networks: Mapping[str, Any]) -> None:
        """Also of the published trainer's files, `{"step", "model", "ema"}`. Raises ValueError for another schedule."""
        named: dict[str, Any] = {}
        for name, weights in networks.items():
            if {"model", "ema"} <= set(weights):
                named |= {name: weights["model"], f"{name}_ema": weights["ema"]}
            else:
                named[name] = weights
        super().load_published({n: policy_weights(w, self.process.buffers["betas"]) for n, w in named.items()})

    # --- Cost -------------------------------------------------------------------------------------------

    ACTS_COMPILED = False  # a chain of networks, with a gradient at every step: it would compile for hours
    PUBLISHED_COST = ""

    @classmethod
    def cost(cls, config: Any, state_dim: int, action_dim: int) -> str:
        here = cls.acting_flops(config, Sizes(state_dim, action_dim, device="meta"))
        steps = 1000 * config.eval_episodes
        return (
            f"cost: {_giga(here)} GFLOP per acted step of a seed's state ({cls.PUBLISHED_COST}), so up to "
            f"{_giga(here * steps)} for an evaluation of {config.eval_episodes} episodes; a core does about 50 a second"
        )

    @classmethod
    def acting_flops(cls, config: Any, sizes: Sizes) -> float:
        """Floating-point operations of one acted step for one state of one seed; a multiply-add counts two."""
        raise NotImplementedError


def _giga(operations: float) -> str:
    return f"{operations / 1e9:,.0f}" if operations >= 1e10 else f"{operations / 1e9:.2g}"


def flops(network: Any, windows: Tensor, embedding: Tensor, gradient: bool = False) -> float:
    """Operations of a network on these windows, on no device; with `gradient` also of its derivative by them."""
    with FlopCounterMode(display=False) as counter, torch.enable_grad():
        x = windows.requires_grad_(gradient)
        out = network(x, embedding)
        if gradient:
            torch.autograd.grad(out.sum(), x)
    return float(counter.get_total_flops())
