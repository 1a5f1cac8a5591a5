"""Systems of linear equations in ONNX, which has no operation for them."""

# mypy: ignore-errors
# What follows is ONNX in Python's syntax: loops and types mean what onnxscript makes of them.

from typing import Any

from onnxscript import DOUBLE, script
from onnxscript import opset18 as op
from onnxscript.values import Opset

from metarun.unroll._torch import solve_operation


@script(Opset("metarun", 1), default_opset=op)
def eliminate(matrix: DOUBLE[...], right: DOUBLE[...]) -> DOUBLE[...]:
    """A⁻¹B by the method of Gauss and Jordan, without pivoting.

    It needs none for the symmetric and positive definite systems of heads in closed form.
    """
    both = op.Concat(matrix, right, axis=1)
    size = op.Shape(matrix, start=0, end=1)
    count = op.Squeeze(size)
    numbers = op.Unsqueeze(op.Range(0, count, 1), [1])
    for row in range(count):
        place = op.Reshape(row, [1])
        chosen = op.Gather(both, place, axis=0)
        pivot = chosen / op.Gather(chosen, place, axis=1)
        both = op.Where(numbers == row, pivot, both - op.Gather(both, place, axis=1) * pivot)
    solved = op.Slice(both, size, op.Shape(both, start=1, end=2), [1])
    return solved


def solve_ex(matrix: Any, right: Any, *rest: Any, **options: Any) -> tuple[Any, ...]:
    """`aten::_linalg_solve_ex` of two matrices, in float64; only its solution is right."""
    found = eliminate(op.Cast(matrix, to=DOUBLE.dtype), op.Cast(right, to=DOUBLE.dtype))
    # The exporter names what is returned, so the other three must not be the matrix itself.
    factors, pivots, failed = op.Identity(matrix), op.Identity(matrix), op.Constant(value_int=0)
    return op.CastLike(found, right), factors, pivots, failed


SOLVE = {solve_operation: solve_ex}
