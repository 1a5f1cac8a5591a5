"""MetaOptNet (Lee, Maji, Ravichandran and Soatto 2019): a convex classifier on learned features."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from metarun.components.algo.adapting import Predictor, Support, at_once, one_hot
from metarun.components.algo.base import OWN_PREFIX, Algorithm, Episode, Problem
from metarun.components.algo.comparing import refuse_regression
from metarun.components.algo.embedding import embedding
from metarun.components.algo.linear_systems import solve
from metarun.components.algo.padding import known, mean_of_known
from metarun.components.algo.svm import crammer_singer
from metarun.config.checks import MOST_STEPS, between, positive
from metarun.config.component import builds, settings
from metarun.errors import ConfigError
from metarun.unroll import Meta

SCALE = OWN_PREFIX + "scale"


@settings
class MetaoptnetConfig:
    """MetaOptNet (Lee et al. 2019): a support vector machine or a ridge regression on features."""

    of_training: ClassVar[tuple[str, ...]] = ("iterations", "scale", "label_smoothing")

    head: Literal["svm", "ridge"] = "svm"  # svm: of Crammer and Singer; ridge: one against all
    cost: float = 0.1  # C of the SVM
    ridge: float = 50.0  # λ of the ridge regression
    iterations: int = 15  # of the SVM's solver in training
    eval_iterations: int = 15  # the same in validation and test
    tolerance: float = 0.01  # scores of an SVM that may be further off than that become NaN
    variant: Literal["paper", "code"] = "paper"  # code: 1 more on the SVM's Gram, twice the ridge's
    scale: float = 1.0  # initial factor of the scores; learned
    label_smoothing: float = 0.0  # taken from the true class in training, and spread on the others

    def __post_init__(self) -> None:
        for key in ("cost", "ridge", "tolerance", "scale"):
            positive(f"algo.{key}", getattr(self, key))
        between("algo.iterations", self.iterations, 1, MOST_STEPS)
        between("algo.eval_iterations", self.eval_iterations, 1, MOST_STEPS)
        between("algo.label_smoothing", self.label_smoothing, 0, 1)
        other, idle = {
            "svm": ("ridge", ("ridge",)),
            "ridge": ("svm", ("cost", "iterations", "eval_iterations", "tolerance")),
        }[self.head]
        for key in idle:
            if (value := getattr(self, key)) != getattr(MetaoptnetConfig, key):
                raise ConfigError(f"algo.{key}={value}: it is for algo.head={other}; leave it out")


@builds(MetaoptnetConfig)
def metaoptnet(problem: Problem, own: MetaoptnetConfig) -> Algorithm:
    """Learn features on which a convex linear classifier of the support set does well on queries.

    The scores of a query x are γ·X'α, with γ learned (equation 12), X' the products of its features
    and those of the support set, and α of one of two heads, neither with an intercept:

    - svm: the dual of Crammer and Singer's machine (equations 8 and 9): see `algo.svm`.
    - ridge: α = (K + λI)⁻¹Y, with K the products of the support features and Y the labels as rows
      of 0 and 1 (section 4.3's ridge regression).

    The reference code adds the unit matrix to K in the machine, which makes it another one (its
    slack is partly squared), and its ridge has twice this α: `variant="code"`.

    The solver of the machine takes a fixed number of iterations. A bound of how far any score of a
    support example can be off, √(2·duality gap)·max‖x‖, in units of the margin, is logged as
    `train/svm_error`. Scores with a bound above `tolerance` are NaN: training stops, and a task's
    figure is none. The reference code takes 15 iterations of another solver in training and 3 in
    its test, which are not as exact as so many of these; `tolerance` has to be raised to score what
    has not converged. Only first derivatives of the machine are right, which is all that training
    takes.

    `label_smoothing` is that of the reference code: the true class gets 1 − ε and each of the
    others ε/(way − 1). (`torch` spreads ε on all classes, the true one included.)

    Args:
        problem: a classification; of the model, the features.
        own: the settings.

    Raises:
        ValueError: a regression, or a model without features.
    """
    refuse_regression(problem, "metaoptnet")
    start, embed = embedding(problem.model, "metaoptnet")
    like = next(problem.model.parameters())
    learns = problem._replace(
        objective=problem.objective._replace(
            loss=partial(smoothed_loss, own.label_smoothing, uneven=problem.uneven)
        )
    )

    def init() -> dict[str, Tensor]:
        return start | {SCALE: like.new_tensor(own.scale)}

    def adapt(
        iterations: int, tell: Callable[[Tensor], None], meta: Meta, support: Support
    ) -> Predictor:
        """Call `tell` with the bound of the scores' error, if the head has one."""
        features, labels = support.x, one_hot(support)
        if support.known is not None:
            features = torch.where(support.known[:, None], features, 0)
        kernel = features @ features.T
        diagonal = torch.eye(kernel.shape[0], dtype=kernel.dtype, device=kernel.device)
        if own.head == "ridge":
            alpha = solve(kernel + own.ridge * diagonal, labels)
            alpha = 2 * alpha if own.variant == "code" else alpha
            return lambda x: meta[SCALE] * (x @ features.T @ alpha)
        wide = features.double()  # the kernel has to be semi-definite to the solver's precision
        kernel = wide @ wide.T
        if own.variant == "code":
            kernel = kernel + diagonal
        solved = crammer_singer(kernel, labels, own.cost, iterations)
        error = (2 * solved.gap * kernel.detach().diagonal().max()).sqrt()
        tell(error)
        weights = (solved.alpha @ wide).to(features)

        def predict(x: Tensor) -> Tensor:
            scores = meta[SCALE] * (x @ weights.T)
            return torch.where(error <= own.tolerance, scores, torch.nan)

        return predict

    def loss(meta: Meta, episode: Episode) -> tuple[Tensor, dict[str, Any]]:
        errors: list[Tensor] = []
        fit = partial(adapt, own.iterations, errors.append)
        value, extra = at_once(learns, init, fit, encode=embed).loss(meta, episode)
        metrics = {"svm_error": errors[0].to(value)} if errors else {}
        return value, extra | {"metrics": metrics}

    fit = partial(adapt, own.eval_iterations, lambda error: None)
    leaves_out = own.head == "ridge"  # in the machine, an absent class is a rival of the others
    made = at_once(problem, init, fit, encode=embed, uneven=leaves_out)
    return made._replace(loss=loss, uneven_with="algo.head=ridge")


def smoothed_loss(smoothing: float, scores: Tensor, labels: Tensor, uneven: bool = False) -> Tensor:
    """The mean cross entropy to 1 − ε at the label and ε/(way − 1) at each other class.

    Args:
        smoothing: ε.
        scores: (examples, way); −∞ for a class that an uneven task does not have.
        labels: (examples,).
        uneven: whether examples may be padding, which is left out.
    """
    places = torch.where(known(labels), labels, 0) if uneven else labels
    absent = scores == -torch.inf
    way = scores.shape[1] - absent.sum(1)
    logs = scores.log_softmax(1).masked_fill(absent, 0)
    true = logs.gather(1, places[:, None])[:, 0]
    others = (logs.sum(1) - true) / (way - 1).clamp(min=1)
    each = -((1 - smoothing) * true + smoothing * others)
    return mean_of_known(each, labels) if uneven else each.mean()
