"""Baseline++ (Chen et al. 2019): as Baseline, with classifiers that compare directions."""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from metarun.components.algo.base import Algorithm, Problem
from metarun.components.algo.head_fitting import HeadFittingConfig, with_new_heads
from metarun.components.algo.pretraining import pretraining
from metarun.config.checks import positive
from metarun.config.component import builds, settings
from metarun.unroll import Meta, Params

HEAD = "head.weight"
FEW_CLASSES = 200  # up to so many the reference code multiplies by 2, beyond by 10


@settings
class BaselinePpConfig(HeadFittingConfig):
    """Baseline++ (Chen et al. 2019): as Baseline, with classifiers that compare directions."""

    of_training: ClassVar[tuple[str, ...]] = (*HeadFittingConfig.of_training, "weight_norm")

    inner_batch: int | None = 4  # support examples of such a step; null: all
    scale: float | None = None  # factor of the cosines; null: 2, of more than 200 classes 10
    weight_norm: bool = True  # a learned length for each class, as the reference code has it

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("algo.scale", self.scale)


@builds(BaselinePpConfig)
def baseline_pp(problem: Problem, own: BaselinePpConfig) -> Algorithm:
    """Learn to tell all training classes apart by direction, then fit such a head for each task.

    The score of class k is s·g_k·cos(w_k, f(x)), in the classifier of pre-training as in the head
    of a task. By the paper (section 3.2) it is the cosine alone; its code has the scale s, since a
    softmax of cosines is nearly flat, and learns the lengths g by weight normalisation.
    `weight_norm=False` leaves g out, `scale=1` leaves s out.

    A head starts at random, the same for all tasks: `head.weight` of the checkpoint, which is drawn
    once and not learned. It is fitted with minibatches, dealt from a shuffled deck of the support
    set: 100 of 4 examples, as the paper says. Its code takes 100 epochs, which are 125 steps for
    5 examples and 625 for 25, and inner_opt.lr=0.01 inner_opt.momentum=0.9
    inner_opt.dampening=0.9 inner_opt.weight_decay=0.001. (There the last minibatch of an epoch is a
    smaller one, and each task draws a head of its own.)

    Args:
        problem: a classification with labelled training images; of the model, the features.
        own: the settings.

    Raises:
        ValueError: there are no labelled images, the model has no features, a task has more
            classes than there are training classes, or inner hyperparameters are to be learned, of
            which nothing is differentiated.
    """

    def classifier(width: int, classes: int) -> dict[str, Tensor]:
        return with_lengths(nn.Linear(width, classes, bias=False).weight.detach())

    def with_lengths(weight: Tensor) -> dict[str, Tensor]:
        lengths = {"length": weight.norm(dim=1)} if own.weight_norm else {}
        return {"weight": weight} | lengths

    def scores(params: Params, features: Tensor) -> Tensor:
        classes = params["weight"].shape[0]
        scale = own.scale or (2.0 if classes <= FEW_CLASSES else 10.0)
        cosines = F.normalize(features, dim=1) @ F.normalize(params["weight"], dim=1).T
        return scale * (cosines * params["length"] if own.weight_norm else cosines)

    pretrained = pretraining(problem, "baseline_pp", classifier, scores)
    assert problem.ways is not None and problem.classes is not None
    if problem.ways[1] > problem.classes:
        raise ValueError(
            f"task.way={problem.ways[1]}: algo=baseline_pp has a first head for as many classes as "
            f"it is trained on, {problem.classes}; lower it"
        )
    like = next(problem.model.parameters())
    first = nn.Linear(pretrained.width, problem.classes, bias=False).weight.detach().to(like)

    def head(meta: Meta, way: int) -> dict[str, Tensor]:
        return with_lengths(meta[HEAD][:way])

    return with_new_heads(problem, own, "baseline_pp", pretrained, head, scores, kept={HEAD: first})
