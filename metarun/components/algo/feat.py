"""FEAT (Ye et al. 2020): class means that are adapted to each other by self-attention."""

from math import sqrt
from typing import ClassVar

import torch
from torch import Tensor, nn

from metarun.components.algo.adapting import Predictor, Support, at_once
from metarun.components.algo.base import Algorithm, Problem
from metarun.components.algo.comparing import class_means, refuse_regression, squared_distances
from metarun.components.algo.embedding import embedding, width_of
from metarun.components.algo.padding import known, present, without_absent
from metarun.config.checks import at_least, between, positive
from metarun.config.component import builds, settings
from metarun.errors import ConfigError
from metarun.unroll import Meta

PREFIX = "transformer."
"""Begins the names of the self-attention's parameters."""


@settings
class FeatConfig:
    """FEAT (Ye et al. 2020): class means that are adapted to each other by self-attention."""

    of_training: ClassVar[tuple[str, ...]] = (
        "balance",
        "contrast_temperature",
        "dropout",
        "attention_dropout",
    )

    temperature: float = 64.0  # divides squared distances to adapted means
    balance: float = 1.0  # weight λ of the contrastive loss; their code for ResNet-12: 0.01
    contrast_temperature: float = 16.0  # divides squared distances in the contrastive loss
    dropout: float = 0.0  # part of what attention adds that training drops; their code: 0.5
    attention_dropout: float = 0.0  # part of the attention that training drops; their code: 0.1

    def __post_init__(self) -> None:
        positive("algo.temperature", self.temperature)
        positive("algo.contrast_temperature", self.contrast_temperature)
        at_least("algo.balance", self.balance, 0)
        for key in ("dropout", "attention_dropout"):
            between(f"algo.{key}", value := getattr(self, key), 0, 1)
            if value == 1:
                raise ConfigError(f"algo.{key}=1: nothing would be left; choose a value below 1")


@builds(FeatConfig)
def feat(problem: Problem, own: FeatConfig) -> Algorithm:
    """Learn features, and a transformer that adapts the class means of a task to each other.

    The score of class k is −‖f(x) − p_k‖² / temperature, where the p are the means of f over the
    support examples of each class after one layer of single-head self-attention over the classes
    (`SetToSet`; equations 5 to 8). Queries are not adapted. Tasks may have any number of classes.

    Training adds λ times a contrastive loss (equation 9). The support examples and queries of each
    class are a set that is adapted by the same transformer. c_k is the mean of what comes out, and
    the loss is the cross entropy of −‖f(x) − c_k‖² / contrast_temperature over all of them. As in
    their code, x is not adapted there.

    Their code has dropout in the transformer, which the paper does not speak of. A run with dropout
    is slower: what draws random numbers is not recorded.

    The other constants are those of their commands for a four-block network and one shot; for
    five, they take balance=0.1 temperature=32 contrast_temperature=64. The paper starts from a
    pretrained network, and gives the transformer ten times its learning rate: `backbone.weights`
    and 'outer_opt.groups=[{params:transformer.*,lr_factor:10}]'. Without these, both start from
    random weights, with one rate.

    Args:
        problem: a classification; of the model, the features.
        own: the settings.

    Raises:
        ValueError: a regression, or a model without features.
    """
    refuse_regression(problem, "feat")
    start, embed = embedding(problem.model, "feat")
    width, like = width_of(problem, embed, start), next(problem.model.parameters())
    transformer = SetToSet(width, own.dropout, own.attention_dropout).to(like)
    begins = {n: p.detach().clone() for n, p in transformer.named_parameters()}

    def together(meta: Meta, x: Tensor, labels: Tensor) -> Tensor:
        """Examples adapted to those with the same label."""
        parameters = {name: meta[PREFIX + name] for name in begins}
        apart = labels[:, None] != labels
        adapted: Tensor = torch.func.functional_call(transformer, parameters, (x, apart))
        return adapted

    def adapt(meta: Meta, support: Support) -> Predictor:
        means = class_means(support)
        absent = torch.zeros_like(means[:, 0])
        if support.known is not None:  # classes that a task does not have stand apart
            absent = (~present(support.y, len(means))).to(means)
        means = together(meta, means, absent)
        return lambda x: -squared_distances(x, means) / own.temperature

    def outer(
        meta: Meta, support: Support, queries: Support, outputs: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        x, labels = torch.cat([support.x, queries.x]), torch.cat([support.y, queries.y])
        counted = known(labels) if problem.uneven else None
        adapted = Support(together(meta, x, labels), labels, support.way, known=counted)
        contrast = -squared_distances(x, class_means(adapted)) / own.contrast_temperature
        if problem.uneven:
            contrast = without_absent(contrast, support.y)
        query_loss = problem.objective.loss(outputs, queries.y)
        value = query_loss + own.balance * problem.objective.loss(contrast, labels)
        return value, {"outer_loss": value}

    return at_once(
        problem._replace(model=nn.ModuleDict({"backbone": problem.model, "own": transformer})),
        lambda: start | {PREFIX + name: value for name, value in begins.items()},
        adapt,
        encode=embed,
        outer=outer if own.balance else None,
        uneven=True,
    )


class SetToSet(nn.Module):
    """Single-head self-attention over a set, with a residual and layer normalisation."""

    def __init__(self, width: int, dropout: float, attention_dropout: float) -> None:
        """Build for vectors of a width, with their code's initial weights."""
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        for layer in (self.query, self.key, self.value):
            nn.init.normal_(layer.weight, std=sqrt(1 / width))
        self.out = nn.Linear(width, width)
        nn.init.xavier_normal_(self.out.weight)
        self.norm = nn.LayerNorm(width)
        self.dropout, self.attention_dropout = nn.Dropout(dropout), nn.Dropout(attention_dropout)

    def forward(self, x: Tensor, apart: Tensor) -> Tensor:
        """(items, width) -> the same shape; items do not see those `apart`, (items, items)."""
        fit = self.query(x) @ self.key(x).T / sqrt(x.shape[1])
        attention = self.attention_dropout(fit.masked_fill(apart, -torch.inf).softmax(-1))
        found: Tensor = self.norm(x + self.dropout(self.out(attention @ self.value(x))))
        return found
