"""Functions of tensors recorded once, operation by operation, and replayed without Python.

Building the graphs of an unroll costs more than its arithmetic where tensors are small. A
recording is a flat list of the operations that one call came down to, derivatives and vmap
included, so a replay skips all of that.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from metarun.unroll._torch import pytree
from metarun.unroll.effects.python_state import changed, python_state
from metarun.unroll.gradients.recompute import RandomState
from metarun.unroll.recording.capture import RecordingError, captured
from metarun.unroll.recording.comparison import Rewritten, agree, undone
from metarun.unroll.recording.compiled import compiled
from metarun.unroll.recording.graphs import Launching, Operations, constants
from metarun.unroll.recording.rewrites import DECOMPOSITIONS

Backend = Literal["replay", "inductor"]
"""What runs a recording; see `recorded`."""

Program = Callable[..., Any]
"""What runs for arguments of one layout; see `Recorded.program`."""

Record = Callable[[Callable[..., Any]], Callable[..., Any]]
"""`record(fn)`: a function that does the same, perhaps `recorded`."""


def unrecorded(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function as it is.

    Args:
        fn: any function.

    Returns:
        `fn` itself, where a `Record` is asked for.

    Example:
        >>> import torch
        >>> from metarun.unroll import unrecorded
        >>> unrecorded(torch.sin) is torch.sin
        True
    """
    return fn


class ChangedFunction(RecordingError):
    """A function is not what was recorded: it depends on more than its arguments.

    Attributes:
        outcome: what the call gives, by the function as it is now; nothing if there was no call.
        replays: calls that the recording has answered before.

    Example:
        >>> import torch
        >>> from metarun.unroll import ChangedFunction, recorded
        >>> scale = [2.0]
        >>> scaled = recorded(lambda x: scale[0] * x)
        >>> scaled(torch.ones(1))
        tensor([2.])
        >>> scale[0] = 3.0
        >>> try:
        ...     scaled(torch.ones(1))
        ... except ChangedFunction as change:
        ...     change.outcome
        (tensor([3.]),)
    """

    def __init__(self, message: str, replays: int, outcome: tuple[Any, ...] = ()) -> None:
        super().__init__(message)
        self.replays, self.outcome = replays, outcome


@dataclass
class _Made:
    """A recording for one layout of arguments.

    Attributes:
        program: what runs: the graph, or what was compiled of it.
        launched: what runs in its place, on a device that launches it as a whole.
        results: the structure of what the function gives.
        graph: the operations.
        constants: tensors that the function closes over.
        replays: calls answered so far.
        check_at: at this call the function is evaluated as well. The next such call is twice as
            far on, so that all of them together cost little.
        asked: the next call is to be checked, too.
    """

    program: Operations
    launched: Operations | None
    results: pytree.TreeSpec
    graph: fx.GraphModule
    constants: list[Tensor]
    replays: int = 0
    check_at: int = 1
    asked: bool = False

    def due(self) -> bool:
        """Count a call, and say whether it is to be checked."""
        self.replays += 1
        due = self.asked or self.replays >= self.check_at
        if self.replays >= self.check_at:
            self.check_at *= 2
        self.asked = False
        return due


