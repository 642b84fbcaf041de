"""One Markdown table of all training benchmarks of a machine: `python -m benchmarks.table FOLDER NAME`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from utils.options import command_line

COLUMNS = {
    "algo": "algorithm",
    "env_name": "task",
    "seeds": "seeds",
    "threads": "threads",
    "execution": "execution",
    "precision": "precision",
    "plain_steps_per_s": "plain steps/s",
    "steps_per_s": "steps/s",
    "seed_steps_per_s": "seed-steps/s",
    "ratio": "ratio",
    "peak_memory_gb": "peak GB",
    "share_of_matmul_rate": "share of matmul rate",
}


def table(folder: Path, name: str) -> str:
    """Rows of `training_*_<name>.json`, in the files' order."""
    paths = sorted(folder.glob(f"training_*_{name}.json"))
    results = [{"precision": "float32", **json.loads(path.read_text(encoding="utf-8"))} for path in paths]
    if not results:
        raise SystemExit(f"benchmarks.table: no training_*_{name}.json in {folder}")
    first = results[0]
    lines = [
        f"`benchmarks.training` on random data of the tasks' shapes, on {first['device']} ({first['machine']}), "
        f"torch {first['torch']}; medians, plain and ours alternating.",
        "",
    ]
    lines += ["| " + " | ".join(COLUMNS.values()) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(_shown(result[key]) for key in COLUMNS) + " |" for result in results]
    return "\n".join(lines) + "\n"


def _shown(value: object) -> str:
    if value is None or value != value:
        return ""
    return (
        f"{value:.3g}"
        if isinstance(value, float) and value < 100
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )


def main(arguments: list[str]) -> None:
    """Write `<folder>/training_<name>.md` and print it."""
    if len(arguments) != 2:
        raise SystemExit("usage: python -m benchmarks.table FOLDER NAME")
    folder, name = Path(arguments[0]), arguments[1]
    text = table(folder, name)
    (folder / f"training_{name}.md").write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    sys.exit(command_line("benchmarks.table", lambda: main(sys.argv[1:])))
