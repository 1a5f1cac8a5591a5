"""Operations whose derivatives torch gets wrong, written out in operations that it gets right.

Each replacement has the value of the operation that it stands for, up to rounding. Found by
`scripts/op_zoo`, whose table is docs/operations.md.

**Second derivatives.** torch's fused kernel of weight normalisation is differentiated wrongly
when its own derivative is. The second derivative of a determinant goes through a singular value
decomposition, whose derivative is infinite where two singular values are equal.

**Third derivatives**, which an optimizer needs that takes the Hessian of its loss. The fused
normalisations take their saved statistics for constants from the third derivative on.
"""

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

Table = dict[Any, Callable[..., Any]]
P = ParamSpec("P")
R = TypeVar("R")

_entered = threading.local()


class RightDerivatives(TorchFunctionMode):
    """A context in which a loss gets its derivatives right where torch alone would not.

    `unroll` evaluates inner losses in it, and a patched module of `metarun.unroll.higher` runs
    in it. Who computes a loss by himself, for `metarun.unroll.multi`, say, enters it by himself:

        with RightDerivatives():
            loss = model_loss(params)

    Args:
        order: up to which derivative, 2 or 3. Written-out normalisations take longer than
            torch's own, so they are used from the third on only.
    """

    def __init__(self, order: int = 3) -> None:
        super().__init__()
        self.table = _SECOND if order == 2 else _THIRD

    def __enter__(self) -> "RightDerivatives":
        _entered.depth = getattr(_entered, "depth", 0) + 1
        super().__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        _entered.depth -= 1
        super().__exit__(*failure)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        replacement = self.table.get(func)
        if replacement is not None:
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


def within_another() -> bool:
    """Whether a loss is being evaluated by this thread, whose derivatives are to come."""
    return getattr(_entered, "depth", 0) > 0


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """`torch._weight_norm`: v · g / ‖v‖, with the norm over all dimensions but `dim`.

    Args:
        v: the direction.
        g: the length, which broadcasts against v.
        dim: the dimension that is left; −1 takes the norm of the whole.
    """
    return v * (g / torch.norm_except_dim(v, 2, dim))


