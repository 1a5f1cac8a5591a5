"""A network cut before its head, where that changes nothing but the time that it takes."""

import logging
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metarun.components.algo.base import apply_model, detached_parameters, evaluating
from metarun.components.algo.embedding import Features
from metarun.components.network import Network, untouched
from metarun.unroll import Meta

log = logging.getLogger(__name__)

SPREADS = (0.0, 0.1, 3.0, 100.0)
"""How far from the initial parameters the halves are compared with the whole: standard deviations
of what is added. Small changes show factors that start at 1, large ones show limits."""


class Halves(NamedTuple):
    """A model cut where adaptation begins.

    Attributes:
        encode: `encode(meta, x)`, what does not change during adaptation; computed once.
        decode: `decode(params, encoded)`, the model's output.
        shared: names of the parameters that `decode` needs besides the adapted ones.
    """

    encode: Callable[[Meta, Tensor], Tensor]
    decode: Callable[[Meta, Tensor], Tensor]
    shared: tuple[str, ...]


def halves(
    model: nn.Module, adapted: Collection[str], inputs: Callable[[], Sequence[Tensor]] | None = None
) -> Halves:
    """Cut a model with `features(x)` before its `head` if only the head is adapted.

    A model is cut if `head(features(x))` has the bits of `forward(x)`: for some examples, in
    training and in evaluation, for the initial parameters and for others. Other models are whole:
    nothing is encoded.

    Args:
        adapted: names of the parameters that change during adaptation.
        inputs: gives batches of examples to compare for; without it no model is cut.
    """
    names = list(detached_parameters(model))
    head = [name for name in names if name.startswith("head.")]
    whole = Halves(
        lambda meta, x: x,
        partial(apply_model, model),
        tuple(name for name in names if name not in adapted),
    )
    if not (set(adapted) <= set(head) and hasattr(model, "features") and hasattr(model, "head")):
        return whole
    body, features = [name for name in names if name not in head], Features(model)

    def encode(meta: Meta, x: Tensor) -> Tensor:
        return apply_model(features, {f"model.{name}": meta[name] for name in body}, x)

    def decode(params: Meta, encoded: Tensor) -> Tensor:
        own = {name.removeprefix("head."): value for name, value in params.items()}
        return apply_model(model.get_submodule("head"), own, encoded)

    cut = Halves(encode, decode, tuple(name for name in head if name not in adapted))
    if inputs is None:
        return whole
    reason = _difference(model, partial(_output, cut, head), inputs)
    if reason is None:
        return cut
    log.info(
        "features are computed anew at each inner step: head(features(x)) of the backbone cannot "
        "take the place of forward(x) (%s)",
        reason,
    )
    return whole


def _output(cut: Halves, head: list[str], params: Meta, x: Tensor) -> Tensor:
    return cut.decode({name: params[name] for name in head}, cut.encode(params, x))


def _difference(
    model: nn.Module, cut: Callable[[Meta, Tensor], Tensor], inputs: Callable[[], Sequence[Tensor]]
) -> str | None:
    """Where the outputs of a model and of its halves differ; None: nowhere that was looked at."""
    try:
        examples = inputs()
    except Exception as error:  # of any type: it is a plugin's code
        return f"there are no examples to compare for: {_brief(error)}"
    generator = torch.Generator().manual_seed(0)  # not torch's: a run draws as it would otherwise

    def moved(value: Tensor, spread: float) -> Tensor:
        if not (spread and value.is_floating_point()):
            return value
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        return value + spread * noise.to(value)

    start = detached_parameters(model)
    for spread in SPREADS:
        with untouched(model), torch.no_grad():
            params = {name: moved(value, spread) for name, value in start.items()}
            network = Network(model)
            network.put({name: moved(value, spread) for name, value in network.buffers().items()})
            try:
                whole = partial(apply_model, model)
                expected = [y for x in examples for y in _in_both_modes(model, whole, params, x)]
            except Exception as error:  # of any type: it is a plugin's network
                if not spread:
                    return f"forward fails: {_brief(error)}"
                continue  # the network cannot be where this would be
            try:
                found = [y for x in examples for y in _in_both_modes(model, cut, params, x)]
                equal = [_equal(*pair) for pair in zip(expected, found, strict=True)]
            except Exception as error:  # likewise
                return _brief(error)
        if not all(equal):
            mode = "evaluation" if all(equal[::2]) else "training"
            where = "at other parameters than the initial ones" if spread else "from the start"
            return f"they differ in {mode}, {where}"
    return None


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two outputs have the same values, of which NaN is one."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _in_both_modes(
    model: nn.Module, compute: Callable[[Meta, Tensor], Tensor], params: Meta, x: Tensor
) -> list[Tensor]:
    """Outputs in training and in evaluation, each from the same buffers and random state."""
    with untouched(model):
        training = compute(params, x)
    with untouched(model), evaluating(model):
        return [training, compute(params, x)]
