"""Runs to the two files worth keeping beside a published number: every episode, and a line of settings per run."""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from utils.errors import UserError
from utils.report.runs import EPISODES, NUMBERS, RUNS, SeedRun, method_name
from utils.report.tables import harmless

OFFICIAL = ("d4rl", "local", "bandit")


def export(runs: Sequence[SeedRun], target: Path) -> list[Path]:
    """Write TARGET/runs.jsonl and TARGET/episodes.csv.gz, plain text both and the same bytes for the same runs.

    Line k of `runs.jsonl` is the configuration of run k, without paths of this machine: of the data's file its name,
    size, SHA-256 and origin (`label`), so that a report made of the copy says "rebuilt" where the original did. Raises
    UserError where the folder holds an export already.
    """
    if (target / RUNS).exists() or (target / EPISODES).exists():
        raise UserError(f"{target} holds an export already; delete it, or export into another folder")
    runs = sorted(runs, key=lambda r: (r.label, r.algo, r.env_name, method_name(r), r.total_steps, r.seed))
    lines = [{**portable(run.config, run.label), "events": list(run.events)} for run in runs]
    names = [("data", "label"), ("algorithm", "algo"), ("task", "env_name"), ("seed", "seed")]
    frame = pd.concat(
        [run.episodes.assign(run=k, **{column: getattr(run, name) for column, name in names})
         for k, run in enumerate(runs)]
    )[["run", *(column for column, _ in names), *list(NUMBERS)[1:]]]  # fmt: skip
    for column in ("data", "algorithm", "task"):
        frame[column] = frame[column].map(harmless)
    text = "".join(json.dumps(line, sort_keys=True, separators=(",", ":")) + "\n" for line in lines)
    target.mkdir(parents=True, exist_ok=True)
    (target / RUNS).write_text(text, encoding="utf-8")
    table = frame.to_csv(index=False, lineterminator="\n").encode()
    (target / EPISODES).write_bytes(gzip.compress(table, mtime=0))
    return [target / RUNS, target / EPISODES]


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
