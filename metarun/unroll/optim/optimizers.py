"""Every optimizer of `torch.optim` that has a differentiable counterpart."""

from collections.abc import Callable

import torch

from metarun.unroll.optim.adadelta import adadelta
from metarun.unroll.optim.adafactor import adafactor
from metarun.unroll.optim.adagrad import adagrad
from metarun.unroll.optim.adam import adam, adamw
from metarun.unroll.optim.adamax import adamax
from metarun.unroll.optim.asgd import asgd
from metarun.unroll.optim.base import InnerOptimizer
from metarun.unroll.optim.muon import muon
from metarun.unroll.optim.nadam import nadam
from metarun.unroll.optim.radam import radam
from metarun.unroll.optim.rmsprop import rmsprop
from metarun.unroll.optim.rprop import rprop
from metarun.unroll.optim.sgd import sgd

OPTIMIZERS: dict[type[torch.optim.Optimizer], Callable[..., InnerOptimizer]] = {
    torch.optim.SGD: sgd,
    torch.optim.Adam: adam,
    torch.optim.AdamW: adamw,
    torch.optim.NAdam: nadam,
    torch.optim.RAdam: radam,
    torch.optim.Adamax: adamax,
    torch.optim.Adadelta: adadelta,
    torch.optim.Adagrad: adagrad,
    torch.optim.RMSprop: rmsprop,
    torch.optim.Rprop: rprop,
    torch.optim.ASGD: asgd,
    torch.optim.Adafactor: adafactor,
    torch.optim.Muon: muon,
}
"""torch's class -> the factory of its differentiable counterpart."""
