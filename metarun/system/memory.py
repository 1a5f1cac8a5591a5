"""How much memory there is, and how the C library gives it back."""

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h


def machine_memory() -> int:
    """Bytes of memory of this machine: nothing that needs more is worth beginning."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def keep_memory() -> None:
    """Let the process keep memory that it has freed, for what it allocates next.

    glibc maps each large block anew and gives it back when it is freed, so that every operation
    on large tensors touches fresh pages, which can cost several times its arithmetic. Torch has
    no cache of its own on a CPU. Other C libraries are left alone.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, -1)  # never
        library.mallopt(M_ARENA_MAX, 1)  # threads would map and unmap heaps of their own
