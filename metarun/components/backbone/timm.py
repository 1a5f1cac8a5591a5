"""The models of timm (PyTorch Image Models)."""

from typing import Any

from torch import nn

from metarun.components.backbone.base import NormalisedConfig
from metarun.components.backbone.library import Cut, channels_of, cut, known_model
from metarun.config.component import builds, settings


@settings
class TimmConfig(NormalisedConfig):
    """A model of timm."""

    model: str = "resnet18"  # its name there


@builds(TimmConfig)
def timm(input_shape: tuple[int, ...], outputs: int, own: TimmConfig) -> Cut:
    """A model of timm with random weights, or those of `backbone.weights`.

    Parameters have timm's names behind "body.", and the last linear layer is the head. Nothing is
    downloaded. Models that are built for a size of images are built for that of the data.

    Args:
        input_shape: (channels, height, width).
        outputs: of the head.
        own: the settings.

    Raises:
        ValueError: timm is not installed, there is no such model, it has no head that could be
            replaced, or the images do not fit it.
    """
    try:
        import timm as library
    except ImportError as error:
        raise ValueError(
            "backbone=timm needs timm, which is not installed: pip install 'metarun[timm]'"
        ) from error

    if not library.is_model(own.model):
        known_model("timm", own.model, library.list_models())
    channels, size = channels_of("timm", input_shape), tuple(input_shape[1:])

    def build() -> nn.Module:
        options: dict[str, Any] = {
            "pretrained": False,
            "num_classes": outputs,
            "in_chans": channels,
        }
        try:
            return library.create_model(own.model, img_size=size, **options)
        except TypeError:  # most are not built for a size
            return library.create_model(own.model, **options)

    return cut(own.model, build, input_shape, outputs)
