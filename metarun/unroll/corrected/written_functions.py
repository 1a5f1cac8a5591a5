"""Functions of torch written out in operations whose derivatives are right at every order.

Each has the value of the function that it stands for, up to rounding, and its names of arguments.
"""

from typing import Any

import torch
from torch import Tensor

from metarun.unroll.optim.base import safe_sqrt


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """`torch._weight_norm`: v · g / ‖v‖, with the norm over all dimensions but `dim`.

    Args:
        v: the direction.
        g: the length, which broadcasts against v.
        dim: the dimension that is left; −1 takes the norm of the whole.
    """
    return weight_norm_interface(v, g, dim)[0]


def weight_norm_interface(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """`torch._weight_norm_interface`: `weight_norm` and the norm."""
    if dim == -1:
        norm: Tensor = torch.linalg.vector_norm(v)
    else:
        over = [d for d in range(v.dim()) if d != dim]
        norm = torch.linalg.vector_norm(v, dim=over, keepdim=True)
    return v * (g / norm), norm


MOST_ROWS = 16
"""Of matrices whose determinant has right derivatives where it is zero."""


def det_of(input: Tensor) -> Tensor:
    """`torch.det`, which is `torch.linalg.det` with another name of its argument."""
    return det(input)


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
    determinant: Tensor
    if rows < 2 or not A.is_floating_point():
        determinant = torch.linalg.det(A)
        return determinant
    if rows > MOST_ROWS:
        sign, logarithm = torch.linalg.slogdet(A)
        determinant = sign * logarithm.exp()
        return determinant
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


def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: Any = None) -> Tensor:
    """`torch.cdist`, distances of rows; Euclidean ones have a zero derivative where one is zero.

    Args:
        x1, x2: (..., N, D) and (..., M, D).
    """
    differences = x1[..., :, None, :] - x2[..., None, :, :]
    if p == 2:
        return safe_sqrt(differences.square().sum(-1))
    distances: Tensor = torch.linalg.vector_norm(differences, p, dim=-1)
    return distances


def power(input: Any, exponent: Any) -> Tensor:
    """`torch.pow`, whose derivatives at exponents of 0, 1, … are those at any other.

    torch's are zero where the exponent is zero, and by that what comes of deriving them by the
    exponent. A base of zero stays zero whatever the (positive) exponent, where torch's second
    derivative is NaN.
    """
    if not (isinstance(input, Tensor) and isinstance(exponent, Tensor) and exponent.requires_grad):
        return torch.pow(input, exponent)
    positive = input > 0
    by_logarithm = (exponent * torch.where(positive, input, 1.0).log()).exp()
    others = torch.where(positive, 1.0, input)
    fixed = torch.where(input == 0, exponent.detach(), exponent)
    return torch.where(positive, by_logarithm, torch.pow(others, fixed))


def float_power(input: Any, exponent: Any) -> Tensor:
    """`torch.float_power`."""
    given = (v.double() if isinstance(v, Tensor) else v for v in (input, exponent))
    return power(*given)
