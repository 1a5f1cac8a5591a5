"""What backbones of images have in common."""

from torch import Tensor, nn


def image_size(backbone: str, input_shape: tuple[int, ...], smallest: int = 1) -> tuple[int, ...]:
    """The channels, the height and the width of images.

    Args:
        backbone: its name, for the message.
        smallest: pixels that a side must have.

    Raises:
        ValueError: the examples are no images, or too small.
    """
    if len(input_shape) != 3:
        raise ValueError(
            f"backbone {backbone} needs images (channels, height, width), but the examples have "
            f"shape {tuple(input_shape)}: use backbone=mlp"
        )
    if min(input_shape[1:]) < smallest:
        raise ValueError(
            f"images of {input_shape[1]}×{input_shape[2]} are too small for backbone={backbone}, "
            f"which needs {smallest}×{smallest} or more: use backbone=conv4, or larger images"
        )
    return input_shape


class WithHead(nn.Module):
    """A body that makes maps of images, and a linear head.

    Args:
        body: (examples, channels, height, width) -> maps.
        width: channels of the maps, or all their units where they are flattened.
        outputs: of the head.
        flatten: whether the head gets all units, and not the mean of each map.
    """

    def __init__(self, body: nn.Module, width: int, outputs: int, flatten: bool = False) -> None:
        super().__init__()
        self.body, self.flatten = body, flatten
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(examples, channels, height, width) -> (examples, outputs)."""
        scores: Tensor = self.head(self.features(x))
        return scores

    def features(self, x: Tensor) -> Tensor:
        """What the head gets: (examples, features)."""
        maps: Tensor = self.body(x)
        return maps.flatten(1) if self.flatten else maps.mean(dim=(-2, -1))


def draw_for_relu(body: nn.Module) -> nn.Module:
    """The body, its convolutions drawn for ReLU by their outputs (He et al. 2015)."""
    for module in body.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return body
