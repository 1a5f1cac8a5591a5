"""Operations whose derivatives torch gets wrong, written out in operations that it gets right.

Each replacement has the value of the operation that it stands for, up to rounding. Found by
`scripts/op_zoo`, whose table is docs/operations.md.

**Second derivatives.** torch's fused kernel of weight normalisation is differentiated wrongly
when its own derivative is. The second derivative of a determinant goes through a singular value
decomposition, whose derivative is infinite where two singular values are equal.
Under vmap, that of a distance is wrong where it is zero.

**Third derivatives**, which an optimizer needs that takes the Hessian of its loss, a loss that
penalises a gradient, and the Hessian of a meta-loss. The fused normalisations take their saved
statistics for constants from the third derivative on. So they are always written out.
"""

import re
import threading
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from metarun.unroll._torch import (
    TransformType,
    get_function_stack_at,
    len_torch_function_stack,
    pop_torch_function_stack,
    push_on_torch_function_stack,
    retrieve_all_functorch_interpreters,
    weight_norm_kernels,
)
from metarun.unroll.advice import WrongDerivative
from metarun.unroll.corrected.written_functions import (
    cdist,
    det,
    det_of,
    float_power,
    power,
    weight_norm,
    weight_norm_interface,
)
from metarun.unroll.corrected.written_norms import (
    batch_norm,
    group_norm,
    instance_norm,
    layer_norm,
    rms_norm,
)

Table = dict[Any, Callable[..., Any]]
P = ParamSpec("P")
R = TypeVar("R")

_entered = threading.local()


RIGHT_MODULES = {
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Identity, nn.Flatten, nn.Dropout),
    *(nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Softplus, nn.Sigmoid, nn.Tanh),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d),
}
"""Classes of torch whose forwards have right second derivatives."""


class RightDerivatives(TorchFunctionMode):
    """A context in which a loss gets its derivatives right where torch alone would not.

    `unroll` evaluates inner losses in it, and a patched module of `metarun.higher` runs
    in it. Who computes a loss by himself, for `metarun.unroll.multi`, say, enters it by himself.

    Args:
        order: up to which derivative, 2 or 3. With 2, functions that are right up to the second
            alone are not refused.

    Raises, within the context:
        WrongDerivative: an operation without right derivatives; the message names another.

    Example:
        >>> import torch
        >>> from metarun.unroll import RightDerivatives
        >>> x = torch.eye(2, requires_grad=True)
        >>> with RightDerivatives():
        ...     value = torch.linalg.det(x)
        >>> slope = torch.autograd.grad(value, x, create_graph=True)[0]
        >>> torch.autograd.grad(slope.sum(), x)  # of ad − bc
        (tensor([[ 1., -1.],
                [-1.,  1.]]),)
    """

    def __init__(self, order: int = 3) -> None:
        super().__init__()
        self.table = _SECOND if order == 2 else _THIRD

    def __enter__(self) -> "RightDerivatives":
        _entered.depth = getattr(_entered, "depth", 0) + 1
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *failure: Any) -> None:
        _entered.depth -= 1
        super().__exit__(*failure)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        replacement = self.table.get(func)
        if replacement is not None:
            if kwargs and "out" in kwargs:
                if kwargs["out"] is not None:  # which torch does not differentiate
                    return func(*args, **kwargs)
                kwargs = {key: value for key, value in kwargs.items() if key != "out"}
            func = replacement
        return func(*args, **kwargs) if kwargs else func(*args)


def right_to_order(order: int, fn: Callable[P, R]) -> Callable[P, R]:
    """The function, evaluated so that its derivatives up to this order are right."""
    if order < 2:
        return fn

    @wraps(fn)
    def evaluated(*args: P.args, **kwargs: P.kwargs) -> R:
        with RightDerivatives(order):
            return fn(*args, **kwargs)

    return evaluated


def aside(forward: Callable[P, R]) -> Callable[P, R]:
    """A forward that calls nothing that is wrong at second order, without the context's cost.

    An operation in the context takes several times as long to call. `RIGHT_MODULES` are the
    modules that this is for.
    """

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        depth = len_torch_function_stack()
        mode: Any = get_function_stack_at(depth - 1) if depth else None
        if type(mode) is not RightDerivatives or mode.table is not _SECOND:
            return forward(*args, **kwargs)
        pop_torch_function_stack()
        try:
            return forward(*args, **kwargs)
        finally:
            push_on_torch_function_stack(mode)

    return call


def within_another() -> bool:
    """Whether a loss is being evaluated by this thread, whose derivatives are to come."""
    return getattr(_entered, "depth", 0) > 0


def cdist_of_tasks(
    x1: Tensor,
    x2: Tensor,
    p: float = 2.0,
    compute_mode: str = "use_mm_for_euclid_dist_if_necessary",
) -> Tensor:
    """`torch.cdist`, written out where tasks are mapped by vmap.

    There torch's second derivative is wrong where a distance is zero, as that of a prototype
    from itself.
    """
    return cdist(x1, x2, p) if _mapped() else torch.cdist(x1, x2, p, compute_mode)


