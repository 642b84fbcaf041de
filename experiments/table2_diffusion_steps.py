"""Table 2: average scores with 5, 15 and 20 diffusion steps, three seeds. Its runs are those of Figure 3 too.

python -m experiments.table2_diffusion_steps plan|run|show [--help]
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import hyperparameters
from experiments.study.study import Experiment, main
from utils.report.build import Report
from utils.report.tables import Table, signed

STEPS = (5, 15, 20)
PUBLISHED = Path(__file__).resolve().parents[1] / "results" / "published" / "table2.csv"


def averages(report: Report, label: str) -> list[Table]:
    """Averages over the tasks that were run, beside the paper's over all of them."""
    with open(PUBLISHED, newline="", encoding="utf-8") as file:
        paper = {(row["tasks"], row["algorithm"], row["diffusion_steps"]): row["score"] for row in csv.DictReader(file)}
    lines = []
    rows = report.rows[(report.rows["data"] == label) & (report.rows["protocol"] == report.choice.protocol)]
    for row in rows[rows["task"].str.startswith("average")].itertuples():
        group, method = row.task.split(" ")[0], row.method.partition(" diffusion_steps=")
        score = paper.get((group, "DiffCPS", method[2])) if method[0] == "diffcps" else None
        difference = signed(row.mean - float(score)) if score else "–"
        lines.append([row.task, method[0], method[2], f"{row.mean:.1f}", score or "–", difference])
    columns = ["tasks", "method", "T", report.choice.protocol, "paper", "difference"]
    note = "The paper's figure is its average over all tasks of the group, also where fewer were run here."
    return [Table(f"Table 2: averages by diffusion steps, data: {label}", columns, lines, [note])] if lines else []


EXPERIMENT = Experiment(
    folder="diffusion_steps",
    about="Table 2 of the paper: average scores with 5, 15 and 20 diffusion steps",
    tasks=hyperparameters.PAPER_TASKS,
    seeds="0-2",
    grid={"diffusion_steps": STEPS},
    by=("diffusion_steps",),
    extra=averages,
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, "table2_diffusion_steps", sys.argv[1:]))
