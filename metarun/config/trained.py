"""The config of the commands that use a trained run: eval, predict, explain, export, sensitivity.

What null leaves open is taken from the run's checkpoint. Imports neither torch nor Hydra.
"""

from dataclasses import field
from typing import Any, Literal, get_args

from metarun.config.checks import between
from metarun.config.component import section
from metarun.config.run import MOST, MOST_TASKS, Batching, Norm, TrainConfig, Within
from metarun.errors import ConfigError


@section("task.")
class EvalTask:
    """Changes to the episode's shape; null keeps the checkpoint's."""

    way: int | None = None  # classes: another number only where the algorithm has no head
    shot: int | None = None  # support examples of each class
    query: int | None = None  # query examples of each class
    within: Within | None = None  # of what a task's classes are drawn
    min_way: int | None = None  # fewest classes
    min_shot: int | None = None  # fewest support examples of each class
    imbalanced: bool | None = None  # whether each class has its own number of them
    max_support: int | None = None  # most support examples of an imbalanced task


@section("algo.")
class EvalAlgo:
    """Changes to the adaptation."""

    eval_inner_steps: int | None = None  # inner steps


@section("backbone.")
class EvalBackbone:
    """Changes to the network's evaluation."""

    norm: Norm | None = None  # whose moments normalise the queries of a task


@section("engine.")
class EvalEngine:
    """Changes to the computation."""

    batching: Batching | None = None  # of the tasks
    chunk: Any = None  # tasks at a time; auto: as many as fit
    precision: Literal["float32", "bf16", "tf32"] | None = None  # what the network computes in


@section("data.")
class EvalData:
    """Where the data are now; data=… for another domain, with the settings of its own."""

    name: str | None = None  # another data set; null: that of the run
    root: str | None = None  # folder of data sets
    download: bool | None = None  # fetch the files if they are not there
    fit: bool | None = None  # another domain's images get the size and the channels of training
    invert: bool | None = None  # dark and light change places in another domain's images


OF_CALIBRATION = ("coverage", "false_alarms", "calibration_tasks")
"""Settings that say something of a calibration alone."""


def _calibration(config: Any) -> None:
    """Refuse fractions that are none, and what is said of a calibration where there is none."""
    for key in OF_CALIBRATION:
        value, usual = getattr(config, key, None), getattr(type(config), key, None)
        if isinstance(value, float) and not 0 < value < 1:
            raise ConfigError(f"{key}={value}: must be above 0 and below 1")
        if value != usual and not config.calibrate:
            raise ConfigError(f"{key}={value}: it goes with calibrate=true; give both, or neither")


@section("")
class EvalConfig:
    """`metarun eval`: what null leaves open is taken from the checkpoint."""

    ckpt: str = "???"  # a run directory (its best one) or a checkpoint file
    split: Literal["train", "val", "test"] = "test"  # whose tasks
    episodes: int | None = None  # tasks; null: as many as the run itself took (600)
    ensemble: int | None = None  # best checkpoints whose outputs are averaged; null: one
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    seed: int | None = None  # of the episodes
    assign: bool = False  # also assign queries to the classes together, as many as each has
    confusion: bool = False  # which classes are taken for which
    calibrate: bool = False  # on as many validation tasks, and measure what that is worth
    coverage: float = 0.9  # calibrate: how often the true label is to be in the set of labels
    false_alarms: float = 0.05  # calibrate: how often a known picture may be called none of these
    plugins: list[str] = field(default_factory=list)  # modules imported for their components
    task: EvalTask = field(default_factory=EvalTask)
    algo: EvalAlgo = field(default_factory=EvalAlgo)
    backbone: EvalBackbone = field(default_factory=EvalBackbone)
    engine: EvalEngine = field(default_factory=EvalEngine)
    data: EvalData = field(default_factory=EvalData)
    more: dict[str, Any] = field(default_factory=dict)  # written algo.…, data.…, inner_opt.…

    def __post_init__(self) -> None:
        between("seed", self.seed or 0, 0, 2**63 - 1)
        for group, settings in self.more.items():
            if group not in ("algo", "data", "inner_opt") or not isinstance(settings, dict):
                raise ConfigError("more: write algo.<setting>=…, data.… or inner_opt.…")
        for name in ("episodes", "ensemble"):
            if getattr(self, name) is not None:
                between(name, getattr(self, name), 1, MOST)
        _calibration(self)
        for key in ("calibrate", "confusion", "assign"):
            if getattr(self, key) and self.ensemble is not None:
                raise ConfigError(f"{key}=true is for one checkpoint: leave ensemble out")


