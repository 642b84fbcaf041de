"""Train and evaluate: `python run.py --env_name halfcheetah-medium-v2 --device 0`. See --help and the README."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import utils.interrupts  # noqa: F401  first, for what follows takes seconds to import

# isort: split
import torch

from agents import AGENTS
from agents.parts.agent import Agent
from utils import sources
from utils.errors import user_errors
from utils.options import (
    command_line,
    config_table,
    parse,
    parse_seeds,
    resolve_device,
    resolve_settings,
    steps_to_train,
)
from utils.process import Stop, lasting_output
from utils.runs import checkpoint
from utils.runs.folder import describe_run, note_execution, owner, prepare_folders, recorded
from utils.runs.journal import Journal
from utils.runs.locks import RunLock
from utils.runs.summary import show_scores
from utils.seeding import torch_generators
from utils.training.capture import acting, choose_mode
from utils.training.evaluation import Evaluator
from utils.training.faults import Watch, value_bound
from utils.training.memory import keep_freed_memory
from utils.training.runner import Runner
from utils.training.threads import choose as choose_threads


@dataclass(frozen=True)
class Training:
    """What one process trains: an agent with one or several seeds on one task, and all that goes with it."""

    options: Namespace
    config: Any  # the algorithm's settings
    total_steps: int
    source: sources.Source
    behaviour_score: float | None  # the mean normalised return of the dataset's own episodes
    folders: Sequence[Path]
    owners: Sequence[checkpoint.Owner]  # whose checkpoints each folder holds
    agent: Agent
    runner: Runner
    watch: Watch
    parts: Mapping[str, Any]  # all that a checkpoint holds beside an evaluation under way
    evaluator: Evaluator | None  # None where the task has no environment here
    journal: Journal
    stop: Stop
    resources: ExitStack  # to be closed at the end

    @property
    def ending(self) -> bool:
        """Whether to end before the last step: after a signal, or when no seed is left."""
        return bool(self.stop.signal) or not self.watch.running.any()


def main(argv: Sequence[str]) -> int:
    """Run a command line; the exit code is 2 for what the user can fix, 1 if no seed is left, 128 + n for signal n."""
    with lasting_output():
        return command_line("run.py", lambda: start(parse(argv, AGENTS)))


def start(options: Namespace) -> int:
    """Set up, train, and show the table of scores; or print the settings."""
    if options.print_config:
        print(config_table(options, AGENTS))
        return 0
    with (training := setup(options)).resources:
        train(training)
    return show(training)


def setup(options: Namespace) -> Training:
    """Data, agent, environments, folders and logs. Raises UserError for what the user can fix."""
    seeds, device = parse_seeds(options.seeds, options.seed), resolve_device(options.device)
    config, settings = resolve_settings(options)
    total_steps = steps_to_train(options, config)
    source = sources.choose(options.env_name, options.dataset, options.backend, options.local_size, not options.quiet)
    folders = [Path(options.dir) / options.algo / options.env_name / f"seed_{seed}" for seed in seeds]
    if options.threads != "auto":  # for the data, too
        torch.set_num_threads(options.threads)
    dataset = source.load()
    keep_freed_memory(device)
    with ExitStack() as stack:
        stack.enter_context(closing(RunLock(folders)))
        tuned, environments = dataset.tuned(config.reward_tune), source.environments(len(seeds) * config.eval_episodes)
        held = partial(recorded, folders if options.resume else ())  # a resumed run keeps what it began with
        mode, why = choose_mode(options.execution, device, total_steps, held("execution", str))
        max_action = environments.max_action if environments else 1.0
        make = partial(make_agent, options, dataset.state_dim, dataset.action_dim, max_action, config, seeds, device)
        agent = make(load=options.load_published)
        table, used = tuned.batches_to(device, agent.windows), held("threads", int)
        threads, so_many = choose_threads(options.threads, used, device, make, table, config.batch_size, total_steps)
        runner = Runner(agent, table, config.batch_size, torch_generators(seeds, "training", device), mode)
        watch = Watch(agent, value_bound(tuned.rewards, getattr(config, "discount", None)))
        evaluator = None
        if environments is not None:
            beside = device.type == "cuda" if options.eval_async is None else options.eval_async
            if snapshot := make() if beside else None:
                snapshot.observe(table)  # what it keeps beside its networks
            act, fresh = acting(snapshot or agent, runner.mode), options.eval_seeds == "fresh"
            evaluator = stack.enter_context(closing(Evaluator(agent, snapshot, act, environments, fresh)))
        run = {name: value for name, value in vars(options).items() if name not in settings}
        sizes = {"state_dim": dataset.state_dim, "action_dim": dataset.action_dim, "max_action": max_action}
        described = describe_run(settings, run, device, {"source": dataset.source, **sizes, **dataset.info})
        configs = [{**described, "seed": seed, "execution": runner.mode, "threads": threads} for seed in seeds]
        states = prepare_folders(folders, configs, options.resume, options.overwrite)
        parts: dict[str, Any] = {"agent": agent, "runner": runner, "watch": watch}
        if states is not None:
            checkpoint.restore(parts, states)
            if evaluator:
                evaluator.resume([state.get("evaluation", {}) for state in states])
        span, title = (agent.first_step, agent.step, total_steps), f"{options.algo} {options.env_name}"
        journal = Journal(folders, agent.METRICS, agent.SHOWN, span, described["settings"], options.quiet, title)
        stack.enter_context(closing(journal))
        where = f"seeds {seeds}, {device}, {runner.mode} ({why}), threads {threads} ({so_many})"
        journal.bar.note(f"{title}: {dataset.size:,} transitions ({dataset.source}), {where}")
        if cost := agent.cost(config, dataset.state_dim, dataset.action_dim):
            journal.bar.note(cost)
        score, owners = dataset.info.get("behaviour_score"), [owner(config) for config in configs]
        return Training(options, config, total_steps, source, score, folders, owners, agent, runner, watch, parts,
                        evaluator, journal, Stop(), stack.pop_all())  # fmt: skip


def make_agent(options: Namespace, *arguments: Any, load: Sequence[str] | None = None) -> Agent:
    """The agent of `--algo` at its first step, or at step 0 with published weights, NAME=FILE each."""
    with user_errors():
        arguments = (*arguments, options.precision)
        agent = AGENTS[options.algo](*arguments)
        if load:
            agent.load_published(checkpoint.load_named(load, agent.published_state()[0]))
        agent.step = 0 if load else agent.first_step  # which is below 0 with a pretraining
        return agent


def train(t: Training) -> None:
    """Epochs of gradient steps; metrics every epoch, evaluation every `eval_interval` epochs and at the end.

    A checkpoint is written when an evaluation has come in, every `checkpoint_interval` minutes, and at a signal.
    """
    steps, saved_at = t.config.num_steps_per_epoch, time.monotonic()
    if not all((folder / checkpoint.CURRENT).exists() for folder in t.folders):
        save(t)  # before anything else: no folder ever has evaluations and nothing to continue from
    with t.stop:
        while t.agent.step < t.total_steps and not t.ending:
            started, mode = time.perf_counter(), t.runner.mode
            t.runner.run(steps)
            if t.runner.mode != mode:  # a later phase got no graph
                note_execution(t.folders, t.runner.mode)
            write_metrics(t, steps, started)
            epoch, last = t.agent.step // steps, t.agent.step >= t.total_steps
            due = epoch > 0 and (epoch % t.config.eval_interval == 0 or last)
            arrived = collect(t, wait=due or t.ending)
            if due and t.evaluator:
                t.evaluator.begin(t.watch.running)
                arrived |= collect(t, wait=last or t.ending)
            if due and t.options.save_best_model:
                checkpoint.save_published(t.folders, t.agent.published_state(), epoch)
            late = time.monotonic() - saved_at > 60 * t.options.checkpoint_interval
            if arrived or late or t.ending or (due and not t.evaluator):
                saved_at = save(t)
        if collect(t, wait=True):  # begun before a run was resumed that has nothing left to train, or before a signal
            save(t)


def write_metrics(t: Training, steps: int, started: float) -> None:
    """A row per seed. Reading the metrics waits for the device, so the time includes all queued work."""
    means = {name: value.cpu().numpy() for name, value in t.runner.metrics().items()}
    rate, running = steps / (time.perf_counter() - started), t.watch.running.copy()
    t.journal.metrics(t.agent.step, steps, means, rate, running, t.watch.look(means))


def collect(t: Training, wait: bool) -> bool:
    """Log the evaluation that has come in, a row per episode; whether there was one."""
    if t.evaluator is None or (collected := t.evaluator.collect(wait)) is None:
        return False
    step, episodes = collected
    t.journal.evaluation(step, t.source.normalized_score(episodes.returns), **vars(episodes))
    return True


def save(t: Training) -> float:
    """A checkpoint of everything in each seed's folder, the evaluation under way included; the time of the clock."""
    parts = t.parts if t.evaluator is None else {**t.parts, "evaluation": t.evaluator}
    checkpoint.save_run(t.folders, parts, t.journal.sync(), t.owners)
    return time.monotonic()


def show(t: Training) -> int:
    """Say how it ended: the scores of every seed, or why there are none; the exit code."""
    if t.stop.signal:
        t.journal.bar.note(f"stopped at step {t.agent.step}; continue with --resume")
        return 128 + t.stop.signal
    if not t.watch.running.any():
        print(f"run.py: no seed is left, their numbers are not finite: {t.folders[0].parent}", file=sys.stderr)
        return 1
    show_scores(t.folders, f"{t.options.algo} on {t.options.env_name}", t.behaviour_score)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
