"""As many tasks at a time as fit into memory (`engine.chunk=auto`): found out by running out."""

import logging
from collections.abc import Callable
from typing import Any

import torch

from metarun.errors import is_out_of_memory
from metarun.unroll._torch import pytree
from metarun.unroll.gradients.recompute import RandomState, tensor_leaves

log = logging.getLogger(__name__)


class AsManyAsFit:
    """A function of `(meta, tasks, …)` that halves its chunk of tasks wherever memory runs out.

    A call that ran out is made again from the same random state: what it computes depends on its
    arguments alone. A chunk changes how sums over tasks are rounded, so checkpoints hold it.

    Args:
        of_chunk: `of_chunk(chunk)` makes the function that takes so many tasks at a time; None:
            `first`.
        what: what it computes, in the plural.
        first: tasks at a time to begin with; None: all of them.

    Attributes:
        chunk: tasks at a time; None: memory has not run out.
    """

    def __init__(
        self,
        of_chunk: Callable[[int | None], Callable[..., Any]],
        what: str,
        first: int | None = None,
    ) -> None:
        self.of_chunk, self.what, self.first = of_chunk, what, first
        self.chunk: int | None = None
        self.run: Callable[..., Any] | None = None

    def take(self, chunk: int | None) -> None:
        """Begin with a chunk that was found before."""
        self.chunk, self.run = chunk, None

    def __call__(self, meta: Any, tasks: Any, *more: Any) -> Any:
        count = len(pytree.tree_leaves(tasks)[0])
        while True:
            before = RandomState(tensor_leaves((meta, tasks)))
            try:
                if self.run is None:
                    self.run = self.of_chunk(self.chunk)
                return self.run(meta, tasks, *more)
            except Exception as error:
                size = min(self.chunk or self.first or count, count)
                if not is_out_of_memory(error) or size == 1:
                    raise
            # Not within the block above: the error holds what had been computed until then.
            before.restore()
            self.take(-(-size // 2))
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            log.info(
                "%s: %d tasks at a time need more memory than there is; from here on %d "
                "(engine.chunk=auto)", self.what, size, self.chunk,
            )  # fmt: skip
