"""The settings of each inner optimizer. Imports neither torch nor Hydra."""

from dataclasses import dataclass, field
from typing import Any

from metarun.checks import at_least, between, one_of, positive
from metarun.errors import ConfigError


@dataclass
class InnerOptConfig:
    """What every inner optimizer has: groups, and hyperparameters that are learned."""

    name: str = "???"
    learn: list[str] = field(default_factory=list)  # e.g. [lr]: becomes a meta-parameter
    granularity: str = "global"  # global, parameter, step or parameter_step: one value for each
    groups: list[dict[str, Any]] = field(default_factory=list)  # e.g. [{params: head.*, lr: 0.1}]

    def __post_init__(self) -> None:
        for group in self.groups:
            check_group(group)
        patterns = [group["params"] for group in self.groups]
        if len(set(patterns)) < len(patterns):
            raise ConfigError(f"inner_opt.groups: two groups for one pattern in {patterns}")
        one_of(
            "inner_opt.granularity",
            self.granularity,
            ("global", "parameter", "step", "parameter_step"),
        )


@dataclass
class InnerSgdConfig(InnerOptConfig):
    """Stochastic gradient descent."""

    name: str = "sgd"
    lr: float = 0.4
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lr", "momentum", "weight_decay"):
            at_least(f"inner_opt.{name}", getattr(self, name), 0)
        between("inner_opt.dampening", self.dampening, 0, 1)


@dataclass
class InnerAdamConfig(InnerOptConfig):
    """Adam, differentiable."""

    name: str = "adam"
    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lr", "weight_decay"):
            at_least(f"inner_opt.{name}", getattr(self, name), 0)
        for name in ("beta1", "beta2"):
            between(f"inner_opt.{name}", getattr(self, name), 0, 1 - 1e-9)
        positive("inner_opt.eps", self.eps)


def check_group(group: dict[str, Any]) -> None:
    """Refuse a parameter group that is not a pattern with numbers."""
    example = "expected e.g. {params: head.*, lr: 0.1}"
    if not isinstance(group.get("params"), str):
        raise ConfigError(f"inner_opt.groups: {group} names no parameters; {example}")
    values = [value for key, value in group.items() if key != "params"]
    if not values or any(type(value) not in (int, float) for value in values):
        raise ConfigError(f"inner_opt.groups: the settings of {group} must be numbers; {example}")