def _pictures(query: Any) -> None:
    given = [query] if isinstance(query, str) else query
    if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
        raise ConfigError(f"query={query}: name a folder, a file, or [several,of,them]")
    if not given or not all(one.strip() for one in given):
        raise ConfigError("query= is empty: name a folder or pictures")


@section("data.")
class PredictData:
    """How the pictures are read, and where the data of the run are."""

    skip_unreadable: bool = False  # leave out pictures that cannot be read, and name them
    root: str | None = None  # calibrate: folder of data sets, or that of the run's data=folder


@section("")
class PredictConfig:
    """`metarun predict`: labels for pictures, by a few examples of each class."""

    ckpt: str = "???"  # a run directory (its best one) or a checkpoint file
    support: str = "???"  # a folder with a folder of pictures for each class
    query: Any = "???"  # pictures to label: a folder, a file, a pattern, or [a.png,b.png]
    out: str = "predictions.csv"  # the table: path, label, its probability, that of each class
    sheet: str | None = None  # a PNG file for the pictures with their labels
    calibrate: bool = False  # by validation tasks of the run, whose data must be there
    calibration_tasks: int = 200  # how many; kept for the next time
    coverage: float = 0.9  # calibrate: how often the true label is to be in the set of labels
    false_alarms: float = 0.05  # calibrate: how often a known picture may be called none of these
    batch: int | None = None  # pictures at a time; null: the queries of a task of the run
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    plugins: list[str] = field(default_factory=list)  # modules imported for their components
    algo: EvalAlgo = field(default_factory=EvalAlgo)
    backbone: EvalBackbone = field(default_factory=EvalBackbone)
    data: PredictData = field(default_factory=PredictData)

    def __post_init__(self) -> None:
        _pictures(self.query)
        if self.sheet is not None and not self.sheet.lower().endswith(".png"):
            raise ConfigError(f"sheet={self.sheet}: must end in .png")
        if self.batch is not None:
            between("batch", self.batch, 1, MOST_TASKS)
        between("calibration_tasks", self.calibration_tasks, 2, MOST_TASKS)
        _calibration(self)


@section("data.")
class ExplainData(EvalData):
    """Where the data of the run are now, or how your own pictures are read."""

    skip_unreadable: bool = False  # support, query: leave out what cannot be read, and name it


@section("")
class ExplainConfig:
    """`metarun explain`: one task as a picture."""

    ckpt: str = "???"  # a run directory (its best one) or a checkpoint file
    episode: int = 0  # the number of the task
    split: Literal["train", "val", "test"] = "test"  # whose tasks
    support: str | None = None  # a folder of class folders: a task of your own pictures
    query: Any = None  # its queries: a folder, a file, a pattern, or [a.png,b.png]
    out: str = "explain.png"  # the picture
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    plugins: list[str] = field(default_factory=list)  # modules imported for their components
    algo: EvalAlgo = field(default_factory=EvalAlgo)
    backbone: EvalBackbone = field(default_factory=EvalBackbone)
    data: ExplainData = field(default_factory=ExplainData)

    def __post_init__(self) -> None:
        between("episode", self.episode, 0, MOST)
        if (self.support is None) != (self.query is None):
            one, other = ("support", "query") if self.query is None else ("query", "support")
            raise ConfigError(f"{one} goes with {other}=…: a task of your own pictures has both")
        if self.query is not None:
            _pictures(self.query)
            own, usual = vars(self), ExplainConfig
            for key in ("episode", "split"):
                if own[key] != getattr(usual, key):
                    raise ConfigError(f"{key}={own[key]}: it is for tasks of the run; leave it out")
            for key, value in vars(self.data).items():
                if key != "skip_unreadable" and value is not None:
                    raise ConfigError(
                        f"data.{key}: it is for tasks of the run, and support=… takes none of its "
                        "data; leave it out"
                    )
        elif self.data.skip_unreadable:
            raise ConfigError("data.skip_unreadable: it is for support=… and query=…; leave it out")
        if not self.out.lower().endswith(".png"):
            raise ConfigError(f"out={self.out}: must end in .png")


