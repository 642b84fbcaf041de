"""A trained run again: `python play.py RUN` evaluates it, films it, exports it or collects with it. See --help.

In a program:

    policy = play.Policy.load("results/runs/diffcps/hopper-medium-v2/seed_0")
    action = policy(observation)
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

if __name__ == "__main__":  # not in a program that imports this: it changes how Ctrl-C ends a process
    import utils.interrupts  # noqa: F401  first, for what follows takes seconds to import

import numpy as np
import torch
from torch import Tensor

from agents import AGENTS
from utils import sources, video
from utils.errors import UserError
from utils.options import Parser, command_line, resolve_device
from utils.runs import checkpoint
from utils.runs.columns import EVALUATION_COLUMNS, PLAYED_FILE, PLAYED_HOW
from utils.runs.played import played_table, save_played, way_of
from utils.runs.reading import read_config
from utils.seeding import torch_generators
from utils.trained import Trained, film, find, load, play
from utils.training.capture import MODES
from utils.training.export import export_policy

Observation = TypeVar("Observation", np.ndarray, Tensor)


class Policy:
    """A trained seed's policy; also what `utils.behaviour.collect` takes."""

    def __init__(self, trained: Trained, seed: int = 0) -> None:
        """seed: of what it draws. Raises UserError for several trained seeds."""
        if trained.agent.num_seeds != 1:
            raise UserError(f"one seed acts, not {trained.agent.num_seeds}: name one seed's folder or checkpoint")
        self.agent, run = trained.agent, trained.described["run"]
        self.info = {"kind": "trained", "algo": run["algo"], "env_name": run["env_name"], "seed": self.agent.seeds[0],
                     "step": self.agent.step, "settings": dict(trained.described["settings"])}  # fmt: skip
        self._rng = torch_generators([seed], "playing", self.agent.device)

    @classmethod
    def load(cls, place: str | Path, seed: int = 0, device: torch.device | str = "cpu", **changes: Any) -> Policy:
        """From a seed's folder or a checkpoint; `changes` are settings of acting, such as `action_candidates=1`.

        Raises UserError as `find` and `load`, and for a folder with several seeds.
        """
        if len(paths := find(Path(place))) != 1:
            raise UserError(f"{place} holds {len(paths)} seeds: name one seed's folder or checkpoint")
        return cls(load(paths, AGENTS, device, changes)[0], seed)

    def __call__(self, observation: Observation) -> Observation:
        """[state_dim] or [N, state_dim] -> float32 actions [action_dim] or [N, action_dim]: an array of an array, of a
        tensor a tensor beside it. Raises UserError for another shape.
        """
        states = torch.as_tensor(observation, dtype=torch.float32, device=self.agent.device)
        if states.dim() not in (1, 2) or states.shape[-1] != self.agent.state_dim:
            raise UserError(f"an observation has {self.agent.state_dim} numbers, or is [N, {self.agent.state_dim}]; "
                            f"not {list(states.shape)}")  # fmt: skip
        actions = self.agent.act(torch.atleast_2d(states)[None], self._rng)[0].reshape(*states.shape[:-1], -1)
        return actions.to(observation.device) if isinstance(observation, Tensor) else actions.cpu().numpy()

    def act(self, states: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        """States [N, S] -> actions [N, A]; with `rng`, all that is drawn follows from it."""
        if rng is not None:
            self._rng[0].manual_seed(int(rng.integers(2**63 - 1)))
        return self(states)


# --- The command --------------------------------------------------------------------------------------


def parse(argv: Sequence[str]) -> Namespace:
    """Parse a command line. Raises UserError for what cannot be."""
    parser = Parser(prog="play.py", description="Evaluate a trained run again, or with a FILE do that instead.",
                    allow_abbrev=False)  # fmt: skip
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="a seed's folder, a run's folder with several, or a checkpoint")
    add("--episodes", type=int, default=100, help="of each seed (default: %(default)s)")
    add("--eval_seeds", default="fresh", choices=("fresh", "published"), help="start states (default: %(default)s)")
    add("--action_candidates", type=int, help="actions to choose from in each state (default: the run's)")
    add("--backend", default="", choices=("mujoco", "d4rl"), help="environments, as for run.py (default: the run's)")
    add("--device", default="auto", help="auto, 0, cuda:1 or cpu (default: %(default)s)")
    add("--execution", choices=MODES[1:], help="how the policy is computed (default: the run's, on its kind of device)")
    add("--threads", type=int, help="CPU threads (default: the run's)")
    add("--quiet", action="store_true", help="no progress bar")
    add("--video", type=Path, metavar="FILE", help="film one episode: FILE.mp4 or FILE.gif")
    add("--export", type=Path, metavar="FILE", help="write the policy as a torch.export program, and its weights")
    add("--collect", type=Path, metavar="FILE", help="write --transitions of the policy in D4RL's format")
    add("--transitions", type=int, default=100_000, help="of --collect (default: %(default)s)")
    add("--seed", type=int, default=0, help="of --collect (default: %(default)s)")
    options = parser.parse_args(argv)
    for name in ("episodes", "action_candidates", "threads"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}")
    if options.video:
        video.check(options.video)
    return options


