"""Relation networks (Sung et al. 2018): a network that compares a query with each class."""

import logging
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from metarun.components.algo.adapting import Predictor, Support, at_once, one_hot
from metarun.components.algo.base import Algorithm, Problem, apply_model
from metarun.components.algo.comparing import refuse_regression
from metarun.components.algo.embedding import embedding
from metarun.components.algo.padding import known, present
from metarun.components.backbone.norm import BatchNorm, counted, counting
from metarun.config.checks import MOST_UNITS, between
from metarun.config.component import builds, settings
from metarun.unroll import Meta

log = logging.getLogger(__name__)

PREFIX = "relation."
"""Begins the names of the relation module's parameters."""


@settings
class RelationnetConfig:
    """Relation networks (Sung et al. 2018): a network that compares a query with each class."""

    of_training: ClassVar[tuple[str, ...]] = ("hidden", "loss")

    hidden: int = 8  # units of the relation module's last hidden layer
    class_map: Literal["sum", "mean"] = "sum"  # how the maps of a class's examples become one
    loss: Literal["mse", "cross_entropy"] = "mse"  # mse: of the scores between 0 and 1

    def __post_init__(self) -> None:
        between("algo.hidden", self.hidden, 1, MOST_UNITS)


@builds(RelationnetConfig)
def relationnet(problem: Problem, own: RelationnetConfig) -> Algorithm:
    """Learn features and, with them, how they are to be compared.

    The relation of a query and class k is r = σ(g([m_k, f(q)])) (equation 1), where f gives maps
    (channels, height, width), m_k is the sum of f over the support examples of the class, and g
    is the module of `Relation`. Training minimises the mean of (r − 1)² for the class of a query
    and of r² for the others (equation 2, a sum there and a mean in the paper's code), or with
    `loss="cross_entropy"` the cross entropy of g, as in the code of Chen et al. 2019. They, and
    others, take the mean of f and not the sum: `class_map="mean"`. The outputs are those of g,
    before σ, and losses of an evaluation are their cross entropy. Tasks may have any number of
    classes.

    The maps are those of the backbone's method `maps(x)`, (examples, …) -> (examples, channels,
    height, width). If there is none, they are the features, as maps of one pixel. The paper's
    backbone pools in two of its four blocks alone, so that its maps have 5×5 pixels for images of
    28×28; conv4 halves in each block.

    The module normalises pairs if the backbone has layers of `BatchNorm`, by the moments that
    `backbone.norm` chooses: with `transductive`, by those of all pairs of a task, as the paper's
    code does in tests, too.

    Args:
        problem: a classification; of the model, the maps or the features.
        own: the settings.

    Raises:
        ValueError: a regression, a model without features, or one whose maps are none.
    """
    refuse_regression(problem, "relationnet")
    model = problem.model
    start, _ = embedding(model, "relationnet")
    maps, like = Maps(model), next(problem.model.parameters())

    def encode(meta: Meta, x: Tensor) -> Tensor:
        return apply_model(maps, {f"model.{name}": meta[name] for name in start}, x)

    with torch.no_grad():
        shape = tuple(encode(start, like.new_zeros(2, *problem.input_shape)).shape[1:])
    if len(shape) != 3:
        raise ValueError(
            f"algo=relationnet: maps(x) of {type(model).__name__} gives {shape} for an example: it "
            "must give (channels, height, width), or be left out"
        )
    if not hasattr(model, "maps"):
        log.info(
            "relations are between vectors: %s has no method maps(x), (examples, …) -> "
            "(examples, channels, height, width)", type(model).__name__,
        )  # fmt: skip
    normalised = any(isinstance(part, BatchNorm) for part in model.modules())
    relation = Relation(shape, own.hidden, normalised).to(like)
    compares = {n: p.detach().clone() for n, p in relation.named_parameters()}

    def adapt(meta: Meta, support: Support) -> Predictor:
        members = one_hot(support)
        classes = members.T @ support.x.flatten(1)
        if own.class_map == "mean":
            classes = classes / members.sum(0)[:, None].clamp(min=1)
        parameters = {name: meta[PREFIX + name] for name in compares}

        def predict(x: Tensor) -> Tensor:
            size = (x.shape[0], classes.shape[0], *shape)
            of_class = classes.view(1, *size[1:]).expand(size)
            pairs = torch.cat([of_class, x[:, None].expand(size)], 2)
            count = counted()  # which queries do, of an uneven task
            if count is not None:
                count = (count[:, None] & members.any(0)).flatten()
            with counting(count):
                return apply_model(relation, parameters, pairs.flatten(0, 1)).view(size[:2])

        return predict

    def squared_error(
        meta: Meta, support: Support, queries: Support, outputs: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        errors = (outputs.sigmoid() - one_hot(queries)).square()
        if problem.uneven:
            counts = known(queries.y)[:, None] & present(support.y, outputs.shape[1])
            value = torch.where(counts, errors, 0).sum() / counts.sum()
        else:
            value = errors.mean()
        return value, {"outer_loss": value}

    return at_once(
        problem._replace(model=nn.ModuleDict({"backbone": model, "relation": relation})),
        lambda: start | {PREFIX + name: value for name, value in compares.items()},
        adapt,
        encode=encode,
        outer=squared_error if own.loss == "mse" else None,
        uneven=True,
    )


class Maps(nn.Module):
    """The maps of a backbone, as a module that can be called functionally."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """`model.maps(x)`, or the features as maps of one pixel."""
        if hasattr(self.model, "maps"):
            maps: Tensor = self.model.maps(x)  # type: ignore[operator]
            return maps
        features: Tensor = self.model.features(x)  # type: ignore[operator]
        return features[:, :, None, None]


class Relation(nn.Module):
    """Two blocks of convolution, normalisation, ReLU and pooling, then two linear layers.

    The convolutions are 3×3 with padding, as in the paper's code for Omniglot; for maps of one
    pixel, 1×1. Pooling is 2×2 where there are so many pixels.
    """

    def __init__(self, shape: tuple[int, ...], hidden: int, normalised: bool) -> None:
        """Build for pairs of maps of a shape (channels, height, width)."""
        super().__init__()
        channels, height, width = shape
        kernel = 3 if max(height, width) > 1 else 1
        layers: list[nn.Module] = []
        for channels_in in (2 * channels, channels):
            layers.append(nn.Conv2d(channels_in, channels, kernel, padding=kernel // 2))
            layers += [BatchNorm(channels)] * normalised
            layers.append(nn.ReLU())
            if min(height, width) > 1:
                layers.append(nn.MaxPool2d(2))
                height, width = height // 2, width // 2
        self.blocks = nn.Sequential(*layers)
        self.hidden = nn.Linear(channels * height * width, hidden)
        self.score = nn.Linear(hidden, 1)

    def forward(self, pairs: Tensor) -> Tensor:
        """(pairs, 2 channels, height, width) -> (pairs, 1), before the sigmoid."""
        scores: Tensor = self.score(self.hidden(self.blocks(pairs).flatten(1)).relu())
        return scores
