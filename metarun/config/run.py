"""The config of a run.

Every key of the command line is a field here, or in the file of a component
(`metarun.config.catalogue`). Imports neither torch nor Hydra.
"""

from dataclasses import field, fields, replace
from typing import Any, Literal

from metarun.config.augment import AugmentConfig
from metarun.config.checks import between, positive
from metarun.config.component import section
from metarun.errors import ConfigError

# Beyond what anybody means; products of a few stay within 64 bits.
MOST = 10**9
MOST_TASKS = 10**5  # and what tasks are made of


Within = Literal["all", "group"]
NUMBERS = ("way", "shot", "query", "min_way", "min_shot", "max_support")  # of a task's shape


@section("task.train.")
class TrainTaskConfig:
    """The shape of a training episode, where it is another one; null: that of an evaluation."""

    way: int | None = None  # classes
    shot: int | None = None  # support examples of each class
    query: int | None = None  # query examples of each class
    within: Within | None = None  # of what the classes are drawn
    min_way: int | None = None  # fewest classes
    min_shot: int | None = None  # fewest support examples of each class
    imbalanced: bool | None = None  # whether each class has its own number of them
    max_support: int | None = None  # most support examples of an imbalanced task

    def __post_init__(self) -> None:
        for name in NUMBERS:
            if getattr(self, name) is not None:
                between(f"task.train.{name}", getattr(self, name), 1, MOST_TASKS)


@section("task.")
class TaskConfig:
    """The shape of an episode."""

    way: int = 5  # classes
    shot: int = 1  # support examples of each class
    query: int = 15  # query examples of each class
    within: Within = "all"  # of what a task's classes are drawn: all, or one group (an alphabet)
    min_way: int | None = None  # fewest classes: each task has from so many to way; null: way
    min_shot: int | None = None  # fewest support examples of each class, likewise; null: shot
    imbalanced: bool = False  # each class has its own number of them, drawn as in Meta-Dataset
    max_support: int | None = None  # imbalanced: most support examples of a task; null: way * shot
    train: TrainTaskConfig = field(default_factory=TrainTaskConfig)

    def __post_init__(self) -> None:
        for name in NUMBERS:
            if getattr(self, name) is not None:
                between(f"task.{name}", getattr(self, name), 1, MOST_TASKS)
        for least, most in (("min_way", "way"), ("min_shot", "shot")):
            value, limit = getattr(self, least), getattr(self, most)
            if value is not None and value > limit:
                raise ConfigError(
                    f"task.{least}={value}: must be at most task.{most}={limit}, the largest number"
                )
        if self.min_way == 1:
            raise ConfigError("task.min_way=1: a classification task needs 2 classes or more")
        if self.imbalanced and self.min_shot is not None:
            raise ConfigError(
                f"task.min_shot={self.min_shot}: with task.imbalanced=true a class has 1 support "
                "example or more; leave it out"
            )
        self._check_max_support()

    def _check_max_support(self) -> None:
        most = self.max_support
        if most is None:
            return
        if not self.imbalanced:
            raise ConfigError(
                f"task.max_support={most}: it is for task.imbalanced=true; leave it out"
            )
        if not self.way <= most <= self.way * self.shot:
            raise ConfigError(
                f"task.max_support={most}: must be from task.way={self.way} to "
                f"task.way * task.shot = {self.way * self.shot}"
            )

    @property
    def uneven(self) -> str | None:
        """What makes the number of classes or of support examples differ; None: nothing does."""
        if self.min_way not in (None, self.way):
            return f"min_way={self.min_way}"
        if self.min_shot not in (None, self.shot):
            return f"min_shot={self.min_shot}"
        return "imbalanced=true" if self.imbalanced else None

    @property
    def support(self) -> int:
        """Examples of a support set, with what pads it."""
        return self.way * self.shot if self.max_support is None else self.max_support

    def even(self) -> "TaskConfig":
        """The shape of the largest tasks, in training as well."""
        return replace(self, **EVEN, train=replace(self.train, **dict.fromkeys(EVEN)))

    def in_training(self) -> "TaskConfig":
        """The shape of a training episode.

        Raises:
            ConfigError: the settings of both do not fit together.
        """
        own = {name: value for name, value in vars(self.train).items() if value is not None}
        if not own:
            return self
        try:
            return replace(self, **redrawn(own, self))
        except ConfigError as error:
            raise ConfigError(str(error).replace("task.", "task.train.")) from error


EVEN: dict[str, Any] = {
    "min_way": None, "min_shot": None, "imbalanced": False, "max_support": None,
}  # fmt: skip
"""The settings of tasks that all have one shape."""


def redrawn(given: dict[str, Any], task: TaskConfig) -> dict[str, Any]:
    """Changes of a shape; where shots are now drawn in another way, what was of the former goes."""
    if given.get("imbalanced", task.imbalanced) == task.imbalanced:
        return given
    former = "max_support" if task.imbalanced else "min_shot"
    return {former: None} | given


