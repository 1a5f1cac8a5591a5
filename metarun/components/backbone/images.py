"""What backbones of images have in common."""


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
