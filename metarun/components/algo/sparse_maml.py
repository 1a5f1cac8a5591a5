"""Sparse-MAML (von Oswald et al. 2021): learn which parameters the inner loop moves."""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from metarun.components.algo.base import Algorithm, Problem
from metarun.components.algo.descent import DescentConfig
from metarun.components.algo.maml import MamlConfig, maml
from metarun.config.checks import finite
from metarun.config.component import builds, settings
from metarun.errors import ConfigError
from metarun.unroll import Params, Preconditioner

MASK = "mask"


@settings
class SparseMamlConfig(MamlConfig):
    """Sparse-MAML (von Oswald et al. 2021): learn which parameters the inner loop moves."""

    of_training: ClassVar[tuple[str, ...]] = (*DescentConfig.of_training, "init_shift")
    # The masks have an outer rate of their own, 7.5e-3 beside 1e-3.
    usual: ClassVar[dict[str, dict[str, Any]]] = {
        "outer_opt": {"groups": [{"params": "inner_opt.precondition.*", "lr_factor": 7.5}]}
    }

    order: Literal[1, 2] = 1  # 2: full meta-gradient; 1: inner gradients are constants (FOMAML)
    inner_steps: int = 35  # inner steps in training
    eval_inner_steps: int = 35  # inner steps in validation and test
    init_shift: float = 0.0  # mean of the initial mask values; higher: more is adapted at first

    def __post_init__(self) -> None:
        super().__post_init__()
        finite("algo.init_shift", self.init_shift)
        if not self.inner_steps:
            raise ConfigError(
                "algo=sparse_maml needs inner steps, or its masks are never learned: raise "
                "algo.inner_steps"
            )


@builds(SparseMamlConfig)
def sparse_maml(problem: Problem, own: SparseMamlConfig) -> Algorithm:
    """Learn a mask m of each parameter: inner steps are φ ← φ − α 1[m ≥ 0] ∘ ∇L.

    The step function has the derivative of the identity (straight-through), so a mask learns while
    it is off. The masks are meta-parameters; of the inner gradient the whole is masked, so an
    inner optimizer with moments leaves what is masked where it is. Weight decay of the inner
    optimizer does not.

    The paper's runs are of first order, with 35 inner steps of 0.25 (5-shot) or 0.1. Masks of
    weights start as Kaiming's uniform, those of vectors from U(−0.5, 0.5), each less its mean. The
    masks have an outer rate of their own, 7.5 times that of the weights (`outer_opt.groups`). A
    mask that is exactly 0 is half on in the code. The code's ReLU in the place of the step
    function, and its mask from noise ("sparse-MAML+"), are left out.

    Raises:
        ValueError: a preconditioner, which would mix what is masked; an inner optimizer that takes
            more than the gradient; implicit gradients.
    """
    inner = problem.inner
    if inner.precondition is not None:
        raise ValueError(
            f"inner_opt.precondition={inner.precondition}: algo=sparse_maml masks the gradients in "
            "its place; leave it out"
        )
    masks = Preconditioner(partial(_initial, own.init_shift), _masked)
    return maml(problem._replace(inner=inner._replace(precondition=masks)), own)


def _initial(shift: float, params: Params) -> dict[str, dict[str, Tensor]]:
    return {MASK: {name: _drawn(p) + shift for name, p in params.items()}}


def _drawn(p: Tensor) -> Tensor:
    """Values around zero, by torch's generator on the CPU."""
    values = torch.empty(p.shape)
    if p.dim() > 1:
        nn.init.kaiming_uniform_(values)
    else:
        nn.init.uniform_(values, -0.5, 0.5)
    return (values - values.mean()).to(p)


def _masked(grad: Tensor, factors: Mapping[str, Tensor]) -> Tensor:
    mask = factors[MASK]
    through = mask - mask.detach()  # zero, with the derivative of the identity
    return ((mask >= 0).to(grad) + through) * grad
