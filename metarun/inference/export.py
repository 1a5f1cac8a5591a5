"""A trained run as one program of torch: from a support set and queries to labels.

The program needs no metarun. Sizes that differ between tasks stay open in it: the number of
examples, of classes and of queries.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metarun import __version__
from metarun.components.build import dtype_of, norm_of
from metarun.config.run import TrainConfig
from metarun.errors import ConfigError, RunError, first_line
from metarun.inference.trained import Trained
from metarun.unroll._torch import check as size_check

INPUTS, OUTPUTS = ("support", "labels", "queries"), ("scores", "probabilities")
MOST_WAY = 100_000  # classes: torch asks for a bound of what only the labels tell
ROUNDING = 1e-4  # of the largest score: how far a program may be from the run in float32
TORCH_OWN = ("aten", "prim", "prims", "higher_order")  # namespaces of operations
SHAPES = ((2, 3, 1), (7, 1, 4), (3, 12, 9))  # way, shot and queries of the tasks of the check


class Calibrated(NamedTuple):
    """What probabilities were calibrated on: validation tasks of such a shape."""

    temperature: float
    tasks: int
    way: int
    shot: int


class Labeller(nn.Module):
    """`labeller(support, labels, queries) -> (scores, probabilities)`, as `metarun predict` has.

    The number of classes is the largest label and one.

    Args:
        trained: the run.
        temperature: what scores are divided by before the softmax.
    """

    def __init__(self, trained: Trained, temperature: float = 1.0) -> None:
        super().__init__()
        assert trained.algorithm.adapt is not None
        self.adapt, self.dtype = trained.algorithm.adapt, dtype_of(trained.config)
        self.temperature = temperature
        self.places = {name: f"meta_{place}" for place, name in enumerate(trained.meta)}
        for name, place in self.places.items():  # a buffer's name has no dots
            self.register_buffer(place, trained.meta[name].detach().clone())

    def forward(self, support: Tensor, labels: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Label queries.

        Args:
            support: uint8 pixels (examples, channels, height, width); of a run that has not learned
                from pictures its inputs, floating-point numbers (examples, …).
            labels: int64 (examples,), from 0 on.
            queries: as support, (queries, …).

        Returns:
            Scores and probabilities, (queries, classes).
        """
        way: Any = labels.max().item() + 1
        size_check(way >= 2)
        size_check(way <= MOST_WAY)
        meta = {name: getattr(self, place) for name, place in self.places.items()}
        scores = self.adapt(meta, self._input(support), labels, way)(self._input(queries))
        return scores, (scores / self.temperature).softmax(1)

    def _input(self, x: Tensor) -> Tensor:
        return x.to(self.dtype) / 255 if x.dtype == torch.uint8 else x.to(self.dtype)


def of_a_program(config: TrainConfig) -> TrainConfig:
    """The config of a program: nothing pads its tasks, and it computes in its weights' format."""
    config = replace(config, task=config.task.even())
    if config.engine.precision == "float64":
        return config
    engine = replace(config.engine, precision="float32", inner_precision=None)
    return replace(config, engine=engine)


def refuse_unexportable(trained: Trained, calibrates: bool = False) -> None:
    """Refuse what no program for all tasks can be made of.

    Args:
        calibrates: whether its probabilities are to be calibrated.

    Raises:
        ConfigError: says why, and what can.
    """
    algorithm, name = trained.algorithm, trained.config.algo.name
    if trained.setup.source.kind != "classification":
        raise ConfigError(
            f"metarun export is for runs that tell classes apart; data={trained.config.data.name} "
            "is a regression"
        )
    if algorithm.has_inner_loop or algorithm.adapt is None:
        raise ConfigError(
            f"algo={name} takes inner steps on each task, which need derivatives that a file does "
            "not have: export a run of a metric method or of a head in closed form, such as "
            "protonet or r2d2, or use metarun.FewShotClassifier"
        )
    if calibrates and trained.inputs is None:
        raise ConfigError(
            f"calibrate=true: the run has learned from data={trained.config.data.name}, and this "
            "is for pictures; leave it out, and divide scores by the temperature that `metarun "
            "eval ckpt=… calibrate=true` prints"
        )
    if norm_of(trained.config) == "support_plus_one":
        raise ConfigError(
            "backbone.norm=support_plus_one: torch makes no program of it for any number of "
            "queries; add backbone.norm=support to the command, which has other figures"
        )


