"""How the C library gives memory back."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h


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
