"""R2-D2 (Bertinetto, Henriques, Torr and Vedaldi 2019): a ridge regression on features a task."""

import torch
from torch import Tensor

from metarun.components.algo.adapting import Predictor, Support, at_once, one_hot
from metarun.components.algo.base import OWN_PREFIX, Algorithm, Problem
from metarun.components.algo.embedding import embedding
from metarun.components.algo.linear_systems import solve
from metarun.config.checks import positive
from metarun.config.component import builds, settings
from metarun.unroll import Meta

RIDGE, SCALE = OWN_PREFIX + "ridge", OWN_PREFIX + "scale"


@settings
class R2d2Config:
    """R2-D2 (Bertinetto et al. 2019): a ridge regression on the features of a task."""

    ridge: float = 50.0  # weight λ of the squared head
    learn_ridge: bool = False  # λ becomes a meta-parameter, as its logarithm
    scale: float = 10.0  # initial factor of the scores; learned

    @property
    def of_training(self) -> tuple[str, ...]:
        """Settings that `metarun eval` has no use for: where learned values start."""
        return ("learn_ridge", "scale", *(["ridge"] if self.learn_ridge else []))

    def __post_init__(self) -> None:
        positive("algo.ridge", self.ridge)
        positive("algo.scale", self.scale)


@builds(R2d2Config)
def r2d2(problem: Problem, own: R2d2Config) -> Algorithm:
    """Learn features for which a ridge regression, solved in closed form, makes a good head.

    With X the n support features and a column of ones, Y the labels as rows of 0 and 1, both over
    √n as in the paper's code, the head is W = Xᵀ(XXᵀ + λI)⁻¹Y (equation 6). The scores of queries
    are α·X'W with α learned (equation 7; its shift β, the same for all classes, drops out of a
    cross entropy). In a regression Y holds the targets, and the outputs are X'W.

    Args:
        problem: a classification or a regression; of the model, the features.
        own: the settings.

    Raises:
        ValueError: a model without features, or a scale in a regression.
    """
    if problem.ways is None and own.scale != R2d2Config.scale:
        raise ValueError(f"algo.scale={own.scale}: it is for scores of classes; leave it out")
    start, embed = embedding(problem.model, "r2d2")
    like = next(problem.model.parameters())
    classifies = problem.ways is not None

    def init() -> dict[str, Tensor]:
        learned = {}
        if own.learn_ridge:
            learned[RIDGE] = like.new_tensor(own.ridge).log()
        if classifies:
            learned[SCALE] = like.new_tensor(own.scale)
        return start | learned

    def adapt(meta: Meta, support: Support) -> Predictor:
        ridge = meta[RIDGE].exp() if own.learn_ridge else own.ridge
        targets = one_hot(support) if classifies else support.y
        head = ridge_regression(support.x, targets, ridge, support.known)

        def predict(x: Tensor) -> Tensor:
            outputs = _with_ones(x) @ head
            return meta[SCALE] * outputs if classifies else outputs

        return predict

    return at_once(problem, init, adapt, encode=embed, uneven=True)


def ridge_regression(
    features: Tensor, targets: Tensor, ridge: Tensor | float, known: Tensor | None = None
) -> Tensor:
    """The weights (features + 1, outputs) that minimise ‖XW − Y‖² / n + λ‖W‖², the bias included.

    Args:
        features: (n, features).
        targets: (n, outputs), with zeros for examples that do not count.
        ridge: λ.
        known: bool (n,), which examples count; None: all. The others' rows of X become zero, which
            leaves the weights alone, and n is the number of those that count.
    """
    x = _with_ones(features)
    examples, width = x.shape
    n: int | Tensor = examples
    if known is not None:
        x, n = torch.where(known[:, None], x, 0), known.sum()
    # A system of as many equations as there are examples; a program for any number of them has one.
    if torch.compiler.is_exporting() or examples <= width:
        eye = torch.eye(examples, dtype=x.dtype, device=x.device)
        found: Tensor = x.T @ solve(x @ x.T + n * ridge * eye, targets)
        return found
    eye = torch.eye(width, dtype=x.dtype, device=x.device)
    found = solve(x.T @ x + n * ridge * eye, x.T @ targets)
    return found


def _with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(x.shape[0], 1)], dim=1)
