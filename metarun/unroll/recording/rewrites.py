"""Operations put in another way, for programs that inductor compiles on a CPU.

**Convolutions of few channels**, as the first layer of a network sees them, as matrix products.
The weights' gradient as oneDNN computes it takes several times as long, and what the layer gives
has its channels first, where all later layers want them last.

**The gradient of max-pooling** as an operation that inductor knows nothing of. Its own kernel,
which looks for each element through the windows that might hold it, takes many times as long as
torch's.

**Sums over several dimensions** one dimension at a time, where what is left lies side by side in
memory (channels last). Inductor's loop adds all terms of such a sum one by one into one float32,
thousands of them: moments of a batch normalisation were 3e-6 to 7e-6 off, where torch's own sums
are 1e-7 off. One dimension at a time, no more than its size are added in a row, in the same time.
"""

import math
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_TERMS = 64  # of a sum that are added one by one
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


def sum_over(
    x: Tensor, dims: list[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    """`aten.sum.dim_IntList`; `NotImplemented` leaves it to torch."""
    if dtype not in (None, x.dtype) or not _added_in_a_row(dims, x):
        return NotImplemented
    return _sum_by_dimension(x, dims, keepdim)


def mean_over(
    x: Tensor, dims: list[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    """`aten.mean.dim`; `NotImplemented` leaves it to torch."""
    total = sum_over(x, dims, keepdim, dtype=dtype)
    return NotImplemented if total is NotImplemented else total / (x.numel() // total.numel())


def var_mean_over(
    x: Tensor,
    dims: list[int] | None = None,
    *,
    correction: float | None = None,
    keepdim: bool = False,
) -> Any:
    """`aten.var_mean.correction`; `NotImplemented` leaves it to torch."""
    if not _added_in_a_row(dims, x):
        return NotImplemented
    mean = _sum_by_dimension(x, dims, True)
    terms = x.numel() // mean.numel()
    mean = mean / terms
    squares = _sum_by_dimension((x - mean).square(), dims, keepdim)
    variance = squares / (terms - (1 if correction is None else correction))
    return variance, mean.view(variance.shape)


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.convolution.default: convolution,
    aten.convolution_backward.default: convolution_backward,
    aten.max_pool2d_with_indices_backward.default: max_pool_backward,
    aten.sum.dim_IntList: sum_over,
    aten.mean.dim: mean_over,
    aten.var_mean.correction: var_mean_over,
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


def _added_in_a_row(dims: list[int] | None, x: Tensor) -> TypeGuard[list[int]]:
    """Whether inductor would add more than `MOST_TERMS` terms of each sum one by one."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or not dims:
        return False  # results of a lower precision would be rounded between two dimensions
    over = {dim % x.dim() for dim in dims}
    side_by_side = any(
        size > 1 and stride == 1
        for dim, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True))
        if dim not in over
    )
    terms = math.prod(x.shape[dim] for dim in over)
    return side_by_side and len(over) > 1 and terms > MOST_TERMS


def _sum_by_dimension(x: Tensor, dims: list[int], keepdim: bool) -> Tensor:
    over = sorted({dim % x.dim() for dim in dims})
    for dim in sorted(over, key=x.stride):
        x = x.sum(dim, keepdim=True)
    return x if keepdim else x.squeeze(over)
