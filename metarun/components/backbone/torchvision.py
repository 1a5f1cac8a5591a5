"""The classification models of torchvision."""

from typing import Any

from metarun.components.backbone.base import NormalisedConfig
from metarun.components.backbone.library import COLOURS, Cut, channels_of, cut, known_model
from metarun.config.component import builds, settings

OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}
"""What turns off outputs beside the scores."""


@settings
class TorchvisionConfig(NormalisedConfig):
    """A classification model of torchvision."""

    model: str = "resnet18"  # its name there


@builds(TorchvisionConfig)
def torchvision(input_shape: tuple[int, ...], outputs: int, own: TorchvisionConfig) -> Cut:
    """A model of `torchvision.models` with random weights, or those of `backbone.weights`.

    Parameters have torchvision's names behind "body.", and the last linear layer is the head.
    Nothing is downloaded. Vision transformers are built for the size of the images.

    Args:
        input_shape: (channels, height, width), of one or three channels.
        outputs: of the head.
        own: the settings.

    Raises:
        ValueError: there is no such model, it has no head that could be replaced, or the images
            do not fit it.
    """
    from torchvision import models

    known_model("torchvision", own.model, models.list_models(module=models))
    if channels_of("torchvision", input_shape) != COLOURS:
        raise ValueError(
            f"backbone=torchvision needs images of one or three channels, not {input_shape[0]}: "
            "use backbone=timm"
        )
    options = dict(OPTIONS.get(own.model, {}))
    if own.model.startswith("vit_"):
        options["image_size"] = input_shape[1]
    if own.model.startswith("maxvit"):
        options["input_size"] = tuple(input_shape[1:])
    return cut(
        own.model,
        lambda: models.get_model(own.model, weights=None, num_classes=outputs, **options),
        input_shape,
        outputs,
    )
