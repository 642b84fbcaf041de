"""Train and evaluate: `python run.py --env_name halfcheetah-medium-v2 --device 0`. See --help and the README."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from types import FrameType

import numpy as np
import torch

import hyperparameters
from agents import AGENTS
from utils import options, sources
from utils.data.dataset import Dataset
from utils.errors import UserError
from utils.runs import checkpoint
from utils.runs.folder import describe_run, owner, prepare_folders
from utils.runs.locks import RunLock
from utils.runs.log import Bar, SeedLog
from utils.runs.summary import save_curve, summary_table
from utils.seeding import torch_generators
from utils.training.evaluation import Evaluator
from utils.training.faults import Watch, value_bound
from utils.training.memory import keep_freed_memory
from utils.training.runner import Runner, acting, choose_mode


def main(argv: Sequence[str]) -> int:
    """Run a command line; the exit code is 2 for what the user can mend, 1 if no seed is left, 128 + n for signal n."""
    options.show_warnings_as_lines()
    try:
        return Run(options.parse(argv, AGENTS)).start()
    except UserError as error:
        print(f"run.py: {error}", file=sys.stderr)
    except Exception as error:
        if (line := options.out_of_memory(error)) is None:
            raise
        print(f"run.py: {line}", file=sys.stderr)
    return 2


class Run:
    """One process: an agent with one or several seeds on one task."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.options = given
        self.seeds = options.parse_seeds(given)
        try:
            self.settings = hyperparameters.explain(given.algo, given.env_name, options.overrides(given))
            self.config = hyperparameters.get(given.algo, given.env_name, **options.overrides(given))
        except ValueError as error:
            raise UserError(str(error)) from error
        self.device = options.resolve_device(given.device)
        self.total_steps = self.config.num_epochs * self.config.num_steps_per_epoch
        base = Path(given.dir) / given.algo / given.env_name
        self.folders = [base / f"seed_{seed}" for seed in self.seeds]
        self.signal = 0

    def start(self) -> int:
        """Build everything, train, and show the table of scores."""
        given = self.options
        if given.print_config:
            print(options.config_table(given.algo, given.env_name, options.overrides(given)))
            return 0
        if given.threads:
            torch.set_num_threads(given.threads)
        dataset = sources.load(given)
        behaviour_score = dataset.info.get("behaviour_score")
        keep_freed_memory(self.device)
        with ExitStack() as self.open:
            self.open.enter_context(closing(RunLock(self.folders)))
            self.build(dataset)
            self.open_folders(dataset)
            del dataset  # the device holds the transitions; keep no second copy
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self.stop)
            self.train()
        if self.signal:
            self.bar.note(f"stopped at step {self.agent.step}; continue with --resume")
            return 128 + self.signal
        if not self.watch.running.any():
            print(f"run.py: no seed is left, their numbers are not finite: {self.folders[0].parent}", file=sys.stderr)
            return 1
        print(summary_table(self.folders, behaviour_score))
        curve = save_curve(self.folders, f"{given.algo} on {given.env_name}", behaviour_score)
        print(f"results in {self.folders[0].parent}" + (f", learning curve in {curve}" if curve else ""))
        return 0

    def build(self, dataset: Dataset) -> None:
        """Agent, transitions on the device, environments, and the generators of every stream of numbers."""
        config, seeds, device = self.config, self.seeds, self.device
        tuned = dataset.tuned(config.reward_tune)
        self.environments = sources.make_environments(self.options, len(seeds) * config.eval_episodes)
        max_action = self.environments.max_action if self.environments else 1.0
        try:
            mode, self.why = choose_mode(self.options.execution, device, self.total_steps)
            arguments = (dataset.state_dim, dataset.action_dim, max_action, config, seeds, device)
            self.agent = AGENTS[self.options.algo](*arguments)
            self.agent.step = self.agent.first_step  # below 0 with a pretraining
            if self.options.load_published:
                names = self.agent.published_state()[0]
                self.agent.load_published(checkpoint.load_named(self.options.load_published, names))
                self.agent.step = 0
        except ValueError as error:
            raise UserError(str(error)) from error
        generators = torch_generators(seeds, "training", device)
        self.runner = Runner(self.agent, tuned.to(device), config.batch_size, generators, mode)
        self.watch = Watch(self.agent, value_bound(tuned.rewards, getattr(config, "discount", None)))
        self.parts = {"agent": self.agent, "runner": self.runner, "watch": self.watch}  # all that a checkpoint holds
        beside = device.type == "cuda" if self.options.eval_async is None else self.options.eval_async
        snapshot = AGENTS[self.options.algo](*arguments) if beside else None
        act = acting(snapshot or self.agent, self.runner.mode)
        evaluator = Evaluator(self.agent, snapshot, act, self.environments, self.options.eval_seeds == "fresh")
        self.evaluator = self.open.enter_context(closing(evaluator))

    def open_folders(self, dataset: Dataset) -> None:
        """Write the configuration, and continue from a checkpoint where that was asked for."""
        run = {name: value for name, value in vars(self.options).items() if name not in self.settings}
        described = describe_run(self.settings, run, self.device, {"source": dataset.source, **dataset.info})
        configs = [{**described, "seed": seed, "execution": self.runner.mode} for seed in self.seeds]
        self.owners = [owner(config) for config in configs]
        states = prepare_folders(self.folders, configs, self.options.resume, self.options.overwrite)
        if states is not None:
            checkpoint.restore(self.parts, states)
        log = partial(SeedLog, metrics=self.agent.METRICS, step=self.agent.step, settings=described["settings"])
        self.logs = [self.open.enter_context(closing(log(folder))) for folder in self.folders]
        title, first = f"{self.options.algo} {self.options.env_name}", self.agent.first_step
        if states is None:
            self.save()  # so that no folder has evaluations and nothing to continue from
        bar = Bar(self.total_steps - first, self.agent.step - first, self.options.quiet, title)
        self.bar = self.open.enter_context(closing(bar))
        where = f"seeds {self.seeds}, {self.device}, {self.runner.mode} ({self.why})"
        self.bar.note(f"{title}: {dataset.size:,} transitions ({dataset.source}), {where}")

    # --- The loop ----------------------------------------------------------------------------------

    def train(self) -> None:
        """Epochs of gradient steps; metrics every epoch, evaluation every `eval_interval` epochs and at the end.

        A checkpoint is written when an evaluation has come in, every `checkpoint_interval` minutes, and at a signal;
        never while an evaluation is under way, so that each is complete.
        """
        config, saved_at = self.config, time.monotonic()
        while self.agent.step < self.total_steps and not self.ending:
            started = time.perf_counter()
            self.runner.run(config.num_steps_per_epoch)
            self.write_metrics(config.num_steps_per_epoch, started)
            epoch = self.agent.step // config.num_steps_per_epoch
            last = self.agent.step >= self.total_steps
            due = epoch > 0 and (epoch % config.eval_interval == 0 or last)
            arrived = self.collect(wait=due or self.ending)
            if due and self.environments:
                self.evaluator.begin(self.watch.running)
                arrived |= self.collect(wait=last or self.ending)
            if due and self.options.save_best_model:
                checkpoint.save_published(self.folders, self.agent.published_state(), epoch)
            late = time.monotonic() - saved_at > 60 * self.options.checkpoint_interval
            if not self.evaluator.under_way and (arrived or due or late or self.ending):
                self.save()
                saved_at = time.monotonic()

    def save(self) -> None:
        """A checkpoint of this moment."""
        checkpoint.save_run(self.folders, self.parts, [log.sync() for log in self.logs], self.owners)

    @property
    def ending(self) -> bool:
        """Whether to end before the last step: after a signal, or when no seed is left."""
        return bool(self.signal) or not self.watch.running.any()

    def write_metrics(self, steps: int, started: float) -> None:
        """A row a seed. Reading the metrics waits for the device, so the time includes all queued work."""
        means = {name: value.cpu().numpy() for name, value in self.runner.metrics().items()}
        rate, logged = steps / (time.perf_counter() - started), self.watch.running.copy()
        for k, event in enumerate(self.watch.look(means)):
            if logged[k]:
                self.logs[k].metrics(self.agent.step, {n: float(v[k]) for n, v in means.items()}, rate, event)
        self.bar.advance(steps, **{"lambda": means["lambda"].mean()} if "lambda" in means else {})

    def collect(self, wait: bool) -> bool:
        """Log the evaluation that has come in, a row an episode; whether there was one."""
        if (collected := self.evaluator.collect(wait)) is None:
            return False
        step, episodes = collected
        scores = sources.normalized_score(self.options, episodes.returns)
        played = np.flatnonzero(episodes.lengths.any(axis=1))  # seeds that have stopped play no more
        for k in played:
            self.logs[k].evaluation(step, episodes.returns[k], scores[k], episodes.lengths[k], episodes.unstable[k])
        means = scores[played].mean(axis=1)
        self.bar.advance(0, score=float(means.mean()))
        each = f"  (seeds {', '.join(f'{score:.1f}' for score in means)})" if len(means) > 1 else ""
        self.bar.note(f"step {step:>9,}  normalised score {means.mean():6.1f}{each}")
        return True

    def stop(self, number: int, frame: FrameType | None) -> None:
        """On Ctrl-C or a cluster's SIGTERM: end after this epoch, with a checkpoint. A second one ends at once."""
        if self.signal:
            raise SystemExit(128 + number)
        self.signal = number


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
