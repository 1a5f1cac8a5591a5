"""What is put in another way for inductor computes the same, derivatives included."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from metarun.components.backbone.norm import BatchNorm
from metarun.unroll import mean_gradient, meta_gradient, recorded, sgd, unroll
from metarun.unroll.recording.rewrites import (
    convolution,
    convolution_backward,
    max_pool_backward,
    mean_over,
    sum_over,
    var_mean_over,
)

F64 = torch.float64
aten = torch.ops.aten


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("x", "kernel", "stride", "padding"),
    [
        ((5, 1, 8, 8), (3, 3), [2, 2], [1, 1]),
        ((2, 2, 7, 9), (2, 3), [1, 2], [0, 1]),
        ((1, 1, 5, 4), (4, 4), [3, 1], [2, 0]),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_of_few_channels(
    x: Any, kernel: Any, stride: list[int], padding: list[int], bias: bool
) -> None:
    images, weight = normal(*x), normal(6, x[1], *kernel, seed=1)
    offset = normal(6, seed=2) if bias else None
    rest = (stride, padding, [1, 1], False, [0, 0], 1)
    expected = aten.convolution(images, weight, offset, *rest)
    torch.testing.assert_close(convolution(images, weight, offset, *rest), expected)
    grad, sizes = normal(*expected.shape, seed=3), [6] if bias else None
    mask = [False, True, bias]
    ours = convolution_backward(grad, images, weight, sizes, *rest, mask)
    theirs = aten.convolution_backward(grad, images, weight, sizes, *rest, mask)
    torch.testing.assert_close(ours[1:], tuple(theirs[1:]))


@pytest.mark.parametrize("change", ["channels", "groups", "dilation", "one dimension"])
def test_other_convolutions_are_left_to_torch(change: str) -> None:
    channels = 4 if change == "channels" else 2
    shape = (3, channels, 6) if change == "one dimension" else (3, channels, 6, 6)
    groups = 2 if change == "groups" else 1
    dims = len(shape) - 2
    weight = normal(4, channels // groups, *([3] * dims))
    dilation = [2 if change == "dilation" else 1] * dims
    rest = ([1] * dims, [1] * dims, dilation, False, [0] * dims, groups)
    images = normal(*shape)
    assert convolution(images, weight, None, *rest) is NotImplemented
    grad = aten.convolution(images, weight, None, *rest)
    given = (grad, images, weight, None, *rest, [False, True, False])
    assert convolution_backward(*given) is NotImplemented


def test_gradients_of_images_are_left_to_torch() -> None:
    images, weight = normal(2, 1, 5, 5), normal(3, 1, 3, 3)
    rest = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    grad = aten.convolution(images, weight, None, *rest)
    given = (grad, images, weight, None, *rest, [True, True, False])
    assert convolution_backward(*given) is NotImplemented


def test_max_pooling_is_that_of_torch() -> None:
    x = normal(2, 3, 7, 6)
    values, indices = F.max_pool2d(x, 2, return_indices=True)
    grad = normal(*values.shape, seed=1)
    given = (grad, x, [2, 2], [2, 2], [0, 0], [1, 1], False, indices)
    expected = aten.max_pool2d_with_indices_backward(*given)
    torch.testing.assert_close(max_pool_backward(*given), expected, rtol=0, atol=0)
    elsewhere = [part.to("meta") if isinstance(part, Tensor) else part for part in given]
    assert max_pool_backward(*elsewhere) is NotImplemented, "inductor's own is for other devices"
    torch.library.opcheck(torch.ops.metarun.max_pool_backward.default, given)


def channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("keepdim", [True, False])
@pytest.mark.parametrize("dims", [[0, 2, 3], [-1, 0, 2], [2, 3]])
def test_sums_over_several_dimensions(dims: list[int], keepdim: bool) -> None:
    x = channels_last(normal(3, 4, 7, 11))
    close = torch.testing.assert_close
    close(sum_over(x, dims, keepdim), x.sum(dims, keepdim))
    close(mean_over(x, dims, keepdim, dtype=F64), x.mean(dims, keepdim))
    for correction in (0, 1, None):
        expected = torch.var_mean(x, dims, correction=correction, keepdim=keepdim)
        close(var_mean_over(x, dims, correction=correction, keepdim=keepdim), expected)


@pytest.mark.parametrize(
    ("x", "dims"),
    [
        (normal(3, 4, 7, 11), [0, 2, 3]),  # inductor adds into as many sums as fit a register
        (channels_last(normal(3, 4, 3, 5)), [0, 2, 3]),
        (channels_last(normal(3, 4, 70, 1)), [2]),
        (channels_last(normal(3, 4, 7, 11)), None),
        (channels_last(normal(3, 4, 7, 11)).bfloat16(), [0, 2, 3]),
        (channels_last(normal(3, 4, 7, 11)).to("meta"), [0, 2, 3]),
    ],
    ids=["channels first", "few", "one dimension", "everything", "bfloat16", "another device"],
)
def test_other_sums_are_left_to_inductor(x: Tensor, dims: Any) -> None:
    assert sum_over(x, dims) is NotImplemented
    assert mean_over(x, dims) is NotImplemented
    assert var_mean_over(x, dims) is NotImplemented


def test_sums_of_another_type_are_left_to_inductor() -> None:
    x = channels_last(normal(3, 4, 7, 11))
    assert sum_over(x, [0, 2, 3], dtype=torch.float32) is NotImplemented
    assert mean_over(x, [0, 2, 3], dtype=torch.float32) is NotImplemented


def test_compiled_moments_are_as_exact_as_torchs() -> None:
    """Inductor's own, which add 980 terms one by one, are 3e-6 to 7e-6 off here."""
    x = channels_last((0.2 * normal(5, 8, 14, 14) + 0.3).float())

    def moments(x: Tensor) -> tuple[Tensor, ...]:
        return *torch.var_mean(x, (0, 2, 3), correction=0), x.sum((0, 2, 3)), x.mean((0, 2, 3))

    for ours, exact in zip(recorded(moments, "inductor")(x), moments(x.double()), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=0)


def test_a_compiled_meta_gradient_of_a_network_with_all_of_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), BatchNorm(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(5, 3),
    ).double()  # fmt: skip

    def loss(params: Any, step: int, task: Any) -> Tensor:
        return F.cross_entropy(functional_call(model, params, (task[0],)), task[1])

    def task_loss(meta: Any, task: Any) -> tuple[Tensor, Tensor]:
        end = unroll(loss, meta, sgd(0.3), 2, context=task)
        return loss(end.params, 2, task), end.losses

    meta = {name: p.detach().clone() for name, p in model.named_parameters()}
    labels = torch.randint(3, (3, 6), generator=torch.Generator().manual_seed(0))
    tasks = (normal(3, 6, 1, 9, 9), labels)
    run = mean_gradient(task_loss, "loop", None, lambda fn: recorded(fn, "inductor"))
    expected = meta_gradient(task_loss, meta, tasks, "loop")
    torch.testing.assert_close(run(meta, tasks), expected, rtol=1e-10, atol=1e-12)
