"""How the inner optimizers that `torch.optim` has too are built from their settings."""

from collections.abc import Callable
from typing import Any

from metarun.unroll import OPTIMIZERS, InnerOptimizer, clip_norm, clip_value


def _with_clipping(make: Callable[..., InnerOptimizer]) -> Callable[..., InnerOptimizer]:
    def build(**settings: Any) -> InnerOptimizer:
        norm, value = settings.pop("clip_norm", None), settings.pop("clip_value", None)
        optimizer = make(**settings)
        # The one put on last acts first: by value, then by norm, like the outer gradients.
        if norm is not None:
            optimizer = clip_norm(optimizer, norm)
        return optimizer if value is None else clip_value(optimizer, value)

    return build


TORCH_BUILDERS = {make.__name__: _with_clipping(make) for make in OPTIMIZERS.values()}
"""Inner optimizer -> build(**settings)."""
