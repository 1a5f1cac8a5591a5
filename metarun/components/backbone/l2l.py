"""The networks of learn2learn."""

from collections.abc import Callable
from math import prod
from typing import Any

from torch import nn

from metarun.components.backbone.base import NormalisedConfig
from metarun.components.backbone.images import image_size
from metarun.components.backbone.library import Cut, channels_of, cut, known_model
from metarun.config.component import builds, settings

OTHERS = {"ResNet12": "resnet12", "WRN28": "wrn28_10"}
"""Networks of ours that take the weights of theirs; theirs count their calls in Python."""


@settings
class L2lConfig(NormalisedConfig):
    """A network of learn2learn."""

    model: str = "OmniglotCNN"  # its name there: OmniglotCNN, OmniglotFC or CNN4


@builds(L2lConfig)
def l2l(input_shape: tuple[int, ...], outputs: int, own: L2lConfig) -> Cut:
    """A network of `learn2learn.vision.models`, with its own first weights and default sizes.

    Parameters have learn2learn's names behind "body.", and its `classifier` is the head. Of a
    network that learn2learn made, `backbone.weights` takes the `state_dict`.

    Args:
        input_shape: of one example.
        outputs: of the head.
        own: the settings.

    Raises:
        ValueError: learn2learn is not installed, it has no such network, or the examples do not
            fit it.
    """
    try:
        from learn2learn.vision import models
    except ImportError as error:
        raise ValueError(
            "backbone=l2l needs learn2learn, which is not installed: see its own notes on "
            "installation, or use backbone=conv4, which has the same networks"
        ) from error

    def cnn4() -> nn.Module:
        image_size("l2l", input_shape, smallest=16)
        channels = channels_of("l2l", input_shape)
        units = 64 * (input_shape[1] // 16) * (input_shape[2] // 16)
        model: nn.Module = models.CNN4(outputs, channels=channels, embedding_size=units)
        return model

    networks: dict[str, Callable[[], Any]] = {
        "OmniglotCNN": lambda: models.OmniglotCNN(outputs),
        "OmniglotFC": lambda: models.OmniglotFC(prod(input_shape), outputs),
        "CNN4": cnn4,
    }
    if own.model in OTHERS:
        raise ValueError(
            f"backbone.model={own.model}: use backbone={OTHERS[own.model]}, which is the same "
            "network and takes its weights"
        )
    known_model("l2l", own.model, networks)
    return cut(own.model, networks[own.model], input_shape, outputs, recolours=own.model == "CNN4")
