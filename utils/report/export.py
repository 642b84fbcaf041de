"""Runs to the few files worth keeping beside a published number: a line of settings per run, and every episode, epoch
and replay."""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from utils.errors import UserError
from utils.report.kept import EPISODES, METRICS, NUMBERS, PLAYED, RUNS
from utils.report.runs import SeedRun, method_name
from utils.report.tables import harmless
from utils.runs.columns import PLAYED_COLUMNS

OFFICIAL = ("d4rl", "local", "bandit")


def export(runs: Sequence[SeedRun], target: Path) -> list[Path]:
    """Write TARGET/runs.jsonl, episodes.csv.gz, and metrics.csv.gz and played.csv.gz where the runs have such numbers.

    Plain text all, and the same bytes for the same runs. Line k of `runs.jsonl` is the configuration of run k, without
    paths of this machine: of the data's file its name, size, SHA-256 and origin (`label`), so that a report made of the
    copy says "rebuilt" where the original did. Raises UserError where the folder holds an export already.
    """
    if any((target / name).exists() for name in (RUNS, EPISODES, METRICS, PLAYED)):
        raise UserError(f"{target} holds an export already; delete it, or export into another folder")
    runs = sorted(runs, key=lambda r: (r.label, r.algo, r.env_name, method_name(r), r.total_steps, r.seed))
    lines = [{**portable(run.config, run.label), "events": list(run.events)} for run in runs]
    text = "".join(json.dumps(line, sort_keys=True, separators=(",", ":")) + "\n" for line in lines)
    tables = {
        EPISODES: _episodes(runs),
        METRICS: _joined([_metrics(run) for run in runs]),
        PLAYED: _joined([pd.DataFrame(run.played, columns=list(PLAYED_COLUMNS), dtype=str) for run in runs]),
    }
    target.mkdir(parents=True, exist_ok=True)
    (target / RUNS).write_text(text, encoding="utf-8")
    for name, frame in tables.items():
        if len(frame):
            table = frame.to_csv(index=False, lineterminator="\n").encode()
            (target / name).write_bytes(gzip.compress(table, mtime=0))
    return [target / RUNS, *(target / name for name, frame in tables.items() if len(frame))]


def _episodes(runs: Sequence[SeedRun]) -> pd.DataFrame:
    """A row per episode, with what names its run for a reader."""
    names = [("data", "label"), ("algorithm", "algo"), ("task", "env_name"), ("seed", "seed")]
    frames = [run.episodes.assign(**{column: getattr(run, name) for column, name in names}) for run in runs]
    frame = _joined(frames)[["run", *(column for column, _ in names), *list(NUMBERS)[1:]]]
    return frame.assign(**{column: frame[column].map(harmless) for column in ("data", "algorithm", "task")})


def _metrics(run: SeedRun) -> pd.DataFrame:
    """A row per epoch, of the columns that hold a number."""
    frame = pd.DataFrame({harmless(name): values for name, values in run.metrics.items()})
    return frame.dropna(axis="columns", how="all").astype({"step": "int64"} if "step" in frame else {})


def _joined(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """One below the other, with the run's number; columns in the order in which they come up."""
    some = [frame.assign(run=k) for k, frame in enumerate(frames) if len(frame)]
    if not some:
        return pd.DataFrame()
    return pd.concat(some, ignore_index=True)[["run", *dict.fromkeys(name for frame in frames for name in frame)]]


def portable(config: Mapping[str, Any], label: str) -> dict[str, Any]:
    """`config` with file names in place of paths, the origin of the data spelt out, and origins but the usual ones."""
    copied: dict[str, Any] = copy.deepcopy(dict(config))
    dataset, run = copied["dataset"], copied["run"]
    for part, names in ((dataset, ("path",)), (run, ("dir",))):
        for name in names:
            if part.get(name):
                part[name] = Path(str(part[name])).name
    source = str(dataset.get("source"))
    if source not in OFFICIAL and not source.startswith("minari:"):
        dataset["source"] = run["dataset"] = Path(source).name
        dataset["label"] = label
    if run.get("load_published"):
        run["load_published"] = [f"{k}={Path(f).name}" for k, _, f in (t.partition("=") for t in run["load_published"])]
    copied["origins"] = {name: o for name, o in copied.get("origins", {}).items() if o != "default"}
    return copied
