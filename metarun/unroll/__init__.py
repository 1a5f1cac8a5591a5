"""The differentiable unroll engine. Needs torch only, and can be used without the runner."""

from metarun.unroll.engine import Unrolled, unroll
from metarun.unroll.gradients import (
    Checkpoint,
    Evolution,
    GradientMode,
    Implicit,
    Truncated,
)
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
    "Checkpoint",
    "Evolution",
    "GradientMode",
    "Granularity",
    "Groups",
    "Hyper",
    "HyperValue",
    "Implicit",
    "InnerOptimizer",
    "LearnedHyper",
    "Meta",
    "Params",
    "State",
    "Truncated",
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