@section("trainer.")
class TrainerConfig:
    """The outer loop."""

    steps: int = 2000  # meta-steps
    meta_batch: int = 16  # tasks in a meta-step
    eval_every: int = 200  # meta-steps between validations; the last step has one too
    eval_episodes: int = 200  # validation tasks, the same ones each time
    test_episodes: int = 600  # test tasks at the end of the run
    checkpoint_every: int = 200  # meta-steps between checkpoints
    keep_last: int = 2  # newest checkpoints that stay, as step-*
    keep_best: int = 1  # best checkpoints by validation that stay; from 2 on as best-step-* too
    ensemble: int | None = None  # of the best: their mean outputs are tested, too; null: none
    keep_every: int | None = None  # checkpoints of multiples of this many meta-steps stay as well
    log_every: int = 20  # meta-steps between lines in metrics.jsonl and TensorBoard
    nonfinite: Literal["stop", "skip"] = "stop"  # where a gradient is NaN or infinite
    max_skipped: int = 100  # a run that skips more meta-steps than this fails
    wandb: Literal["off", "online", "offline"] = "off"  # Weights & Biases
    wandb_project: str = "metarun"  # where Weights & Biases files the run

    def __post_init__(self) -> None:
        for own in fields(self):
            if isinstance(value := getattr(self, own.name), int):
                between(f"trainer.{own.name}", value, 1, MOST)
        between("trainer.meta_batch", self.meta_batch, 1, MOST_TASKS)
        if self.ensemble is not None:
            self._check_ensemble(self.ensemble)
        if self.keep_every is not None and self.keep_every % self.checkpoint_every:
            raise ConfigError(
                f"trainer.keep_every={self.keep_every}: must be a multiple of "
                f"trainer.checkpoint_every={self.checkpoint_every}, when checkpoints are written"
            )

    def _check_ensemble(self, size: int) -> None:
        if size > self.keep_best:
            raise ConfigError(
                f"trainer.ensemble={size}: only trainer.keep_best={self.keep_best} checkpoints "
                "are kept; raise that"
            )
        validations = -(-self.steps // self.eval_every)
        if size > validations:
            raise ConfigError(
                f"trainer.ensemble={size}: there are only {validations} validations; lower it, or "
                "lower trainer.eval_every"
            )


Norm = Literal["transductive", "support", "support_plus_one", "running"]
Batching = Literal["auto", "vmap", "loop"]
Precision = Literal["float32", "float64", "bf16", "tf32"]
Compile = Literal["auto", "none", "replay", "inductor"]
Gradient = Literal[
    "auto",
    "reverse",
    "first_order",
    "truncated",
    "checkpoint",
    "mixed",
    "implicit",
    "evolution",
]


def check_chunk(chunk: Any) -> None:
    """Refuse what is neither a number of tasks nor "auto"."""
    if chunk is None or chunk == "auto":
        return
    if type(chunk) is not int:
        raise ConfigError(f"engine.chunk={chunk}: give a number of tasks, auto or null")
    between("engine.chunk", chunk, 1, MOST_TASKS)


@section("engine.")
class EngineConfig:
    """How the tasks of a batch are computed, and the inner loop is differentiated."""

    batching: Batching = "auto"  # of the tasks
    chunk: Any = None  # tasks at a time under vmap; auto: as many as fit; null: see the docs
    precision: Precision = "float32"  # of all; bf16, tf32: of what the network computes alone
    inner_precision: Literal["float32", "bf16"] | None = None  # in inner loops; null: as precision
    compile: Compile = "auto"  # whether a meta-step is recorded
    cuda_graphs: bool = True  # whether a GPU launches what is recorded as one CUDA graph
    gradient: Gradient = "auto"  # of the inner loop; auto: by algo.order and length
    last: int = 1  # truncated: inner steps, the last ones, that are differentiated through
    block: int | None = 1  # checkpoint: inner steps in a block; null: the root of their number
    proximal: float = 2.0  # implicit: weight of the pull to the initial weights
    solver: Literal["cg", "neumann", "fixed_point"] = "cg"  # implicit
    solver_steps: int = 5  # implicit: iterations of the solver
    solver_lr: float = 0.1  # implicit: step size of neumann and fixed_point
    samples: int = 16  # evolution: antithetic pairs
    sigma: float = 0.01  # evolution: size of the perturbations

    def __post_init__(self) -> None:
        check_chunk(self.chunk)
        for name in ("block", "solver_steps", "samples"):
            if getattr(self, name) is not None:
                between(f"engine.{name}", getattr(self, name), 1, MOST_TASKS)
        between("engine.last", self.last, 0, MOST)
        for name in ("proximal", "solver_lr", "sigma"):
            positive(f"engine.{name}", getattr(self, name))

    @property
    def fixed_chunk(self) -> int | None:
        """The number of tasks at a time that was asked for; None: another decides."""
        return None if self.chunk == "auto" else self.chunk


@section("")
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
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        between("seed", self.seed, 0, 2**63 - 1)


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


OLDER = {"task.imbalanced": False, "task.within": "all", "engine.cuda_graphs": True}
"""What runs had before there were settings of it whose default is not null."""


ADDED = ("task.train.", "augment.", "task.min_", "task.imbalanced", "task.max_support")
"""Settings that are left out where they say nothing; see `without_nothing`."""


def without_nothing(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without those of what is not there.

    Older runs know of no other shape in training, of no augmentation and of no uneven tasks. Where
    there is none, nothing is said.
    """
    even = {f"task.{key}": value for key, value in EVEN.items()}
    return {
        key: value
        for key, value in settings.items()
        if (value is not None or not key.startswith(ADDED))
        and not (key in even and value == even[key])
    }


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Dotted keys of the settings in which two runs differ, but for `NEUTRAL_KEYS`."""
    there, here = OLDER | flat(one), OLDER | flat(other)
    return [
        key
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key) and key not in NEUTRAL_KEYS
    ]


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config with dotted keys."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = value
    return values
