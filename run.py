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

import torch

from agents import AGENTS
from agents.parts.agent import Agent
from utils import sources, tasks
from utils.errors import UserError
from utils.options import command_line, config_table, parse, parse_seeds, resolve_device, resolve_settings
from utils.runs import checkpoint
from utils.runs.folder import describe_run, owner, prepare_folders
from utils.runs.locks import RunLock
from utils.runs.log import Bar, SeedLog
from utils.runs.summary import save_curve, summary_table
from utils.seeding import torch_generators
from utils.stopping import Stop
from utils.training.capture import acting, choose_mode
from utils.training.evaluation import Evaluator
from utils.training.faults import Watch, value_bound
from utils.training.memory import keep_freed_memory
from utils.training.runner import Runner


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
    parts: Mapping[str, checkpoint.Part]  # all that a checkpoint holds, by name
    evaluator: Evaluator | None  # None where the task has no environment here
    logs: Sequence[SeedLog]
    bar: Bar
    stop: Stop
    resources: ExitStack  # to be closed at the end

    def save(self) -> None:
        """A checkpoint of this moment."""
        checkpoint.save_run(self.folders, self.parts, [log.sync() for log in self.logs], self.owners)

    @property
    def ending(self) -> bool:
        """Whether to end before the last step: after a signal, or when no seed is left."""
        return bool(self.stop.signal) or not self.watch.running.any()


def main(argv: Sequence[str]) -> int:
    """Run a command line; the exit code is 2 for what the user can fix, 1 if no seed is left, 128 + n for signal n."""
    return command_line("run.py", lambda: start(parse(argv, AGENTS)))


def start(options: Namespace) -> int:
    """Set up, train, and show the table of scores; or print the settings."""
    if options.print_config:
        print(config_table(options))
        for line in cost_lines(options, resolve_settings(options)[0]):
            print(line)
        return 0
    training = setup(options)
    with training.resources:
        train(training)
    return show(training)


def setup(options: Namespace) -> Training:
    """Data, agent, environments, folders and logs. Raises UserError for what the user can fix."""
    seeds, device = parse_seeds(options.seeds, options.seed), resolve_device(options.device)
    config, settings = resolve_settings(options)
    total_steps = config.num_epochs * config.num_steps_per_epoch
    source = sources.choose(options.env_name, options.dataset, options.backend, options.local_size, not options.quiet)
    folders = [Path(options.dir) / options.algo / options.env_name / f"seed_{seed}" for seed in seeds]
    if options.threads:
        torch.set_num_threads(options.threads)
    dataset = source.load()
    keep_freed_memory(device)
    with ExitStack() as stack:
        stack.enter_context(closing(RunLock(folders)))
        tuned = dataset.tuned(config.reward_tune)
        environments = source.environments(len(seeds) * config.eval_episodes)
        mode, why = choose_mode(options.execution, device, total_steps)
        max_action = environments.max_action if environments else 1.0
        make = partial(make_agent, options, dataset.state_dim, dataset.action_dim, max_action, config, seeds, device)
        agent = make(load=options.load_published)
        table = tuned.batches_to(device, agent.windows)
        runner = Runner(agent, table, config.batch_size, torch_generators(seeds, "training", device), mode)
        watch = Watch(agent, value_bound(tuned.rewards, getattr(config, "discount", None)))
        evaluator = None
        if environments is not None:
            beside = device.type == "cuda" if options.eval_async is None else options.eval_async
            snapshot = make() if beside else None
            if snapshot is not None:
                snapshot.observe(table)  # what it keeps beside its networks
            act, fresh = acting(snapshot or agent, runner.mode), options.eval_seeds == "fresh"
            evaluator = stack.enter_context(closing(Evaluator(agent, snapshot, act, environments, fresh)))
        run = {name: value for name, value in vars(options).items() if name not in settings}
        described = describe_run(settings, run, device, {"source": dataset.source, **dataset.info})
        configs = [{**described, "seed": seed, "execution": runner.mode} for seed in seeds]
        states = prepare_folders(folders, configs, options.resume, options.overwrite)
        parts: dict[str, checkpoint.Part] = {"agent": agent, "runner": runner, "watch": watch}
        if states is not None:
            checkpoint.restore(parts, states)
        log = partial(SeedLog, metrics=agent.METRICS, step=agent.step, settings=described["settings"])
        logs = [stack.enter_context(closing(log(folder))) for folder in folders]
        title, first = f"{options.algo} {options.env_name}", agent.first_step
        bar = stack.enter_context(closing(Bar(total_steps - first, agent.step - first, options.quiet, title)))
        where = f"seeds {seeds}, {device}, {runner.mode} ({why})"
        bar.note(f"{title}: {dataset.size:,} transitions ({dataset.source}), {where}")
        for line in cost_lines(options, config):
            bar.note(line)
        score = dataset.info.get("behaviour_score")
        owners = [owner(config) for config in configs]
        if states is None:  # no folder has evaluations and nothing to continue from
            checkpoint.save_run(folders, parts, [log.sync() for log in logs], owners)
        return Training(options, config, total_steps, source, score, folders, owners, agent, runner, watch, parts,
                        evaluator, logs, bar, Stop(), stack.pop_all())  # fmt: skip


