"""Freed memory is used again instead of being given back and cleared anew."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# Page faults of allocating and writing 64 MiB ten times, each freed before the next.
FAULTS = """
import resource, sys
import torch
from utils.training.memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory(torch.device("cpu")) and not keep_freed_memory(torch.device("cuda:0"))
def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(40)  # the heap grows until it has room between what else is in it
print(faults(10))
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the GNU C library's allocator")
def test_a_freed_tensor_is_used_again_without_page_faults() -> None:
    def faults(how: str) -> int:
        command = [sys.executable, "-c", FAULTS, how]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert faults("kept") <= 10
    assert faults("given back") >= 10 * 32  # 2 MiB a page at most
