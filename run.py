"""Train and evaluate: `python run.py --env_name halfcheetah-medium-v2 --device 0`. See --help and the README."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Sequence

import utils.interrupts  # noqa: F401  first, for what follows takes seconds to import

# isort: split
import hyperparameters
from utils.options import command_line, config_table, parse
from utils.process import Stop, lasting_output

if __name__ == "__main__":  # --help and mistakes are answered before that
    with lasting_output():
        if code := command_line("run.py", lambda: parse(sys.argv[1:], hyperparameters.CONFIGS)):
            sys.exit(code)

# isort: split
from agents import AGENTS
from utils.launch import Training, setup
from utils.runs import checkpoint
from utils.runs.summary import show_scores


def main(argv: Sequence[str]) -> int:
    """Run a command line; the exit code is 2 for what the user can fix, 1 if no seed is left, 128 + n for signal n."""
    with lasting_output():
        return command_line("run.py", lambda: start(parse(argv, AGENTS)))


def start(options: Namespace) -> int:
    """Set up, train, and show the table of scores; or print the settings."""
    if options.print_config:
        print(config_table(options, AGENTS))
        return 0
    with Stop(options.max_minutes) as stop, (training := setup(options, AGENTS, stop)).resources:
        train(training)
    return show(training)


def train(t: Training) -> None:
    """Epochs of gradient steps; metrics every epoch, evaluation every `eval_interval` epochs and at the end.

    A checkpoint is written when an evaluation has come in, every `checkpoint_interval` minutes, and at a signal, which
    may come at any step: what an epoch's end still lacks then is done by the process that resumes.
    """
    t.stop.answer = t.answer
    t.journal.bar.begin(t.agent.first_step, t.total_steps, t.now)
    if not all((folder / checkpoint.CURRENT).exists() for folder in t.folders):
        t.saver.save()  # before anything else: no folder ever has evaluations and nothing to continue from
    saved = not collect(t)  # begun before the run was resumed
    while (t.agent.step < t.total_steps or t.runner.unread) and not t.ending:
        started, first = time.perf_counter(), t.agent.step
        while (left := t.left_in_epoch) and not t.stop():
            t.runner.run(left, t.stop, t.saver.late)
            if saved := t.saver.late():
                t.saver.save()
        epoch, last = t.agent.step // t.config.num_steps_per_epoch, t.agent.step >= t.total_steps
        due = epoch > 0 and (epoch % t.config.eval_interval == 0 or last)
        arrived = collect(t, wait=due)  # there is one evaluation under way at a time
        saved = saved and not arrived
        if t.stop():
            break
        write_metrics(t, t.agent.step - first, started)
        if due and t.evaluator:
            t.evaluator.begin(t.watch.running)
            arrived |= collect(t, wait=last)
        if due and t.options.save_best_model:
            checkpoint.save_published(t.folders, t.agent.published_state(), epoch)
        if saved := arrived or t.saver.late() or (due and not t.evaluator):
            t.saver.save()
    if collect(t, wait=not t.stop()) or not saved:
        t.saver.save()


def write_metrics(t: Training, steps: int, started: float) -> None:
    """A row per seed. Reading the metrics waits for the device, so the time includes all queued work."""
    means = {name: value.cpu().numpy() for name, value in t.runner.metrics().items()}
    rate, running = steps / (time.perf_counter() - started), t.watch.running.copy()
    t.journal.metrics(t.agent.step, means, rate, running, t.watch.look(means))


def collect(t: Training, wait: bool = False) -> bool:
    """Log the evaluation that has come in, a row per episode; whether there was one."""
    if t.evaluator is None or (collected := t.evaluator.collect(wait)) is None:
        return False
    step, episodes = collected
    t.journal.evaluation(step, t.source.normalized_score(episodes.returns), **vars(episodes))
    return True


def show(t: Training) -> int:
    """Say how it ended: the scores of every seed, or why there are none; the exit code."""
    if t.stop.signal or (t.stop() and not t.complete):
        t.journal.bar.note(f"stopped at step {t.agent.step:,}; continue with --resume")
        return 128 + t.stop.signal if t.stop.signal else 0
    if not t.watch.running.any():
        print(f"run.py: no seed is left, their numbers are not finite: {t.folders[0].parent}", file=sys.stderr)
        return 1
    show_scores(t.folders, f"{t.options.algo} on {t.options.env_name}", t.behaviour_score, t.data)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
