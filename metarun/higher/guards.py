"""What must hold while a patched module runs, so that it can be differentiated twice."""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.utils.checkpoint

from metarun.higher import originals
from metarun.unroll._torch import set_cudnn
from metarun.unroll.corrected.right_derivatives import RightDerivatives

_lock = threading.Lock()
_callers = 0
_second_order_callers = 0
_checkpoints: dict[str, Any] = {}
_attention: list[tuple[Callable[[bool], None], bool]] = []

_Switch = tuple[Callable[[], bool], Callable[[bool], None]]


def guarded_call(
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    second_order: bool,
    watched: originals.Watched,
) -> Any:
    """The outermost call of a patched module.

    Refuses `torch.utils.checkpoint` and the use of the original's tensors, and, for derivatives
    of second order, keeps attention off the fused kernels, which have none, and replaces what
    torch differentiates wrongly.

    Args:
        call, args, kwargs: what is called, and with what.
        second_order: whether there will be such derivatives.
        watched: the original's tensors.
    """
    before = originals.runs()
    _begin(second_order, watched)
    originals.here.runs = (*before, watched)
    try:
        if second_order:
            with RightDerivatives(2):
                return call(*args, **kwargs)
        return call(*args, **kwargs)
    finally:
        originals.here.runs = before
        _end(second_order)


def _begin(second_order: bool, watched: originals.Watched) -> None:
    global _callers, _second_order_callers
    with _lock:
        if _callers == 0:
            _refuse_checkpoints()
        _callers += 1
        originals.mark(watched.tensors)
        if second_order:
            if _second_order_callers == 0:
                _only_math_attention()
            _second_order_callers += 1


def _end(second_order: bool) -> None:
    """What the threads share ends with the last of them."""
    global _callers, _second_order_callers
    with _lock:
        if second_order:
            _second_order_callers -= 1
            if _second_order_callers == 0:
                for enable, enabled in _attention:
                    enable(enabled)
        _callers -= 1
        if _callers == 0:
            vars(torch.utils.checkpoint).update(_checkpoints)
            originals.unmark()


def _only_math_attention() -> None:
    fused, math = _attention_kernels()
    _attention[:] = [(enable, enabled()) for enabled, enable in (*fused, math)]
    for _, enable in fused:
        enable(False)
    math[1](True)


@functools.cache
def _attention_kernels() -> tuple[list[_Switch], _Switch]:
    """The fused kernels that there are, and the one that has a second derivative."""
    of = torch.backends.cuda
    fused: list[_Switch] = [(of.flash_sdp_enabled, of.enable_flash_sdp)]
    if torch.cuda.is_available():
        fused.append((of.mem_efficient_sdp_enabled, of.enable_mem_efficient_sdp))
        fused.append((of.cudnn_sdp_enabled, of.enable_cudnn_sdp))
    return fused, (of.math_sdp_enabled, of.enable_math_sdp)


@contextmanager
def without_cudnn() -> Iterator[None]:
    """cuDNN's recurrent networks have no second derivative; torch's own have."""
    before = set_cudnn(enabled=False)
    try:
        yield
    finally:
        set_cudnn(enabled=before)


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
        if originals.runs() and torch.is_grad_enabled():
            raise RuntimeError(
                "a patched module called torch.utils.checkpoint: the activations would be "
                "computed again with the fast weights of a later step, and the gradients be "
                "wrong; switch checkpointing off in the model"
            )
        return original(*args, **kwargs)

    return call
