"""SimpleShot (Wang et al. 2019): an ordinary classifier's features, and the nearest centroid."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from metarun.components.algo.adapting import Predictor, Support, at_once
from metarun.components.algo.base import Algorithm, Problem
from metarun.components.algo.comparing import class_means, directions, squared_distances
from metarun.components.algo.pretraining import PretrainingConfig, pretraining
from metarun.config.checks import between, positive
from metarun.config.component import builds, settings
from metarun.episodes.source import Batch
from metarun.unroll import Meta

SUM, WEIGHT = "centre.sum", "centre.weight"
"""A moving mean is the first over the second, so that it has no bias towards its start."""


@settings
class SimpleshotConfig(PretrainingConfig):
    """SimpleShot (Wang et al. 2019): features of a classifier, and the nearest centroid."""

    of_training: ClassVar[tuple[str, ...]] = (*PretrainingConfig.of_training, "momentum")

    transform: Literal["none", "l2n", "cl2n"] = "cl2n"  # of features: length 1; centred before
    momentum: float = 0.01  # part of the centre that comes from the last meta-step

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("algo.momentum", self.momentum)
        between("algo.momentum", self.momentum, 0, 1)


@builds(SimpleshotConfig)
def simpleshot(problem: Problem, own: SimpleshotConfig) -> Algorithm:
    """Learn to tell all training classes apart, then take the class of the nearest centroid.

    Training is that of Baseline: the cross entropy of a linear classifier over all training
    classes, on plain batches. For a task, features are transformed: x ("none"), x/‖x‖ ("l2n") or
    (x − m)/‖x − m‖ ("cl2n"; equations 4 and 5 and section 2.3), with m the mean feature of the
    training images. The score of class k is −‖z − c_k‖², where z is the transformed query and c_k
    the mean of the transformed support examples of the class, which is not scaled to length 1.
    Nothing is learned of a task, which may have any number of classes.

    The paper takes m of all training images by the network at the end. Here it is a moving mean
    over meta-steps, kept in the checkpoint. One run can be evaluated with every transform:
    `metarun eval ckpt=… algo.transform=l2n`. With `backbone.norm=running` evaluations use moving
    averages of the plain batches, as the paper's code does.

    Args:
        problem: a classification with labelled training images; of the model, the features.
        own: the settings.

    Raises:
        ValueError: there are no labelled images, or the model has no features.
    """
    pretrained = pretraining(problem, "simpleshot")
    start, embed, width = pretrained.start, pretrained.embed, pretrained.width
    like = next(problem.model.parameters())

    def init() -> dict[str, Tensor]:
        return start | {SUM: like.new_zeros(width), WEIGHT: like.new_zeros(())}

    def loss(meta: Meta, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        features, averages = pretrained.look(meta, batch)
        value, extra = pretrained.classify(meta, features, batch.y)
        stays, mean = 1 - own.momentum, features.detach().mean(0)
        kept = averages | {
            SUM: stays * meta[SUM].detach() + own.momentum * mean,
            WEIGHT: stays * meta[WEIGHT].detach() + own.momentum,
        }
        return value, extra | {"kept": kept}

    def adapt(meta: Meta, support: Support) -> Predictor:
        weight = meta[WEIGHT]
        centre = meta[SUM] / torch.where(weight > 0, weight, torch.ones_like(weight))

        def transformed(x: Tensor) -> Tensor:
            if own.transform == "none":
                return x
            return directions(x - centre if own.transform == "cl2n" else x)

        centroids = class_means(support._replace(x=transformed(support.x)))
        return lambda x: -squared_distances(transformed(x), centroids)

    made = at_once(problem, init, adapt, encode=embed, uneven=True)
    return made._replace(loss=loss, kept=(*made.kept, SUM, WEIGHT), batch_size=own.batch_size)
