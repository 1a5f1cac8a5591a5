"""A trained run, ready for new tasks; the data that it was trained on need not be there."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metarun.components.algo.adapting import Predictor
from metarun.components.algo.base import Algorithm
from metarun.components.algo.one_model import OneModelConfig
from metarun.components.algo.pretraining import PREFIX
from metarun.components.backbone.norm import BatchNorm
from metarun.components.build import dtype_of, norm_of
from metarun.components.formats import without_gpu
from metarun.config.catalogue import builder
from metarun.config.run import TrainConfig
from metarun.episodes.identity import is_sampled, same_data
from metarun.episodes.source import ImageEpisodes
from metarun.episodes.store import ClassStore
from metarun.episodes.uneven import uneven_of
from metarun.errors import ConfigError
from metarun.inference.adapting_check import refuse_inputs, refuse_labels
from metarun.pictures.inputs import Inputs, inputs_of
from metarun.rundir import checkpoint
from metarun.system.one_at_a_time import OneAtATime
from metarun.system.random_state import random_state_kept
from metarun.training.device import choose_device
from metarun.training.layout import channels_last
from metarun.training.setup import Setup, build, from_plain
from metarun.training.state import restore_meta


@dataclass(frozen=True)
class Trained:
    """A trained run.

    Attributes:
        path: its checkpoint.
        step: meta-steps that were done.
        setup: everything that its config describes. Where the run has learned from pictures, its
            source is a stand-in (`stand_in`), and no data.
        meta: what it has learned, by name.
        inputs: what its network gets of a picture; None: it has not learned from pictures.
        turns: threads take turns by it. Adapted weights stand in the network while it is computed
            (`torch.func.functional_call`), and it is in evaluation mode then, so another thread
            must not compute with it.
    """

    path: Path
    step: int
    setup: Setup
    meta: dict[str, Tensor]
    inputs: Inputs | None
    turns: OneAtATime = field(default_factory=OneAtATime, repr=False, compare=False)

    @property
    def config(self) -> TrainConfig:
        """The config of the run, with what was changed."""
        return self.setup.config

    @property
    def model(self) -> nn.Module:
        """The network as it was before training, for `torch.func.functional_call` with `meta`."""
        return self.setup.model

    @property
    def algorithm(self) -> Algorithm:
        """Pure functions of `meta` and of a task."""
        return self.setup.algorithm

    def adapt(self, x: Tensor, y: Tensor, way: int) -> Predictor:
        """Adapt to the examples of a task, as an evaluation does.

        Threads may call it, and what it returns, at the same time: they take turns.

        Args:
            x: (examples, *input_shape), of the run's type and device; of pictures, from 0 to 1.
            y: int64 (examples,), the classes from 0 to way - 1. They may have any number of
                examples each, in any order, but one at least; in a run of uneven tasks a class
                may have none, and has no probability then.
            way: how many classes there are: for networks with a head of their own, theirs.

        Returns:
            From examples (n, *input_shape) to their scores (n, way), whose softmax are
            probabilities. `predict_together` says when one depends on the others.

        Raises:
            ConfigError: the algorithm or its network cannot do this task.
            ValueError: the examples or their labels are not as said above.
        """
        refuse_way(self, way)
        refuse_inputs(self.setup, "examples", x)
        refuse_labels(self.setup, y, len(x), way)
        if self.algorithm.adapt is None:
            raise ConfigError(
                f"algo={self.config.algo.name} does not say how it adapts to examples, so it can "
                "only be evaluated: it is made neither by at_once nor by by_steps"
            )
        # The layout of an evaluation: another one would round otherwise.
        laid_out: Callable[..., Any] = _as_it_is
        if self.setup.plan.channels_last:
            laid_out = channels_last(_as_it_is)
        with self.turns, torch.no_grad():
            meta, own_x, own_y = laid_out(self.meta, x, y)
            predict = self.algorithm.adapt(meta, own_x, own_y, way)

        def scores(queries: Tensor) -> Tensor:
            refuse_inputs(self.setup, "queries", queries)
            with self.turns, torch.no_grad():
                (own,) = laid_out(queries)
                return predict(own)

        return scores

    def to_inputs(self, pixels: Tensor) -> Tensor:
        """uint8 pixels as what the network gets: from 0 to 1, of the run's type and device."""
        return pixels.to(self.setup.device, dtype_of(self.config)).div_(255.0)

    @property
    def predict_together(self) -> str | None:
        """Why a prediction depends on the other queries of its batch; None: it does not."""
        if self.setup.algorithm.transductive:
            return f"algo={self.config.algo.name} adapts to the queries together"
        layers = (part for part in self.model.modules() if isinstance(part, BatchNorm))
        if norm_of(self.config) == "transductive" and next(layers, None) is not None:
            return (
                "batch normalisation takes the moments of the queries (transductive; of another "
                "backbone.norm, support say, it takes others)"
            )
        return None


def _as_it_is(*given: Any) -> Any:
    return given


_loading = OneAtATime()
"""A network is built by torch's random numbers, of which a process has one sequence."""


