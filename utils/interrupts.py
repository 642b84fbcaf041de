"""Importing this first makes Ctrl-C during a command's other imports one line and exit code 130, not a traceback.

It also keeps a CPU's threads from spinning while they wait for one another, which PyTorch's OpenMP is told before it is
imported. On two free cores this costs nothing (DiffCPS, 2 threads, interleaved: 47 steps/s against 43); on busy ones it
is what a step waits for: 3 steps/s against less than 1. Not spinning at all costs half the speed on free ones (24).
"""

from __future__ import annotations

import os
import sys
from types import TracebackType

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # turns, some microseconds; libgomp's own is 300,000


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(130)  # Python itself would end by the signal


sys.excepthook = _hook
