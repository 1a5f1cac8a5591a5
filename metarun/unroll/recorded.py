"""Functions of tensors recorded once, operation by operation, and replayed without Python.

Building the graphs of an unroll costs more than its arithmetic where tensors are small. A
recording is a flat list of the operations that one call came down to, derivatives and vmap
included, so a replay skips all of that.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree  # what torch.func itself maps over
from torch.utils._python_dispatch import TorchDispatchMode

from metarun.unroll.rewrites import DECOMPOSITIONS

Backend = Literal["replay", "inductor"]
Program = Callable[..., Any]
Record = Callable[[Callable[..., Any]], Callable[..., Any]]
"""`record(fn)`: a function that does the same, perhaps `recorded`."""


def unrecorded(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function as it is."""
    return fn


class RecordingError(RuntimeError):
    """A function cannot be recorded; the message says why."""


class CompilationError(RecordingError):
    """A recording cannot be compiled, but perhaps replayed."""


class Recorded:
    """A function with a recording for each layout of its arguments; made by `recorded`."""

    def __init__(
        self,
        fn: Callable[..., Any],
        backend: Backend,
        after: int,
        most_operations: int | None,
        making: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.fn, self.backend, self.after, self.most = fn, backend, after, most_operations
        self.making = making
        self._programs: dict[Any, tuple[Callable[..., Sequence[Tensor]], pytree.TreeSpec]] = {}
        self._calls: Counter[Any] = Counter()

    def __call__(self, *args: Any) -> Any:
        leaves: list[Tensor] = []
        key = (torch.is_grad_enabled(), _layout(args, leaves))
        if key not in self._programs:
            self._calls[key] += 1
            if self._calls[key] <= self.after:
                return self.fn(*args)
            self._make(key, args)
        return _run(*self._programs[key], leaves)

    def program(self, *args: Any) -> Program:
        """What runs for arguments of this layout; made now, if it is not there.

        Returns:
            A function of such arguments that may be called by several threads at once.

        Raises:
            RecordingError: as a call.
        """
        key = (torch.is_grad_enabled(), _layout(args, []))
        if key not in self._programs:
            self._make(key, args)
        program, results = self._programs[key]
        return lambda *given: _run(program, results, pytree.tree_leaves(given))

    def _make(self, key: Any, args: Any) -> None:
        leaves, structure = pytree.tree_flatten(args)
        with self.making():
            replayed = self.backend == "replay"
            rewritten = None if replayed else DECOMPOSITIONS
            graph, results = _record(self.fn, leaves, structure, self.most, rewritten)
            program = graph if replayed else _compiled(graph, leaves)
        self._programs[key] = program, results


def recorded(
    fn: Callable[..., Any],
    backend: Backend = "replay",
    after: int = 0,
    most_operations: int | None = None,
    making: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Recorded:
    """`fn`, recorded at a call with tensors of given shapes, and replayed from then on.

    A recording serves all tensors of the same shapes, types and devices. So `fn` must depend on
    its arguments alone, and on their values by torch operations alone: tensors that it closes
    over and Python numbers are constants from the recording on. Results have no graph: `fn`
    takes its derivatives itself.

    Args:
        fn: a function of pytrees of tensors that gives such a pytree.
        backend: "replay" runs the same kernels in the same order, and gives the same bits.
            "inductor" merges them into fewer ones, equal up to rounding; compiling takes from
            seconds to minutes, and on the CPU a C++ compiler. It also merges what was computed
            twice, which undoes the saving of `Checkpoint`. On the CPU its kernels are made for
            the number of threads that torch has at that moment.
        after: calls with the same shapes that are left to `fn` itself, since recording costs
            some calls' time.
        most_operations: refuse longer recordings, whose making takes seconds; None: any length.
        making: gives a context that is entered while a recording is made.

    Returns:
        The function. It raises `RecordingError` where a tensor's value decides what happens next,
        where random numbers are drawn (compiled operations would draw others), or where an
        argument is no tensor; the random state is then that of before.
    """
    return Recorded(fn, backend, after, most_operations, making)


def _run(
    program: Callable[..., Sequence[Tensor]], results: pytree.TreeSpec, leaves: list[Tensor]
) -> Any:
    with torch.no_grad():
        return pytree.tree_unflatten(list(program(*leaves)), results)


def _layout(value: Any, leaves: list[Tensor]) -> Any:
    """What a program is made for, of arguments whose tensors are put into `leaves`.

    Pytree's own keys take longer than a small program runs.
    """
    if isinstance(value, Tensor):
        leaves.append(value)
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, dict):
        return dict, *((name, _layout(item, leaves)) for name, item in value.items())
    if isinstance(value, tuple | list):
        return type(value), *(_layout(item, leaves) for item in value)
    raise RecordingError("it has an argument that is no tensor")


def _record(
    fn: Callable[..., Any],
    leaves: list[Tensor],
    structure: pytree.TreeSpec,
    most: int | None,
    rewritten: dict[Any, Callable[..., Any]] | None,
) -> tuple[fx.GraphModule, pytree.TreeSpec]:
    results: list[pytree.TreeSpec] = []

    def flat(*given: Tensor) -> list[Tensor]:
        outputs, spec = pytree.tree_flatten(fn(*pytree.tree_unflatten(list(given), structure)))
        results.append(spec)
        return [output.detach() for output in outputs]

    gpus = sorted({x.device.index for x in leaves if x.device.type == "cuda"})
    try:
        with torch.random.fork_rng(gpus), _Limit(most):
            graph = make_fx(flat, rewritten)(*(leaf.detach() for leaf in leaves))
    except RecordingError:
        raise
    except Exception as error:  # torch raises various ones
        reason = str(error).partition("\n")[0]
        raise RecordingError(f"{type(error).__name__}: {reason}") from error
    for node in graph.graph.nodes:
        if _draws_random_numbers(node):
            raise RecordingError(f"it draws random numbers ({node.target})")
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
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags


def _compiled(graph: fx.GraphModule, leaves: list[Tensor]) -> Callable[..., Sequence[Tensor]]:
    # Not torch.compile: what its guards would check at each call is the key of the recording.
    from torch._inductor import config, standalone_compile  # takes a second to import

    given: list[Any] = [leaf.detach() for leaf in leaves]
    # On a CPU the calls of the kernels are compiled as well: Python's would hold its lock (GIL)
    # while a kernel runs, so the kernels of tasks in several threads would wait for each other.
    cpu = all(leaf.device.type == "cpu" for leaf in leaves)
    try:
        with torch.no_grad(), config.patch(cpp_wrapper=cpu or config.cpp_wrapper):
            program: Any = standalone_compile(graph, given, dynamic_shapes="from_example_inputs")
    except Exception as error:
        inner = getattr(error, "inner_exception", error)  # what torch wraps
        if isinstance(inner, OSError):  # a full disk: another time it might be compiled
            raise inner from None
        reason = str(error).partition("\n")[0]
        raise CompilationError(f"inductor fails: {type(error).__name__}: {reason}") from error
    return program  # type: ignore[no-any-return]
