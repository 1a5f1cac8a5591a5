"""The schema of every setting: typed, documented, validated. Imports neither torch nor Hydra.

Each component has a dataclass here, under the name by which configs choose it; Hydra checks
keys and types when the command line is composed, `__post_init__` checks values.
"""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from metarun.errors import ConfigError

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
        _one_of(self, "order", (1, 2))
        _at_least(self, "inner_steps", 0)
        _at_least(self, "eval_inner_steps", 0)
        _one_of(self, "reduction", ("mean", "per_shot"))
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
        _one_of(self, "split", ("random", "vinyals"))
        if self.root is not None:
            self.root = str(Path(self.root).expanduser().absolute())


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
        _at_least(self, "width", 1)
        _one_of(self, "pool", ("stride", "max"))


@dataclass
class MlpConfig:
    """A multilayer perceptron."""

    name: str = "mlp"
    hidden: list[int] = field(default_factory=lambda: [40, 40])  # units of each hidden layer

    def __post_init__(self) -> None:
        if any(units < 1 for units in self.hidden):
            raise ConfigError(f"backbone.hidden={self.hidden}: layers need at least 1 unit")


# ---------------------------------------------------------------- inner optimizers


@dataclass
class InnerOptConfig:
    """What every inner optimizer has: groups, and hyperparameters that are learned."""

    name: str = "???"
    learn: list[str] = field(default_factory=list)  # e.g. [lr]: becomes a meta-parameter
    granularity: str = "global"  # global, parameter, step or parameter_step: one value for each
    groups: list[dict[str, Any]] = field(default_factory=list)  # e.g. [{params: head.*, lr: 0.1}]

    def __post_init__(self) -> None:
        for group in self.groups:
            _check_group(group)
        patterns = [group["params"] for group in self.groups]
        if len(set(patterns)) < len(patterns):
            raise ConfigError(f"inner_opt.groups: two groups for one pattern in {patterns}")
        _one_of(self, "granularity", ("global", "parameter", "step", "parameter_step"))


@dataclass
class InnerSgdConfig(InnerOptConfig):
    """Stochastic gradient descent."""

    name: str = "sgd"
    lr: float = 0.4
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False


@dataclass
class InnerAdamConfig(InnerOptConfig):
    """Adam, differentiable."""

    name: str = "adam"
    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0


# ---------------------------------------------------------------- outer optimizers


@dataclass
class OuterOptConfig:
    """What every outer optimizer has."""

    name: str = "???"
    lr: float = 0.001
    weight_decay: float = 0.0  # not applied to learned inner hyperparameters
    schedule: str = "constant"  # constant, or cosine (from lr down to min_lr at the last step)
    min_lr: float = 0.0
    clip_norm: float | None = None  # meta-gradients are scaled down to this global norm
    clip_value: float | None = None  # meta-gradients are clipped elementwise to ± this

    def __post_init__(self) -> None:
        _one_of(self, "schedule", ("constant", "cosine"))
        _positive(self, "clip_norm")
        _positive(self, "clip_value")


@dataclass
class OuterAdamConfig(OuterOptConfig):
    """torch.optim.Adam."""

    name: str = "adam"
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8


@dataclass
class OuterAdamWConfig(OuterAdamConfig):
    """torch.optim.AdamW: decoupled weight decay."""

    name: str = "adamw"
    weight_decay: float = 0.01


@dataclass
class OuterSgdConfig(OuterOptConfig):
    """torch.optim.SGD."""

    name: str = "sgd"
    lr: float = 0.01
    momentum: float = 0.0
    nesterov: bool = False


# ---------------------------------------------------------------- the rest


@dataclass
class TaskConfig:
    """The shape of an episode."""

    way: int = 5  # classes
    shot: int = 1  # support examples of each class
    query: int = 15  # query examples of each class

    def __post_init__(self) -> None:
        for name in ("way", "shot", "query"):
            _at_least(self, name, 1)


@dataclass
class TrainerConfig:
    """The outer loop."""

    steps: int = 2000  # meta-steps
    meta_batch: int = 16  # tasks in a meta-step
    eval_every: int = 200  # meta-steps between validations; the last step has one too
    eval_episodes: int = 200  # validation tasks, the same ones each time
    test_episodes: int = 600  # test tasks at the end of the run
    checkpoint_every: int = 200  # meta-steps between checkpoints
    log_every: int = 20  # meta-steps between lines in metrics.jsonl and TensorBoard

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self)):
            _at_least(self, name, 1)