def weight_norm_interface(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """`torch._weight_norm_interface`: `weight_norm` and the norm."""
    norm = torch.norm_except_dim(v, 2, dim)
    return v * (g / norm), norm


MOST_ROWS = 16
"""Of matrices whose determinant has right derivatives where it is zero."""


def det(A: Tensor) -> Tensor:
    """`torch.linalg.det`, with right derivatives of every order.

    By the logarithm of the determinant, whose derivatives are those of a linear system; where the
    matrix is singular up to rounding, as a polynomial of its elements. That takes as many matrix
    products as there are rows, so larger matrices than `MOST_ROWS` do without: their derivatives
    are NaN where they are singular.

    Args:
        A: (..., n, n).
    """
    rows = A.shape[-1]
    if rows < 2 or not A.is_floating_point():
        return torch.linalg.det(A)
    if rows > MOST_ROWS:
        sign, logarithm = torch.linalg.slogdet(A)
        return sign * logarithm.exp()
    with torch.no_grad():
        # By Hadamard's inequality a determinant is no larger than the product of its rows' lengths.
        bound = torch.linalg.vector_norm(A, dim=-1).log().sum(-1)
        rounding = 10 * rows * torch.finfo(A.dtype).eps
        regular = torch.linalg.slogdet(A).logabsdet > bound + torch.tensor(rounding).log()
    eye = torch.eye(rows, dtype=A.dtype, device=A.device)
    # Replaced before anything is computed of them: a NaN that is masked afterwards returns in the
    # derivative.
    sign, logarithm = torch.linalg.slogdet(torch.where(regular[..., None, None], A, eye))
    singular = _polynomial(torch.where(regular[..., None, None], eye, A))
    return torch.where(regular, sign * logarithm.exp(), singular)


def _polynomial(A: Tensor) -> Tensor:
    """The determinant without a division (Bird 2011, "A simple division-free algorithm")."""
    rows = A.shape[-1]
    X = A
    for _ in range(rows - 1):
        diagonal = X.diagonal(dim1=-2, dim2=-1)
        below = diagonal.flip(-1).cumsum(-1).flip(-1) - diagonal  # the sum of those further down
        X = (X.triu(1) - torch.diag_embed(below)) @ A
    return X[..., 0, 0] if rows % 2 else -X[..., 0, 0]


def embedding(
    input: Tensor, weight: Tensor, padding_idx: Any = None, max_norm: Any = None, *rest: Any,
    **options: Any,
) -> Tensor:
    """`F.embedding`, which must not change its weight.

    Raises:
        ValueError: `max_norm` is given.
    """
    _refuse_max_norm(max_norm)
    return F.embedding(input, weight, padding_idx, None, *rest, **options)


def embedding_bag(
    input: Tensor, weight: Tensor, offsets: Any = None, max_norm: Any = None, *rest: Any,
    **options: Any,
) -> Tensor:
    """`F.embedding_bag`, which must not change its weight.

    Raises:
        ValueError: `max_norm` is given.
    """
    _refuse_max_norm(max_norm)
    return F.embedding_bag(input, weight, offsets, None, *rest, **options)


def _refuse_max_norm(max_norm: Any) -> None:
    if max_norm is not None:
        raise ValueError(
            "an embedding with max_norm changes its weight in place, outside of all derivatives: "
            "build it without max_norm, and shorten the rows in the loss (torch.renorm) if need be"
        )


def layer_norm(
    x: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    """`torch.layer_norm`."""
    dims = list(range(-len(tuple(normalized_shape)), 0))
    return _affine(_standardised(x, dims, eps), weight, bias)


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    """`torch.group_norm` of (examples, channels, …)."""
    groups = x.reshape(x.shape[0], num_groups, -1)
    return _by_channel(_standardised(groups, [-1], eps).reshape(x.shape), weight, bias)


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.batch_norm` of (examples, channels, …)."""
    if not training:
        assert running_mean is not None and running_var is not None
        shape = [1, -1] + [1] * (x.dim() - 2)
        x = (x - running_mean.view(shape)) * (running_var.view(shape) + eps).rsqrt()
        return _by_channel(x, weight, bias)
    if running_mean is not None:
        F.batch_norm(x.detach(), running_mean, running_var, None, None, True, momentum, eps)
    dims = [0, *range(2, x.dim())]
    return _by_channel(_standardised(x, dims, eps), weight, bias)


def instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.instance_norm` of (examples, channels, …)."""
    if not use_input_stats:
        return batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    if running_mean is not None:
        F.instance_norm(x.detach(), running_mean, running_var, None, None, True, momentum, eps)
    return _by_channel(_standardised(x, list(range(2, x.dim())), eps), weight, bias)


def rms_norm(
    x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """`torch.rms_norm`."""
    dims = list(range(-len(tuple(normalized_shape)), 0))
    least = torch.finfo(x.dtype).eps if eps is None else eps
    x = x * (x.square().mean(dims, keepdim=True) + least).rsqrt()
    return x if weight is None else x * weight


def _standardised(x: Tensor, dims: list[int], eps: float) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _by_channel(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    shape = [1, -1] + [1] * (x.dim() - 2)
    return _affine(x, *(p if p is None else p.view(shape) for p in (weight, bias)))


_SECOND: Table = {
    torch._weight_norm: weight_norm,
    torch._weight_norm_interface: weight_norm_interface,
    torch.det: det,
    torch.linalg.det: det,
    Tensor.det: det,
    F.embedding: embedding,
    F.embedding_bag: embedding_bag,
}
_THIRD: Table = _SECOND | {
    F.layer_norm: layer_norm,
    torch.layer_norm: layer_norm,
    F.group_norm: group_norm,
    torch.group_norm: group_norm,
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
    F.rms_norm: rms_norm,
    torch.rms_norm: rms_norm,
}
