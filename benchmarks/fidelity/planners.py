"""The claim that both planners compute what the published code computes, checked against recorded outputs of it.

    python -m benchmarks.fidelity.planners tests/fixtures/planners_diffuser.npz [FILE ...]

A file holds the outputs of the published modules (jannerm/diffuser, anuragajay/decision-diffuser) for inputs and
weights that a rule makes of a seed, in cases: schedules, networks, losses with gradients, sampling, training, data.
Every case is computed anew by this project's parts; a line each says the largest error, relative to its array's
largest number (single weights after training: absolute), and the bound. The exit code is 1 beyond it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.parts.adam import Adam
from agents.parts.layers import MLP
from agents.parts.parameters import Network, Sizes, gradients
from agents.parts.unet import TemporalUNet, TemporalValue
from agents.parts.windows import (
    CDFNormalizer,
    GaussianNormalizer,
    Guide,
    WindowProcess,
    Windows,
    clean_loss,
    conditioned_plans,
    guided_plans,
    inverse_loss,
    loss_weights,
    noise_loss,
    window_values,
)
from utils.data.rows import Rows
from utils.data.windows import WindowTable, complete_episodes, window_starts
from utils.errors import UserError
from utils.options import command_line

# The published codes repeat within these with any convolution kernels; the README of the recordings measured it.
BOUND, CHAIN_BOUND, WEIGHTS_BOUND = 1e-4, 1e-3, 5e-6
TEMPERATURE = 0.5  # of Decision Diffuser's noise
SUMMARY, ENDS = 3, 24  # of a tensor of weights: its norm, sum and largest, and so many of either end

Case = Mapping[str, Any]
Found = dict[str, Any]


class Draws:
    """The inputs of one case: drawn in float64 in the rule's order, cast to float32, with a seeds axis of one."""

    def __init__(self, case: Case) -> None:
        self.random = np.random.RandomState(case["seed"])

    def normal(self, *shape: int) -> Tensor:
        return _tensor(self.random.standard_normal(shape))

    def uniform(self, *shape: int) -> Tensor:
        return _tensor(self.random.random_sample(shape))

    def keep(self, dropout: float, *shape: int) -> Tensor:
        return _tensor(self.random.random_sample(shape) > dropout)

    def steps(self, below: int, *shape: int) -> Tensor:
        return torch.from_numpy(self.random.randint(0, below, shape)).unsqueeze(0)

    def weights(self, shapes: Sequence[tuple[str, Sequence[int]]]) -> dict[str, Tensor]:
        found = {}
        for name, shape in shapes:
            z = self.random.standard_normal(shape)
            if len(shape) == 1 or name.endswith((".norm.g", ".norm.b")):
                z = z / 8 + (1 if name.endswith((".block.2.weight", ".norm.g")) else 0)
            else:
                z = z / np.sqrt(np.prod(shape[1:]))
            found[name] = torch.from_numpy(z.astype(np.float32))
        return found


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(array, dtype=np.float32)).unsqueeze(0)


def _array(tensor: Tensor) -> np.ndarray:
    """Without the seeds axis."""
    return tensor.detach().squeeze(0).numpy()


