"""Finding what a recomputed function closes over: tensors whose gradients would be lost, state."""

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from metarun.unroll._torch import (
    disable_current_modes,
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    maybe_current_level,
    maybe_get_bdim,
    maybe_get_level,
    pytree,
    temporarily_clear_interpreter_stack,
    vmap_decrement_nesting,
    vmap_increment_nesting,
)
from metarun.unroll.advice import UnsuitableModel
from metarun.unroll.effects.surroundings import Observer, Place, is_filled, put_back
from metarun.unroll.gradients.recompute import (
    MORE_OFTEN,
    OTHER_VALUE,
    RandomState,
    alike,
    tensor_leaves,
    unwrapped,
)


class ClosureError(ValueError):
    """The inner loop depends on a tensor that it was not given."""


class Seen(NamedTuple):
    """What one evaluation was seen to do.

    Attributes:
        places: what it changes, for `tracking`.
        called: the functions of torch that it called, in their order.
    """

    places: list[Place]
    called: list[Any]


class _Watch(TorchFunctionMode):
    """Refuses tensors from outside that need gradients or belong to a surrounding transform.

    What the watched function is given is plain, and gradients are disabled around it. So a
    tensor that requires them where they are disabled, or that a transform outside has wrapped,
    comes from outside, unless an operation inside has returned it. Transforms of the function's
    own have deeper levels.
    """

    def __init__(self, depth: int, given: list[Tensor]) -> None:
        super().__init__()
        self.depth = depth
        # Alive, so that no other tensor takes the identity of one of them.
        self.made: dict[int, Tensor] = {id(x): x for x in given}
        self.versions: dict[int, tuple[Tensor, int]] = {}
        self.called: list[Any] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        outside = [x for x in tensor_leaves((args, kwargs or {})) if id(x) not in self.made]
        for x in outside:
            if id(x) not in self.versions and not x.is_inference():
                self.versions[id(x)] = x, x._version
        try:
            outputs = func(*args, **(kwargs or {}))
        except Exception:
            self._check(outside)  # the better reason, where there is one
            raise
        self.called.append(func)
        made = tensor_leaves(outputs)
        if made:  # not where only a shape, say, was asked for
            self._check(outside, detaches=func is Tensor.detach)
        self.made |= {id(x): x for x in made if id(x) not in self.versions}
        return outputs

    def _check(self, outside: list[Tensor], detaches: bool = False) -> None:
        for x in outside:
            wrapped = is_functorch_wrapped_tensor(x)
            if wrapped and not 1 <= maybe_get_level(x) <= self.depth:
                continue  # of a transform inside, under way or just over
            if wrapped or (x.requires_grad and not torch.is_grad_enabled() and not detaches):
                raise _closure_error(x)

    def written(self) -> list[Tensor]:
        """Tensors from outside that were changed in place."""
        return [x for x, version in self.versions.values() if x._version != version]


def _closure_error(x: Tensor) -> ClosureError:
    return ClosureError(
        f"the inner loop uses a tensor of shape {_shape(x)} that requires gradients or is mapped "
        "over tasks, but is neither in params nor in context, so this gradient mode would lose "
        "its gradient: give it as unroll(…, context=…) in a pytree of dicts, lists and tuples, or "
        "detach it if it is a constant"
    )


def check_closure(fn: Callable[[Any], Any], inputs: Any, loss: Any) -> Seen:
    """Evaluate `fn(inputs)` once, without a graph and on plain tensors.

    Losses are evaluated twice the first time that they are seen with such parameters, and a few
    times where they change something. What they change is put back.

    Args:
        fn: gives the value of the loss, and what else depends on the inputs.
        inputs: a pytree that begins with the parameters, by name.
        loss: the user's function within `fn`.

    Returns:
        What was seen of the first evaluation.

    Raises:
        ClosureError: it uses a tensor from outside that requires gradients or that belongs to
            a surrounding `torch.func.vmap` or `grad`.
        UnsuitableModel: a second evaluation would not be like the first.
    """
    depth = maybe_current_level() or 0
    # A recording under way sees nothing of this either.
    with temporarily_clear_interpreter_stack(), disable_current_modes(), torch.no_grad():
        plain = plain_values(inputs)
        given = tensor_leaves(plain)
        random_state = RandomState(given)
        with _levels(depth):

            def evaluate() -> Any:
                with random_state.restored(), _Watch(depth, given) as watch, Observer(loss) as seen:
                    value = _evaluated(fn, plain, given)
                put_back(seen.changed)
                if seen.advanced is not None:
                    raise UnsuitableModel(
                        f"the inner loss takes the next item of {seen.advanced}, an iterator, and "
                        + MORE_OFTEN
                        + "take the items before the unroll, and give them by unroll(…, context=…)"
                    )
                return value, seen.changed, watch

            value, changed, watch = evaluate()
            _refuse_writes(watch.written(), changed)
            if changed:
                _check_kept(lambda: _with_graph(fn, plain, given), changed, random_state)
            layout = (*layout_of(plain[0]), kinds_of(loss))
            if layout not in (met := met_with(loss)):
                if not _close(value, evaluate()[0]):
                    raise UnsuitableModel(OTHER_VALUE)
                met.add(layout)
    return Seen([place for place, _ in changed], watch.called)


def _refuse_writes(written: list[Tensor], changed: list[tuple[Place, Any]]) -> None:
    """Refuse what was written in place and cannot be put back."""
    kept = {place.key[1] for place, _ in changed if place.key[0] == "contents"}
    for x in written:
        if id(x) not in kept:
            raise UnsuitableModel(
                f"the inner loss writes on a tensor of shape {_shape(x)} that it was not given; "
                + MORE_OFTEN
                + "give it a clone, or make that tensor a buffer of the module"
            )


