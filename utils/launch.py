"""What sets up a run: folders, data, agent, environments and logs, and the checkpoint of all of them."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from utils import sources
from utils.making import SIZES, Agents, make_agent
from utils.options import parse_seeds, resolve_device, resolve_settings, run_folder, steps_to_train, suggestion
from utils.process import Stop
from utils.runs import checkpoint
from utils.runs.folder import check_folders, describe_run, note_execution, owner, prepare_folders, recorded
from utils.runs.journal import Journal
from utils.runs.locks import RunLock
from utils.runs.progress import Bar, Now
from utils.seeding import torch_generators
from utils.training.capture import acting, choose_mode
from utils.training.evaluation import Evaluator
from utils.training.faults import Watch, value_bound
from utils.training.interfaces import Learner
from utils.training.memory import keep_freed_memory
from utils.training.runner import Runner
from utils.training.threads import choose as choose_threads

PREPARING = {"compile": "compiling, which takes about a minute:", "graph": "capturing CUDA graphs:"}


@dataclass(frozen=True)
class Training:
    """What one process trains: an agent with one or several seeds on one task, and all that goes with it."""

    options: Namespace
    config: Any  # the algorithm's settings
    total_steps: int
    source: sources.Source
    data: str  # where they came from
    behaviour_score: float | None  # the mean normalised return of the dataset's own episodes
    folders: Sequence[Path]
    agent: Learner
    runner: Runner
    watch: Watch
    evaluator: Evaluator | None  # None where the task has no environment here
    journal: Journal
    saver: Saver
    stop: Stop
    resources: ExitStack  # to be closed at the end

    @property
    def ending(self) -> bool:
        """Whether to end before the last step: asked to, or no seed is left."""
        return self.stop() or not self.watch.running.any()

    @property
    def complete(self) -> bool:
        """Whether the last step was taken, its metrics were read, and its evaluation has come in."""
        pending = self.runner.unread or (self.evaluator is not None and self.evaluator.under_way)
        return self.agent.step >= self.total_steps and not pending

    @property
    def evaluations_left(self) -> int:
        """Evaluations that the steps still wait for, that which is under way included."""
        if self.evaluator is None or self.evaluator.beside:
            return 0
        length, interval = self.config.num_steps_per_epoch, self.config.eval_interval
        done, last = max(self.agent.step, 0) // length, self.total_steps // length
        return -(-last // interval) - done // interval + self.evaluator.under_way

    def now(self) -> Now:
        """How far this is, for the progress bar."""
        share = self.evaluator.share if self.evaluator is not None else None
        beside = self.evaluator is not None and self.evaluator.beside
        return Now(self.agent.step, self.evaluations_left, share, beside, self.runner.planned)

    @property
    def left_in_epoch(self) -> int:
        """Steps to the end of the epoch: none where its metrics are still to be read."""
        length = self.config.num_steps_per_epoch
        return -self.agent.step % length or (0 if self.runner.unread else length)

    def answer(self) -> str:
        """What is said to a signal."""
        lost, ago = self.agent.step - self.saver.step, time.monotonic() - self.saver.saved_at
        return (f"stopping after step {self.agent.step:,}, about {max(1, round(self.saver.seconds + 1))} s; "
                f"again to end now, losing up to {max(lost, 0):,} steps, {ago:.0f} s of work")  # fmt: skip


@dataclass
class Saver:
    """Writes checkpoints of everything into each seed's folder, and knows when the last one was."""

    folders: Sequence[Path]
    parts: Mapping[str, Any]  # all that a checkpoint holds beside an evaluation under way
    evaluator: Evaluator | None
    owners: Sequence[checkpoint.Owner]  # whose checkpoints each folder holds
    journal: Journal
    interval: float  # minutes between checkpoints
    execution: str  # as the folders have it
    saved_at: float = field(default_factory=time.monotonic)
    step: int = 0
    seconds: float = 0.0  # that the last one took

    def late(self) -> bool:
        """Whether the next one is due."""
        return time.monotonic() - self.saved_at > 60 * self.interval

    def save(self) -> None:
        """A checkpoint of everything, the evaluation under way included. Raises UserError where the disk refuses."""
        started, runner = time.monotonic(), self.parts["runner"]
        if runner.mode != self.execution:  # a later phase got no graph
            note_execution(self.folders, runner.mode)
            self.execution = runner.mode
        parts = self.parts if self.evaluator is None else {**self.parts, "evaluation": self.evaluator}
        checkpoint.save_run(self.folders, parts, self.journal.sync(), self.owners)
        self.saved_at, self.step = time.monotonic(), self.parts["agent"].step
        self.seconds = self.saved_at - started


