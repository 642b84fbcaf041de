"""The experiment on kappa: which runs it has, and what is shown of known ones."""

from __future__ import annotations

import argparse

import matplotlib.pyplot as plt
import numpy as np
import pytest

from agents import AGENTS
from experiments import kappa, rebuilt
from experiments.study import study
from experiments.study.planned_run import How
from tests.experiments.test_rebuilt import played
from tests.report.test_report import make_run
from utils import options
from utils.report import figures
from utils.report.__main__ import main as export
from utils.report.build import make_report
from utils.report.runs import Labels
from utils.report.tables import Choice


def given(protocol: str, *arguments: str) -> argparse.Namespace:
    return study.build_parser(kappa.PROTOCOLS[protocol], "x").parse_args(["plan", "--dataset", "X", *arguments])


@pytest.mark.parametrize(("protocol", "number"), [("slacks", 24), ("starts", 6)])
def test_run_understands_every_command(tmp_path, protocol, number):
    for task in kappa.PROTOCOLS[protocol].tasks:
        (tmp_path / f"{task}.hdf5").touch()
    chosen = given(protocol, "--threads", "1")
    chosen.dataset = str(tmp_path)
    runs = kappa.PROTOCOLS[protocol].runs(chosen)
    assert len(runs) == number and len({run.name for run in runs}) == number
    for wanted in runs:
        parsed = options.parse(wanted.command(tmp_path / "base", How.of(chosen)), AGENTS)
        config, _ = options.resolve_settings(parsed)
        assert config == wanted.config and options.steps_to_train(parsed, config) == wanted.steps == 100_000


def test_the_baselines_are_those_of_the_rebuilt_table(tmp_path):
    def own(experiment: study.Experiment) -> set[str]:
        chosen = study.build_parser(experiment, "x").parse_args(["plan", "--dataset", str(tmp_path), "--seeds", "0-1"])
        planned = study.Study(experiment, chosen)
        return {str(f) for run in planned.runs for f in run.folders(planned.base) if run.variant == "own"}

    ours = own(kappa.PROTOCOLS["slacks"])
    assert len(ours) == 3 * 3 * 2 and ours < own(rebuilt.PROTOCOLS["main"])


def test_the_table_of_known_runs(tmp_path, capsys):
    for seed in (0, 1):
        make_run(tmp_path / "a", [10.0, 20.0 + seed], seed=seed, kappa="auto", kappa_slack=0.3)
        make_run(tmp_path / "b", [30.0, 40.0], seed=seed, algo="diffusion_ql")
        path = tmp_path / "a" / "diffcps" / "hopper-medium-v2" / f"seed_{seed}" / "metrics.csv"
        header = "step,kl_loss,lambda,lambda_violated,lambda_at_bound,kappa,steps_per_s,event"
        rows = [f"{10 * k},0.{4 - k}5,0.5,{k / 4},0,0.0{seed + 4},1," for k in (1, 2, 3, 4)]
        path.write_text("\n".join([header, *rows, ""]))
        played(path.parent, 40, [1.0, 2.0, 6.0 + 6 * seed], action_candidates=1)
    report = make_report([tmp_path], Labels(), Choice(), extra=kappa.tables)
    table = report.tables("official D4RL")[-1]
    assert [list(row) for row in table.rows] == [
        ["hopper-medium-v2", "diffcps kappa=auto kappa_slack=0.3", "40", "20.5 ± 0.5", "–", "20.5 ± 0.5",
         "4.0 ± 1.0", "0.045", "0.1", "87.5", "0.5"],
        ["hopper-medium-v2", "diffusion_ql", "40", "40.0 ± 0.0", "–", "40.0 ± 0.0", "–", "–", "–", "–", "–"],
    ]  # fmt: skip
    assert "§ with --action_candidates 1, so without a choice by Q, 3 episodes per seed (play.py)." in table.notes
    assert np.isnan(kappa._constraint(report.cells[1].runs[0])).all()
    figure = figures.constraint(report.cells, "title")
    assert figure is not None and len(figure.axes) == 3  # these runs have no mean Q
    loss, bound = figure.axes[1].lines
    np.testing.assert_allclose(loss.get_ydata(), [0.35, 0.25, 0.15, 0.05])
    np.testing.assert_allclose(bound.get_ydata(), 0.045)  # kappa of the two seeds: 0.04 and 0.05
    np.testing.assert_allclose(figure.axes[2].lines[0].get_ydata(), [0.25, 0.5, 0.75, 1.0])
    plt.close(figure)
    (cell,) = (cell for cell in report.cells if cell.algo == "diffcps")
    assert cell.remarks == ()  # it binds
    kept = str(tmp_path / "kept")
    assert export([str(tmp_path), "--export", kept]) == 0
    capsys.readouterr()
    assert kappa.command(["show", "--kept", kept]) == 0  # needs no --dataset
    assert table.markdown() in capsys.readouterr().out  # an export has the constraint, too
    assert kappa.command(["show", "--kept", kept, "--seeds", "0"]) == 0
    assert "| diffcps kappa=auto kappa_slack=0.3 | 40 | 20.0 | – | 20.0 | 3.0 | 0.04 |" in capsys.readouterr().out
    assert kappa.command(["show", "--kept", kept, "--tasks", "walker2d-medium-v2"]) == 2
    assert "no run is left" in capsys.readouterr().err
    for arguments, fault in ((["run", "--kept", kept], "--kept goes with show"), (["show"], "required: --dataset")):
        with pytest.raises(SystemExit):
            kappa.command(arguments)
        assert fault in capsys.readouterr().err


def test_the_command_line(tmp_path, capsys):
    assert kappa.command(["plan", "--protocol", "starts", "--dataset", str(tmp_path), "--dir", str(tmp_path)]) == 0
    assert (
        "kappa=auto,kappa_slack=0.1,lambda_min=0.0,lambda_init=10.0/diffcps/hopper-medium-v2/"
        in capsys.readouterr().out
    )
    with pytest.raises(SystemExit, match="2"):
        kappa.command(["plan", "--protocol", "short"])
