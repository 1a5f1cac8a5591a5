"""What must hold while a patched module runs, so that it can be differentiated twice."""

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

from metarun.unroll.higher import originals

_lock = threading.Lock()
_guarded = threading.local()
_callers = 0
_second_order_callers = 0
_checkpoints: dict[str, Any] = {}
_attention: list[tuple[Callable[[bool], None], bool]] = []

_KERNELS = (
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
)
"""torch's attention kernels. Only the last, "math", has a second derivative."""


class patched_call:  # noqa: N801 (a function with a `with`, but quicker than `contextmanager`)
    """Surrounds the outermost call of a patched module.

    Refuses `torch.utils.checkpoint` and the use of the original's tensors, and, for derivatives
    of second order, keeps attention off the fused kernels, which have none.

    Args:
        second_order: whether there will be such derivatives.
        tensors: the original's.
        names: their names, by id.
        current: gives the copy's tensor by such a name.
    """

    def __init__(
        self,
        second_order: bool,
        tensors: Sequence[Tensor],
        names: Mapping[int, str],
        current: originals.Current,
    ) -> None:
        self.second_order = second_order
        self.originals = tensors, names, current

    def __enter__(self) -> None:
        """Set the guards up."""
        global _callers, _second_order_callers
        tensors, names, current = self.originals
        with _lock:
            _callers += 1
            if _callers == 1:
                _refuse_checkpoints()
            originals.mark(tensors)
            _second_order_callers += self.second_order
            if self.second_order and _second_order_callers == 1:
                _attention[:] = [(enable, enabled()) for enabled, enable in _KERNELS]
                for enable, _ in _attention:
                    enable(enable is _KERNELS[-1][1])
        _guarded.depth = getattr(_guarded, "depth", 0) + 1
        originals.begin_run(names, current)

    def __exit__(self, *error: object) -> None:
        """Take the guards down; those that other threads share, with the last of them."""
        global _callers, _second_order_callers
        originals.end_run()
        _guarded.depth -= 1
        with _lock:
            _second_order_callers -= self.second_order
            if self.second_order and _second_order_callers == 0:
                for enable, enabled in _attention:
                    enable(enabled)
            _callers -= 1
            if _callers == 0:
                vars(torch.utils.checkpoint).update(_checkpoints)
                originals.unmark()


@contextmanager
def without_cudnn() -> Iterator[None]:
    """cuDNN's recurrent networks have no second derivative; torch's own have."""
    enabled = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = enabled


def _refuse_checkpoints() -> None:
    # `checkpoint` is usually imported by name, so it is caught one level below: at what its
    # reentrant and its other variant look up in their own module. These two names are put
    # there while any thread runs a patched module, and refuse in such a thread only.
    module = vars(torch.utils.checkpoint)
    reentrant = module["CheckpointFunction"]
    hook = module["_checkpoint_hook"]
    _checkpoints.update(CheckpointFunction=reentrant, _checkpoint_hook=hook)
    module["CheckpointFunction"] = _refusing_function(reentrant)
    module["_checkpoint_hook"] = _refusing(hook)


@functools.cache
def _refusing_function(original: Any) -> Any:
    return SimpleNamespace(apply=_refusing(original.apply))


@functools.cache
def _refusing(original: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        if getattr(_guarded, "depth", 0) and torch.is_grad_enabled():
            raise RuntimeError(
                "a patched module called torch.utils.checkpoint: the activations would be "
                "computed again with the fast weights of a later step, and the gradients be "
                "wrong; switch checkpointing off in the model"
            )
        return original(*args, **kwargs)

    return call
