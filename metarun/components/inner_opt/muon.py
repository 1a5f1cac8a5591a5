"""Muon (Jordan 2024): orthogonalised momentum."""

from typing import Literal

from metarun.components.inner_opt.base import InnerGradientConfig, clipped
from metarun.config.checks import between
from metarun.config.component import builds, settings
from metarun.unroll import InnerOptimizer, optim


@settings
class MuonConfig(InnerGradientConfig):
    """Muon: orthogonalised momentum, of matrices only; the rest through inner_opt=partition."""

    lr: float = 0.02
    weight_decay: float = 0.1  # pulls the parameters towards zero, not by the gradient
    momentum: float = 0.95  # share of the previous step that is kept
    nesterov: bool = True  # Nesterov momentum
    ns_a: float = 3.4445  # coefficients of the Newton-Schulz polynomial
    ns_b: float = -4.775  # the second of them
    ns_c: float = 2.0315  # the third
    eps: float = 1e-7  # keeps the denominator off zero
    ns_steps: int = 5  # Newton-Schulz iterations
    adjust_lr_fn: Literal["original", "match_rms_adamw", "spectral_unclamped"] = (
        "original"  # by shape
    )
    ns_precision: Literal["bfloat16", "full"] = "bfloat16"  # full: exact derivatives

    def __post_init__(self) -> None:
        super().__post_init__()
        between("inner_opt.ns_steps", self.ns_steps, 0, 99)


@builds(MuonConfig)
def muon(own: MuonConfig) -> InnerOptimizer:
    """The differentiable optimizer: `metarun.unroll.muon`."""
    return clipped(optim.muon, own)