def cost_lines(options: Namespace, config: Any) -> list[str]:
    """What acting costs, where that is worth saying before a run: a line or none."""
    if not AGENTS[options.algo].COSTLY:
        return []
    wanted = tasks.task(options.env_name)
    try:
        return [AGENTS[options.algo].cost(config, wanted.state_dim, wanted.action_dim)]
    except ValueError as error:
        raise UserError(str(error)) from error


def make_agent(options: Namespace, *arguments: Any, load: Sequence[str] | None = None) -> Agent:
    """The agent of `--algo` at its first step, or at step 0 with published weights, NAME=FILE each."""
    try:
        agent = AGENTS[options.algo](*arguments)
        agent.step = agent.first_step  # below 0 with a pretraining
        if load:
            agent.load_published(checkpoint.load_named(load, agent.published_state()[0]))
            agent.step = 0
    except ValueError as error:
        raise UserError(str(error)) from error
    return agent


# --- The loop ---------------------------------------------------------------------------------------


def train(t: Training) -> None:
    """Epochs of gradient steps; metrics every epoch, evaluation every `eval_interval` epochs and at the end.

    A checkpoint is written when an evaluation has come in, every `checkpoint_interval` minutes, and at a signal;
    never while an evaluation is under way, so that each is complete.
    """
    steps, saved_at = t.config.num_steps_per_epoch, time.monotonic()
    with t.stop:
        while t.agent.step < t.total_steps and not t.ending:
            started = time.perf_counter()
            t.runner.run(steps)
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
            under_way = t.evaluator is not None and t.evaluator.under_way
            if not under_way and (arrived or due or late or t.ending):
                save(t)
                saved_at = time.monotonic()


def save(t: Training) -> None:
    """A checkpoint of this moment."""
    checkpoint.save_run(t.folders, t.parts, [log.sync() for log in t.logs], t.owners)


def write_metrics(t: Training, steps: int, started: float) -> None:
    """A row per seed. Reading the metrics waits for the device, so the time includes all queued work."""
    means = {name: value.cpu().numpy() for name, value in t.runner.metrics().items()}
    rate, logged = steps / (time.perf_counter() - started), t.watch.running.copy()
    for k, event in enumerate(t.watch.look(means)):
        if logged[k]:
            t.logs[k].metrics(t.agent.step, {n: float(v[k]) for n, v in means.items()}, rate, event)
    t.bar.advance(steps, **{name: means[name].mean() for name in t.agent.SHOWN if name in means})


def collect(t: Training, wait: bool) -> bool:
    """Log the evaluation that has come in, a row per episode; whether there was one."""
    if t.evaluator is None or (collected := t.evaluator.collect(wait)) is None:
        return False
    step, episodes = collected
    scores = t.source.normalized_score(episodes.returns)
    played = [k for k, lengths in enumerate(episodes.lengths) if lengths.any()]  # seeds that have stopped do not
    for k in played:
        t.logs[k].evaluation(step, episodes.returns[k], scores[k], episodes.lengths[k], episodes.unstable[k])
    means = scores[played].mean(axis=1)
    t.bar.advance(0, score=float(means.mean()))
    each = f"  (seeds {', '.join(f'{score:.1f}' for score in means)})" if len(means) > 1 else ""
    t.bar.note(f"step {step:>9,}  normalised score {means.mean():6.1f}{each}")
    return True


def show(t: Training) -> int:
    """Say how it ended: the scores of every seed, or why there are none; the exit code."""
    base = t.folders[0].parent
    if t.stop.signal:
        t.bar.note(f"stopped at step {t.agent.step}; continue with --resume")
        return 128 + t.stop.signal
    if not t.watch.running.any():
        print(f"run.py: no seed is left, their numbers are not finite: {base}", file=sys.stderr)
        return 1
    print(summary_table(t.folders, t.behaviour_score))
    curve = save_curve(t.folders, f"{t.options.algo} on {t.options.env_name}", t.behaviour_score)
    print(f"results in {base}" + (f", learning curve in {curve}" if curve else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