def start(options: Namespace) -> int:
    """Do what the command line asks for; raises UserError for what the user can fix."""
    device = torch.device("cpu") if options.export else resolve_device(options.device)
    changes = {} if options.action_candidates is None else {"action_candidates": options.action_candidates}
    paths = find(options.run)
    if threads := options.threads or read_config(paths[0].parent).get("threads"):
        torch.set_num_threads(threads)
    known: dict[str, Callable[[Trained, Namespace], None]] = {"video": record, "export": export, "collect": collect}
    actions = [action for name, action in known.items() if getattr(options, name)]
    if actions and len(paths) > 1:
        raise UserError(f"{options.run} holds {len(paths)} seeds: name one seed's folder or checkpoint")
    groups = load(paths, AGENTS, device, changes, options.backend)
    for action in actions:
        action(groups[0], options)
    if not actions:
        evaluate_again(groups, options)
    return 0


def evaluate_again(groups: Sequence[Trained], options: Namespace) -> None:
    """Play every seed's episodes, write them beside the run, and print what they say."""
    seeds: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for t in groups:
        mode = options.execution or t.described.get("execution", "eager")
        if t.agent.device.type != "cuda" and mode == "graph":
            mode = "eager"
        episodes = play(t, options.episodes, options.eval_seeds == "fresh", mode, options.quiet)
        scores = t.source.normalized_score(episodes.returns)
        how = {"episodes": options.episodes, "eval_seeds": options.eval_seeds, "execution": mode, **way_of(t.described)}
        for k, folder in enumerate(t.folders):
            columns = zip(episodes.returns[k], scores[k], episodes.lengths[k], episodes.unstable[k], strict=True)
            rows = [(t.agent.step, e, float(r), float(s), int(n), int(u)) for e, (r, s, n, u) in enumerate(columns)]
            save_played(folder, how, [dict(zip(EVALUATION_COLUMNS, row, strict=True)) for row in rows])
            seeds[str(t.agent.seeds[k])] = (scores[k], episodes.returns[k])
        print(f"{t}: " + ", ".join(f"{name} {how[name]}" for name in PLAYED_HOW if how[name] != ""))
    print(played_table(seeds))
    print(f"episodes in {groups[0].folders[0].parent}/seed_*/{PLAYED_FILE}")


def record(t: Trained, options: Namespace) -> None:
    """One episode as a video."""
    episodes = film(t, options.video, options.eval_seeds == "fresh", options.quiet)
    score = float(t.source.normalized_score(episodes.returns)[0, 0])
    print(f"{options.video}: {t}, {episodes.lengths[0, 0]} steps, normalised score {score:.1f}")


def export(t: Trained, options: Namespace) -> None:
    """The policy as a program that acts without this project, and its weights by name."""
    export_policy(t.agent, options.export, Policy(t).info)
    weights = options.export.with_name(f"{options.export.stem}.weights.pt")
    checkpoint.save(weights, t.agent.published_state()[0])
    print(f"{options.export}: a program for observations [N, {t.agent.state_dim}]; its weights by name: {weights}")


def collect(t: Trained, options: Namespace) -> None:
    """Transitions of the policy in a D4RL-format file."""
    from utils.behaviour.collect import collect_parts

    run = t.described["run"]
    if run["backend"] == "d4rl" or not isinstance(t.source, sources.Task):
        raise UserError("--collect takes D4RL's tasks under --backend mujoco")
    collect_parts(run["env_name"], [(run["algo"], Policy(t))], options.collect, options.transitions,
                  seed=options.seed, progress=not options.quiet)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Run a command line; the exit code is 2 for what the user can fix."""
    return command_line("play.py", lambda: start(parse(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
