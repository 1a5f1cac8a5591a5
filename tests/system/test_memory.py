"""Memory that a process keeps, and what it gives back around what needs more."""

import platform
import subprocess
import sys

import pytest

RUN = """
from metarun.system.memory import giving_back, keep_memory

SIZE = 2**26  # bytes

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / SIZE

def use():
    block = b"x" * SIZE
    return resident()

keep_memory()
start = resident()
during = use() - start
kept = resident() - start
with giving_back():
    before = resident() - start
    use()
after = resident() - start
use()
again = resident() - start
print(during, kept, before, after, again)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone keeps memory")
def test_memory_is_kept_but_for_that_of_a_block_that_gives_it_back() -> None:
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, check=True)
    during, kept, before, after, again = map(float, done.stdout.split())
    assert min(during, kept, again) > 0.9
    assert max(before, after) < 0.1
