"""Images brought to another size, number of channels or polarity: for a network of other data."""

import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.episodes.store import ClassStore, derived, packed

AT_A_TIME = 1024  # images that are floats at a time
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601), as Pillow has it


def fitted(store: ClassStore, shape: tuple[int, ...], invert: bool = False) -> ClassStore:
    """The same classes, with images of another shape.

    Colours become grey by their luma, grey becomes three equal channels. The size changes by
    bilinear interpolation with antialiasing, which stretches what has other proportions.

    Args:
        store: of uint8 images (images, channels, height, width).
        shape: (channels, height, width), with 1 or 3 channels.
        invert: dark and light change places.

    Raises:
        ValueError: the store has no images, or its images or `shape` have another number of
            channels.
    """
    if store.images.dtype is not torch.uint8 or store.images.dim() != 4 or len(shape) != 3:
        raise ValueError(f"only images can be brought to the shape of others, {shape}")
    channels = store.images.shape[1]
    if channels != shape[0] and {channels, shape[0]} != {1, 3}:
        raise ValueError(f"images of {channels} channels cannot be brought to {shape[0]}")
    own = packed(store)
    starts = range(0, len(own.images), AT_A_TIME)
    images = torch.cat([_fitted(own.images[start : start + AT_A_TIME], shape) for start in starts])
    known = derived(store, "fitted", tuple(shape), invert)
    return ClassStore(
        255 - images if invert else images, own.starts, own.sizes, own.class_names, known
    )


def _fitted(images: Tensor, shape: tuple[int, ...]) -> Tensor:
    values = images.float()
    if values.shape[1] > shape[0]:
        luma = values.new_tensor(LUMA)[:, None, None]
        values = (values * luma).sum(1, keepdim=True)
    if values.shape[2:] != shape[1:]:
        values = F.interpolate(values, tuple(shape[1:]), mode="bilinear", antialias=True)
    return values.round().clamp(0, 255).to(torch.uint8).expand(-1, shape[0], -1, -1)