@section("task.")
class ExportTask:
    """calibrate: the tasks that probabilities are calibrated for; null: those of the run."""

    way: int | None = None  # classes
    shot: int | None = None  # examples of each class

    def __post_init__(self) -> None:
        for key, least in (("way", 2), ("shot", 1)):
            if (value := getattr(self, key)) is not None:
                between(f"task.{key}", value, least, MOST_TASKS)


@section("data.")
class ExportData:
    """Where the data of the run are."""

    root: str | None = None  # calibrate: folder of data sets, or that of the run's data=folder


@section("")
class ExportConfig:
    """`metarun export`: a trained run as one file that labels pictures without metarun."""

    ckpt: str = "???"  # a run directory (its best one) or a checkpoint file
    out: str = "model.pt2"  # .pt2: for torch.export.load; .onnx: needs metarun[export]
    calibrate: bool = False  # by validation tasks of the run, whose data must be there
    calibration_tasks: int = 200  # how many; kept for the next time
    plugins: list[str] = field(default_factory=list)  # modules imported for their components
    task: ExportTask = field(default_factory=ExportTask)
    backbone: EvalBackbone = field(default_factory=EvalBackbone)
    data: ExportData = field(default_factory=ExportData)

    def __post_init__(self) -> None:
        if not self.out.lower().endswith((".pt2", ".onnx")):
            raise ConfigError(f"out={self.out}: must end in .pt2 or .onnx")
        between("calibration_tasks", self.calibration_tasks, 2, MOST_TASKS)
        _calibration(self)
        for key in ("way", "shot"):
            if (value := getattr(self.task, key)) is not None and not self.calibrate:
                raise ConfigError(
                    f"task.{key}={value}: it is for calibrate=true, since a file takes any number "
                    "of classes and of examples; leave it out"
                )


@section("data.")
class SensitivityData:
    """Where the data of the run are now."""

    root: str | None = None  # folder of data sets
    download: bool | None = None  # fetch the files if they are not there


@section("")
class SensitivityConfig:
    """`metarun sensitivity`: one checkpoint under several protocols, on the same tasks."""

    ckpt: str = "???"  # a run directory (its best one) or a checkpoint file
    split: Literal["train", "val", "test"] = "test"  # whose tasks
    episodes: int | None = None  # tasks; null: as many as the run itself took (600)
    norms: list[str] = field(  # moments that normalise queries, alone and with `queries`
        default_factory=lambda: ["transductive", "support", "support_plus_one"]
    )
    queries: list[int] = field(default_factory=lambda: [1, 5, 15])  # queries of each class
    inner_steps: list[int] = field(default_factory=lambda: [1, 5, 10])  # inner steps
    label_orders: int = 5  # other orders of a task's classes, which give them other labels
    rotations: bool = True  # with rotated classes, or without them, where the data have such
    fewer: list[int] = field(default_factory=lambda: [100, 600])  # the first so many tasks alone
    out: str = "sensitivity.md"  # the table; beside it as .json
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    plugins: list[str] = field(default_factory=list)  # modules imported for their components
    engine: EvalEngine = field(default_factory=EvalEngine)
    data: SensitivityData = field(default_factory=SensitivityData)

    def __post_init__(self) -> None:
        if self.episodes is not None:
            between("episodes", self.episodes, 2, MOST)
        for key, least in (("queries", 1), ("inner_steps", 0), ("fewer", 2)):
            for value in getattr(self, key):
                between(key, value, least, MOST)
        for name in self.norms:
            if name not in (known := get_args(Norm)):
                raise ConfigError(f"norms: {name} is none of {', '.join(known)}")
        between("label_orders", self.label_orders, 0, 100)
        if not self.out.lower().endswith(".md"):
            raise ConfigError(f"out={self.out}: must end in .md")


COMMANDS = {
    "train": TrainConfig,
    "eval": EvalConfig,
    "predict": PredictConfig,
    "explain": ExplainConfig,
    "export": ExportConfig,
    "sensitivity": SensitivityConfig,
}
"""The config of each command that Hydra composes."""

NEEDED = {
    "ckpt": "run directory or checkpoint file",
    "support": "folder of class folders",
    "query": "folder or pictures",
}
"""What is to be given for a setting without a default."""
