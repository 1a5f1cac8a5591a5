"""How much memory there is, and how the C library gives it back."""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h
USUAL_MMAP_MAX = 65536  # blocks that glibc maps, if it is not told otherwise


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
        _kept.append(library)


@contextmanager
def giving_back() -> Iterator[None]:
    """A block that runs now and then and needs more memory than what is around it.

    Memory is not kept inside, and what is free is given back before and after it. Otherwise the
    process would hold the most that the block needs for good, and in pieces that do not fit what
    runs next: twice as much as either needs, where that was looked at. Nothing happens unless
    `keep_memory` was called.
    """
    for library in _kept[:1]:
        library.malloc_trim(0)
        library.mallopt(M_MMAP_MAX, USUAL_MMAP_MAX)
    try:
        yield
    finally:
        for library in _kept[:1]:
            library.mallopt(M_MMAP_MAX, 0)
            library.malloc_trim(0)


_kept: list[ctypes.CDLL] = []
"""The C library, once it was told to keep memory."""
