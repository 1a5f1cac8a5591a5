"""Systems of linear equations, in training, on an accelerator and in an exported file."""

from typing import Any

import torch
from torch import Tensor


def solve(matrix: Tensor, right: Tensor) -> Tensor:
    """A⁻¹B, as `torch.linalg.solve` has it, which refuses a singular A on a CPU alone.

    Elsewhere a singular A gives what is not finite. An accelerator would have to be waited for to
    know whether A is singular, in the derivative as well. ONNX has no operation for that.

    Args:
        matrix: A, (n, n).
        right: B, (n, columns).
    """
    if torch.compiler.is_exporting():
        found: Tensor = torch.linalg.solve_ex(matrix, right).result
    elif matrix.device.type == "cpu":
        found = torch.linalg.solve(matrix, right)
    else:
        found = solve_unchecked(matrix, right)
    return found


def solve_unchecked(matrix: Tensor, right: Tensor) -> Tensor:
    """A⁻¹B by operations that look at no value, in the derivatives of every order as well.

    Args:
        matrix: A, (n, n).
        right: B, (n, columns).
    """
    found: Tensor = _Solve.apply(matrix, right)
    return found


class _Solve(torch.autograd.Function):
    """X = A⁻¹B with B̄ = A⁻ᵀX̄ and Ā = −B̄Xᵀ: torch's own derivative of `solve_ex` checks A."""

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, right: Tensor) -> Tensor:
        found: Tensor = torch.linalg.solve_ex(matrix, right).result
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor]:
        matrix, found = ctx.saved_tensors
        of_right = solve_unchecked(matrix.mT, slope)
        return -of_right @ found.mT, of_right
