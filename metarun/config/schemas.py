"""The settings of each component: typed, documented, validated. Imports neither torch nor Hydra.

Those of the inner optimizers are in `metarun.config.inner_schemas`.

Hydra checks keys and types when a command line is composed, `__post_init__` checks values.
"""

import os
from dataclasses import dataclass, field, fields
from pathlib import Path

from metarun.config.checks import between, finite, one_of, positive
from metarun.errors import ConfigError

# Far beyond what anybody means, and near enough that arithmetic stays within 64 bits.
MOST_STEPS = 10**5
MOST_UNITS = 10**6
MOST_LAYERS = 1000

# ---------------------------------------------------------------- algorithms


@dataclass
class MamlConfig:
    """MAML (Finn et al. 2017)."""

    name: str = "maml"
    order: int = 2  # 2: full meta-gradient; 1: inner gradients are constants (FOMAML)
    inner_steps: int = 1  # inner steps in training
    eval_inner_steps: int = 3  # inner steps in validation and test
    adapt: list[str] = field(default_factory=lambda: ["*"])  # patterns over parameter names
    reduction: str = "mean"  # inner loss: mean, or per_shot (sum over classes, mean over shots)

    def __post_init__(self) -> None:
        one_of("algo.order", self.order, (1, 2))
        between("algo.inner_steps", self.inner_steps, 0, MOST_STEPS)
        between("algo.eval_inner_steps", self.eval_inner_steps, 0, MOST_STEPS)
        one_of("algo.reduction", self.reduction, ("mean", "per_shot"))
        if not self.adapt:
            raise ConfigError("algo.adapt is empty: name what the inner loop adapts, e.g. ['*']")


@dataclass
class AnilConfig(MamlConfig):
    """ANIL (Raghu et al. 2020): MAML whose inner loop adapts the head only."""

    name: str = "anil"
    adapt: list[str] = field(default_factory=lambda: ["head.*"])


# ---------------------------------------------------------------- data sets


@dataclass
class GlyphsConfig:
    """Handwriting-like characters that the program draws from a seed; needs no files."""

    name: str = "glyphs"
    seed: int = 0  # of the drawings, not of the episodes

    def __post_init__(self) -> None:
        between("data.seed", self.seed, 0, 2**63 - 1)


@dataclass
class OmniglotConfig:
    """Omniglot (Lake et al. 2015): 1623 characters, 20 drawings each."""

    name: str = "omniglot"
    root: str | None = None  # folder of data sets; null: a cache folder of the user
    download: bool = True  # fetch the files if they are not there
    split: str = "random"  # random (1100/100/423 characters) or vinyals (1028/172/423)
    split_seed: int = 0  # of the random split
    rotations: bool = True  # each character turned by 90, 180, 270 degrees is a class too

    def __post_init__(self) -> None:
        one_of("data.split", self.split, ("random", "vinyals"))
        if self.root is not None:
            self.root = str(Path(os.path.expanduser(self.root)).absolute())


@dataclass
class SinusoidConfig:
    """Regression on random sine curves (Finn et al. 2017)."""

    name: str = "sinusoid"


# ---------------------------------------------------------------- backbones


@dataclass
class Conv4Config:
    """Four convolution blocks."""

    name: str = "conv4"
    width: int = 64  # channels of each block
    pool: str = "stride"  # stride (2 in each convolution) or max (2×2 pooling)

    def __post_init__(self) -> None:
        between("backbone.width", self.width, 1, MOST_UNITS)
        one_of("backbone.pool", self.pool, ("stride", "max"))


@dataclass
class MlpConfig:
    """A multilayer perceptron."""

    name: str = "mlp"
    hidden: list[int] = field(default_factory=lambda: [40, 40])  # units of each hidden layer

    def __post_init__(self) -> None:
        if len(self.hidden) > MOST_LAYERS:
            raise ConfigError(f"backbone.hidden: must be {MOST_LAYERS} layers or fewer")
        for units in self.hidden:
            between("backbone.hidden", units, 1, MOST_UNITS)


# ---------------------------------------------------------------- outer optimizers


@dataclass
class OuterOptConfig:
    """What every outer optimizer has."""

    name: str = "???"
    lr: float = 0.001  # learning rate of the outer loop
    weight_decay: float = 0.0  # not applied to learned inner hyperparameters
    schedule: str = "constant"  # constant, or cosine (from lr down to min_lr at the last step)
    min_lr: float = 0.0  # where cosine ends
    clip_norm: float | None = None  # meta-gradients are scaled down to this global norm
    clip_value: float | None = None  # meta-gradients are clipped elementwise to ± this

    def __post_init__(self) -> None:
        for own in fields(self):
            finite(f"outer_opt.{own.name}", getattr(self, own.name))
        positive("outer_opt.lr", self.lr)
        between("outer_opt.min_lr", self.min_lr, 0, self.lr)
        one_of("outer_opt.schedule", self.schedule, ("constant", "cosine"))
        positive("outer_opt.clip_norm", self.clip_norm)
        positive("outer_opt.clip_value", self.clip_value)


@dataclass
class OuterAdamConfig(OuterOptConfig):
    """Adam, torch's own."""

    name: str = "adam"
    beta1: float = 0.9  # decay of the average of gradients
    beta2: float = 0.999  # decay of the average of squared gradients
    eps: float = 1e-8  # keeps the denominator off zero


@dataclass
class OuterAdamWConfig(OuterAdamConfig):
    """Adam with decoupled weight decay, torch's own."""

    name: str = "adamw"
    weight_decay: float = 0.01


@dataclass
class OuterSgdConfig(OuterOptConfig):
    """Stochastic gradient descent, torch's own."""

    name: str = "sgd"
    lr: float = 0.01
    momentum: float = 0.0  # share of the previous step that is kept
    nesterov: bool = False  # Nesterov momentum
