"""What every test runs under: one thread (two can be slower than one on a shared machine)."""

import torch

torch.set_num_threads(1)
