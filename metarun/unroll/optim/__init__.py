"""Functional, differentiable inner optimizers, one file a family."""

from metarun.unroll.optim.adadelta import AdadeltaState, adadelta
from metarun.unroll.optim.adafactor import AdafactorState, adafactor
from metarun.unroll.optim.adagrad import AdagradState, adagrad
from metarun.unroll.optim.adam import AdamState, adam, adamw
from metarun.unroll.optim.adamax import AdamaxState, adamax
from metarun.unroll.optim.asgd import ASGDState, asgd
from metarun.unroll.optim.base import (
    Derivatives,
    Hyper,
    HyperValue,
    InnerOptimizer,
    LossOptimizer,
    ParamHyper,
    Params,
    State,
    hyper_for,
    per_parameter,
    safe_norm,
    safe_sqrt,
)
from metarun.unroll.optim.from_torch import Continued, from_torch, translate
from metarun.unroll.optim.mixed import mixed
from metarun.unroll.optim.muon import MuonState, muon
from metarun.unroll.optim.nadam import NAdamState, nadam
from metarun.unroll.optim.newton import newton
from metarun.unroll.optim.optimizers import OPTIMIZERS
from metarun.unroll.optim.partition import partition
from metarun.unroll.optim.preconditioners import (
    KRONECKER,
    KRONECKER_PSD,
    META_CURVATURE,
    Preconditioner,
)
from metarun.unroll.optim.radam import RAdamState, radam
from metarun.unroll.optim.rmsprop import RMSpropState, rmsprop
from metarun.unroll.optim.rprop import RpropState, rprop
from metarun.unroll.optim.sgd import SGDState, sgd
from metarun.unroll.optim.transforms import clip_norm, clip_value, precondition

__all__ = [
    "KRONECKER",
    "KRONECKER_PSD",
    "META_CURVATURE",
    "OPTIMIZERS",
    "ASGDState",
    "AdadeltaState",
    "AdafactorState",
    "AdagradState",
    "AdamState",
    "AdamaxState",
    "Continued",
    "Derivatives",
    "Hyper",
    "HyperValue",
    "InnerOptimizer",
    "LossOptimizer",
    "MuonState",
    "NAdamState",
    "ParamHyper",
    "Params",
    "Preconditioner",
    "RAdamState",
    "RMSpropState",
    "RpropState",
    "SGDState",
    "State",
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "asgd",
    "clip_norm",
    "clip_value",
    "from_torch",
    "hyper_for",
    "mixed",
    "muon",
    "nadam",
    "newton",
    "partition",
    "per_parameter",
    "precondition",
    "radam",
    "rmsprop",
    "rprop",
    "safe_norm",
    "safe_sqrt",
    "sgd",
    "translate",
]
