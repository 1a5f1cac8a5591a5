"""Functional, differentiable inner optimizers, one file a family."""

from metarun.unroll.optim.adam import AdamState, adam
from metarun.unroll.optim.base import (
    Derivatives,
    Hyper,
    HyperValue,
    InnerOptimizer,
    LossOptimizer,
    Params,
    State,
    hyper_for,
    safe_sqrt,
)
from metarun.unroll.optim.sgd import SGDState, sgd

__all__ = [
    "AdamState",
    "Derivatives",
    "Hyper",
    "HyperValue",
    "InnerOptimizer",
    "LossOptimizer",
    "Params",
    "SGDState",
    "State",
    "adam",
    "hyper_for",
    "safe_sqrt",
    "sgd",
]