def _mapped() -> bool:
    levels = retrieve_all_functorch_interpreters()
    return any(level.key() == TransformType.Vmap for level in levels)


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    *rest: Any,
    **options: Any,
) -> Tensor:
    """`F.embedding` without `max_norm`.

    Raises:
        WrongDerivative: `max_norm` is given.
    """
    _refuse_max_norm(max_norm)
    return F.embedding(input, weight, padding_idx, None, *rest, **options)


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    *rest: Any,
    **options: Any,
) -> Tensor:
    """`F.embedding_bag` without `max_norm`.

    Raises:
        WrongDerivative: `max_norm` is given.
    """
    _refuse_max_norm(max_norm)
    return F.embedding_bag(input, weight, offsets, None, *rest, **options)


def _refuse_max_norm(max_norm: float | None) -> None:
    if max_norm is not None:
        raise WrongDerivative(
            "an embedding with max_norm changes its weight in place, and no derivative sees that: "
            "build it without max_norm, and shorten its rows in the loss by torch.renorm"
        )


def _max_unpool(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A `F.max_unpool…d` for windows that do not overlap.

    Raises, when it is called:
        WrongDerivative: they do. Two maxima may then be the same element, of whose two values one
            counts; torch's gradient takes both.
    """

    def unpool(
        x: Tensor, indices: Tensor, kernel_size: Any, stride: Any = None, *rest: Any, **options: Any
    ) -> Tensor:
        if stride is not None and stride != []:
            kernels, strides = (_as_tuple(size) for size in (kernel_size, stride))
            if any(step < kernel for step in strides for kernel in kernels):
                raise WrongDerivative(
                    f"max_unpool with windows that overlap (kernel_size={kernel_size}, "
                    f"stride={stride}) has wrong gradients in torch: choose a stride that is not "
                    "below the kernel's size, or scatter_add the values"
                )
        return original(x, indices, kernel_size, stride, *rest, **options)

    return unpool


def _as_tuple(size: Any) -> tuple[int, ...]:
    return (size,) if isinstance(size, int) else tuple(size)


def _refused(name: str, instead: str, unless_mapped: Any = None) -> Callable[..., Any]:
    """An operation that has no right derivatives, with what to use in its place.

    `unless_mapped` is the operation itself, if it is right where no tasks are mapped.
    """

    def refuse(*args: Any, **kwargs: Any) -> Any:
        if unless_mapped is not None and not _mapped():
            return unless_mapped(*args, **kwargs)
        raise WrongDerivative(
            f"torch's derivatives of {name}, as it is called here, are wrong at the order that is "
            f"needed: use {instead}"
        )

    return refuse


def _constant(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A smooth function that torch cannot differentiate and takes for a constant."""

    def refuse(*args: Any, **kwargs: Any) -> Tensor:
        if any(isinstance(x, Tensor) and x.requires_grad for x in args):
            raise WrongDerivative(
                f"torch takes {function.__name__} for a constant, since it has no derivative of "
                "it: detach its argument if that is meant, or write the function out"
            )
        return function(*args, **kwargs)

    return refuse


def _kernels() -> Iterator[tuple[str, Any]]:
    """torch's own kernels of normalisations, by the name of the function that uses them."""
    kernels = {
        "layer_norm": ["native_layer_norm"],
        "group_norm": ["native_group_norm"],
        "batch_norm": ["native_batch_norm", "_native_batch_norm_legit", "_batch_norm_with_update"],
    }
    for name, its in kernels.items():
        for kernel in its:
            for where in (torch, torch.ops.aten):
                if hasattr(where, kernel):
                    yield name, getattr(where, kernel)


_SECOND: Table = {
    weight_norm_kernels[0]: weight_norm,
    weight_norm_kernels[1]: weight_norm_interface,
    torch.det: det_of,
    torch.linalg.det: det,
    Tensor.det: det_of,
    torch.cdist: cdist_of_tasks,
    torch.pow: power,
    Tensor.pow: power,
    Tensor.__pow__: power,
    torch.float_power: float_power,
    Tensor.float_power: float_power,
    F.embedding: embedding,
    F.embedding_bag: embedding_bag,
    F.max_unpool1d: _max_unpool(F.max_unpool1d),
    F.max_unpool2d: _max_unpool(F.max_unpool2d),
    F.max_unpool3d: _max_unpool(F.max_unpool3d),
    F.layer_norm: layer_norm,
    torch.layer_norm: layer_norm,
    F.group_norm: group_norm,
    torch.group_norm: group_norm,
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
    F.rms_norm: rms_norm,
    torch.rms_norm: rms_norm,
    torch.as_strided_scatter: _refused("as_strided_scatter", "slice_scatter or torch.where"),
    **{
        function: _constant(function)
        for name, function in vars(torch.special).items()
        if re.search("bessel|airy|polynomial", name)
    },
}
_LU_SOLVES = (torch.linalg.lu_solve, torch.lu_solve, Tensor.lu_solve)
_THIRD: Table = _SECOND | {
    torch.cdist: cdist,
    torch.special.i1: _refused("special.i1", "an optimizer that is driven by gradients alone"),
    **{fn: _refused("lu_solve", "torch.linalg.solve", unless_mapped=fn) for fn in _LU_SOLVES},
    **{fn: _refused(name, f"torch.nn.functional.{name}") for name, fn in _kernels()},
    torch.batch_norm: _refused("torch.batch_norm", "torch.nn.functional.batch_norm"),
    torch.instance_norm: _refused("torch.instance_norm", "torch.nn.functional.instance_norm"),
}
