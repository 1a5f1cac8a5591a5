"""Functional, differentiable inner optimizers, one file a family."""

from metarun.unroll.optim.adam import AdamState, adam
from metarun.unroll.optim.base import (
    Hyper,
    HyperValue,
    InnerOptimizer,
    Params,
    State,
    hyper_for,
    safe_sqrt,
)
from metarun.unroll.optim.sgd import SGDState, sgd

__all__ = [
    "AdamState",
    "Hyper",
    "HyperValue",
    "InnerOptimizer",
    "Params",
    "SGDState",
    "State",
    "adam",
    "hyper_for",
    "safe_sqrt",
    "sgd",
]
