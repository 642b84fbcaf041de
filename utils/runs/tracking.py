"""Weights & Biases (`--wandb PROJECT`): the numbers of metrics.csv and evaluations.csv, one run there per seed.

The package is optional and imported here alone. The CSV files are the record: a server that is not to be reached at the
start is said before training starts, one that fails later costs a warning and no more.
"""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import atomic_write, first_line
from utils.runs.columns import TRACKED_FILE


class Tracker:
    """A seed's run at Weights & Biases: its settings, and scalars by step, under the names that TensorBoard has.

    Raises UserError where no run can be begun: no login, no network, or a project that is not one.
    """

    def __init__(self, project: str, folder: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        self._folder = folder
        algo, task, seed = folder.absolute().parts[-3:]
        try:
            self._run: Any = wandb.init(
                project=project,
                id=_name(folder),
                resume="allow",
                name=f"{algo} {task} {seed}",
                group=f"{algo} {task}",
                config=dict(settings),
                dir=str(folder),
                reinit="create_new",  # the seeds of a process are runs beside each other
                settings=wandb.Settings(silent=True, console="off"),
            )
            self._run.define_metric("*", step_metric="step")
        except Exception as error:  # its own errors have no common class
            raise UserError(f"--wandb {project}: {first_line(error)}; WANDB_MODE=offline keeps the numbers here for "
                            "`wandb sync`") from error  # fmt: skip

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Numbers by name at a step; after a failure nothing more."""
        if self._run is None:
            return
        try:
            self._run.log({**values, "step": step})
        except Exception as error:
            self._run = None
            warnings.warn(f"no more numbers of {self._folder} to Weights & Biases: {first_line(error)}", stacklevel=2)

    def close(self) -> None:
        """Wait until all is sent."""
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:
                warnings.warn(f"Weights & Biases: {first_line(error)}", stacklevel=2)


def _name(folder: Path) -> str:
    """The name that the run of this folder has there, from its file; a new one where it has none yet."""
    path = folder / TRACKED_FILE
    try:
        if path.exists():
            return path.read_text(encoding="utf-8").strip()
        name = secrets.token_hex(8)
        atomic_write(path, f"{name}\n")
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot write {path}: {first_line(error)}") from error
    return name
