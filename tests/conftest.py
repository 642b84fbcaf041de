"""What holds for every test: one thread, and Matplotlib's cache of fonts in a folder of the tests' own."""

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)

# Tests that limit memory or files would else leave a broken list of fonts behind, for the user's next figures too.
os.environ["MPLCONFIGDIR"] = tempfile.mkdtemp(prefix="matplotlib-")
atexit.register(shutil.rmtree, os.environ["MPLCONFIGDIR"], ignore_errors=True)
import matplotlib.font_manager  # noqa: E402, F401  makes the list, before any limit


@pytest.fixture
def signals_of_a_terminal() -> Iterator[None]:
    """Ctrl-C and a closed terminal are heard, by programs that the test starts too, also where nohup or a shell's `&`
    had the tests themselves ignore them."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