def setup(options: Namespace, agents: Agents, stop: Stop) -> Training:
    """Data, agent, environments, folders and logs; what is cheap to check first. Raises UserError for what the user can
    fix."""
    seeds, device = parse_seeds(options.seeds, options.seed), resolve_device(options.device)
    config, settings = resolve_settings(options)
    total_steps, folders = steps_to_train(options, config), [run_folder(options) / f"seed_{seed}" for seed in seeds]
    source = sources.choose(options.env_name, options.dataset, options.backend, options.local_size, not options.quiet)
    held = partial(recorded, folders if options.resume else ())  # a resumed run keeps what it began with
    mode, why = choose_mode(options.execution, device, total_steps, held("execution", str))
    check_folders(folders, options.resume, options.overwrite)
    if options.threads != "auto":  # for the data, too
        torch.set_num_threads(options.threads)
    dataset, title = source.load(), f"{options.algo} {options.env_name}"
    keep_freed_memory(device)
    with ExitStack() as stack:
        bar = stack.enter_context(closing(Bar(options.quiet)))
        bar.note(f"{title}, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}, {device}: {dataset.size:,} "
                 f"transitions ({dataset.source})")  # fmt: skip
        stack.enter_context(closing(RunLock(folders)))
        tuned, environments = dataset.tuned(config.reward_tune), source.environments(len(seeds) * config.eval_episodes)
        sizes = (dataset.state_dim, dataset.action_dim, environments.max_action if environments else 1.0)
        make = partial(make_agent, agents[options.algo], sizes, config, seeds, device, options.precision)
        with bar.doing("making the networks"):  # in bfloat16 the first time compiles their layers
            agent = make(options.load_published)
        table, used = tuned.batches_to(device, agent.windows), held("threads", int)
        with bar.doing("timing threads"):
            threads, so_many = choose_threads(options.threads, used, device, make, table, config.batch_size,
                                              total_steps)  # fmt: skip
        with bar.doing(PREPARING.get(mode, "preparing")):
            runner = Runner(agent, table, config.batch_size, torch_generators(seeds, "training", device), mode)
            evaluator = None
            if environments is not None:
                beside = device.type == "cuda" if options.eval_async is None else options.eval_async
                if snapshot := make() if beside else None:
                    snapshot.observe(table)  # what it keeps beside its networks
                act, fresh = acting(snapshot or agent, runner.mode), options.eval_seeds == "fresh"
                evaluator = stack.enter_context(closing(Evaluator(agent, snapshot, act, environments, fresh, stop)))
        watch = Watch(agent, value_bound(tuned.rewards, getattr(config, "discount", None)))
        run = {name: value for name, value in vars(options).items() if name not in settings}
        about = dict(zip(SIZES, sizes, strict=True))
        described = describe_run(settings, run, device, {"source": dataset.source, **about, **dataset.info})
        configs = [{**described, "seed": seed, "execution": runner.mode, "threads": threads} for seed in seeds]
        states = prepare_folders(folders, configs, options.resume, options.overwrite)
        parts: dict[str, Any] = {"agent": agent, "runner": runner, "watch": watch}
        if states is not None:
            checkpoint.restore(parts, states)
            if evaluator:
                evaluator.resume([state.get("evaluation", {}) for state in states])
        shown = {"algo": options.algo, "env_name": options.env_name, "data": dataset.source, **described["settings"]}
        journal = Journal(folders, agent.METRICS, agent.SHOWN, agent.step, [{**shown, "seed": k} for k in seeds], bar,
                          options.wandb)  # fmt: skip
        stack.enter_context(closing(journal))
        bar.note(f"{runner.mode} ({why}), threads {threads} ({so_many})")
        cost = agent.cost(config, dataset.state_dim, dataset.action_dim)
        for line in filter(None, (cost, suggestion(options, settings, dataset.source))):
            bar.note(line)
        owners = [owner(config) for config in configs]
        saver = Saver(folders, parts, evaluator, owners, journal, options.checkpoint_interval, runner.mode,
                      step=agent.step)  # fmt: skip
        return Training(options, config, total_steps, source, dataset.source, dataset.info.get("behaviour_score"),
                        folders, agent, runner, watch, evaluator, journal, saver, stop, stack.pop_all())  # fmt: skip
