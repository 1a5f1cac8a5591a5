"""The settings of the inner optimizers that `torch.optim` has too. Imports no torch, no Hydra."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from metarun.config.checks import at_least, between, finite, one_of, positive
from metarun.errors import ConfigError

_BELOW_ONE = 1 - 1e-9
_SETTING_OF = {"max_norm": "clip_norm"}  # hyperparameters that settings call otherwise


@dataclass
class InnerOptConfig:
    """What every inner optimizer has: groups, and hyperparameters that are learned."""

    name: str = "???"
    learn: list[str] = field(default_factory=list)  # e.g. [lr]: becomes a meta-parameter
    granularity: str = "global"  # global, parameter, step or parameter_step: one value for each
    groups: list[dict[str, Any]] = field(default_factory=list)  # e.g. [{params: head.*, lr: 0.1}]

    def __post_init__(self) -> None:
        for own in fields(self):
            finite(f"inner_opt.{own.name}", getattr(self, own.name))
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
        if self.groups:
            replace(self, groups=[])  # before the groups: what is wrong without is not theirs
        for group in self.groups:
            changes = {key: value for key, value in group.items() if key != "params"}
            try:
                self.check_changes(changes)
            except ConfigError as error:
                reason = str(error).removeprefix("inner_opt.")
                raise ConfigError(f"inner_opt.groups, {group['params']}: {reason}") from error

    def check_changes(self, changes: Mapping[str, float]) -> None:
        """Refuse hyperparameters that these settings would not allow in place of their own.

        Names that are no setting pass: what the optimizer has is known when it is built.

        Raises:
            ConfigError: a value that is not allowed.
        """
        of_all = {f.name for f in fields(InnerOptConfig)}
        own = {f.name for f in fields(self)} - of_all
        named: dict[str, Any] = {_SETTING_OF.get(k, k): value for k, value in changes.items()}
        replace(self, groups=[], **{k: value for k, value in named.items() if k in own})


@dataclass
class InnerGradientConfig(InnerOptConfig):
    """What every inner optimizer has that is driven by the gradient alone."""

    lr: float = 0.01  # learning rate of the inner loop
    weight_decay: float = 0.0  # pulls the parameters towards zero
    clip_norm: float | None = None  # inner gradients are scaled down to this norm (max_norm)
    clip_value: float | None = None  # inner gradients are clipped elementwise to ± this

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lr", "weight_decay", "momentum", "eps", "lr_decay", "momentum_decay"):
            at_least(f"inner_opt.{name}", getattr(self, name, 0), 0)
        for name in ("beta1", "beta2"):
            between(f"inner_opt.{name}", getattr(self, name, 0), 0, _BELOW_ONE)
        positive("inner_opt.clip_norm", self.clip_norm)
        positive("inner_opt.clip_value", self.clip_value)


@dataclass
class InnerSgdConfig(InnerGradientConfig):
    """Stochastic gradient descent."""

    name: str = "sgd"
    lr: float = 0.4
    momentum: float = 0.0  # share of the previous step that is kept
    dampening: float = 0.0  # share of a new gradient that the momentum leaves out
    nesterov: bool = False  # Nesterov momentum
    maximize: bool = False  # climb instead of descend

    def __post_init__(self) -> None:
        super().__post_init__()
        between("inner_opt.dampening", self.dampening, 0, 1)


@dataclass
class InnerAdamConfig(InnerGradientConfig):
    """Adam, differentiable."""

    name: str = "adam"
    beta1: float = 0.9  # decay of the average of gradients
    beta2: float = 0.999  # decay of the average of squared gradients
    eps: float = 1e-8  # keeps the denominator off zero
    amsgrad: bool = False  # divide by the largest second moment so far
    maximize: bool = False  # climb instead of descend
    decoupled_weight_decay: bool = False  # true: AdamW

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("inner_opt.eps", self.eps)


@dataclass
class InnerAdamWConfig(InnerGradientConfig):
    """Adam with decoupled weight decay."""

    name: str = "adamw"
    beta1: float = 0.9  # decay of the average of gradients
    beta2: float = 0.999  # decay of the average of squared gradients
    eps: float = 1e-8  # keeps the denominator off zero
    weight_decay: float = 0.01  # pulls the parameters towards zero, not by the gradient
    amsgrad: bool = False  # divide by the largest second moment so far
    maximize: bool = False  # climb instead of descend


@dataclass
class InnerNAdamConfig(InnerGradientConfig):
    """Adam with Nesterov momentum."""

    name: str = "nadam"
    beta1: float = 0.9  # decay of the average of gradients
    beta2: float = 0.999  # decay of the average of squared gradients
    eps: float = 1e-8  # keeps the denominator off zero
    momentum_decay: float = 0.004  # how fast the momentum grows to beta1
    maximize: bool = False  # climb instead of descend
    decoupled_weight_decay: bool = False  # weight decay apart from the gradient, as in AdamW


@dataclass
class InnerRAdamConfig(InnerGradientConfig):
    """Rectified Adam: with these betas, the first five steps do without a second moment."""

    name: str = "radam"
    beta1: float = 0.9  # decay of the average of gradients
    beta2: float = 0.999  # decay of the average of squared gradients
    eps: float = 1e-8  # keeps the denominator off zero
    maximize: bool = False  # climb instead of descend
    decoupled_weight_decay: bool = False  # weight decay apart from the gradient, as in AdamW


@dataclass
class InnerAdamaxConfig(InnerGradientConfig):
    """Adam by the infinity norm."""

    name: str = "adamax"
    beta1: float = 0.9  # decay of the average of gradients
    beta2: float = 0.999  # decay of the largest gradient so far
    eps: float = 1e-8  # keeps the denominator off zero
    maximize: bool = False  # climb instead of descend


@dataclass
class InnerAdadeltaConfig(InnerGradientConfig):
    """Adadelta: steps as long as the recent ones, by the recent gradients."""

    name: str = "adadelta"
    lr: float = 1.0
    rho: float = 0.9  # decay of the averages of squared gradients and moves
    eps: float = 1e-6  # keeps the denominator off zero
    maximize: bool = False  # climb instead of descend

    def __post_init__(self) -> None:
        super().__post_init__()
        between("inner_opt.rho", self.rho, 0, 1)


@dataclass
class InnerAdagradConfig(InnerGradientConfig):
    """Adagrad: steps shrink with the sum of all squared gradients."""

    name: str = "adagrad"
    lr_decay: float = 0.0  # step t, from 0, has lr / (1 + t · lr_decay)
    initial_accumulator_value: float = 0.0  # where the sum of squared gradients starts
    eps: float = 1e-10  # keeps the denominator off zero
    maximize: bool = False  # climb instead of descend

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("inner_opt.initial_accumulator_value", self.initial_accumulator_value, 0)


@dataclass
class InnerRMSpropConfig(InnerGradientConfig):
    """RMSprop: gradients over the root of their average square."""

    name: str = "rmsprop"
    alpha: float = 0.99  # decay of the average of squared gradients
    eps: float = 1e-8  # keeps the denominator off zero
    momentum: float = 0.0  # share of the previous step that is kept
    centered: bool = False  # divide by the standard deviation instead
    maximize: bool = False  # climb instead of descend

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("inner_opt.alpha", self.alpha, 0)


@dataclass
class InnerRpropConfig(InnerOptConfig):
    """Rprop: steps by the signs of the gradients, through which no derivative flows."""

    name: str = "rprop"
    lr: float = 0.01  # the first step size
    eta_minus: float = 0.5  # factor of a step size whose gradient changed its sign
    eta_plus: float = 1.2  # factor of one whose gradient kept it
    step_size_min: float = 1e-6  # smallest step size
    step_size_max: float = 50.0  # largest step size
    maximize: bool = False  # climb instead of descend

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("inner_opt.lr", self.lr, 0)
        between("inner_opt.eta_minus", self.eta_minus, 1e-9, _BELOW_ONE)
        if not self.eta_plus > 1:
            raise ConfigError(f"inner_opt.eta_plus={self.eta_plus}: must be above 1")


@dataclass
class InnerASGDConfig(InnerGradientConfig):
    """Averaged SGD. The average itself is not used, only the decay of the learning rate."""

    name: str = "asgd"
    lr: float = 0.4
    lambd: float = 1e-4  # decay of the parameters and, with alpha, of the lr
    alpha: float = 0.75  # power of the decay of the lr
    t0: float = 1e6  # step from which on parameters are averaged
    maximize: bool = False  # climb instead of descend

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lambd", "alpha"):
            at_least(f"inner_opt.{name}", getattr(self, name), 0)


@dataclass
class InnerAdafactorConfig(InnerGradientConfig):
    """Adafactor: second moments by rows and columns."""

    name: str = "adafactor"
    beta2_decay: float = -0.8  # exponent of the decay of the second moment
    eps1: float | None = None  # lower bound of the root second moment; null: machine epsilon
    eps2: float = 1e-3  # lower bound of a parameter's root mean square
    d: float = 1.0  # root mean square to which updates are clipped
    maximize: bool = False  # climb instead of descend

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta2_decay > 0:
            raise ConfigError(f"inner_opt.beta2_decay={self.beta2_decay}: must be 0 or less")
        at_least("inner_opt.eps1", self.eps1 or 0, 0)
        at_least("inner_opt.eps2", self.eps2, 0)
        at_least("inner_opt.d", self.d, 1)


@dataclass
class InnerMuonConfig(InnerGradientConfig):
    """Muon: orthogonalised momentum, of matrices only; the rest through inner_opt=mixed."""

    name: str = "muon"
    lr: float = 0.02
    weight_decay: float = 0.1  # pulls the parameters towards zero, not by the gradient
    momentum: float = 0.95  # share of the previous step that is kept
    nesterov: bool = True  # Nesterov momentum
    ns_a: float = 3.4445  # coefficients of the Newton-Schulz polynomial
    ns_b: float = -4.775  # the second of them
    ns_c: float = 2.0315  # the third
    eps: float = 1e-7  # keeps the denominator off zero
    ns_steps: int = 5  # Newton-Schulz iterations
    adjust_lr_fn: str = "original"  # original, match_rms_adamw or spectral_unclamped
    ns_precision: str = "bfloat16"  # bfloat16 as in torch, or full: derivatives of full precision

    def __post_init__(self) -> None:
        super().__post_init__()
        between("inner_opt.ns_steps", self.ns_steps, 0, 99)
        allowed = ("original", "match_rms_adamw", "spectral_unclamped")
        one_of("inner_opt.adjust_lr_fn", self.adjust_lr_fn, allowed)
        one_of("inner_opt.ns_precision", self.ns_precision, ("bfloat16", "full"))


def check_group(group: dict[str, Any]) -> None:
    """Refuse a parameter group that is not a pattern with numbers."""
    example = "expected e.g. {params: head.*, lr: 0.1}"
    if not isinstance(group.get("params"), str):
        raise ConfigError(f"inner_opt.groups: {group} names no parameters; {example}")
    values = [value for key, value in group.items() if key != "params"]
    if not values or any(type(value) not in (int, float) for value in values):
        raise ConfigError(f"inner_opt.groups: the settings of {group} must be numbers; {example}")


TORCH_SCHEMAS: dict[str, type[InnerOptConfig]] = {
    "sgd": InnerSgdConfig,
    "adam": InnerAdamConfig,
    "adamw": InnerAdamWConfig,
    "nadam": InnerNAdamConfig,
    "radam": InnerRAdamConfig,
    "adamax": InnerAdamaxConfig,
    "adadelta": InnerAdadeltaConfig,
    "adagrad": InnerAdagradConfig,
    "rmsprop": InnerRMSpropConfig,
    "rprop": InnerRpropConfig,
    "asgd": InnerASGDConfig,
    "adafactor": InnerAdafactorConfig,
    "muon": InnerMuonConfig,
}
"""Inner optimizer -> its schema."""
