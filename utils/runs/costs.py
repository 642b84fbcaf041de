"""What a run takes of its machine, for `metrics.csv`: wall-clock and CPU seconds, and the memory of a GPU."""

from __future__ import annotations

import time

import torch

MIB = 2**20


class Costs:
    """Counts from when it is made; every reading counts on from the one before, so that the rows of a run add up."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, str]:
        """wall_s and cpu_s (of all threads of this process) since the last reading, and gpu_memory_mib.

        The last is the most that PyTorch has had allocated on a GPU so far, in MiB; "" where it has used none. Of
        several seeds in one process each row has those of the process.
        """
        wall, cpu = time.perf_counter(), time.process_time()
        found = {
            "wall_s": f"{wall - self._wall:.3f}",
            "cpu_s": f"{cpu - self._cpu:.3f}",
            "gpu_memory_mib": gpu_memory(),
        }
        self._wall, self._cpu = wall, cpu
        return found


def gpu_memory() -> str:
    """The most MiB that have been allocated so far on the GPU that has had most; "" where CUDA is not in use."""
    if not torch.cuda.is_initialized():
        return ""
    most = max(torch.cuda.max_memory_allocated(k) for k in range(torch.cuda.device_count()))
    return f"{most / MIB:.1f}"