def program_of(trained: Trained, temperature: float = 1.0) -> torch.export.ExportedProgram:
    """The program, for any numbers of examples, classes and queries.

    Raises:
        ConfigError: torch cannot make one of this run.
    """
    examples, queries = torch.export.Dim("examples", min=2), torch.export.Dim("queries", min=1)
    sizes = {"support": {0: examples}, "labels": {0: examples}, "queries": {0: queries}}
    try:
        with torch.no_grad():
            program = torch.export.export(
                Labeller(trained, temperature),
                noise_task(trained, 5, 3, 8),
                dynamic_shapes=sizes,
                strict=False,
            )
    except Exception as error:
        raise ConfigError(
            f"torch.export makes no program of algo={trained.config.algo.name} with this network "
            f"for any number of examples, classes and queries ({first_line(error)}): use "
            "metarun.FewShotClassifier"
        ) from error
    refuse_foreign_operations(program, trained.config.algo.name)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it has paths of this machine
    return program


def refuse_foreign_operations(program: torch.export.ExportedProgram, algo: str) -> None:
    """Refuse a program that another process cannot run, which has imported torch alone.

    Raises:
        ConfigError: names an operation that is not torch's.
    """
    for node in program.graph.nodes:
        if getattr(node.target, "namespace", "aten") not in TORCH_OWN:
            raise ConfigError(
                f"algo={algo} with this network needs the operation {node.target}, which torch "
                "alone does not have: use metarun.FewShotClassifier"
            )


def noise_task(trained: Trained, way: int, shot: int, queries: int) -> tuple[Tensor, ...]:
    """Support, labels and queries of noise; the last class has an example less, if it has two."""
    generator = torch.Generator().manual_seed(way)
    shape, labels = trained.setup.source.input_shape, torch.arange(way).repeat_interleave(shot)
    labels = labels[:-1] if shot > 1 else labels

    def noise(count: int) -> Tensor:
        if trained.inputs is None:
            return torch.rand(count, *shape, generator=generator).to(dtype_of(trained.config))
        return torch.randint(256, (count, *shape), dtype=torch.uint8, generator=generator)

    return noise(len(labels)), labels, noise(queries)


def check(trained: Trained, temperature: float, run: Any) -> float:
    """Compare a program with the run, on tasks of noise of several shapes.

    Args:
        run: `run(support, labels, queries) -> (scores, probabilities)`.

    Returns:
        The largest difference between scores.

    Raises:
        RunError: scores or probabilities differ by more than rounding.
    """
    largest = 0.0
    for shape in SHAPES:
        task = noise_task(trained, *shape)
        x, labels, queries = task
        if trained.inputs is not None:
            x, queries = trained.to_inputs(x), trained.to_inputs(queries)
        scores = trained.adapt(x, labels, shape[0])(queries)
        wanted = (scores, (scores / temperature).softmax(1))
        with torch.no_grad():
            found = run(*task)
        for name, one, other in zip(OUTPUTS, wanted, found, strict=True):
            same = (one == other) | (one.isnan() & other.isnan())  # ∞ less ∞ is none
            apart = float((one - other).abs().masked_fill(same, 0.0).amax())
            scale = float(one.nan_to_num(0.0, 0.0, 0.0).abs().amax().clamp(min=1))
            if not apart <= ROUNDING * scale:
                raise RunError(
                    f"the exported program has other {name} than the run (by {apart:.3g}), so "
                    "nothing was written: use metarun.FewShotClassifier, and tell the makers"
                )
            largest = max(largest, apart) if name == OUTPUTS[0] else largest
    return largest


def about(trained: Trained, calibrated: Calibrated | None) -> dict[str, Any]:
    """What a reader of the file has to know, as plain values."""
    config, inputs = trained.config, trained.inputs
    one = ", ".join(map(str, trained.setup.source.input_shape))
    kind = "uint8" if inputs else str(dtype_of(config)).removeprefix("torch.")
    picture = None
    if inputs is not None:
        picture = {"in_words": str(inputs), **inputs.how._asdict(), "inverted": inputs.inverted}
    return {
        "metarun": __version__,
        "torch": torch.__version__,
        "run": {
            "algo": config.algo.name,
            "backbone": config.backbone.name,
            "data": config.data.name,
            "meta_step": trained.step,
            "batch_norm": trained.setup.batch_norm,
        },
        "inputs": {
            "support": f"{kind} (examples, {one})",
            "labels": "int64 (examples,), from 0 on; every class has an example",
            "queries": f"{kind} (queries, {one})",
        },
        "outputs": {
            "scores": "(queries, classes)",
            "probabilities": "softmax of scores / temperature",
        },
        "picture": picture,
        "temperature": 1.0 if calibrated is None else calibrated.temperature,
        "calibrated": None if calibrated is None else calibrated._asdict(),
        "queries_depend_on_each_other": trained.predict_together,
    }