class Planner:
    """The networks of a case with its weights, and the schedule."""

    def __init__(self, case: Case, algo: str, draws: Draws) -> None:
        if case.get("loss_discount", 1) != 1:
            raise UserError("loss_discount is 1 in the published settings and here; this case has another")
        self.case, self.sizes = case, Sizes(case["state_dim"], case["action_dim"])
        self.S, self.A, self.H, self.T = (case[k] for k in ("state_dim", "action_dim", "horizon", "T"))
        self.decides = algo == "decision_diffuser"
        self.C = self.S if self.decides else self.S + self.A
        self.process = WindowProcess(self.T)
        self.networks: dict[str, Network] = {}
        for kind, shapes in case.get("shapes", {}).items():
            weights = draws.weights(shapes)
            for name, network in self._made(kind):
                network.load_seed(0, weights)
                self.networks[name] = network
            named = {name for network in self.networks.values() for name in network.parameters.shapes}
            if unknown := set(weights) - named:
                raise UserError(f"{kind}: the networks here lack {', '.join(sorted(unknown))}")

    def _made(self, kind: str) -> list[tuple[str, Network]]:
        case, dim, mults = self.case, self.case["dim"], self.case["dim_mults"]
        if kind == "value":
            dim, mults = case.get("value_dim", dim), case.get("value_dim_mults", mults)
            return [("value", TemporalValue(self.sizes, self.C, self.H, dim, mults))]
        attention = bool(case.get("attention", False))
        unet = TemporalUNet(self.sizes, self.C, self.H, dim, mults, attention, conditioned=self.decides)
        if not self.decides:
            return [("diffusion", unet)]
        widths = [2 * self.S, case["hidden_dim"], case["hidden_dim"], self.A]
        return [("diffusion", unet), ("inverse", MLP(widths, self.sizes, prefix="inv_model"))]

    def __getitem__(self, name: str) -> Any:
        return self.networks[name]

    @property
    def weights(self) -> Tensor:
        """Of the loss [H, C]."""
        first = None if self.decides else self.case["action_weight"]
        return loss_weights(self.H, self.C, self.A, first)

    def loss(self, inputs: Mapping[str, Tensor]) -> Found:
        """The loss of one batch [1], and what is recorded beside it."""
        x, t, noise = inputs["x"], inputs["t"], inputs["noise"]
        if "targets" in inputs:
            found, wanted = window_values(self["value"], self.process, x, t, noise, self.A), inputs["targets"][..., 0]
            one, other = _array(found), _array(wanted)
            statistics = {
                f"{function.__name__}_{name}": function(numbers)
                for function in (np.mean, np.min, np.max)
                for name, numbers in (("pred", one), ("targ", other))
            }
            loss = (found - wanted).square().mean(dim=1)
            return {"loss": loss, **statistics, "corr": np.corrcoef(one, other)[0, 1]}
        if not self.decides:
            loss, first = clean_loss(self["diffusion"], self.process, x, t, noise, self.weights, self.A)
            return {"loss": loss, "a0_loss": first}
        observations, actions = x[..., self.A :], x[..., : self.A]
        arguments = (observations, inputs["returns"], t, noise, inputs["keep"])
        parts = {
            "diffusion_loss": noise_loss(self["diffusion"], self.process, *arguments),
            "inverse_loss": inverse_loss(self["inverse"], observations, actions),
        }
        return {"loss": sum(parts.values()) / 2, **parts}

    def learning(self) -> list[Network]:
        return list(self.networks.values())

    def named(self, flat: Sequence[Tensor]) -> dict[str, np.ndarray]:
        """What is recorded of tensors like the parameters, [1, P] a network, by name."""
        found: dict[str, np.ndarray] = {}
        for network, values in zip(self.learning(), flat, strict=True):
            shapes = network.parameters.shapes
            parts = values[0].detach().split([int(np.prod(shape)) for shape in shapes.values()])
            found |= {name: _summary(part) for name, part in zip(shapes, parts, strict=True)}
        return found


def _summary(values: Tensor) -> np.ndarray:
    numbers = [values.double().norm(), values.double().sum(), values.abs().max()]
    return np.array([*(float(n) for n in numbers), *values[:ENDS].tolist(), *values[-ENDS:].tolist()], np.float32)


# --- The cases, by kind -----------------------------------------------------------------------------------------------


def schedule(planner: Planner, draws: Draws) -> Found:
    return {**planner.process.buffers, "loss_weights": planner.weights}


def unet(planner: Planner, draws: Draws) -> Found:
    p, B = planner, planner.case["batch_size"]
    x, t = draws.normal(B, p.H, p.C), draws.steps(p.T, B)
    network = p["diffusion"]
    time = network.time_embedding(t)
    if not p.decides:
        return {"out": _array(network(x, time))}
    shown = network.returns_embedding(draws.uniform(B, 1))
    keep = draws.keep(p.case["condition_dropout"], B, 1)
    cases = {"conditional": shown, "unconditional": 0 * shown, "masked": keep * shown}
    under = network.under(x, torch.stack([torch.cat([time, z], dim=2) for z in cases.values()], dim=1))
    return dict(zip(cases, _array(under), strict=True))


