"""What holds for every test: one thread, and Matplotlib's cache of fonts in a folder of the tests' own."""

import atexit
import os
import shutil
import tempfile

import torch

torch.set_num_threads(1)

# Tests that limit memory or files would else leave a broken list of fonts behind, for the user's next figures too.
os.environ["MPLCONFIGDIR"] = tempfile.mkdtemp(prefix="matplotlib-")
atexit.register(shutil.rmtree, os.environ["MPLCONFIGDIR"], ignore_errors=True)
import matplotlib.font_manager  # noqa: E402, F401  makes the list, before any limit
