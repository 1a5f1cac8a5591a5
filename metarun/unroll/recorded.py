"""Functions of tensors recorded once, operation by operation, and replayed without Python.

Building the graphs of an unroll costs more than its arithmetic where tensors are small. A
recording is a flat list of the operations that one call came down to, derivatives and vmap
included, so a replay skips all of that.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree  # what torch.func itself maps over

Backend = Literal["replay", "inductor"]
Program = Callable[..., Sequence[Tensor]]


class RecordingError(RuntimeError):
    """A function cannot be recorded; the message says why."""


def recorded(
    fn: Callable[..., Any], backend: Backend = "replay", after: int = 0
) -> Callable[..., Any]:
    """`fn`, recorded at a call with tensors of given shapes, and replayed from then on.

    A recording serves all tensors of the same shapes, types and devices. So `fn` must depend on
    its arguments alone, and on their values by torch operations alone: tensors that it closes
    over and Python numbers are constants from the recording on. Results have no graph: `fn`
    takes its derivatives itself.

    Args:
        fn: a function of pytrees of tensors that gives such a pytree.
        backend: "replay" runs the same kernels in the same order, and gives the same bits.
            "inductor" merges them into fewer ones (`torch.compile`), equal up to rounding;
            compiling takes from seconds to minutes, and on the CPU a C++ compiler.
        after: calls with the same shapes that are left to `fn` itself, since recording costs
            some calls' time.

    Returns:
        The function. It raises `RecordingError` where a tensor's value decides what happens next,
        where random numbers are drawn (compiled operations would draw others), or where an
        argument is no tensor; the random state is then that of before.
    """
    programs: dict[Any, tuple[Program, pytree.TreeSpec]] = {}
    calls: Counter[Any] = Counter()

    def run(*args: Any) -> Any:
        leaves, structure = pytree.tree_flatten(args)
        if not all(isinstance(leaf, Tensor) for leaf in leaves):
            raise RecordingError("it has an argument that is no tensor")
        leaves = [leaf.detach() for leaf in leaves]
        layout = [(x.shape, x.stride(), x.dtype, x.device) for x in leaves]
        key = (structure, torch.is_grad_enabled(), *layout)
        if key not in programs:
            calls[key] += 1
            if calls[key] <= after:
                return fn(*args)
            programs[key] = _record(fn, leaves, structure, backend)
        program, results = programs[key]
        with torch.no_grad():
            return pytree.tree_unflatten(list(program(*leaves)), results)

    return run


def _record(
    fn: Callable[..., Any], leaves: list[Tensor], structure: pytree.TreeSpec, backend: Backend
) -> tuple[Program, pytree.TreeSpec]:
    results: list[pytree.TreeSpec] = []

    def flat(*given: Tensor) -> list[Tensor]:
        outputs, spec = pytree.tree_flatten(fn(*pytree.tree_unflatten(list(given), structure)))
        results.append(spec)
        return [output.detach() for output in outputs]

    gpus = sorted({x.device.index for x in leaves if x.device.type == "cuda"})
    try:
        with torch.random.fork_rng(gpus):
            graph = make_fx(flat)(*leaves)
    except Exception as error:  # torch raises various ones
        reason = str(error).partition("\n")[0]
        raise RecordingError(f"{type(error).__name__}: {reason}") from error
    for node in graph.graph.nodes:
        if _draws_random_numbers(node):
            raise RecordingError(f"it draws random numbers ({node.target})")
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return torch.compile(graph) if backend == "inductor" else graph, results[0]


def _draws_random_numbers(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags
