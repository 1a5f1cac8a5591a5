"""Transforms of pictures, many at once, each by its own parameters.

torchvision's functions take one set of parameters for all pictures of a batch. These compute the
same of each picture: `window` what `pad`, `crop` and the flips do, `warp` what `affine` does, and
`recolour` what the `adjust_…` functions do.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.config.augment import Colour

LUMA = (0.2989, 0.587, 0.114)  # of red, green and blue, as torchvision rounds them


def window(
    images: Tensor,
    down: Tensor,
    right: Tensor,
    mirrored: Tensor,
    upside_down: Tensor,
    *,
    border: int,
    fill: float,
) -> Tensor:
    """A window of each picture with a border around it, perhaps flipped: no pixel is changed.

    Args:
        images: (pictures, channels, height, width).
        down, right: int64 (pictures,), place of the window, from 0 to 2 * border: at `border` it is
            the picture.
        mirrored, upside_down: bool (pictures,), whether left and right, or top and bottom, change
            places in the window.
        border: pixels on each side.
        fill: value of the border.

    Returns:
        As `images`.
    """
    height, width = images.shape[-2:]
    rows = _ends_exchanged(height, upside_down) + down[:, None]
    columns = _ends_exchanged(width, mirrored) + right[:, None]
    padded = F.pad(images, [border] * 4, value=fill)
    places = rows[:, :, None] * padded.shape[-1] + columns[:, None, :]
    of_channels = places.flatten(1)[:, None].expand(-1, images.shape[1], -1)
    return padded.flatten(2).gather(2, of_channels).view(images.shape)


def _ends_exchanged(size: int, exchanged: Tensor) -> Tensor:
    places = torch.arange(size, device=exchanged.device)
    return torch.where(exchanged[:, None], size - 1 - places, places)


def warp(
    images: Tensor,
    angle: Tensor,
    right: Tensor,
    down: Tensor,
    scale: Tensor,
    shear: Tensor,
    *,
    fill: float,
) -> Tensor:
    """Shear, zoom and turn each picture about its middle, then move it; by bilinear interpolation.

    The pixel at p, from the middle, comes from A⁻¹ (p − (right, down)), with A = R(angle) · scale ·
    [[1, −tan(shear)], [0, 1]].

    Args:
        images: (pictures, channels, height, width).
        angle: float64 (pictures,), degrees, clockwise.
        right, down: float64 (pictures,), pixels.
        scale: float64 (pictures,), factor of the size.
        shear: float64 (pictures,), degrees.
        fill: value outside of the pictures.

    Returns:
        As `images`.
    """
    cos, sin = angle.deg2rad().cos(), angle.deg2rad().sin()
    tan = shear.deg2rad().tan()
    inverse = torch.stack([cos - sin * tan, sin + cos * tan, -sin, cos]) / scale
    from_x, from_y, to_x, to_y = (n.to(images.dtype)[:, None, None] for n in inverse)
    height, width = images.shape[-2:]
    x, y = _from_the_middle(width, right, images), _from_the_middle(height, down, images)
    x, y = x[:, None, :], y[:, :, None]
    # Written out: a matrix product may round otherwise with other pictures beside it.
    grid = torch.stack(
        [(from_x * x + from_y * y) * (2 / width), (to_x * x + to_y * y) * (2 / height)], dim=-1
    )
    # What grid_sample takes from outside is 0.
    warped = F.grid_sample(images - fill, grid, padding_mode="zeros", align_corners=False)
    return warped.add_(fill).clamp_(0, 1)


def _from_the_middle(size: int, moved: Tensor, images: Tensor) -> Tensor:
    places = torch.arange(size, dtype=torch.float64, device=images.device) - (size - 1) / 2
    return (places - moved[:, None]).to(images.dtype)


def recolour(images: Tensor, kinds: Sequence[Colour], amounts: Tensor, order: Tensor) -> Tensor:
    """Change the colours of each picture, in an order of its own.

    Brightness, contrast and saturation are a blend f · image + (1 − f) · base, cut off at 0 and 1.
    The base is black, the mean of the grey picture, or the grey picture. Hue is a turn of the
    circle of colours.

    Args:
        images: (pictures, channels, height, width), in [0, 1]; of 3 channels, or of 1 if there is
            neither saturation nor hue.
        kinds: what changes.
        amounts: (pictures, kinds), by which factor f; of hue by which part of the circle.
        order: int64 (pictures, kinds), the places in `kinds` of what comes first, second, …

    Returns:
        As `images`.
    """
    amounts = amounts.to(images.dtype)[:, :, None, None, None]
    for place in order.T:
        chosen = [(place == number)[:, None, None, None] for number in range(len(kinds))]
        which = dict(zip(kinds, chosen, strict=True))
        amount = amounts[torch.arange(len(images), device=images.device), place]
        base = images.new_zeros(1, 1, 1, 1)
        if "contrast" in which or "saturation" in which:
            grey = _grey(images)
            # Row by row: a whole picture may be added up otherwise if there is only one.
            mean = grey.mean(-1, keepdim=True).mean(-2, keepdim=True)
            base = torch.where(which["contrast"], mean, base) if "contrast" in which else base
            base = torch.where(which["saturation"], grey, base) if "saturation" in which else base
        changed = torch.lerp(base.expand_as(images), images, amount).clamp_(0, 1)
        if "hue" in which:
            changed = torch.where(which["hue"], _with_hue_turned(images, amount), changed)
        images = changed
    return images


def _grey(images: Tensor) -> Tensor:
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unsqueeze(2).unbind(1)
    grey = red * LUMA[0]
    return grey.add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def _with_hue_turned(images: Tensor, by: Tensor) -> Tensor:
    """The colours of the same value and saturation, with another hue.

    Each channel is v − c · clamp(min(k, 4 − k), 0, 1), with the value v, the chroma c and k = n + h
    modulo 6. The hue h is from 0 to 6, and n is 5, 3 and 1 for red, green and blue.
    """
    red, green, blue = images.unbind(1)
    least, value = torch.aminmax(images, dim=1)
    chroma = value - least
    divisor = torch.where(chroma == 0, torch.ones_like(chroma), chroma)  # grey has any hue
    hue = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    offsets = 5 - 2 * torch.arange(3, dtype=images.dtype, device=images.device)[:, None, None]
    place = (hue[:, None] + 6 * by + offsets).remainder(6)
    part = torch.minimum(place, 4 - place).clamp_(0, 1)
    return value[:, None] - chroma[:, None] * part
