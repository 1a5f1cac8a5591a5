"""The differentiable operations of torch's own database, as cases."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from op_zoo.measure import Case, Params

LARGEST = 450  # elements of all parameters of a case
SAMPLES = 2


@cache
def operations() -> dict[str, Any]:
    """Name -> an entry of the database that can be differentiated in float64."""
    from torch.testing._internal.common_methods_invocations import op_db

    found = {}
    for op in op_db:
        if op.supports_autograd and torch.float64 in op.supported_backward_dtypes("cpu"):
            name = op.name + (f" ({op.variant_test_name})" if op.variant_test_name else "")
            found[name] = op
    return found


def cases(name: str) -> Iterator[Case]:
    """Some samples of an operation, spread over those that are small enough."""
    op = operations()[name]
    torch.manual_seed(0)
    fit = []
    for sample in op.sample_inputs("cpu", torch.float64, requires_grad=True):
        case = _case(op, sample)
        if case is not None and sum(p.numel() for p in case.params.values()) <= LARGEST:
            fit.append(case)
    count = min(SAMPLES, len(fit))
    for i in range(count):
        yield fit[i * (len(fit) - 1) // max(count - 1, 1)]


def _case(op: Any, sample: Any) -> Case | None:
    leaves, structure = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
    moving = {
        i: leaf
        for i, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor) and leaf.requires_grad and leaf.numel()
    }
    if not moving or any(leaf.layout != torch.strided for leaf in moving.values()):
        return None
    if any(leaf.is_complex() for leaf in moving.values()):
        return None
    fixed = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def fn(params: Params) -> Any:
        values = list(fixed)
        for i in moving:
            values[i] = params[f"input{i}"]
        given, args, kwargs = pytree.tree_unflatten(values, structure)
        call = op.gradcheck_wrapper
        return sample.output_process_fn_grad(call(op.op, given, *args, **kwargs))

    return Case(fn, {f"input{i}": leaf.detach().clone() for i, leaf in moving.items()})
