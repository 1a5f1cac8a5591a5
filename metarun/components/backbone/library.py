"""Networks of other libraries as backbones: cut before their last layer, and normalised as ours."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from metarun.components.algo.base import evaluating
from metarun.components.backbone.norm import BatchNorm
from metarun.errors import did_you_mean, first_line

OF_TORCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
GREY, COLOURS = 1, 3


class Cut(nn.Module):
    """A network of another library, cut into what makes features and its last linear layer.

    Attributes:
        head_in_files: what begins the names of the head in files of the library's weights.
        batch_norm: "none" where there is no batch normalisation, for the result line.
    """

    def __init__(self, model: nn.Module, place: str, grey: bool) -> None:
        super().__init__()
        self.body, self.grey, self.head_in_files = model, grey, f"{place}."
        self.head = model.get_submodule(place)
        model.set_submodule(place, nn.Identity())
        if not any(isinstance(module, BatchNorm) for module in model.modules()):
            self.batch_norm = "none"

    def forward(self, x: Tensor) -> Tensor:
        """(examples, channels, height, width) -> (examples, outputs)."""
        scores: Tensor = self.head(self.features(x))
        return scores

    def features(self, x: Tensor) -> Tensor:
        """What the head gets: (examples, features)."""
        features: Tensor = self.body(_coloured(x) if self.grey else x)
        return features


class _NormThen(BatchNorm):
    """Batch normalisation that is one layer with what follows it."""

    def __init__(self, channels: int, eps: float, *then: nn.Module) -> None:
        super().__init__(channels, eps)
        self.then = nn.Sequential(*then)

    def forward(self, x: Tensor) -> Tensor:
        """(examples, channels, …) -> the same shape."""
        out: Tensor = self.then(super().forward(x))
        return out


def known_model(backbone: str, name: str, known: Iterable[str]) -> None:
    """Refuse a model that its library does not have.

    Raises:
        ValueError: it names one that is close, if there is one.
    """
    names = list(known)
    if name not in names:
        few = f": choose one of {', '.join(names)}" if len(names) < 10 else ""
        raise ValueError(
            f"backbone.model={name}: {backbone} has no such model{did_you_mean(name, names)}{few}"
        )


def channels_of(backbone: str, input_shape: tuple[int, ...]) -> int:
    """The channels that a network gets: three where images are grey.

    Raises:
        ValueError: the examples are no images.
    """
    if len(input_shape) != 3:
        raise ValueError(
            f"backbone={backbone} needs images (channels, height, width), but the examples have "
            f"shape {tuple(input_shape)}: use backbone=mlp"
        )
    return COLOURS if input_shape[0] == GREY else input_shape[0]


def cut(
    name: str,
    build: Callable[[], nn.Module],
    input_shape: tuple[int, ...],
    outputs: int,
    recolours: bool = True,
) -> Cut:
    """A network that is built with as many outputs, as a backbone.

    Its batch normalisation becomes `BatchNorm`, and layers that change their input in place do so
    no longer.

    Args:
        name: the model's, for messages.
        build: makes the network.
        input_shape: of one example.
        outputs: of its last layer.
        recolours: whether grey images are given to it in three channels.

    Raises:
        ValueError: it cannot be built, is not made for such images, or cannot be cut.
    """
    try:
        model = build()
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"backbone.model={name}: {_unfit(input_shape, error)}") from error
    replace_batch_norms(name, model)
    for module in model.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
    heads = [
        place
        for place, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == outputs
    ]
    if not heads:
        raise ValueError(
            f"backbone.model={name} does not end in a linear layer, which would be its head: "
            "choose another model"
        )
    grey = recolours and input_shape[0] == GREY
    x = _example(model, input_shape)
    if x is None:
        return Cut(model, heads[-1], grey)
    try:
        expected = _in_evaluation(model, _coloured(x) if grey else x)
    except (AssertionError, RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ValueError(f"backbone.model={name}: {_unfit(input_shape, error)}") from error
    made = Cut(model, heads[-1], grey)
    try:
        same = torch.equal(_in_evaluation(made, x), expected)
    except (RuntimeError, ValueError, TypeError):
        same = False
    if not same or expected.shape != (len(x), outputs):
        raise ValueError(
            f"backbone.model={name} does more with its last linear layer than to apply it, so "
            "that is no head of its own: choose another model"
        )
    return made


def replace_batch_norms(name: str, model: nn.Module) -> None:
    """Put `BatchNorm` in the place of torch's batch normalisation, with the same parameters.

    Torch's has running statistics, which tasks cannot share, and a second derivative that is wrong
    around vmap. Layers that make an activation one with it (timm's) keep their activation.

    Raises:
        ValueError: a layer has no parameters, or is of a kind that is not known.
    """
    made: dict[int, BatchNorm] = {}  # a layer may stand in several places
    for place, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, OF_TORCH):
            continue
        if id(module) in made:
            model.set_submodule(place, made[id(module)])
            continue
        kind = type(module)
        if not module.affine:
            raise ValueError(
                f"backbone.model={name}: its {place} normalises batches without parameters, which "
                "metarun has no layer for; choose another model"
            )
        own: BatchNorm
        if kind in OF_TORCH or kind.forward in [torchs.forward for torchs in OF_TORCH]:
            own = BatchNorm(module.num_features, module.eps)
        elif isinstance(getattr(module, "act", None), nn.Module):
            drop = getattr(module, "drop", None)
            then = [part for part in (drop, module.act) if isinstance(part, nn.Module)]
            own = _NormThen(module.num_features, module.eps, *then)
        else:
            raise ValueError(
                f"backbone.model={name}: its {place} is a {kind.__name__}, a batch normalisation "
                "that metarun does not know; choose another model"
            )
        own.weight, own.bias = module.weight, module.bias
        made[id(module)] = own
        model.set_submodule(place, own)


def _coloured(x: Tensor) -> Tensor:
    """Grey images in three channels."""
    return x.expand(*x.shape[:-3], COLOURS, *x.shape[-2:])


def _example(model: nn.Module, input_shape: tuple[int, ...]) -> Tensor | None:
    """Two images to try a network with; None if it is built without memory."""
    like = next(model.parameters())
    if like.is_meta:
        return None
    numbers = torch.linspace(-1, 1, 2 * math.prod(input_shape)).cos()
    return numbers.to(like).reshape(2, *input_shape)


def _in_evaluation(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad(), evaluating(model):
        outputs: Tensor = model(x)
        return outputs


def _unfit(input_shape: tuple[int, ...], error: Exception) -> str:
    shape = "×".join(map(str, input_shape[1:] + input_shape[:1]))
    return (
        f"it cannot take examples of {shape} "
        f"({first_line(error).rstrip('.')[:160]}); choose another model or other images"
    )
