"""Which moments batch normalisation takes for the queries of a task.

It is the technical question that the field asks most often, since figures differ by points:

- "transductive": all queries of a task are one batch (MAML's reference code). A prediction depends
  on the other queries.
- "support": queries are normalised by the moments of the support set.
- "support_plus_one": each query is in a batch with the whole support set ("without transduction" in
  Reptile's code).
- "running": evaluations take moving averages of meta-training, for the support set too where it
  is not adapted to by inner steps. Training is transductive.

What MAML++ calls per-step batch normalisation is none of these: its reference code keeps moments
for each inner step, and normalises by the batch at hand all the same. What is per step there are
γ and β: `algo.per_step=['*.norm.*']`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from metarun.components.algo.padding import Known
from metarun.components.backbone.norm import (
    BatchNorm,
    Moments,
    Seen,
    collecting,
    counting,
    using,
)
from metarun.unroll import Meta

PREFIX = "norm."
"""Begins the names of moving averages among what is kept."""

MOMENTUM = 0.1  # of a moving average, as torch's

MEANING = {
    "transductive": "batch statistics (transductive)",
    "support": "moments of the support set",
    "support_plus_one": "each query with the support set",
    "running": "moving averages of training",
}
"""What a result line says of each."""

Encode = Callable[[Meta, Tensor], Any]

ALL = Known()


class Normalising:
    """What a choice means for encoding examples and for predicting.

    Args:
        norm: the choice.
        model: the backbone, with its layers of `BatchNorm`.
    """

    def __init__(self, norm: str, model: nn.Module) -> None:
        self.norm = norm
        self.layers = [part for part in model.modules() if isinstance(part, BatchNorm)]
        if norm != "transductive" and not self.layers:
            raise ValueError(
                f"backbone.norm={norm}: the backbone has no BatchNorm of "
                "metarun.components.backbone.norm"
            )
        self.kept: tuple[str, ...] = ()
        if norm == "running":
            numbered = range(len(self.layers))
            self.kept = tuple(f"{PREFIX}{i}.{part}" for i in numbered for part in ("mean", "var"))

    def init(self) -> dict[str, Tensor]:
        """The moving averages before training: of pretrained weights, or mean 0 and variance 1."""
        start: list[Tensor] = []
        for layer in self.layers:
            like, given = layer.bias.detach(), layer.averages
            plain = [torch.zeros_like(like), torch.ones_like(like)]
            start += plain if given is None else [given.mean.to(like), given.variance.to(like)]
        return dict(zip(self.kept, start, strict=False))

    def updated(self, meta: Meta, seen: Seen) -> dict[str, Tensor]:
        """The next moving averages, by what training was seen to normalise by."""
        found = {}
        for i, layer in enumerate(self.layers):
            calls = seen.of[id(layer)]
            mean = torch.stack([m.mean.detach() for m in calls]).mean(0)
            # Unbiased, as torch's.
            own = [m.variance.detach() * unbiased(m.examples) for m in calls]
            for part, new in (("mean", mean), ("var", torch.stack(own).mean(0))):
                name = f"{PREFIX}{i}.{part}"
                found[name] = (1 - MOMENTUM) * meta[name].detach() + MOMENTUM * new
        return found

    def _averages(self, meta: Meta) -> Seen:
        seen = Seen(always=True)
        for i, layer in enumerate(self.layers):
            seen.add(layer, Moments(meta[f"{PREFIX}{i}.mean"], meta[f"{PREFIX}{i}.var"], 0))
        return seen

    def support(
        self, encode: Encode, meta: Meta, x: Tensor, evaluates: bool, known: Known = ALL
    ) -> tuple[Any, Seen]:
        """The encoded support set, and what it was normalised by."""
        with counting(known.support):
            if evaluates and self.norm == "running":
                with using(self._averages(meta)):
                    return encode(meta, x), Seen()
            if self.norm == "support":
                with collecting() as seen:
                    return encode(meta, x), seen
            return encode(meta, x), Seen()

    def queries(
        self,
        encode: Encode,
        meta: Meta,
        x: Tensor,
        support_x: Tensor,
        seen: Seen,
        evaluates: bool,
        known: Known = ALL,
    ) -> Any:
        """The encoded queries."""
        if evaluates and self.norm == "running":
            seen = self._averages(meta)
        if self.norm == "support_plus_one":
            return _with_each(lambda both: encode(meta, both), support_x, x, known)
        with using(seen), counting(known.queries):
            return encode(meta, x)

    def outputs(
        self,
        predict: Callable[[Any], Tensor],
        meta: Meta,
        queries: Any,
        support: Any,
        evaluates: bool,
        known: Known = ALL,
    ) -> Tensor:
        """The predictor's outputs for encoded queries."""
        if evaluates and self.norm == "running":
            with using(self._averages(meta)):
                return predict(queries)
        if self.norm == "support":
            with collecting() as seen, counting(known.support):
                predict(support)
            with using(seen):
                return predict(queries)
        if self.norm == "support_plus_one":
            outputs: Tensor = _with_each(predict, support, queries, known)
            return outputs
        with counting(known.queries):
            return predict(queries)


def unbiased(examples: int | Tensor) -> float | Tensor:
    """The factor that makes a variance over so many examples an unbiased one."""
    if isinstance(examples, Tensor):
        return examples / (examples - 1).clamp(min=1)
    return examples / max(examples - 1, 1)


def refuse_each_query_alone(norm: str, algo: str) -> None:
    """Refuse `support_plus_one` where an example has to have one set of features.

    Args:
        norm: the choice.
        algo: the algorithm's name, for the message.

    Raises:
        ValueError: it is that choice.
    """
    if norm == "support_plus_one":
        raise ValueError(
            f"backbone.norm=support_plus_one: algo={algo} learns by the likelihood of all examples "
            "of a task together, of which each has one set of features; choose another norm"
        )


def _with_each(fn: Callable[[Tensor], Any], support: Tensor, queries: Tensor, known: Known) -> Any:
    """What `fn` gives for each query, which stands behind the support set in a batch of its own."""
    counted = known.support
    if counted is not None:
        counted = torch.cat([counted, counted.new_ones(1)])
    with counting(counted):
        return torch.func.vmap(
            lambda query: fn(torch.cat([support, query[None]]))[-1], randomness="different"
        )(queries)
