"""docs/clusters.md: the job script runs, and run.py understands what it is called with."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from agents import AGENTS
from utils.options import parse

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
@pytest.mark.parametrize(("index", "task", "seed"), [(0, "halfcheetah", 0), (7, "hopper", 2), (14, "walker2d", 4)])
def test_every_job_of_the_array_is_a_task_and_a_seed(tmp_path: Path, index: int, task: str, seed: int) -> None:
    script = re.search(r"```bash\n(#!/bin/bash\n.*?)```", (ROOT / "docs" / "clusters.md").read_text(), re.DOTALL)
    assert script
    bin_folder = tmp_path / ".venv" / "bin"
    bin_folder.mkdir(parents=True)
    (bin_folder / "activate").write_text('PATH="$PWD/.venv/bin:$PATH"\n')
    (bin_folder / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (bin_folder / "python").chmod(0o755)
    (tmp_path / "run.sh").write_text(script[1])
    given = {"SLURM_ARRAY_TASK_ID": str(index), "SLURM_CPUS_PER_TASK": "4", "SLURM_SUBMIT_DIR": str(tmp_path)}
    called = subprocess.run(["bash", str(tmp_path / "run.sh")], env={**os.environ, **given}, capture_output=True,
                            text=True, check=True)  # fmt: skip
    program, *arguments = called.stdout.splitlines()
    options = parse(arguments, AGENTS)
    assert program == "run.py" and (options.env_name, options.seed) == (f"{task}-medium-v2", seed)
    assert options.resume and options.max_minutes == 225 and options.threads == 4


def test_the_image_installs_what_the_requirements_name() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert "ARG TORCH=cpu" in text and "whl/$TORCH" in text and "-r requirements.txt" in text
    assert all((ROOT / name).exists() for name in ("requirements.txt", "requirements.lock", "run.py"))
    left_out = (ROOT / ".dockerignore").read_text().splitlines()
    assert ".git" not in left_out and "results/runs" in left_out
