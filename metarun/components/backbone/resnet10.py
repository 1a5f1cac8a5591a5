"""The residual network of ten layers in CloserLook (Chen et al. 2019)."""

from metarun.components.backbone.images import WithHead
from metarun.components.backbone.resnet18 import Resnet18Config, residual
from metarun.config.component import builds, settings


@settings
class Resnet10Config(Resnet18Config):
    """ResNet-10 (Chen et al. 2019): four residual blocks."""


@builds(Resnet10Config)
def resnet10(input_shape: tuple[int, ...], outputs: int, own: Resnet10Config) -> WithHead:
    """Four stages of one basic block, a mean over space, and a linear head.

    CloserLook takes images of 224 pixels with `stem="imagenet"`. See
    `metarun.components.backbone.resnet18`.

    Args:
        input_shape: (channels, height, width).
        outputs: of the head.
        own: the settings.
    """
    return residual("resnet10", input_shape, outputs, own, blocks=1)
