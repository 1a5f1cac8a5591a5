"""Pictures from Python, in whatever form they are there, as what a network gets."""

import math
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from metarun.errors import DataError
from metarun.pictures.decode import UnreadableError
from metarun.pictures.inputs import Inputs
from metarun.pictures.listing import Picture

FORMS = (
    "a path, a PIL image, a uint8 array (height, width) or (height, width, 1, 3 or 4), or a uint8 "
    "tensor (channels, height, width)"
)


def to_examples(images: Any, inputs: Inputs) -> Tensor:
    """Pictures as inputs of a network, from 0 to 1.

    Paths, PIL images and whole numbers from 0 to 255 are pictures as one sees them: they are
    treated as in training. Floating-point numbers are inputs of the network already, and stay as
    they are.

    Args:
        images: a sequence of pictures, each a path, a PIL image, a uint8 array (height, width) or
            (height, width, channels), or a uint8 tensor (channels, height, width); an array or
            tensor of such; rows (pictures, height · width) of a network that gets grey
            pictures; or floating-point numbers from 0 to 1, (pictures, *inputs.shape) or
            (pictures, features) in the same order. An array or tensor of three dimensions has
            grey pictures, and is refused where it may be a single one.
        inputs: what the network gets of a picture.

    Returns:
        float64 (pictures, *inputs.shape).

    Raises:
        ValueError: they are none of these.
        DataError: a file cannot be read.
    """
    if isinstance(images, str | os.PathLike | Image.Image):
        raise ValueError("images is a single picture: give a list, [picture]")
    if isinstance(images, np.ndarray | Tensor) and _is_numeric(images):
        if _is_floating(images):
            return _shaped(torch.as_tensor(images).double(), inputs)
        if not _is_uint8(images):
            raise ValueError(
                f"images are {images.dtype}: give uint8 from 0 to 255, or floating-point numbers "
                "from 0 to 1"
            )
        if images.ndim == 2:
            images = _from_rows(images, inputs)
        elif images.ndim == 3 and _may_be_one(images):
            raise ValueError(
                f"images have the shape {tuple(images.shape)}, which is that of a single picture: "
                "give a list, [picture]; or of grey pictures an array (pictures, height, width, 1) "
                "or a tensor (pictures, 1, height, width)"
            )
    if not isinstance(images, Iterable):
        raise ValueError(f"images is a {type(images).__name__}: give a sequence of pictures")
    made = [_example(place, image, inputs) for place, image in enumerate(images)]
    if not made:
        return torch.empty((0, *inputs.shape), dtype=torch.float64)
    return torch.stack(made)


def _from_rows(rows: Any, inputs: Inputs) -> Any:
    """Rows of whole numbers as grey pictures (pictures, height, width).

    Raises:
        ValueError: they have another length, or the network gets colours: nobody knows in which
            order those of a row are.
    """
    channels, height, width = inputs.shape
    if rows.shape[1] != height * width or channels != 1:
        raise ValueError(
            f"images are uint8 of shape {tuple(rows.shape)}: as rows they would be (pictures, "
            f"{height * width}) of a network that gets grey pictures, and this one gets "
            f"{tuple(inputs.shape)}; give a list of pictures, each {FORMS}"
        )
    return rows.reshape(len(rows), height, width)


def _may_be_one(values: Any) -> bool:
    """Whether whole numbers of three dimensions are a picture, as well as grey ones in a row."""
    first, *_, last = values.shape
    # One channel first is one grey picture, whichever way it is meant.
    return last in (1, 3, 4) or (isinstance(values, Tensor) and first in (3, 4))


def _is_numeric(values: Any) -> bool:
    return isinstance(values, Tensor) or values.dtype.kind in "fiub"


def _is_uint8(values: Any) -> bool:
    return str(values.dtype).removeprefix("torch.") == "uint8"


def _is_floating(values: Any) -> bool:
    if isinstance(values, Tensor):
        return values.is_floating_point()
    return bool(values.dtype.kind == "f")


def _shaped(values: Tensor, inputs: Inputs) -> Tensor:
    """Floating-point numbers (pictures, …) as (pictures, *inputs.shape).

    Raises:
        ValueError: they have another shape, or are not from 0 to 1.
    """
    shape, size = inputs.shape, math.prod(inputs.shape)
    if tuple(values.shape[1:]) not in (shape, (size,)):
        raise ValueError(
            f"images have the shape {tuple(values.shape)}: inputs of this run's network are "
            f"(pictures, {', '.join(map(str, shape))}) or (pictures, {size}); pictures of another "
            "size are uint8, PIL images or paths"
        )
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(
            "images have numbers that are not from 0 to 1: divide by 255, or give pictures as uint8"
        )
    return values.reshape(-1, *shape).cpu()


def _example(place: int, image: Any, inputs: Inputs) -> Tensor:
    try:
        if isinstance(image, str | os.PathLike):
            pixels = inputs.of_file(Picture(os.path.expanduser(image)))
        elif isinstance(image, Image.Image):
            pixels = inputs.of_image(image)
        elif isinstance(image, np.ndarray | Tensor):
            if _is_floating(image):
                return _shaped(torch.as_tensor(image).double()[None], inputs)[0]
            pixels = inputs.of_image(_opened(image))
        else:
            raise ValueError(f"images[{place}] is a {type(image).__name__}: give {FORMS}")
    except (UnreadableError, OSError) as error:  # Pillow reads a file when its pixels are needed
        shown = image if isinstance(image, str | os.PathLike) else f"images[{place}]"
        raise DataError(f"cannot read the picture {shown}: {error}") from error
    return torch.tensor(pixels, dtype=torch.float64) / 255


def _opened(image: Any) -> Image.Image:
    """An array or a tensor of whole numbers as a PIL image.

    Raises:
        ValueError: it is no picture.
    """
    if isinstance(image, Tensor):
        pixels = image.cpu().numpy()
        pixels = pixels.transpose(1, 2, 0) if pixels.ndim == 3 else pixels
    else:
        pixels = image
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    fits = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))
    if not fits or not _is_uint8(pixels) or 0 in pixels.shape:
        what = f"a {image.dtype} {type(image).__name__} of shape {tuple(image.shape)}"
        raise ValueError(f"a picture is {what}: give {FORMS}")
    return Image.fromarray(np.ascontiguousarray(pixels))
