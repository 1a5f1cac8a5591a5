"""Operations put in another way, for programs that inductor compiles on a CPU.

**Convolutions of few channels**, as the first layer of a network sees them, as matrix products.
The weights' gradient as oneDNN computes it takes several times as long, and what the layer gives
has its channels first, where all later layers want them last.

**The gradient of max-pooling** as an operation that inductor knows nothing of. Its own kernel,
which looks for each element through the windows that might hold it, takes many times as long as
torch's.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_COLUMNS = 16  # elements of a patch; with 27 (3 channels, 3×3) the patches cost too much

aten = torch.ops.aten


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Any:
    """`aten.convolution`; `NotImplemented` leaves it to torch."""
    if transposed or groups != 1 or not _applies(x, weight, dilation):
        return NotImplemented
    patches = _patches(x, weight, stride, padding)
    product = patches.flatten(0, 2) @ weight.flatten(1).t()
    if bias is not None:
        product = product + bias
    return product.view(*patches.shape[:3], -1).permute(0, 3, 1, 2)


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: list[int] | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    output_mask: list[bool],
) -> Any:
    """`aten.convolution_backward`; `NotImplemented` leaves it to torch."""
    if transposed or groups != 1 or output_mask[0] or not _applies(x, weight, dilation):
        return NotImplemented
    weight_grad = bias_grad = None
    if output_mask[1]:
        patches = _patches(x, weight, stride, padding)
        rows = grad.permute(0, 2, 3, 1).flatten(0, 2)
        weight_grad = (patches.flatten(0, 2).t() @ rows).t().reshape(weight.shape)
    if output_mask[2]:
        bias_grad = grad.sum((0, 2, 3))
    return None, weight_grad, bias_grad


@torch.library.custom_op("metarun::max_pool_backward", mutates_args=())
def opaque_max_pool_backward(
    grad: Tensor,
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
    indices: Tensor,
) -> Tensor:
    """`aten.max_pool2d_with_indices_backward` as it is, which inductor leaves alone."""
    result: Tensor = aten.max_pool2d_with_indices_backward(
        grad, x, kernel, stride, padding, dilation, ceil_mode, indices
    )
    return result


opaque_max_pool_backward.register_fake(aten.max_pool2d_with_indices_backward)


def max_pool_backward(grad: Tensor, x: Tensor, *rest: Any) -> Any:
    """`aten.max_pool2d_with_indices_backward`; `NotImplemented` leaves it to torch."""
    return opaque_max_pool_backward(grad, x, *rest) if x.device.type == "cpu" else NotImplemented


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.convolution.default: convolution,
    aten.convolution_backward.default: convolution_backward,
    aten.max_pool2d_with_indices_backward.default: max_pool_backward,
}


def _applies(x: Tensor, weight: Tensor, dilation: list[int]) -> bool:
    few = weight[0].numel() <= MOST_COLUMNS
    return x.device.type == "cpu" and x.dim() == 4 and few and set(dilation) == {1}


def _patches(x: Tensor, weight: Tensor, stride: list[int], padding: list[int]) -> Tensor:
    """(examples, height, width, channels × kernel height × kernel width)."""
    (high, wide), (down, right) = weight.shape[2:], stride
    padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    windows = padded.unfold(2, high, down).unfold(3, wide, right)
    return windows.permute(0, 2, 3, 1, 4, 5).flatten(3)
