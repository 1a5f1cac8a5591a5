"""Refusing a loss that has been computed by operations whose derivatives torch gets wrong.

`right_derivatives` replaces such operations while a loss is computed. Of a loss that is there
already only its graph can be looked at.
"""

from collections.abc import Iterable

from torch import Tensor

from metarun.unroll.advice import WrongDerivative

_SECOND = {"WeightNormInterfaceBackward0": "weight_norm", "LinalgDetBackward0": "det"}
_NORMS = {
    "CdistBackward0": "cdist",
    "SpecialI1Backward0": "special.i1",
    "NativeLayerNormBackward0": "layer_norm",
    "NativeGroupNormBackward0": "group_norm",
    "NativeBatchNormBackward0": "batch_norm or instance_norm",
    "CudnnBatchNormBackward0": "batch_norm or instance_norm",
    "MiopenBatchNormBackward0": "batch_norm or instance_norm",
}


def refuse_wrong_derivatives(loss: Tensor, params: Iterable[Tensor], order: int) -> None:
    """Look at the graph between a loss and its parameters.

    Args:
        loss: a scalar with a graph.
        params: where the graph ends, although they may have one of their own.
        order: up to which derivative the loss will be differentiated, 2 or 3.

    Raises:
        WrongDerivative: it has an operation whose derivative of that order is wrong.
    """
    wrong = _SECOND if order < 3 else _SECOND | _NORMS
    seen = {p.grad_fn for p in params if p.grad_fn is not None}
    left = [loss.grad_fn] if loss.grad_fn is not None else []
    while left:
        node = left.pop()
        if node in seen:
            continue
        seen.add(node)
        learned_power = node.name() == "PowBackward1" and node.next_functions[1][0] is not None
        if node.name() in wrong or learned_power:
            name = "pow by a learned exponent" if learned_power else wrong[node.name()]
            raise WrongDerivative(
                f"torch's derivatives of {name} are wrong at order {order}, which this optimizer "
                f"needs: compute the loss within `with metarun.unroll.RightDerivatives():`, which "
                "writes it out"
            )
        left += [following for following, _ in node.next_functions if following is not None]
