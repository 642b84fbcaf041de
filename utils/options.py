"""The command line: flags from the settings in hyperparameters.py, devices, seeds, and where each setting came from."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from tqdm import tqdm

import hyperparameters
from utils import tasks
from utils.errors import UserError, user_errors
from utils.files import first_line, print_any_text
from utils.process import INTERRUPTED, Interrupted

if TYPE_CHECKING:  # seconds to import, and nothing to do with --help
    import torch

MAX_SEEDS = 1024
LARGEST_FLOAT, LEAST_FLOAT = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)
LARGEST_INT = 2**63 - 1
MAX_THREADS = 1024


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line and exits with 2."""

    def error(self, message: str) -> NoReturn:
        line = " ".join(message.split())  # an argument that it quotes may have several
        self.exit(2, f"{self.prog}: {line} (see {self.prog} --help)\n")


def build_parser(algo: str, algorithms: Iterable[str]) -> Parser:
    """All flags for one algorithm. A setting that is not given stays out of the result."""
    parser = Parser(
        prog="run.py",
        usage="run.py --env_name TASK [--algo NAME] [--dataset SOURCE] [--seeds LIST] [flags]",
        description="Train an offline policy on a fixed dataset, evaluate as it goes, leave results.",
        epilog=f"The settings listed are those of --algo {algo}; other algorithms have others.",
        allow_abbrev=False,
    )
    task = parser.add_argument_group("what to run, and where").add_argument
    task("--env_name", default="halfcheetah-medium-v2", metavar="TASK", help="D4RL task (default: %(default)s)")
    task("--tasks", action=_ListTasks, nargs=0, help="list the tasks, then stop")
    task("--algo", default="diffcps", metavar="NAME", help=f"{', '.join(algorithms)} (default: %(default)s)")
    task("--dataset", metavar="SOURCE", help="local, minari:ID, a D4RL-format file or folder (D4RL's)")
    task("--seeds", metavar="LIST", help="several seeds at once: 0-4 or 0,3,7 (instead of --seed)")
    task("--device", default="auto", help="auto, 0, cuda:1 or cpu (default: %(default)s)")
    task("--dir", default="results/runs", help="folder for the results (default: %(default)s)")
    task("--name", default="", metavar="LABEL", help="DIR/LABEL instead: runs of other settings lie beside each other")
    task("--resume", action="store_true", help="continue the run in this folder from its last checkpoint")
    task("--overwrite", action="store_true", help="delete what an earlier run left in this folder")
    task("--quiet", action="store_true", help="no progress bar: one line an evaluation")
    task("--print_config", action="store_true", help="print the settings and their origins, then stop")
    more = parser.add_argument_group("more of that").add_argument
    # fmt: off
    more("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    more("--local_size", type=int, default=100_000, help="transitions of --dataset local (%(default)s)")
    more("--max_steps", type=int, metavar="N", help="end after N steps of the schedule; --resume goes on")
    more("--max_minutes", type=float, metavar="M", help="end after M minutes with a checkpoint; --resume goes on")
    more("--load_published", nargs="+", metavar="NAME=FILE", help="start from published weights")
    more("--save_best_model", action="store_true",
         help="save the weights under the published names at every evaluation (the published flag does the same)")
    more("--checkpoint_interval", type=float, default=10, help="minutes between checkpoints (%(default)s)")
    more("--execution", default="auto", help="auto, eager, compile or graph (default: %(default)s)")
    more("--precision", default="float32", choices=("float32", "tf32", "bfloat16"),
         help="of the update's matrix products: float32 (as published), tf32 (GPUs) or bfloat16 (docs/speed.md)")
    more("--threads", type=thread_number, default="auto", metavar="NUMBER",
         help="CPU threads, or auto: the fastest for a few steps (default: %(default)s)")
    more("--backend", default="mujoco", choices=("mujoco", "d4rl"),
         help="evaluation environments: mujoco (D4RL's physics, current MuJoCo) or d4rl (the original stack)")
    more("--eval_seeds", default="published", choices=("published", "fresh"),
         help="start states: published (seed + 100 at every evaluation) or fresh (new ones each time)")
    more("--eval_async", action=argparse.BooleanOptionalAction,
         help="evaluate in a thread while training goes on (default: on a GPU)")
    more("--wandb", metavar="PROJECT", help="send the numbers to a Weights & Biases project, too (docs/runs.md)")
    # fmt: on
    settings = parser.add_argument_group(f"settings of {algo} (default < domain < task < flag)")
    defaults = vars(hyperparameters.CONFIGS[algo]())
    for name, about in hyperparameters.settings(algo).items():
        _add_setting(settings, name, defaults[name], about)
    return parser


def thread_number(text: str) -> int | str:
    """A number of threads, or `auto`. Raises ArgumentTypeError for anything else."""
    if text == "auto" or (text.isdecimal() and len(text) < 5 and 1 <= int(text) <= MAX_THREADS):
        return text if text == "auto" else int(text)
    raise argparse.ArgumentTypeError(f"takes auto or a number between 1 and {MAX_THREADS}, not {text!r}")


def _add_setting(group: argparse._ArgumentGroup, name: str, default: Any, about: hyperparameters.About) -> None:
    names = [f"--{name}"] + ([f"--{about.alias}"] if about.alias else [])
    text = f"{about.help} (default: {default})".replace("%", "%%")
    common: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": text}
    if isinstance(default, bool):
        group.add_argument(*names, action=argparse.BooleanOptionalAction, **common)
    else:
        kind, metavar = type(default), type(default).__name__.upper()
        if about.auto:
            group.add_argument(*names, type=number_or_auto, metavar=f"{metavar}|auto", **common)
        else:
            group.add_argument(*names, type=kind, metavar=metavar, **common)


def number_or_auto(text: str) -> float | str:
    """A number, or `auto`. Raises ArgumentTypeError for anything else."""
    try:
        return text if text == hyperparameters.AUTO else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes a number or auto, not {text!r}") from None


def parse(argv: Sequence[str], algorithms: Iterable[str]) -> argparse.Namespace:
    """Parse a command line; the settings' flags depend on `--algo`."""
    algorithms = list(algorithms)
    first = Parser(prog="run.py", add_help=False, allow_abbrev=False)
    first.add_argument("--algo", default="diffcps")
    algo = first.parse_known_args(list(argv))[0].algo
    if algo not in algorithms:
        raise UserError(f"--algo: no algorithm {algo!r}; {nearest(algo, algorithms)}known: {', '.join(algorithms)}")
    parser = build_parser(algo, algorithms)
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(_no_such_flag(unknown, algo, parser))
    if options.env_name not in (known := hyperparameters.known_tasks()):
        raise UserError(f"unknown task {options.env_name!r}; {nearest(options.env_name, known)}--tasks lists them")
    if options.resume and options.overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    if options.wandb is not None and find_spec("wandb") is None:
        raise UserError("--wandb needs the package wandb, which is not installed: pip install wandb")
    if options.local_size >= 2**31:
        raise UserError(f"--local_size must be below 2^31, not {options.local_size}")
    if options.max_steps is not None and options.max_steps < 1:
        raise UserError(f"--max_steps must be at least 1, not {options.max_steps}")
    if options.name and (
        Path(options.name).name != options.name or options.name[0] in ".-" or options.name in algorithms
    ):
        raise UserError(f"--name takes one word, which is no path and no algorithm, not {options.name!r}")
    if options.max_minutes is not None and not options.max_minutes > 0:
        raise UserError(f"--max_minutes must be above 0, not {options.max_minutes}")
    if not options.checkpoint_interval >= 0:
        raise UserError(f"--checkpoint_interval must be at least 0 minutes, not {options.checkpoint_interval}")
    return options


def nearest(word: str, known: Iterable[str]) -> str:
    """A question that names the nearest of the known words; "" where none is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {near[0]}? " if near else ""


def _no_such_flag(unknown: Sequence[str], algo: str, parser: argparse.ArgumentParser) -> str:
    """What is said of the first word that is no flag here: whose it is, or the nearest flag."""
    word = next((word for word in unknown if word.startswith("--")), unknown[0])
    flag = word.partition("=")[0]
    name = flag.removeprefix("--").removeprefix("no-")
    if owners := [other for other in hyperparameters.CONFIGS if name in hyperparameters.settings(other)]:
        return f"{flag} is a setting of {', '.join(owners)}; {algo} has none of that name"
    flags = [string for action in parser._actions for string in action.option_strings]
    return f"unrecognized arguments: {' '.join(unknown)}; {nearest(flag, flags)}".rstrip("; ")


class _ListTasks(argparse.Action):
    """Prints the tasks, a line per domain, and ends."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        domains: dict[str, list[str]] = {}
        for env_name in hyperparameters.known_tasks():
            domains.setdefault(hyperparameters.domain(env_name), []).append(env_name)
        for domain, names in domains.items():
            print(f"{domain}:\n  " + "\n  ".join(names))
        parser.exit()


def overrides(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given on the command line."""
    known = hyperparameters.settings(options.algo)
    return {name: value for name, value in vars(options).items() if name in known}


def resolve_settings(options: argparse.Namespace) -> tuple[Any, dict[str, tuple[Any, str]]]:
    """The algorithm's settings, and each one's value and origin. Raises UserError for one that cannot be."""
    with user_errors():
        config, settings = hyperparameters.resolve(options.algo, options.env_name, overrides(options))
    for name, (value, _) in settings.items():
        if isinstance(value, float) and math.isfinite(value) and abs(value) > LARGEST_FLOAT:
            raise UserError(f"{name} must lie within ±{LARGEST_FLOAT:.3g}, what a float32 holds, not {value:.3g}")
        if isinstance(value, float) and 0 < abs(value) < LEAST_FLOAT:
            raise UserError(f"{name} must be 0 or at least {LEAST_FLOAT:.3g}, what a float32 holds, not {value:.3g}")
        if isinstance(value, int) and abs(value) > LARGEST_INT:
            raise UserError(f"{name} must lie within ±2^63, not {value}")
    return config, settings


def suggestion(options: argparse.Namespace, settings: Mapping[str, tuple[Any, str]], source: str) -> str:
    """A line for a number that nobody tuned for these data and that may be `auto`; "" where there is none.

    settings: as `resolve_settings` gives them. source: the data's; numbers were tuned on D4RL's own, "d4rl".
    """
    for name, about in hyperparameters.settings(options.algo).items():
        value, origin = settings[name]
        tuned = source == "d4rl" and origin.startswith("task ")
        if about.auto and not tuned and origin != "command line":
            which = "D4RL's own set of this task" if origin.startswith("task ") else "other tasks"
            return f"{name} = {value:g} was tuned for {which}: for these data there is --{name} auto"
    return ""


def steps_to_train(options: argparse.Namespace, config: Any) -> int:
    """Gradient steps at which a run ends: those of its schedule, or `--max_steps` where that is less.

    The schedule of a decaying learning rate keeps its length. Raises UserError for a part of an epoch.
    """
    schedule = config.num_epochs * config.num_steps_per_epoch
    if options.max_steps is None:
        return schedule
    if options.max_steps % config.num_steps_per_epoch:
        raise UserError(f"--max_steps must be a multiple of num_steps_per_epoch, {config.num_steps_per_epoch}, "
                        f"not {options.max_steps}")  # fmt: skip
    return min(schedule, options.max_steps)


def run_folder(options: argparse.Namespace) -> Path:
    """Where the folders of a run's seeds lie."""
    return Path(options.dir) / options.name / options.algo / options.env_name


def config_table(options: argparse.Namespace, algorithms: Mapping[str, Any]) -> str:
    """Each setting, its value and its origin, a line each, and what acting costs where the algorithm says so.

    Raises UserError as `resolve_settings`, and for settings that do not fit together.
    """
    config, rows = resolve_settings(options)
    width = max(map(len, rows))
    lines = [f"{name:{width}}  {value!s:12}  {origin}" for name, (value, origin) in rows.items()]
    if task := tasks.TASKS.get(options.env_name):  # a bandit is none
        with user_errors():
            lines.append(algorithms[options.algo].cost(config, task.state_dim, task.action_dim))
    return "\n".join(line for line in lines if line)


def parse_seeds(text: str | None, seed: int = 0) -> list[int]:
    """`0-4` or `0,3,7`; the one `seed` where there is no text.

    Raises UserError for anything else, a repeated or a negative seed.
    """
    if text is None and seed < 0:
        raise UserError(f"--seed must be at least 0, not {seed}")
    text = text if text is not None else str(seed)
    seeds: list[int] = []
    try:
        for part in text.split(","):
            low, _, high = part.partition("-")
            # No longer than one too many: a wrong figure costs no memory.
            seeds.extend(range(int(low), min(int(high or low), int(low) + MAX_SEEDS) + 1))
    except ValueError:
        raise UserError(f"--seeds takes 0-4 or 0,3,7, not {text!r}") from None
    if not seeds or len(set(seeds)) != len(seeds) or len(seeds) > MAX_SEEDS:
        raise UserError(f"--seeds {text!r} must name between 1 and {MAX_SEEDS} different seeds")
    if max(seeds) >= 2**63:
        raise UserError(f"a seed must be below 2^63, not {max(seeds)}")
    return seeds


def resolve_device(text: str) -> torch.device:
    """`auto`, a bare number, `cuda`, `cuda:1` or `cpu` as a device.

    A bare number falls back to the CPU with a warning where there is no CUDA at all, as the published code does; a
    device that was named but does not exist raises UserError.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text == "cpu":
        return torch.device("cpu")
    if text == "auto":
        return torch.device("cuda:0" if count else "cpu")
    if text.isdecimal() and count == 0:
        warnings.warn(f"--device {text}: no CUDA device here, training on the CPU", stacklevel=2)
        return torch.device("cpu")
    number = "0" if text == "cuda" else text.removeprefix("cuda:")
    if not number.isdecimal():
        raise UserError(f"--device takes auto, 0, cuda:1 or cpu, not {text!r}")
    if int(number) >= count:
        there = f"devices 0 to {count - 1}" if count else "no CUDA device"
        raise UserError(f"--device {text} does not exist: this machine has {there}; use --device auto or cpu")
    return torch.device(f"cuda:{number}")


# --- Around a command ---------------------------------------------------------------------------------


def command_line(prog: str, act: Callable[[], object]) -> int:
    """Run a command; its exit code, 0 where it returns no number.

    2 and one line, `PROG: what is wrong`, for what the user can fix; 130 and one line after Ctrl-C.
    """
    show_warnings_as_lines()
    try:
        code = act()
        print(end="", flush=True)
        return code if isinstance(code, int) else 0
    except UserError as error:
        print(f"{prog}: {error}", file=sys.stderr)
    except BrokenPipeError:  # a pager or `head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as error:
        print(f"{prog}: interrupted", file=sys.stderr)
        return error.code if isinstance(error, Interrupted) else INTERRUPTED
    except Exception as error:
        if (line := out_of_memory(error)) is None:
            raise
        print(f"{prog}: {line}", file=sys.stderr)
    return 2


# How PyTorch says on a CPU, and MuJoCo, that something does not fit.
NO_MEMORY = ("not enough memory", "allocate memory", "size calculation overflowed", "Overflow when unpacking long")


def out_of_memory(error: Exception) -> str | None:
    """A line for the user if that is what `error` says, of a GPU or of this machine's own; else None."""
    text = first_line(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch.cuda's
        return f"out of GPU memory; use fewer --seeds ({text})"
    if isinstance(error, MemoryError) or any(words in text for words in NO_MEMORY):
        return f"out of memory; use fewer --seeds or smaller sizes ({text})"
    return None


def show_warnings_as_lines() -> None:
    """A warning is one line on stderr, without the source line that raised it; and any text can be shown."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        tqdm.write(f"warning: {' '.join(str(message).split())}", file=sys.stderr)  # above a progress bar

    warnings.showwarning = show
    print_any_text()
