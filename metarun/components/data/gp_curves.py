"""Curves of a Gaussian process, those of neural processes (Kim et al. 2019, section 4.1)."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from metarun.components.data._curves import Curves, Numbers
from metarun.components.data.sinusoid import SinusoidConfig
from metarun.config.checks import at_least, positive
from metarun.config.component import builds, settings
from metarun.config.run import TaskConfig

X_RANGE = (-2.0, 2.0)
JITTER = 1e-8  # of the variance: without it a kernel matrix of near points has no Cholesky factor


@settings
class GpCurvesConfig:
    """Regression on curves of a Gaussian process with a squared exponential kernel."""

    usual: ClassVar[dict[str, dict[str, Any]]] = SinusoidConfig.usual

    length_scale: float = 0.4  # over which a curve changes, in units of x
    scale: float = 1.0  # standard deviation of a curve
    noise: float = 0.02  # standard deviation of what is added to each target

    def __post_init__(self) -> None:
        positive("data.length_scale", self.length_scale)
        positive("data.scale", self.scale)
        at_least("data.noise", self.noise, 0)


@builds(GpCurvesConfig)
def gp_curves(
    task: TaskConfig, seed: int, device: torch.device, dtype: torch.dtype, own: GpCurvesConfig
) -> Curves:
    """Episodes of y ~ N(0, K) with K_ij = σ²·exp(−(xᵢ − xⱼ)² / 2l²) + noise²·δ_ij.

    x is uniform in [−2, 2]. Support and query are points of one curve.
    """

    def draw(keys: Tensor, points: int) -> tuple[Tensor, Tensor]:
        numbers = Numbers(keys)
        x, z = numbers.uniform(points, *X_RANGE), numbers.normal(points)
        distance = (x[:, :, None] - x[:, None, :]) / own.length_scale
        variance = own.noise**2 + JITTER * own.scale**2
        kernel = own.scale**2 * torch.exp(-distance.square() / 2)
        kernel = kernel + variance * torch.eye(points, dtype=x.dtype, device=x.device)
        factor, failed = torch.linalg.cholesky_ex(kernel)  # whose check would wait for the device
        factor = torch.where(failed[:, None, None] == 0, factor, torch.nan)
        # A sum, not a product of matrices: that may round otherwise in batches of other sizes.
        return x, (factor * z[:, None, :]).sum(dim=2)

    return Curves(
        "gp_curves", draw, f"gp_curves-v1, {own!r}",
        shot=task.shot, query=task.query, seed=seed, device=device, dtype=dtype,
    )  # fmt: skip
