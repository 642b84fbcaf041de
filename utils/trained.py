"""A trained run again: its checkpoints found and loaded, its episodes played and filmed. It knows no algorithm."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import hyperparameters
from utils import sources
from utils.errors import UserError
from utils.making import SIZES, Agents, make_agent
from utils.runs import checkpoint
from utils.runs.folder import owner
from utils.runs.reading import read_config
from utils.training.capture import acting
from utils.training.evaluation import Episodes, acting_generators, environment_rngs, evaluate
from utils.training.interfaces import Environments, Learner
from utils.video import Film


@dataclass(frozen=True)
class Trained:
    """Seeds of a run as they were at one checkpoint, in company as they were trained."""

    agent: Learner
    described: Mapping[str, Any]  # the first seed's `config.json`, with the settings and backend that act
    source: sources.Source
    folders: Sequence[Path]

    def __str__(self) -> str:
        run, seeds = self.described["run"], self.agent.seeds
        which = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
        return f"{run['algo']} {run['env_name']}, {which}, step {self.agent.step:,}"


def find(place: Path) -> list[Path]:
    """The checkpoints that a checkpoint's, a seed's or a run's path names. Raises UserError where there are none."""
    if place.is_file():
        return [place]
    for pattern in (checkpoint.CURRENT, f"seed_*/{checkpoint.CURRENT}"):
        if found := sorted(place.glob(pattern), key=lambda path: (len(path.parent.name), path)):
            return found
    below = (path.parent for depth in range(1, 4) for path in sorted(place.glob("*/" * depth + checkpoint.CURRENT)))
    hint = f", such as {one}" if (one := next(below, None)) else ""
    raise UserError(f"no {checkpoint.CURRENT} in {place} or its seed_* folders; name a seed's folder, a run's, or a "
                    f"checkpoint{hint}")  # fmt: skip


def load(
    paths: Sequence[Path],
    agents: Agents,
    device: torch.device | str,
    changes: Mapping[str, Any] | None = None,
    backend: str = "",
) -> list[Trained]:
    """Trained seeds from their checkpoints, those together that one command trained and that stand at one step.

    In that company they act bit for bit as they did in training. agents: by algorithm; changes: settings of acting;
    backend: another than the run's. Raises UserError for a file that is none of its folder's run, for settings that
    its algorithm does not have, or that this version does not know.
    """
    groups: dict[str, list[tuple[Path, dict[str, Any], dict[str, Any]]]] = {}
    for path in paths:
        state, config = checkpoint.load(path), read_config(path.parent)
        if state["owner"] != asdict(owner(config)):
            raise UserError(f"{path} is of another run ({checkpoint.Owner(**state['owner'])}) than its config.json")
        together = config["run"].get("seeds") or config["seed"]
        key = json.dumps([together, config["settings"], config["dataset"], state["agent"]["step"]], sort_keys=True)
        groups.setdefault(key, []).append((path, state, config))
    return [_built(group, agents, torch.device(device), changes or {}, backend) for group in groups.values()]


def _built(
    group: Sequence[Any],
    agents: Agents,
    device: torch.device,
    changes: Mapping[str, Any],
    backend: str,
) -> Trained:
    """One of `load`'s, from (path, state, config) of each seed."""
    paths, states, configs = zip(*group, strict=True)
    run = {**configs[0]["run"], **({"backend": backend} if backend else {})}
    described = {**configs[0], "run": run, "settings": {**configs[0]["settings"], **changes}}
    algo, env_name = run["algo"], run["env_name"]
    if algo not in agents:
        raise UserError(f"{paths[0].parent} is a run of {algo!r}, which is not known here")
    if unknown := changes.keys() - hyperparameters.settings(algo).keys():
        raise UserError(f"{algo} has no {', '.join(sorted(unknown))}")
    source = sources.choose(env_name, run["dataset"], run["backend"], progress=False)
    data = described["dataset"]
    if "max_action" not in data:  # an earlier version's run
        if (environments := source.environments(1)) is None:
            raise UserError(f"{paths[0].parent} does not say how large its states are, and has no environment here")
        data = {name: getattr(environments, name) for name in SIZES}
    try:
        config = hyperparameters.get(algo, env_name, **described["settings"])
        state_dim, action_dim, max_action = (data[name] for name in SIZES)
        sizes = (state_dim, action_dim, max_action)
        agent = make_agent(agents[algo], sizes, config, [c["seed"] for c in configs], device)
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{paths[0].parent} cannot be built here: {error}") from error
    if agent.ACTS_BY_DATA:
        dataset = source.load()
        if dataset.info.get("sha256") != described["dataset"].get("sha256"):
            raise UserError(f"{algo} acts by its data, and {dataset.info.get('path', env_name)} is not the file that "
                            f"{paths[0].parent} was trained on")  # fmt: skip
        agent.observe(dataset.batches_to(device, agent.windows))
    checkpoint.restore({"agent": agent}, states)
    return Trained(agent, described, source, [path.parent for path in paths])


def play(trained: Trained, episodes: int, fresh: bool, mode: str = "eager", quiet: bool = True) -> Episodes:
    """So many episodes of each seed, with a bar. Raises UserError where the task has no environment here.

    With as many as in training, its start states and its mode they are those of its evaluation at this step.
    """
    agent = trained.agent
    if (environments := trained.source.environments(agent.num_seeds * episodes)) is None:
        raise UserError(f"{trained.described['run']['env_name']} has no environment here; try --backend d4rl")
    return _episodes(trained, environments, acting(agent, mode), fresh, quiet)


def film(trained: Trained, path: Path, fresh: bool, quiet: bool = True) -> Episodes:
    """One episode of one seed as a video. Raises UserError where there is nothing to see, or as `Film`."""
    with closing(trained.source.watched()) as environments, Film(path, environments.fps) as frames:

        def act(states: Tensor, rng: Any, active: Tensor | None = None) -> Tensor:
            frames.add(environments.frame)
            return trained.agent.act(states, rng, active)

        episodes = _episodes(trained, environments, act, fresh, quiet)
        frames.add(environments.frame)
    return episodes


def _episodes(trained: Trained, environments: Environments, act: Any, fresh: bool, quiet: bool) -> Episodes:
    """One episode in each of the environments, with a bar."""
    agent, total = trained.agent, environments.num_envs
    steps, hidden = environments.max_episode_steps, True if quiet else None  # None: where there is no terminal
    with tqdm(total=steps, desc="playing", unit="step", disable=hidden) as bar:

        def shown(states: Tensor, rng: Any, active: Tensor | None = None) -> Tensor:
            over = 0 if active is None else total - int(active.sum())
            bar.set_postfix_str(f"{over} of {total} episodes over", refresh=False)
            bar.update()
            return act(states, rng, active)

        rngs = environment_rngs(agent.seeds, agent.step, fresh)
        generators = acting_generators(agent.seeds, agent.step, agent.device)
        return evaluate(shown, environments, agent.seeds, rngs, generators, agent.device)
