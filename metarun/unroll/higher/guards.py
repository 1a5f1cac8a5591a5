"""What must hold while a patched module runs, so that it can be differentiated twice."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.utils.checkpoint
from torch.nn.attention import SDPBackend, sdpa_kernel

from metarun.unroll.right_derivatives import RightDerivatives

_lock = threading.Lock()
_guarded = threading.local()
_callers = 0
_originals: dict[str, Any] = {}


@contextmanager
def patched_call(second_order: bool) -> Iterator[None]:
    """Surrounds the outermost call of a patched module.

    Refuses `torch.utils.checkpoint`, and, for derivatives of second order, keeps attention off
    the fused kernels, which have none, and replaces what torch differentiates wrongly.

    Raises:
        RuntimeError: the module checkpoints activations.
    """
    with ExitStack() as stack:
        stack.enter_context(_no_checkpoints())
        if second_order:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(RightDerivatives(2))
        yield


@contextmanager
def without_cudnn() -> Iterator[None]:
    """cuDNN's recurrent networks have no second derivative; torch's own have."""
    enabled = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = enabled


@contextmanager
def _no_checkpoints() -> Iterator[None]:
    # `checkpoint` is usually imported by name, so it is caught one level below: at what its
    # reentrant and its other variant look up in their own module. These two names are put
    # there while any thread runs a patched module, and refuse in such a thread only.
    global _callers
    module = vars(torch.utils.checkpoint)
    with _lock:
        _callers += 1
        if _callers == 1:
            reentrant = module["CheckpointFunction"]
            hook = module["_checkpoint_hook"]
            _originals.update(CheckpointFunction=reentrant, _checkpoint_hook=hook)
            module["CheckpointFunction"] = SimpleNamespace(apply=_refusing(reentrant.apply))
            module["_checkpoint_hook"] = _refusing(hook)
    before = getattr(_guarded, "depth", 0)
    _guarded.depth = before + 1
    try:
        yield
    finally:
        _guarded.depth = before
        with _lock:
            _callers -= 1
            if _callers == 0:
                module.update(_originals)


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