def _check_kept(
    with_graph: Callable[[], Any], changed: list[tuple[Place, Any]], random_state: RandomState
) -> None:
    """Refuse what is kept of one evaluation, with its graph, for the next one.

    In "reverse" the derivative flows through it, where each step is recomputed by itself it ends
    there. What is kept but never read is harmless, such as the activations for a plot.
    """
    with random_state.restored():
        value = with_graph()
    left = [(place, place.read()) for place, _ in changed]
    put_back(changed)
    for place, kept in left:
        if not any(x.requires_grad for x in tensor_leaves(kept)):
            continue
        with random_state.restored():
            place.write(pytree.tree_map(lambda x: x.detach(), kept))
            first = with_graph()
        put_back(changed)
        with random_state.restored():
            place.write(pytree.tree_map(lambda x: 1 + 2 * x.detach(), kept))
            second = with_graph()
        put_back(changed)
        if not (_close(first, second) and _close(first, value)):
            raise UnsuitableModel(
                f"the inner loss keeps {place.name} for its next evaluation, with its graph, and "
                + MORE_OFTEN
                + "detach what it keeps"
            )


@contextmanager
def _levels(depth: int) -> Iterator[None]:
    """As many levels of torch.func as surround the unroll, without a task in them.

    A tensor that belongs to one of those can be told by its level from what transforms within
    the loss make. Operations on plain tensors pass through these levels unchanged, random ones
    as well.
    """
    for _ in range(depth):
        vmap_increment_nesting(1, "same")
    try:
        yield
    finally:
        for _ in range(depth):
            vmap_decrement_nesting()


def _evaluated(fn: Callable[[Any], Any], plain: Any, given: list[Tensor]) -> Any:
    try:
        return fn(plain)
    except RuntimeError as error:
        if not re.search(_WANTS_A_GRAPH, str(error)):
            raise
    # The loss takes derivatives itself.
    with torch.enable_grad():
        return _with_graph(fn, plain, given)


_WANTS_A_GRAPH = (
    "does not require grad|retain_grad on Tensor that has|register a hook on a tensor that doesn't"
)


def _with_graph(fn: Callable[[Any], Any], plain: Any, given: list[Tensor]) -> Any:
    """`fn(plain)` with a graph, which may end in what was given alone."""
    with temporarily_clear_interpreter_stack():  # no transform lets leaves be made within it
        leaves = [x.detach().requires_grad_(x.is_floating_point() or x.is_complex()) for x in given]
    order = iter(leaves)
    fresh = pytree.tree_map(lambda x: next(order) if isinstance(x, Tensor) else x, plain)
    with torch.enable_grad():
        outputs = fn(fresh)
    known = {id(x) for x in leaves}
    todo = [x.grad_fn for x in tensor_leaves(outputs)]
    seen = set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) not in known:
                raise _closure_error(variable)
    return pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, outputs)


_met: "WeakKeyDictionary[Any, set[Any]]" = WeakKeyDictionary()


def met_with(loss: Any) -> set[Any]:
    """The layouts of parameters with which a loss has been tried out; a set to add to."""
    while hasattr(loss, "func"):  # functools.partial
        loss = loss.func
    loss = getattr(loss, "__func__", loss)
    try:  # a function that is defined again and again has the same code
        return _met.setdefault(getattr(loss, "__code__", loss), set())
    except TypeError:  # it has no weak references, or no hash
        return set()


def kinds_of(loss: Any, depth: int = 3) -> Any:
    """What a loss uses from outside, by the classes: functions of one code may differ in it."""
    if isinstance(loss, functools.partial):
        return tuple(kinds_of(x, depth) for x in (loss.func, *loss.args, *loss.keywords.values()))
    if isinstance(loss, MethodType):
        return kinds_of(loss.__func__, depth), kinds_of(loss.__self__, depth)
    if isinstance(loss, FunctionType):
        if not depth:
            return loss.__code__
        cells = [cell for cell in loss.__closure__ or () if is_filled(cell)]
        inside = tuple(kinds_of(cell.cell_contents, depth - 1) for cell in cells)
        return loss.__code__, *inside, *map(type, loss.__defaults__ or ())
    if isinstance(loss, Tensor | type):
        return type(loss)
    return type(loss), *map(type, getattr(loss, "__dict__", {}).values())


def layout_of(params: dict[str, Tensor]) -> tuple[Any, ...]:
    """The names and shapes of parameters."""
    return tuple((name, p.shape) for name, p in params.items())


def _close(a: Any, b: Any) -> bool:
    pairs = zip(tensor_leaves(a), tensor_leaves(b), strict=True)
    return all(alike(x, y) for x, y in pairs if x.is_floating_point() or x.is_complex())


def plain_values(tree: Any) -> Any:
    """A pytree with copies of its tensors' values; to be called outside of all transforms."""
    return pytree.tree_map(lambda x: _plain(x) if isinstance(x, Tensor) else x, tree)


def _plain(x: Tensor) -> Tensor:
    """The values of a tensor below all transforms: of the first task, where tasks are mapped."""
    while is_functorch_wrapped_tensor(x):
        task_dim = maybe_get_bdim(x) if is_batchedtensor(x) else None
        x = get_unwrapped(x)
        if task_dim is not None:
            x = x.select(task_dim, 0)
    return x.detach().clone()  # so that a loss which writes on its arguments writes on this


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(unwrapped(x).shape)
