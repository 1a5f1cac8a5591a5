"""In what format a run's network computes: from the settings to the algorithm, and what is refused.

See `metarun.components.precision` for what a format means.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from metarun.components.algo.base import Algorithm
from metarun.components.algo.descent import DescentConfig
from metarun.components.precision import Precision, computing_in, within
from metarun.config.run import TrainConfig
from metarun.errors import ConfigError
from metarun.unroll._torch import allow_tf32

log = logging.getLogger(__name__)

TF32_TWICE = ("tf32", "tf32")
OF_AUTOCAST = {"bf16": torch.bfloat16}


def precision_of(config: TrainConfig) -> Precision:
    """The formats that the network of a run computes in."""
    outer, inner = config.engine.precision, config.engine.inner_precision
    return Precision(OF_AUTOCAST.get(inner or outer), OF_AUTOCAST.get(outer))


def in_format(algorithm: Algorithm, dtype: torch.dtype | None) -> Algorithm:
    """The algorithm, whose networks compute in a format; None: in that of the weights."""
    if dtype is None:
        return algorithm
    adapt, outputs, one = algorithm.adapt, algorithm.outputs, algorithm.one_model

    def adapted(*given: Any) -> Callable[..., Any]:
        assert adapt is not None
        with computing_in(dtype):
            return within(dtype, adapt(*given))

    if one is not None and one.advance is not None:
        one = one._replace(advance=within(dtype, one.advance))
    return algorithm._replace(
        loss=within(dtype, algorithm.loss),
        trace=within(dtype, algorithm.trace),
        outputs=None if outputs is None else within(dtype, outputs),
        adapt=None if adapt is None else adapted,
        one_model=one,
    )


def check_precision(config: TrainConfig, device: torch.device, trains: bool) -> None:
    """Refuse a format that the run cannot have.

    Args:
        trains: whether the run is trained, and not only evaluated.

    Raises:
        ConfigError: names the setting, and what to choose.
    """
    engine, wanted = config.engine, config.engine.precision
    if wanted == "tf32" and device.type != "cuda":
        raise ConfigError(
            f"engine.precision=tf32: only GPUs compute in it, and device={device.type} is none; "
            "use engine.precision=float32 or bf16"
        )
    if engine.inner_precision is not None:
        _check_inner(config)
    if "bf16" in (wanted, engine.inner_precision):
        _refuse_rough(config, trains)


def without_gpu(trained: TrainConfig, config: TrainConfig, device: torch.device) -> TrainConfig:
    """The config of an evaluation; without a GPU in float32, where the run computed in TF32.

    Args:
        trained: the run's own.
        config: that of its evaluation.
    """
    if device.type == "cuda" or (trained.engine.precision, config.engine.precision) != TF32_TWICE:
        return config
    log.info("evaluated in float32: the run computed in tf32, which only GPUs have")
    return replace(config, engine=replace(config.engine, precision="float32"))


def with_tf32(allowed: bool, fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function, within which a GPU may use TensorFloat-32 or not; afterwards it is as before.

    torch has one switch for all that a process computes.
    """

    def inside(*args: Any) -> Any:
        before = allow_tf32(allowed)
        try:
            return fn(*args)
        finally:
            allow_tf32(before)

    return inside


def _check_inner(config: TrainConfig) -> None:
    engine = config.engine
    key = f"engine.inner_precision={engine.inner_precision}"
    if not isinstance(config.algo, DescentConfig):
        raise ConfigError(
            f"{key}: it is for algorithms with algo.order, such as maml and anil, and "
            f"algo={config.algo.name} has none; leave it out, and engine.precision is that of all"
        )
    if engine.precision not in ("float32", "bf16"):
        raise ConfigError(f"{key}: it goes with engine.precision=float32 or bf16; leave it out")


def _refuse_rough(config: TrainConfig, trains: bool) -> None:
    """Refuse bfloat16 where a derivative is a difference, or a system is solved by products.

    Of these an evaluation has Newton steps alone.
    """
    key = "inner_precision" if config.engine.inner_precision == "bf16" else "precision"
    inside = config.engine.inner_precision in (None, "bf16")
    gradient = config.engine.gradient if trains else "auto"
    name = config.inner_opt.name
    parts = [part.get("name") for part in vars(config.inner_opt).get("parts", [])]
    if gradient == "evolution":
        raise ConfigError(
            f"engine.{key}=bf16: engine.gradient=evolution compares losses that engine.sigma="
            f"{config.engine.sigma} sets apart, which bfloat16 rounds away; use float32"
        )
    if gradient == "implicit":
        raise ConfigError(
            f"engine.{key}=bf16: engine.gradient=implicit solves a system by products with the "
            "Hessian, which bfloat16 makes too rough to solve; use float32"
        )
    if inside and gradient == "mixed":
        raise ConfigError(
            f"engine.{key}=bf16: engine.gradient=mixed takes derivatives forwards and backwards, "
            "which bfloat16 rounds apart; use engine.gradient=checkpoint"
        )
    if inside and (name == "newton" or "newton" in parts):
        raise ConfigError(
            f"engine.{key}=bf16: inner_opt=newton divides by the eigenvalues of a Hessian, whose "
            "signs bfloat16 does not keep; use float32"
        )
