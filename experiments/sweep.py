"""A sweep of one's own: every combination of the values of some settings, on some tasks, with some seeds.

    python -m experiments.sweep plan --grid kappa=0.03,0.06 --tasks hopper-medium-v2 --seeds 0-2
    python -m experiments.sweep run  --grid kappa=0.03,0.06 --tasks hopper-medium-v2 --seeds 0-2
    python -m experiments.sweep show --grid kappa=0.03,0.06 --tasks hopper-medium-v2 --seeds 0-2

The three take the same options, as those of the paper's tables do; `run` again goes on. A value that a sweep before
this one has trained, with the same data and scale, is not trained again.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import hyperparameters
from agents.parts.diffusion import SCHEDULES
from experiments.study.study import Experiment, Study, build_parser, lengths_of
from utils import tasks
from utils.data.dataset import REWARD_TUNES
from utils.errors import UserError
from utils.options import Parser, command_line

# Its grid and tasks come from the command line.
SWEEP = Experiment(folder="sweep", about="A sweep over settings", tasks=(), seeds="0-2", compared=True)
# Names that only what uses them knows.
CHOICES = {"reward_tune": REWARD_TUNES, "beta_schedule": SCHEDULES}
SWITCH = {"true": True, "false": False}


def parse_grid(texts: Sequence[str], algos: Sequence[str]) -> dict[str, list[Any]]:
    """NAME=VALUE,VALUE,... each, as values by setting, of the kind that the algorithms' settings have.

    Raises UserError for another form, for a setting that one of the algorithms has not, for a value of another kind,
    and for one that is given twice.
    """
    grid: dict[str, list[Any]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if not equals or not all(value.strip() for value in values.split(",")):
            raise UserError(f"--grid takes NAME=VALUE,VALUE,..., such as kappa=0.03,0.06, not {text!r}")
        if name in grid:
            raise UserError(f"--grid names {name} twice; give all of its values at once: {name}=VALUE,VALUE,...")
        default = _default(name, algos)
        one_of = CHOICES.get(name) or hyperparameters.settings(algos[0])[name].one_of
        grid[name] = [_value(name, value.strip(), default, one_of) for value in values.split(",")]
        if len(set(grid[name])) < len(grid[name]):
            raise UserError(f"--grid {text} has a value twice")
    return grid


def _default(name: str, algos: Sequence[str]) -> Any:
    """A setting's default. Raises UserError for one that an algorithm has not."""
    for algo in algos:
        known = list(hyperparameters.settings(algo))
        if name not in known:
            others = [other for other in hyperparameters.CONFIGS if name in hyperparameters.settings(other)]
            hint = f"; it is one of {', '.join(others)}" if others else _nearest(name, known)
            raise UserError(f"{algo} has no setting {name!r}{hint} (python run.py --algo {algo} --help lists them)")
    return getattr(hyperparameters.CONFIGS[algos[0]](), name)


def _nearest(text: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(text, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _value(name: str, text: str, default: Any, one_of: Sequence[str]) -> Any:
    """`text` as a value of the default's kind. Raises UserError where it is none."""
    if isinstance(default, bool):
        if text.lower() not in SWITCH:
            raise UserError(f"--grid: {name} is true or false, not {text!r}")
        return SWITCH[text.lower()]
    if isinstance(default, str) and "," in default:
        raise UserError(f"--grid: {name} cannot be swept, for its values have commas")
    if one_of and text not in one_of:
        raise UserError(f"--grid: {name} is {' or '.join(one_of)}, not {text!r}{_nearest(text, one_of)}")
    try:
        return type(default)(text)
    except ValueError:
        kind = {int: "a whole number", float: "a number"}.get(type(default), type(default).__name__)
        raise UserError(f"--grid: {name} must be {kind}, not {text!r}") from None


def sweep(options: argparse.Namespace) -> Experiment:
    """The experiment that a command line means. Raises UserError as `parse_grid`, and for an unknown task."""
    grid = parse_grid(options.grid, options.algos)
    for task in options.tasks:
        tasks.task(task)  # which names the nearest one
    for algo in options.algos:
        for name in lengths_of(algo, options.tasks[0], options)[0]:
            if name in grid:
                how = f"--{name}" if getattr(options, name, None) is not None else "--scale"
                raise UserError(f"--grid and {how} both set {name}; leave one of them out")
    return dataclasses.replace(SWEEP, grid=grid, tasks=options.tasks, by=tuple(grid))


def sweep_parser() -> Parser:
    """The options of every experiment, and the grid."""
    parser = build_parser(SWEEP, "sweep")
    about = "values of settings, such as kappa=0.03,0.06 policy_interval=1,2: every combination is a run"
    parser.add_argument("--grid", nargs="+", required=True, metavar="NAME=VALUES", help=about)
    for action in parser._actions:
        if action.dest == "tasks":
            action.required, action.help = True, "D4RL tasks"
    return parser


def main(argv: Sequence[str]) -> int:
    """Run a command line; 2 for what the user can fix."""

    def act() -> int | None:
        options = sweep_parser().parse_args(argv)
        study = Study(sweep(options), options, shlex.join(["python", "-m", "experiments.sweep", *argv]))
        return getattr(study, options.action)()

    return command_line("experiments.sweep", act)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
