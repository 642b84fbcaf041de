"""Training on another device than the CPU: what runs there mixes no tensors of two devices, and gives the same bits."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

import hyperparameters
import play
import run as training
import utils.launch
from agents import AGENTS
from tests import small
from tests.elsewhere import ELSEWHERE, There, elsewhere
from tests.training.making import make_runner, parameters
from utils.training.runner import Runner


def test_tensors_of_two_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with elsewhere(monkeypatch) as mode:
        generator = torch.Generator(device=ELSEWHERE).manual_seed(3)
        x = torch.randn(3, 4, generator=generator, device=generator.device)
        assert isinstance(x, There) and x.device == ELSEWHERE
        assert torch.equal(x.cpu(), torch.randn(3, 4, generator=torch.Generator().manual_seed(3))) and mode.copies == 1
        for mixed in (
            lambda: x + torch.ones(4),
            lambda: x[torch.tensor([0])],
            lambda: torch.cat([x, torch.ones(1, 4)]),
        ):
            with pytest.raises(RuntimeError, match="takes tensors of two devices"):
                mixed()
        assert mode.copies == 1
        weight = torch.zeros(4, device=ELSEWHERE).requires_grad_()
        (slope,) = torch.autograd.grad((x * weight + torch.tensor(1.0)).sum(), weight)
        assert torch.equal(slope.cpu(), x.cpu().sum(0))
        part = x.view(-1)[2:4]
        part.fill_(7.0)
        assert x.tolist()[0][2:] == [7.0, 7.0]


def quick(device: torch.device, mode: str, algo: str) -> Runner:
    fields = {field.name for field in dataclasses.fields(hyperparameters.CONFIGS[algo])}
    short = {"pretrain_epochs": 1, "num_steps_per_epoch": 4} if "pretrain_epochs" in fields else {}
    if "diffusion_steps" in fields:
        short["diffusion_steps"] = 2
    if "horizon" in fields:
        short |= {"hidden_dim": 16, "dim_mults": "1,2"}
    run = make_runner(mode, [0, 3], str(device), algo, **short)
    run.agent.step = run.agent.first_step
    return run


def learnt(device: torch.device, mode: str, algo: str) -> dict[str, Tensor]:
    """What some steps and actions on a device give, all of it, with a checkpoint taken and restored in between."""
    run = quick(device, mode, algo)
    steps = run.agent.period if mode == "graph" else 3
    run.run(steps)
    saved = run.agent.state_dict(), run.state_dict()
    run.run(1)
    run.agent.load_state_dict(saved[0])
    run.load_state_dict(saved[1])
    run.run(steps)
    assert run.mode == mode and (mode == "eager" or run._graphs)
    generators = [torch.Generator(device=device).manual_seed(seed) for seed in (5, 6)]
    states = torch.linspace(-1, 1, 66).view(1, 6, 11).expand(2, 6, 11).to(device)
    active = torch.tensor([[True] * 6, [True, False] * 3]).to(device)
    acted = {"actions": run.agent.act(states, generators), "some": run.agent.act(states, generators, active)}
    networks = {name: network.flat for name, network in run.agent.networks.items()}
    return {**run.metrics(), **acted, **networks}


CAPTURED = ["diffcps", "dtql", "sfbc"]  # with a pretraining, and with columns made of the whole table


@pytest.mark.usefixtures("replayed_eagerly")
@pytest.mark.parametrize(("algo", "mode"), [(a, "eager") for a in AGENTS] + [(a, "graph") for a in CAPTURED])
def test_a_run_elsewhere_is_the_run_here(monkeypatch: pytest.MonkeyPatch, algo: str, mode: str) -> None:
    here = learnt(torch.device("cpu"), mode, algo)
    with elsewhere(monkeypatch):
        there = learnt(ELSEWHERE, mode, algo)
    assert here.keys() == there.keys()
    for name, value in there.items():
        assert isinstance(value, There), name
        if name in ("actions", "some"):  # a GPU takes more candidates at once, so sums may be rounded otherwise
            torch.testing.assert_close(value.here, here[name], rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(value.here, here[name]), name


@pytest.mark.parametrize("algo", list(AGENTS))
def test_an_update_copies_nothing_between_devices(monkeypatch: pytest.MonkeyPatch, algo: str) -> None:
    """A copy from the host's memory makes it wait, and cannot be captured."""
    with elsewhere(monkeypatch) as mode:
        run = quick(ELSEWHERE, "eager", algo)
        run.run(1)
        copies = mode.copies
        run.run(run.agent.period)
        assert mode.copies == copies
        parameters(run).cpu()
        assert mode.copies == copies + 1


def test_a_whole_command_elsewhere_leaves_the_files_of_one_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = str(small.d4rl_file(tmp_path / "data.hdf5"))
    for place in ("here", "there"):
        command = ["--env_name", "hopper-medium-v2", "--dataset", data, "--dir", str(tmp_path / place), *small.SHORT]
        with pytest.MonkeyPatch.context() as patch, elsewhere(patch) if place == "there" else nullcontext():
            if place == "there":
                for module in (utils.launch, play):
                    patch.setattr(module, "resolve_device", lambda _: ELSEWHERE)
            assert training.main([*command, "--num_epochs", "2"]) == 0
            assert training.main([*command, "--resume"]) == 0
            folder = tmp_path / place / "diffcps" / "hopper-medium-v2"
            assert play.main([str(folder), "--episodes", "2", "--quiet"]) == 0
    files = {}
    for place in ("here", "there"):
        folder = tmp_path / place / "diffcps" / "hopper-medium-v2" / "seed_0"
        files[place] = [
            pd.read_csv(folder / name).drop(columns=["steps_per_s", "wall_s", "cpu_s"], errors="ignore")
            for name in ("metrics.csv", "evaluations.csv", "played.csv")
        ]
    for one, other in zip(files["here"], files["there"], strict=True):
        pd.testing.assert_frame_equal(one, other, check_exact=True)
        assert len(one) >= 2
