"""Runners over random transitions, for the tests of this room."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

import hyperparameters
from agents import AGENTS
from agents.parts.draws import normals
from tests import small
from utils.seeding import torch_generators
from utils.training.runner import Runner


def make_runner(
    mode: str,
    seeds: list[int],
    device: str = "cpu",
    algo: str = "diffcps",
    precision: str = "float32",
    **settings: Any,
) -> Runner:
    fields = {field.name for field in dataclasses.fields(hyperparameters.CONFIGS[algo])}
    early = {"ema_start": 20, "warmup_steps": 20, "hidden_dim": 64, "vae_hidden_dim": 32}  # where an agent has them
    if "plan_actions" in fields or "support_actions" in fields:  # a behaviour model is sampled for the whole table
        early |= {"hidden_dim": 32, "diffusion_steps": 3, "support_actions": 2}
    if "horizon" in fields:
        early |= {"horizon": 4, "hidden_dim": 32, "dim_mults": "1,4", "diffusion_steps": 3, "action_candidates": 4}
    settings = {name: value for name, value in early.items() if name in fields} | settings
    config = hyperparameters.get(algo, "hopper-medium-v2", **settings)
    agent = AGENTS[algo](11, 3, 1.0, config, seeds, device, precision)
    table = small.dataset().batches_to(device, agent.windows)
    return Runner(agent, table, 32, torch_generators(seeds, "training", device), mode)


def parameters(run: Runner) -> torch.Tensor:
    return torch.cat([p.flat.view(run.agent.num_seeds, -1) for p in run.agent.networks.values()], dim=1)


def ran(mode: str, steps: int) -> Runner:
    run = make_runner(mode, [0])
    run.run(steps)
    return run


class Planner(AGENTS["diffusion_bc"]):
    """Behaviour cloning with a planned column: where the policy's weights stand, plus noise; weights its loss."""

    READS = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.planned = {"mark": 1, "index": 1}
        self.plans: list[int] = []

    @property
    def period(self) -> int:
        return 4

    def plan_step(self, step: int) -> int | None:
        return None if step < 8 else step // 16 * 16 if step >= 16 else 8

    def plan(self, transitions: Any, rng: Any, columns: Any) -> None:
        self.plans.append(self.step)
        noise = normals(rng, self.num_seeds, 1, (transitions.size, 1))[0]
        columns["mark"].copy_(noise + self.actor.parameters.flat.square().mean(dim=1).view(-1, 1, 1))
        columns["index"].copy_(torch.arange(transitions.size).view(1, -1, 1))

    def policy_loss(self, batch: Any, draws: Any) -> Any:
        loss, metrics = super().policy_loss(batch, draws)
        return (loss * (1 + batch["mark"].mean(dim=(1, 2))) if self.READS else loss), metrics


class RepeatingPlanner(Planner):
    """Its plan is made once, of a network that does not move afterwards: the initial one."""

    PLAN_REPEATS = True

    def plan_step(self, step: int) -> int | None:
        return None if step < 8 else 8

    def plan(self, transitions: Any, rng: Any, columns: Any) -> None:
        super().plan(transitions, rng, columns)
        columns["mark"].copy_(normals(rng, self.num_seeds, 1, (transitions.size, 1))[0])


def planning(mode: str, seeds: list[int], kind: type[Planner] = Planner, rows: int = 400) -> Runner:
    agent = kind(11, 3, 1.0, hyperparameters.get("diffusion_bc", "hopper-medium-v2", hidden_dim=64), seeds)
    table = small.dataset(rows).to("cpu")
    return Runner(agent, table, 32, torch_generators(seeds, "training", "cpu"), mode)