@dataclass
class EngineConfig:
    """How the tasks of a batch are computed; not what."""

    batching: str = "auto"  # auto, vmap or loop
    chunk: int | None = None  # tasks at a time under vmap; null: all
    precision: str = "float32"  # float32 or float64

    def __post_init__(self) -> None:
        _one_of(self, "batching", ("auto", "vmap", "loop"))
        _one_of(self, "precision", ("float32", "float64"))
        if self.chunk is not None:
            _at_least(self, "chunk", 1)


@dataclass
class TrainConfig:
    """`metarun train`."""

    seed: int = 0  # of the initial weights and of the episodes
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    plugins: list[str] = field(default_factory=list)  # modules imported for their components
    algo: Any = None
    data: Any = None
    backbone: Any = None
    inner_opt: Any = None
    outer_opt: Any = None
    task: TaskConfig = field(default_factory=TaskConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)


@dataclass
class EvalTask:
    """Changes to the episode's shape; null keeps the checkpoint's."""

    way: int | None = None
    shot: int | None = None
    query: int | None = None


@dataclass
class EvalAlgo:
    """Changes to the adaptation."""

    eval_inner_steps: int | None = None


@dataclass
class EvalEngine:
    """Changes to the computation."""

    batching: str | None = None
    chunk: int | None = None


@dataclass
class EvalData:
    """Where the data are now."""

    root: str | None = None
    download: bool | None = None


@dataclass
class EvalConfig:
    """`metarun eval`: what null leaves open is taken from the checkpoint."""

    ckpt: str = "???"  # a run directory (its best.pt) or a checkpoint file
    split: str = "test"  # train, val or test
    episodes: int = 600
    device: str = "auto"
    seed: int | None = None  # of the episodes
    plugins: list[str] = field(default_factory=list)
    task: EvalTask = field(default_factory=EvalTask)
    algo: EvalAlgo = field(default_factory=EvalAlgo)
    engine: EvalEngine = field(default_factory=EvalEngine)
    data: EvalData = field(default_factory=EvalData)

    def __post_init__(self) -> None:
        _one_of(self, "split", ("train", "val", "test"))
        _at_least(self, "episodes", 1)


SCHEMAS: dict[str, dict[str, type]] = {
    "algo": {"maml": MamlConfig, "anil": AnilConfig},
    "data": {"glyphs": GlyphsConfig, "omniglot": OmniglotConfig, "sinusoid": SinusoidConfig},
    "backbone": {"conv4": Conv4Config, "mlp": MlpConfig},
    "inner_opt": {"sgd": InnerSgdConfig, "adam": InnerAdamConfig},
    "outer_opt": {"adam": OuterAdamConfig, "adamw": OuterAdamWConfig, "sgd": OuterSgdConfig},
}
"""Group -> name -> schema. `metarun.components` has the implementation of each."""


def settings(config: Any, *drop: str) -> dict[str, Any]:
    """A component's settings without its name (and without `drop`), as keyword arguments."""
    return {k: v for k, v in asdict(config).items() if k not in ("name", *drop)}


_PREFIXES = {
    InnerOptConfig: "inner_opt",
    OuterOptConfig: "outer_opt",
    TaskConfig: "task",
    TrainerConfig: "trainer",
    EngineConfig: "engine",
    MamlConfig: "algo",
    OmniglotConfig: "data",
    Conv4Config: "backbone",
}


def _key(config: Any, name: str) -> str:
    """The dotted name under which a user sets a field."""
    for kind, prefix in _PREFIXES.items():
        if isinstance(config, kind):
            return f"{prefix}.{name}"
    return name


def _check_group(group: dict[str, Any]) -> None:
    example = "expected e.g. {params: head.*, lr: 0.1}"
    if not isinstance(group.get("params"), str):
        raise ConfigError(f"inner_opt.groups: {group} names no parameters; {example}")
    values = [value for key, value in group.items() if key != "params"]
    if not values or any(type(value) not in (int, float) for value in values):
        raise ConfigError(f"inner_opt.groups: the settings of {group} must be numbers; {example}")


def _one_of(config: Any, name: str, allowed: tuple[Any, ...]) -> None:
    value = getattr(config, name)
    if value not in allowed:
        choices = ", ".join(str(choice) for choice in allowed)
        raise ConfigError(f"{_key(config, name)}={value}: choose one of {choices}")


def _at_least(config: Any, name: str, least: int) -> None:
    value = getattr(config, name)
    if value < least:
        raise ConfigError(f"{_key(config, name)}={value}: must be {least} or more")


def _positive(config: Any, name: str) -> None:
    value = getattr(config, name)
    if value is not None and not value > 0:
        raise ConfigError(f"{_key(config, name)}={value}: must be above 0")
