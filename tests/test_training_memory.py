"""Blocks that were freed are taken again without asking the system for their pages."""

import subprocess
import sys

import pytest

TAKE = """
import ctypes, resource, sys
from tided.training.memory import keep_freed
if sys.argv[1] == "kept":
    keep_freed()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def take():
    block = ctypes.c_void_p(libc.malloc(48 << 20))
    ctypes.memset(block, 1, 48 << 20)
    libc.free(block)
take()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    take()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it asks glibc")
def test_freed_blocks_are_kept() -> None:
    def faults(how: str) -> int:
        return int(subprocess.run([sys.executable, "-c", TAKE, how], stdout=subprocess.PIPE, check=True).stdout)

    assert faults("kept") < 100 < faults("given back")