class Recorded:
    """A function with a recording for each layout of its arguments; made by `recorded`.

    Example:
        >>> import torch
        >>> from metarun.unroll import recorded
        >>> slope = recorded(torch.func.grad(lambda x: x.square().sum()))
        >>> slope(torch.ones(2)), slope(torch.ones(1))  # two recordings
        (tensor([2., 2.]), tensor([2.]))
        >>> program = slope.program(torch.ones(1))  # the second one
        >>> program(torch.tensor([4.0]))
        tensor([8.])
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        backend: Backend,
        after: int,
        most_operations: int | None,
        making: Callable[[], AbstractContextManager[None]],
        evaluating: Callable[[], AbstractContextManager[None]],
        launching: Launching | None,
    ) -> None:
        self.fn, self.backend, self.after, self.most = fn, backend, after, most_operations
        self.making, self.evaluating, self.launching = making, evaluating, launching
        self._programs: dict[Any, _Made] = {}
        self._calls: Counter[Any] = Counter()

    def __call__(self, *args: Any) -> Any:
        leaves: list[Tensor] = []
        key = (torch.is_grad_enabled(), _layout(args, leaves))
        made = self._programs.get(key)
        if made is None:
            self._calls[key] += 1
            if self._calls[key] <= self.after:
                return self.fn(*args)
            made = self._make(key, args)
        elif made.due():
            self._check(made, args, leaves)
        return _run(made.launched or made.program, made.results, leaves)

    def program(self, *args: Any) -> Program:
        """What runs for arguments of this layout; made now, if it is not there.

        Args:
            args: arguments of `fn`, whose layout counts.

        Returns:
            A function of such arguments that may be called by several threads at once.

        Raises:
            RecordingError: as a call.
        """
        leaves: list[Tensor] = []
        key = (torch.is_grad_enabled(), _layout(args, leaves))
        made = self._programs.get(key)
        if made is None:
            made = self._make(key, args)
        elif made.due():
            self._check(made, args, leaves)
        program, results = made.launched or made.program, made.results
        return lambda *given: _run(program, results, pytree.tree_leaves(given))

    def forget(self) -> None:
        """Drop all recordings, and the memory that they hold; later calls record again."""
        self._programs.clear()

    def recheck(self) -> None:
        """Compare every recording with the function at its next call."""
        for made in self._programs.values():
            made.asked = True

    def _make(self, key: Any, args: Any) -> _Made:
        leaves, structure = pytree.tree_flatten(args)
        with self.making():
            replayed = self.backend == "replay"
            # What a first call sets up stays as it is from then on: that is no change.
            for last in (self.after > 0, True):
                before = python_state(self.fn)
                with self.evaluating():
                    graph, results = captured(
                        self.fn, leaves, structure, self.most, self._rewritten
                    )
                change = changed(before, python_state(self.fn))
                if change is None:
                    break
                if last:
                    raise ChangedFunction(
                        f"each call changes {change}, which a recording would not repeat",
                        0,
                        (_run(graph, results, leaves),),
                    )
            program = graph if replayed else compiled(graph, leaves)
            launched = self._launched(program, leaves, graph)
        made = _Made(program, launched, results, graph, constants(graph))
        self._programs[key] = made
        return made

    def _launched(
        self, program: Operations, leaves: list[Tensor], graph: fx.GraphModule
    ) -> Operations | None:
        launched = program if self.launching is None else self.launching(program, leaves, graph)
        return None if launched is program else launched

    @property
    def _rewritten(self) -> dict[Any, Callable[..., Any]] | None:
        return None if self.backend == "replay" else DECOMPOSITIONS

    def _check(self, made: _Made, args: Any, leaves: list[Tensor]) -> None:
        """Evaluate the function itself and refuse a recording that gives something else.

        What is compared is the graph, also where it was compiled: its operations are those of
        the function, so the bits are the same. A call leaves no trace but in Python: constants
        and random states are what they were before.

        Raises:
            ChangedFunction: they differ.
        """
        random_state = RandomState(leaves)
        rewriting = Rewritten(self._rewritten) if self._rewritten else nullcontext()

        def result_of(program: Operations) -> Any:
            with undone(made.constants, unseen=program is made.launched):
                return _run(program, made.results, leaves)

        launched = made.launched and result_of(made.launched)
        made.launched = None  # the memory that it holds is needed here
        with self.evaluating():
            with random_state.restored(), undone(made.constants), rewriting:
                outcome = self.fn(*args)
            agrees = agree(outcome, result_of(made.graph), lambda: result_of(made.graph))
            if agrees and launched is not None:
                again = result_of(made.program)
                agrees = agree(launched, again, lambda: result_of(made.program))
        if not agrees:
            raise ChangedFunction(
                "it gives something else than its recording does: it depends on a Python value or "
                "a tensor that has changed since (a coefficient, a random number), or torch took "
                "another way while it was recorded",
                made.replays - 1,
                (outcome,),
            )
        if launched is not None:
            made.launched = self._launched(made.program, leaves, made.graph)


def recorded(
    fn: Callable[..., Any],
    backend: Backend = "replay",
    after: int = 0,
    most_operations: int | None = None,
    making: Callable[[], AbstractContextManager[None]] = nullcontext,
    evaluating: Callable[[], AbstractContextManager[None]] = nullcontext,
    launching: Launching | None = None,
) -> Recorded:
    """`fn`, recorded at a call with tensors of given shapes, and replayed from then on.

    A recording serves all tensors of the same shapes, strides, types and devices, with or without
    `torch.no_grad()` as at its making. So `fn` must depend on its arguments alone, and on their
    values by torch operations alone: tensors that it closes over and Python numbers are constants
    from the recording on. Results have no graph: `fn` takes its derivatives itself.

    A function that breaks this rule is found out. Python values within its reach are looked at
    before and after it is recorded. At the 1st, 2nd, 4th, 8th … call after that, and whenever
    `recheck` was called, `fn` is evaluated as well, and the results have to be the same.

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
        evaluating: gives one that is entered while `fn` itself is evaluated, to make a recording or
            to compare with one. That takes more memory than a replay, which keeps no graph.
        launching: gives what runs in the place of the recorded operations: `launched_together`,
            on a GPU. It is compared with them as often.

    Returns:
        The function, as a `Recorded`.

    Raises, when it is called:
        RecordingError: a tensor's value decides what happens next or how large a result is, random
            numbers are drawn (compiled operations would draw others), an argument is no tensor, or
            the recording is too long. The random state is then that of before.
        CompilationError: inductor fails.
        ChangedFunction: the call finds a recording out. The error has the right result.

    Example:
        >>> import torch
        >>> from metarun.unroll import recorded, sgd, unroll
        >>> def outer(w):
        ...     end = unroll(lambda p, step: (p["w"] - 3).square().sum(), {"w": w}, sgd(0.1), 5)
        ...     return (end.params["w"] - 3).square().sum()
        >>> meta_gradient = recorded(torch.func.grad(outer))
        >>> meta_gradient(torch.zeros(1)), meta_gradient(torch.ones(1))  # recorded, then replayed
        (tensor([-0.6442]), tensor([-0.4295]))
    """
    return Recorded(fn, backend, after, most_operations, making, evaluating, launching)


def _run(program: Operations, results: pytree.TreeSpec, leaves: list[Tensor]) -> Any:
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