def value(planner: Planner, draws: Draws) -> Found:
    p, B = planner, planner.case["batch_size"]
    x, t = draws.normal(B, p.H, p.C).requires_grad_(), draws.steps(p.T, B)
    found = p["value"](x, p["value"].time_embedding(t))
    (gradient,) = torch.autograd.grad(found.sum(), x)
    return {"out": _array(found), "grad": _array(gradient)}


def inverse(planner: Planner, draws: Draws) -> Found:
    p, B = planner, planner.case["batch_size"]
    pairs, actions = draws.normal(B, 2 * p.S), draws.normal(B, p.A)
    out = p["inverse"](pairs)
    # A window of two steps, the second of which has no action of its own.
    window = torch.stack(pairs.split(p.S, dim=2), dim=2)
    loss = inverse_loss(p["inverse"], window, torch.stack([actions, actions], dim=2))
    return {"out": _array(out), "loss": loss}


def _batch(planner: Planner, draws: Draws, *lead: int, targets: bool) -> dict[str, Tensor]:
    """The inputs of a loss, in the order of its rule; `lead`: updates and batches in each."""
    p, B = planner, planner.case["batch_size"]
    training = bool(lead)
    found: dict[str, Tensor] = {"x": draws.normal(*lead, B, p.H, p.S + p.A)}
    if p.decides:
        found["returns"] = draws.uniform(*lead, B, 1)
    found["t"] = draws.steps(p.T, *lead, B)
    found["noise"] = draws.normal(*lead, B, p.H, p.C)
    if targets:
        found["targets"] = 10 * draws.normal(*lead, B, 1)
    if p.decides:
        found["keep"] = draws.keep(p.case["condition_dropout"], *lead, B, 1)
    return {name: number.squeeze(0) for name, number in found.items()} if training else found


def loss(planner: Planner, draws: Draws) -> Found:
    found = planner.loss(_batch(planner, draws, targets=planner.case["kind"] == "value_loss"))
    slopes = gradients(found["loss"], [network.parameters for network in planner.learning()])
    return {**found, **{f"grad/{name}": numbers for name, numbers in planner.named(slopes).items()}}


def train(planner: Planner, draws: Draws) -> Found:
    case, networks = planner.case, planner.learning()
    K, G = case["updates"], case["gradient_accumulate_every"]
    inputs = _batch(planner, draws, K, G, targets=case["kind"] == "train_value")
    optimizers = [Adam(network.parameters, 1, case["learning_rate"], 0.0) for network in networks]
    averages, losses = [network.averaged() for network in networks], np.zeros((K, G), np.float32)
    for k in range(K):
        parts = [planner.loss({n: v[k, g][None] for n, v in inputs.items()})["loss"] for g in range(G)]
        losses[k] = [float(part.detach()) for part in parts]
        for optimizer, slope in zip(
            optimizers, gradients(sum(parts) / G, [n.parameters for n in networks]), strict=True
        ):
            optimizer.step(slope)
        step = case["start_step"] + k
        if step % case["update_ema_every"] == 0:
            for average, online in zip(averages, networks, strict=True):
                average.weight = 1.0 if step < case["step_start_ema"] else 1 - case["ema_decay"]
                average.follow(online)
    after, ema = (planner.named([n.parameters.flat for n in kind]) for kind in (networks, averages))
    found: Found = {"losses": losses}
    found |= {f"after/{name}": numbers for name, numbers in after.items()}
    return found | {f"ema/{name}": numbers for name, numbers in ema.items()}


def guided(planner: Planner, draws: Draws) -> Found:
    p, case, B = planner, planner.case, planner.case["batch_size"]
    states = GaussianNormalizer(p.S, 1, "cpu")
    actions = GaussianNormalizer(p.A, 1, "cpu")
    states.fit(2 * draws.normal(50, p.S)[0] + 1)
    actions.fit(draws.normal(50, p.A)[0].double().tanh().float())
    condition = states(draws.normal(1, p.S))
    start, noise = draws.normal(B, p.H, p.C), draws.normal(p.T, B, p.H, p.C)
    guide = Guide(case["scale"], case["n_guide_steps"], case["t_stopgrad"], case["scale_grad_by_std"])
    chain: list[Tensor] = []
    drawn = torch.cat([start.unsqueeze(2), noise.transpose(1, 2)[:, :, :-1]], dim=2)
    x, values = guided_plans(
        p["diffusion"], p["value"], p.process, guide, condition.expand(-1, B, -1), drawn, chain.append
    )
    order = values[0].argsort(descending=True)
    best = x[:, order]
    plans = actions.inverse(best[..., : p.A])
    return {
        "condition": _array(condition)[0],
        "chain": _array(torch.stack(chain, dim=2)),
        "unsorted_values": _array(values),
        "values": _array(values[:, order]),
        "actions": _array(plans),
        "observations": _array(states.inverse(best[..., p.A :])),
        "action": _array(plans)[0, 0],
    }


