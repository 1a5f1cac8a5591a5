"""The differentiable unroll engine. Needs torch only, and can be used without the runner."""

from metarun.unroll.engine import GradientMode, Unrolled, unroll
from metarun.unroll.hyper import (
    Granularity,
    Groups,
    LearnedHyper,
    group_settings,
    learn_hyper,
    match_names,
)
from metarun.unroll.optim import Hyper, HyperValue, InnerOptimizer, Params, State, adam, sgd
from metarun.unroll.tasks import Batching, Meta, map_tasks, meta_gradient

__all__ = [
    "Batching",
    "GradientMode",
    "Granularity",
    "Groups",
    "Hyper",
    "HyperValue",
    "InnerOptimizer",
    "LearnedHyper",
    "Meta",
    "Params",
    "State",
    "Unrolled",
    "adam",
    "group_settings",
    "learn_hyper",
    "map_tasks",
    "match_names",
    "meta_gradient",
    "sgd",
    "unroll",
]
