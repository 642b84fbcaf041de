"""A peer's environment of its own: other libraries ask for versions that this project cannot use."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.errors import UserError


@dataclass(frozen=True)
class Peer:
    """A library, how it is installed, and the script that runs it there."""

    name: str
    requirement: str
    script: Path
    algos: tuple[str, ...]  # that it has and we have

    @property
    def version(self) -> str:
        return self.requirement.partition("==")[2]


_HERE = Path(__file__).parent
# flowrl (Diffusion-QL, IQL, DTQL) is left out: its releases on PyPI, up to 0.2.0, lack the modules that its
# algorithms import (flowrl.flow, flowrl.functional, flowrl.module, flowrl.config).
PEERS = {
    "d3rlpy": Peer(
        "d3rlpy", "d3rlpy==2.8.1", _HERE / "worker_d3rlpy.py", ("bc", "td3_bc", "iql", "cql", "bcq", "bear")
    ),
}


def python_of(folder: Path, peer: Peer, wheels: Path | None = None) -> Path:
    """The interpreter of an environment in `folder` that has the peer; it is made where there is none.

    It has this process' version of PyTorch. wheels: a folder with those of the peer and of what it needs, to install
    instead of asking PyPI; PyTorch is then this process' own. Raises UserError where that fails.
    """
    python = folder / "bin" / "python"
    wanted = f"{peer.name} {peer.version}, torch {torch.__version__.partition('+')[0]}"
    if python.exists() and _installed(python, peer) == wanted:
        return python
    _run([sys.executable, "-m", "venv", str(folder)])
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if wheels is None:
        _run([*pip, f"torch=={torch.__version__.partition('+')[0]}"])
        _run([*pip, peer.requirement])
    else:
        _run([*pip, "--no-index", "--no-deps", *_wheels_in(wheels)])
        (packages,) = folder.glob("lib/python*/site-packages")
        (packages / "pytorch.pth").write_text(f"{Path(torch.__file__).parents[1]}\n", encoding="utf-8")
    if (found := _installed(python, peer)) != wanted:
        raise UserError(f"the environment in {folder} has {found or 'nothing that can be imported'}, not {wanted}")
    return python


def _wheels_in(folder: Path) -> list[str]:
    wheels = sorted(map(str, folder.glob("*.whl")))
    if not wheels:
        raise UserError(f"no wheels in {folder}")
    return wheels


def _installed(python: Path, peer: Peer) -> str:
    """What that interpreter imports; "" where it cannot."""
    code = f"import {peer.name}, torch; print('{peer.name}', {peer.name}.__version__, 'torch', torch.__version__)"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    words = done.stdout.split()[-4:]
    return f"{words[0]} {words[1]}, torch {words[3].partition('+')[0]}" if len(words) == 4 else ""


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no output"]
        raise UserError(f"{shutil.which(command[0]) or command[0]} {command[1]} {command[2]} failed: {last[0]}")
