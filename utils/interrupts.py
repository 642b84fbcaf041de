"""Importing this first makes Ctrl-C during a command's other imports one line and exit code 130, not a traceback."""

from __future__ import annotations

import os
import sys
from types import TracebackType


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(130)  # Python itself would end by the signal


sys.excepthook = _hook