def load(
    run: str | Path,
    device: str = "auto",
    way: int | None = None,
    change: Callable[[TrainConfig], TrainConfig] | None = None,
    with_data: bool = False,
) -> Trained:
    """Load a trained run.

    Args:
        run: a run directory (its best checkpoint) or a checkpoint file.
        device: "auto", "cpu", "cuda" or "cuda:N".
        way: classes of the tasks to come; None: as many as in the run's evaluations.
        change: gives the config to use in place of the run's; its network stays the same.
        with_data: whether its source is the data of the run.

    Raises:
        ConfigError: there is no such run, it trained one model and solves no tasks, the algorithm
            cannot do tasks of so many classes, or these are other data than the run was trained on.
        DataError: the data are missing or damaged.
        CheckpointError: the checkpoint is damaged, or needs a component that is not there.

    Example:
        >>> import metarun
        >>> import torch
        >>> trained = metarun.load("outputs/train/mine")  # of 5-way tasks of pictures, 1 x 28 x 28
        >>> x, y = torch.rand(10, 1, 28, 28), torch.arange(10) % 5
        >>> trained.adapt(x, y, way=5)(torch.rand(7, 1, 28, 28)).shape
        torch.Size([7, 5])
    """
    with _loading:
        return _load(run, device, way, change, with_data)


def _load(
    run: str | Path,
    device: str,
    way: int | None,
    change: Callable[[TrainConfig], TrainConfig] | None,
    with_data: bool,
) -> Trained:
    path = checkpoint.find(run)
    content = checkpoint.load(path)
    own = from_plain(content["config"])
    _refuse_one_model(own)
    config = own if change is None else change(own)
    config = replace(config, device=device)
    if way is not None:
        config = replace(config, task=replace(config.task.even(), way=way))
    builder("data", config.data.name)  # imports its file, which says what it does to pictures
    inputs = inputs_of(config.data)
    where = choose_device(device)
    config = without_gpu(own, config, where)
    with_data = with_data or inputs is None
    source = None if inputs is None or with_data else stand_in(config, inputs, content, where)
    with random_state_kept():
        setup = build(
            config, where, planned_for=content["planned_for"], trained_with=own.seed, source=source
        )
    if way is not None and setup.source.kind == "classification" and way != own.task.way:
        _refuse_fixed_way(setup.algorithm, own, way)
    if source is None:
        _refuse_other_data(content["data_identity"], setup)
    return Trained(path, content["step"], setup, restore_meta(setup, content), inputs)


def _refuse_one_model(config: TrainConfig) -> None:
    if isinstance(config.algo, OneModelConfig):
        raise ConfigError(
            f"the run of algo={config.algo.name} trained one classifier of the classes of "
            f"data={config.data.name}, which adapts to no examples of others: `metarun eval` "
            "evaluates it; for new classes train on tasks, such as algo=protonet data=omniglot"
        )


def _refuse_other_data(before: str | None, setup: Setup) -> None:
    known = before is not None and not is_sampled(before)
    if known and not same_data(str(before), setup.identity):
        raise ConfigError(
            f"data={setup.config.data.name} here has another content than the run was trained on: "
            "give data.root=… with the folder of its data"
        )


def refuse_way(trained: Trained, way: int) -> None:
    """Refuse a task of a number of classes that the network does not tell apart.

    Raises:
        ConfigError: says which number it does.
    """
    if way != trained.config.task.way:
        _refuse_fixed_way(trained.algorithm, trained.config, way)


def _refuse_fixed_way(algorithm: Algorithm, config: TrainConfig, way: int) -> None:
    if not algorithm.any_way:
        raise ConfigError(
            f"there are {way} classes, but the run's network tells {config.task.way} apart: give "
            f"{config.task.way} classes, train one with task.way={way}, or choose an algorithm "
            "without a head of its own, such as protonet or r2d2"
        )


def stand_in(
    config: TrainConfig, inputs: Inputs, content: dict[str, Any], device: torch.device
) -> ImageEpisodes:
    """Tasks of the run's shape made of noise, to build its network and its algorithm with.

    They are looked at for their shape, and to find out how the network may be computed.

    Args:
        config: the config of the run.
        inputs: has the shape of a picture.
        content: the checkpoint of the run.
        device: where the tasks are to be.

    Raises:
        ConfigError: tasks have more classes than the run was trained on, and its algorithm is an
            ordinary classifier of these.
    """
    task, shapes = config.task, (config.task, config.task.in_training())
    classes = max(shape.way for shape in shapes)
    rows = [len(value) for name, value in content["meta"].items() if name.startswith(PREFIX)]
    if rows and classes > rows[0]:
        raise ConfigError(
            f"there are {classes} classes, more than the {rows[0]} that algo={config.algo.name} "
            "was trained on: give fewer"
        )
    classes = rows[0] if rows else classes
    each = max(shape.shot + shape.query for shape in shapes)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (each, *inputs.shape), dtype=torch.uint8, generator=generator)
    names = tuple(map(str, range(classes)))
    # All classes have the same images.
    starts, sizes = torch.zeros(classes, dtype=torch.int64), torch.full((classes,), each)
    return ImageEpisodes(
        dict.fromkeys(("train", "val", "test"), ClassStore(noise, starts, sizes, names, "noise")),
        way=task.way,
        shot=task.shot,
        query=task.query,
        seed=config.seed,
        device=device,
        dtype=dtype_of(config),
        uneven=uneven_of(task),
    )
