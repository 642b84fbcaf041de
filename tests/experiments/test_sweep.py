"""A sweep of one's own: what a grid means, one line for what it cannot mean, and from done runs to a comparison."""

from __future__ import annotations

from pathlib import Path

import pytest

import hyperparameters
from agents import AGENTS
from experiments import sweep
from experiments.study.planned_run import How
from experiments.study.study import Study
from tests.report.test_report import make_run
from utils import options
from utils.errors import UserError

TASK = ["--tasks", "hopper-medium-v2"]


def study(*arguments: str) -> Study:
    given = sweep.sweep_parser().parse_args(["plan", *arguments])
    return Study(sweep.sweep(given), given)


def test_a_grid_is_every_combination_of_its_values(tmp_path: Path) -> None:
    grid = ("kappa=0.03,0.06", "policy_interval=1,2", "max_q_backup=true")
    planned = study("--grid", *grid, *TASK, "walker2d-medium-v2", "--seeds", "0,3", "--dataset", "local",
                    "--dir", str(tmp_path))  # fmt: skip
    assert len(planned.runs) == 8 and {run.seeds for run in planned.runs} == {(0, 3)}
    for wanted in planned.runs:  # run.py's own parser makes the same of it
        parsed = options.parse(wanted.command(planned.base, How.of(planned.options)), AGENTS)
        assert hyperparameters.get("diffcps", wanted.env_name, **options.overrides(parsed)) == wanted.config
        assert wanted.config.max_q_backup is True and wanted.config.kappa in (0.03, 0.06)
    names = {run.variant for run in planned.runs}
    assert "kappa=0.03,policy_interval=2,max_q_backup=True" in names and len(names) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kapa=0.03"], "diffcps has no setting 'kapa'; did you mean kappa?"),
        (["kappa=0.03", "--algos", "diffcps", "bc"], "bc has no setting 'kappa'; it is one of diffcps "),
        (["kappa=0.03,much"], "kappa must be a number, not 'much'"),
        (["policy_interval=1.5"], "policy_interval must be a whole number, not '1.5'"),
        (["max_q_backup=maybe"], "max_q_backup is true or false, not 'maybe'"),
        (["reward_tune=normalise"], "not 'normalise'; did you mean normalize?"),
        (["beta_schedule=cosin"], "not 'cosin'; did you mean cosine?"),
        (["dim_mults=1,2", "--algos", "diffuser"], "dim_mults cannot be swept"),
        (["kappa=-1"], "kappa must be at least 0, not -1.0"),
        (["kappa"], "--grid takes NAME=VALUE,VALUE,..., such as kappa=0.03,0.06, not 'kappa'"),
        (["kappa=0.03,"], "--grid takes NAME=VALUE"),
        (["kappa=0.1,0.1"], "has a value twice"),
        (["kappa=0.1", "kappa=0.2"], "--grid names kappa twice"),
        (["num_epochs=3", "--scale", "0.1"], "--grid and --scale both set num_epochs"),
        (["eval_episodes=3", "--eval_episodes", "5"], "--grid and --eval_episodes both set eval_episodes"),
        (["kappa=0.1", "--tasks", "hoper-medium-v2"], "did you mean 'hopper-medium-v2'?"),
    ],
)
def test_one_line_for_what_cannot_be_swept(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert sweep.main(["plan", *TASK, "--grid", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_tasks_and_the_grid_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    for given, missing in ((["--grid", "kappa=0.1"], "--tasks"), (TASK, "--grid")):
        with pytest.raises(SystemExit):
            sweep.main(["plan", *given])
        assert f"required: {missing}" in capsys.readouterr().err


def test_what_is_done_is_shown_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--grid", "kappa=0.03,0.06", *TASK, "--seeds", "0,1", "--dir", str(tmp_path / "runs")]
    assert sweep.main(["show", *command]) == 2
    assert "nothing was run yet" in capsys.readouterr().err
    base = study(*command).base
    for kappa, last in ((0.03, 10.0), (0.06, 15.0)):
        for seed in (0, 1):
            make_run(base / f"kappa={kappa}", [last + seed * kappa] * 5, seed=seed, kappa=kappa)
    assert sweep.main(["show", *command, "--html", str(tmp_path / "page.html")]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "kappa=0.06 − kappa=0.03 0,1 5.0 [4.8, 5.2]" in text and "| " not in text
    page = (tmp_path / "page.html").read_text()
    assert "python -m experiments.sweep show --grid kappa=0.03,0.06" in page and "A sweep over settings" in page


def test_settings_of_other_kinds_are_refused_as_values() -> None:
    assert sweep.parse_grid(["lr_decay=True,false", "batch_size=64"], ["diffcps"]) == {
        "lr_decay": [True, False],
        "batch_size": [64],
    }
    with pytest.raises(UserError, match="true or false"):
        sweep.parse_grid(["lr_decay=1"], ["diffcps"])
