"""The random numbers of whoever calls metarun from Python."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def random_state_kept() -> Iterator[None]:
    """A block after which torch's generators are as they were before.

    Runs seed them. A caller who has done so as well would draw the same numbers for every seed.
    """
    before = torch.get_rng_state()
    begun = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = torch.cuda.get_rng_state_all() if begun else []
    try:
        yield
    finally:
        torch.set_rng_state(before)
        if devices:
            torch.cuda.set_rng_state_all(devices)
