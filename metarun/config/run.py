"""The whole config of each command, and the table of components.

Every key of the command line is a field here or in `metarun.config.schemas`. Imports neither torch
nor Hydra.
"""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from metarun.config.checks import between, one_of, positive
from metarun.config.inner_schemas import INNER_SCHEMAS
from metarun.config.schemas import (
    AnilConfig,
    Conv4Config,
    GlyphsConfig,
    MamlConfig,
    MlpConfig,
    OmniglotConfig,
    OuterAdamConfig,
    OuterAdamWConfig,
    OuterSgdConfig,
    SinusoidConfig,
)
from metarun.errors import ConfigError

# Beyond what anybody means; products of a few stay within 64 bits.
MOST = 10**9
MOST_TASKS = 10**5  # and what tasks are made of


@dataclass
class TaskConfig:
    """The shape of an episode."""

    way: int = 5  # classes
    shot: int = 1  # support examples of each class
    query: int = 15  # query examples of each class

    def __post_init__(self) -> None:
        for name in ("way", "shot", "query"):
            between(f"task.{name}", getattr(self, name), 1, MOST_TASKS)


@dataclass
class TrainerConfig:
    """The outer loop."""

    steps: int = 2000  # meta-steps
    meta_batch: int = 16  # tasks in a meta-step
    eval_every: int = 200  # meta-steps between validations; the last step has one too
    eval_episodes: int = 200  # validation tasks, the same ones each time
    test_episodes: int = 600  # test tasks at the end of the run
    checkpoint_every: int = 200  # meta-steps between checkpoints
    keep_last: int = 2  # newest checkpoints that stay, as step-*.pt
    keep_best: int = 1  # best checkpoints by validation that stay; from 2 on as best-step-*.pt too
    keep_every: int | None = None  # checkpoints of multiples of this many meta-steps stay as well
    log_every: int = 20  # meta-steps between lines in metrics.jsonl and TensorBoard
    nonfinite: str = "stop"  # a gradient that is NaN or infinite: stop, or skip the meta-step
    max_skipped: int = 100  # a run that skips more meta-steps than this fails
    wandb: str = "off"  # Weights & Biases: off, online or offline
    wandb_project: str = "metarun"  # where Weights & Biases files the run

    def __post_init__(self) -> None:
        for own in fields(self):
            if isinstance(value := getattr(self, own.name), int):
                between(f"trainer.{own.name}", value, 1, MOST)
        between("trainer.meta_batch", self.meta_batch, 1, MOST_TASKS)
        one_of("trainer.nonfinite", self.nonfinite, ("stop", "skip"))
        if self.keep_every is not None and self.keep_every % self.checkpoint_every:
            raise ConfigError(
                f"trainer.keep_every={self.keep_every}: must be a multiple of "
                f"trainer.checkpoint_every={self.checkpoint_every}, when checkpoints are written"
            )
        one_of("trainer.wandb", self.wandb, ("off", "online", "offline"))


GRADIENTS = (
    "auto",
    "reverse",
    "first_order",
    "truncated",
    "checkpoint",
    "mixed",
    "implicit",
    "evolution",
)


