"""Systems of linear equations, in training and in an exported file."""

import torch
from torch import Tensor


def solve(matrix: Tensor, right: Tensor) -> Tensor:
    """A⁻¹B, as `torch.linalg.solve` has it; an exported file does not check whether A is singular.

    ONNX has no operation for that check.

    Args:
        matrix: A, (n, n).
        right: B, (n, columns).
    """
    if torch.compiler.is_exporting():
        found: Tensor = torch.linalg.solve_ex(matrix, right).result
    else:
        found = torch.linalg.solve(matrix, right)
    return found
