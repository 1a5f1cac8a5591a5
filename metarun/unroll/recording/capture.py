"""A call of a function as a flat list of its tensor operations."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from metarun.unroll._torch import TorchDispatchMode, described_once, pytree
from metarun.unroll.advice import plain_reason


class RecordingError(RuntimeError):
    """A function cannot be recorded; the message says why.

    Example:
        >>> import torch
        >>> from metarun.unroll import RecordingError, recorded
        >>> try:
        ...     recorded(torch.rand_like)(torch.ones(2))
        ... except RecordingError as error:
        ...     print(error)
        it draws random numbers (aten.rand_like.default)
    """


def captured(
    fn: Callable[..., Any],
    leaves: list[Tensor],
    structure: pytree.TreeSpec,
    most: int | None,
    rewritten: dict[Any, Callable[..., Any]] | None,
) -> tuple[fx.GraphModule, pytree.TreeSpec]:
    """The operations that a call of `fn` comes down to, and the structure of what it gives.

    Args:
        fn: a function of pytrees of tensors that gives such a pytree.
        leaves: the tensors of its arguments.
        structure: that of its arguments.
        most: refuse longer recordings; None: any length.
        rewritten: operations that are put in another way.

    Raises:
        RecordingError: as `metarun.unroll.recording.recorded`.
    """
    results: list[pytree.TreeSpec] = []

    def flat(*given: Tensor) -> list[Tensor]:
        outputs, spec = pytree.tree_flatten(fn(*pytree.tree_unflatten(list(given), structure)))
        results.append(spec)
        return [output.detach() for output in outputs]

    gpus = sorted({x.device.index for x in leaves if x.device.type == "cuda"})
    try:
        with torch.random.fork_rng(gpus), described_once(), _Limit(most):
            graph = make_fx(flat, rewritten)(*(leaf.detach() for leaf in leaves))
    except RecordingError:
        raise
    except Exception as error:  # torch raises various ones
        raise RecordingError(plain_reason(error)) from error
    for node in graph.graph.nodes:
        if _draws_random_numbers(node):
            raise RecordingError(f"it draws random numbers ({node.target})")
        if _sized_by_values(node):
            raise RecordingError(
                f"the values of a tensor decide how large a result is ({node.target}, as of "
                "x[mask]); torch.where or a weighted sum can be recorded"
            )
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph, results[0]


class _Limit(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Ends a recording that becomes too long."""

    def __init__(self, most: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most, self.count = most, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.most is not None and self.count > self.most:
            raise RecordingError(f"it takes more than {self.most} operations")
        return func(*args, **(kwargs or {}))


def _draws_random_numbers(node: fx.Node) -> bool:
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    if "dropout_p" not in names:
        return True
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    return bool(given.get("dropout_p", 0.0) != 0.0)  # attention draws for its dropout alone


def _sized_by_values(node: fx.Node) -> bool:
    """Whether the size of a result depends on values: derivatives have it as a constant."""
    if torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
        return False
    if node.target is not torch.ops.aten.index.Tensor:
        return True
    indices = [index for index in node.args[1] if index is not None]  # type: ignore[union-attr]
    return any(index.meta["val"].dtype in (torch.bool, torch.uint8) for index in indices)  # type: ignore[union-attr]