@dataclass
class EngineConfig:
    """How the tasks of a batch are computed, and the inner loop is differentiated."""

    batching: str = "auto"  # auto, vmap or loop
    chunk: int | None = None  # tasks at a time under vmap; null: all, or 8 if a CPU convolves
    precision: str = "float32"  # float32 or float64
    compile: str = "auto"  # auto, none, replay or inductor: whether a meta-step is recorded
    gradient: str = "auto"  # how the inner loop is differentiated; auto: by algo.order and length
    last: int = 1  # truncated: inner steps, the last ones, that are differentiated through
    block: int | None = 1  # checkpoint: inner steps in a block; null: the root of their number
    proximal: float = 2.0  # implicit: weight of the pull to the initial weights
    solver: str = "cg"  # implicit: cg, neumann or fixed_point
    solver_steps: int = 5  # implicit: iterations of the solver
    solver_lr: float = 0.1  # implicit: step size of neumann and fixed_point
    samples: int = 16  # evolution: antithetic pairs
    sigma: float = 0.01  # evolution: size of the perturbations

    def __post_init__(self) -> None:
        one_of("engine.batching", self.batching, ("auto", "vmap", "loop"))
        one_of("engine.precision", self.precision, ("float32", "float64"))
        one_of("engine.compile", self.compile, ("auto", "none", "replay", "inductor"))
        one_of("engine.gradient", self.gradient, GRADIENTS)
        one_of("engine.solver", self.solver, ("cg", "neumann", "fixed_point"))
        for name in ("chunk", "block", "solver_steps", "samples"):
            if getattr(self, name) is not None:
                between(f"engine.{name}", getattr(self, name), 1, MOST_TASKS)
        between("engine.last", self.last, 0, MOST)
        for name in ("proximal", "solver_lr", "sigma"):
            positive(f"engine.{name}", getattr(self, name))


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

    def __post_init__(self) -> None:
        between("seed", self.seed, 0, 2**63 - 1)


@dataclass
class EvalTask:
    """Changes to the episode's shape; null keeps the checkpoint's."""

    way: int | None = None  # classes: the checkpoint's number, no other
    shot: int | None = None  # support examples of each class
    query: int | None = None  # query examples of each class


@dataclass
class EvalAlgo:
    """Changes to the adaptation."""

    eval_inner_steps: int | None = None  # inner steps


@dataclass
class EvalEngine:
    """Changes to the computation."""

    batching: str | None = None  # auto, vmap or loop
    chunk: int | None = None  # tasks at a time


@dataclass
class EvalData:
    """Where the data are now."""

    root: str | None = None  # folder of data sets
    download: bool | None = None  # fetch the files if they are not there


@dataclass
class EvalConfig:
    """`metarun eval`: what null leaves open is taken from the checkpoint."""

    ckpt: str = "???"  # a run directory (its best.pt) or a checkpoint file
    split: str = "test"  # train, val or test
    episodes: int | None = None  # tasks; null: as many as the run itself took (600)
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    seed: int | None = None  # of the episodes
    plugins: list[str] = field(default_factory=list)  # modules imported for their components
    task: EvalTask = field(default_factory=EvalTask)
    algo: EvalAlgo = field(default_factory=EvalAlgo)
    engine: EvalEngine = field(default_factory=EvalEngine)
    data: EvalData = field(default_factory=EvalData)

    def __post_init__(self) -> None:
        between("seed", self.seed or 0, 0, 2**63 - 1)
        one_of("split", self.split, ("train", "val", "test"))
        if self.episodes is not None:
            between("episodes", self.episodes, 1, MOST)


SCHEMAS: dict[str, dict[str, type]] = {
    "algo": {"maml": MamlConfig, "anil": AnilConfig},
    "data": {"glyphs": GlyphsConfig, "omniglot": OmniglotConfig, "sinusoid": SinusoidConfig},
    "backbone": {"conv4": Conv4Config, "mlp": MlpConfig},
    "inner_opt": INNER_SCHEMAS,
    "outer_opt": {"adam": OuterAdamConfig, "adamw": OuterAdamWConfig, "sgd": OuterSgdConfig},
}
"""Group -> name -> schema. `metarun.components.build` has the implementation of each."""


PLUGIN_OPTIONS: list[tuple[str, str]] = []
"""Group and name of the components that plugins have added."""


def settings(config: Any, *drop: str) -> dict[str, Any]:
    """A component's settings without its name (and without `drop`), as keyword arguments."""
    return {k: v for k, v in asdict(config).items() if k not in ("name", *drop)}


# Settings that are not part of what a run is: it may be resumed with others. Data may have moved.
# What becomes of a gradient that is not finite matters only from the first one on.
NEUTRAL_KEYS = (
    "data.root",
    "data.download",
    "trainer.keep_last",
    "trainer.keep_best",
    "trainer.keep_every",
    "trainer.nonfinite",
    "trainer.max_skipped",
    "trainer.wandb",
    "trainer.wandb_project",
)


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config with dotted keys."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = value
    return values