def chain(planner: Planner, draws: Draws) -> Found:
    p, case, B = planner, planner.case, planner.case["batch_size"]
    states, actions = CDFNormalizer(p.S, "cpu"), CDFNormalizer(p.A, "cpu")
    states.fit(2 * draws.normal(50, p.S)[0] + 1)
    actions.fit(draws.normal(50, p.A)[0].double().tanh().float())
    condition = states(draws.normal(B, p.S))
    start, noise = draws.normal(B, p.H, p.S), draws.normal(p.T, B, p.H, p.S)
    drawn = torch.cat([start.unsqueeze(2), noise.transpose(1, 2)[:, :, :-1]], dim=2)
    seen: list[Tensor] = []
    weight, target = case["condition_guidance_w"], case["test_ret"]
    x = conditioned_plans(p["diffusion"], p.process, target, weight, TEMPERATURE, condition, drawn, seen.append)
    normed = p["inverse"](x[:, :, :2].flatten(2))
    return {
        "condition": _array(condition),
        "chain": _array(torch.stack(seen, dim=2)),
        "normed_action": _array(normed),
        "action": _array(actions.inverse(normed)),
    }


def data(planner: Planner, draws: Draws) -> Found:
    """The windows of a small set. A case of data has no networks."""
    case, random = planner.case, draws.random
    S, A, lengths = case["state_dim"], case["action_dim"], case["lengths"]
    rows = sum(lengths) + case["tail"]
    observations = random.standard_normal((rows, S)).astype(np.float32)
    actions = np.tanh(random.standard_normal((rows, A))).astype(np.float32)
    rewards = random.standard_normal(rows).astype(np.float32)
    if case.get("round_half"):
        observations[:, : S // 2] = observations[:, : S // 2].round(1)
    if case.get("constant_last"):
        observations[:, -1] = 0.5
    last = np.cumsum(lengths) - 1
    flags = {kind: np.zeros(rows, bool) for kind in ("terminal", "timeout")}
    for row, kind in zip(last, case["ends"], strict=True):
        flags[kind][row] = True
    longest, horizon = case["max_path_length"], case["horizon"]
    recorded = Rows(observations, actions, rewards, flags["terminal"], flags["timeout"])
    episodes = complete_episodes(recorded, longest, "the case")
    table = WindowTable(episodes, Windows(horizon, case["discount"], case["termination_penalty"], longest), "cpu")
    gaussian = "returns_scale" not in case
    norms = [GaussianNormalizer(d, 1, "cpu") if gaussian else CDFNormalizer(d, "cpu") for d in (S, A)]
    for norm, numbers in zip(norms, (table.observations, table.actions), strict=True):
        norm.fit(numbers)
    table.normalize(norms[0], norms[1])
    batch = table.gather(torch.arange(table.size).unsqueeze(0))
    starts = np.stack([table.episodes, table.steps, table.steps + horizon], axis=1)
    found = {
        "path_lengths": episodes.lengths,
        "indices": starts,
        "trajectories": _array(torch.cat([batch["actions"], batch["observations"]], dim=3)),
        "conditions": _array(batch["observations"][:, :, 0]),
    }
    if gaussian:
        which, first = window_starts(episodes.lengths, horizon, longest, padding=False)
        plain = _tensor(random.standard_normal((5, A)))
        for name, norm in zip(("observations", "actions"), norms, strict=True):
            assert isinstance(norm, GaussianNormalizer)
            found |= {f"{name}_mean": norm.mean.numpy(), f"{name}_std": norm.deviation.numpy()}
        return {
            **found,
            "indices_unpadded": np.stack([which, first, first + horizon], axis=1),
            "values": _array(batch["returns"]),
            "unnormalized_actions": _array(norms[1].inverse(plain)),
        }
    plain = _tensor(2 * random.standard_normal((6, S)))
    normed = [_tensor(random.uniform(-1.2, 1.2, (6, d))) for d in (A, S)]
    return {
        **found,
        "returns": _array(batch["returns"] / case["returns_scale"]),
        "normalized_observations": _array(norms[0](plain)),
        "unnormalized_actions": _array(norms[1].inverse(normed[0])),
        "unnormalized_observations": _array(norms[0].inverse(normed[1])),
    }


KINDS: dict[str, Callable[[Planner, Draws], Found]] = {
    "schedule": schedule, "unet": unet, "value": value, "inverse": inverse, "loss": loss, "value_loss": loss,
    "guided": guided, "chain": chain, "train": train, "train_value": train, "data": data,
}  # fmt: skip


# --- Comparing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """The largest error of one case, as a share of its bound."""

    case: str
    entries: int  # arrays that were compared
    worst: str  # the array with the largest share
    error: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.error <= self.bound  # False for NaN, too


def replay(path: str | Path) -> list[Line]:
    """Every case of a recorded file. Raises UserError for a file that is none."""
    try:
        with np.load(path) as file:
            recorded = {name: file[name] for name in file.files}
        config = json.loads(str(recorded.pop("config")))
        cases, algo = config["cases"], config["algo"]
    except (OSError, ValueError, KeyError, EOFError, AttributeError) as error:
        raise UserError(f"{path} is no recorded file of a planner: {error!r}") from error
    lines = []
    for name, case in cases.items():
        prefix = f"{name}/"
        wanted = {key.removeprefix(prefix): array for key, array in recorded.items() if key.startswith(prefix)}
        lines.append(_compared(name, case, wanted, algo))
    return lines


def _compared(name: str, case: Case, wanted: Mapping[str, np.ndarray], algo: str) -> Line:
    if case["kind"] not in KINDS:
        raise UserError(f"case {name}: unknown kind {case['kind']!r}; known: {', '.join(KINDS)}")
    draws = Draws(case)
    planner = Planner({"T": 1, **case}, algo, draws) if case["kind"] != "data" else _WithoutNetworks(case)
    found = KINDS[case["kind"]](planner, draws)
    errors = [(*one, key) for key, array in wanted.items() for one in _errors(key, array, found.get(key), case["kind"])]
    error, bound, worst = max(errors, key=lambda line: np.inf if line[0] != line[0] else line[0] / line[1])
    return Line(name, len(wanted), worst, error, bound)


class _WithoutNetworks(Planner):
    def __init__(self, case: Case) -> None:
        self.case = case


def _errors(key: str, wanted: np.ndarray, found: Any, kind: str) -> Iterator[tuple[float, float]]:
    """The errors of one array, each with its bound; infinite for another shape, or where nothing was computed."""
    bound = CHAIN_BOUND if kind == "chain" else BOUND
    here = np.asarray(found.detach() if isinstance(found, Tensor) else np.nan if found is None else found, np.float64)
    if here.size != wanted.size or (here.ndim == wanted.ndim and here.shape != wanted.shape):
        yield float("inf"), bound
        return
    there = wanted.astype(np.float64)
    difference = np.abs(here.reshape(there.shape) - there)
    if key.startswith(("after/", "ema/")):
        # Single weights; the norm, sum and largest of all add up the last digits of up to millions.
        yield float(difference[SUMMARY:].max(initial=0.0)), WEIGHTS_BOUND
        there, difference = there[:SUMMARY], difference[:SUMMARY]
    yield float(difference.max(initial=0.0) / (np.abs(there).max(initial=0.0) or 1.0)), bound


def check(options: argparse.Namespace) -> int:
    holds = True
    for path in options.files:
        print(path)
        for line in replay(path):
            verdict = "" if line.holds else "  BEYOND"
            print(f"  {line.case:22} {line.error:8.1e} of {line.bound:.0e}  {line.entries:4} arrays, "
                  f"worst {line.worst}{verdict}")  # fmt: skip
            holds &= line.holds
    print("every case holds" if holds else "not every case holds")
    return 0 if holds else 1


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("benchmarks.fidelity.planners", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", metavar="FILE", help="recorded outputs of the published modules, .npz")
    return command_line("benchmarks.fidelity.planners", lambda: check(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
