"""Functions with a backward pass of one's own, which keep their inputs and nothing else."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metarun.unroll._torch import (
    get_current_dispatch_mode,
    get_unwrapped,
    is_functorch_wrapped_tensor,
    maybe_current_level,
    pytree,
    temporarily_clear_interpreter_stack,
)
from metarun.unroll.advice import UnsuitableModel, explained
from metarun.unroll.effects.surroundings import put_back, tracked, tracking, values_of

Flat = Callable[..., tuple[Tensor, ...]]
Pullback = Callable[[Flat, Sequence[Tensor], Sequence[Tensor], Sequence[int]], Sequence[Tensor]]
"""`pullback(fn, inputs, cotangents, wanted)`: the gradients of the inputs with the numbers in
`wanted`, for `fn(*inputs)`, whose outputs have the given cotangents."""


class Recomputation:
    """A function that is evaluated again, and has to give what it gave at first.

    What a loss takes from an iterator, say, would be something else by then. So its small outputs,
    the values of losses among them, are kept and compared. On a CPU: the host would wait for an
    accelerator at each of them. `check_closure` looks at losses anywhere.
    """

    def __init__(self, fn: Flat) -> None:
        self.fn = fn
        self.first: list[Tensor | None] = []

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = self.fn(*inputs)
        self.compare(outputs, range(len(outputs)))
        return outputs

    def keep(self, outputs: Sequence[Tensor]) -> None:
        """Take these for what the function gives."""
        if not _under_recording():
            compared = [x.numel() <= _SMALL and x.device.type == "cpu" for x in outputs]
            self.first = [
                unwrapped(x).detach() if known else None
                for x, known in zip(outputs, compared, strict=True)
            ]

    def compare(self, outputs: Sequence[Tensor], places: Iterable[int]) -> None:
        """Refuse outputs in these places that are not those of the first time.

        Raises:
            UnsuitableModel: one is not.
        """
        if not self.first or _under_recording():
            return
        with temporarily_clear_interpreter_stack(), torch.no_grad():
            for x, i in zip(outputs, places, strict=True):
                first = self.first[i]
                if first is not None and not alike(unwrapped(x).detach(), first):
                    raise UnsuitableModel(OTHER_VALUE)


def unchecked(fn: Flat) -> Flat:
    """The function of a recomputation, to be evaluated at other inputs."""
    return fn.fn if isinstance(fn, Recomputation) else fn


_SMALL = 64  # elements of an output that is compared

MORE_OFTEN = (
    "this gradient mode evaluates the loss more often than once a step, and would not compute "
    "what gradient='reverse' does. Choose that (engine.gradient=reverse of a command), or keep "
    "the loss from changing anything: "
)
OTHER_VALUE = (
    "a second evaluation of the inner loss with the same parameters gives another value, and "
    + MORE_OFTEN
    + "let it depend on its arguments and on torch's random numbers alone"
)


def _under_recording() -> bool:
    return torch.compiler.is_compiling() or get_current_dispatch_mode() is not None


def unwrapped(x: Tensor) -> Tensor:
    """A tensor without the wrappers of transforms: of all tasks, where tasks are mapped."""
    while is_functorch_wrapped_tensor(x):
        x = get_unwrapped(x)
    return x


def alike(x: Tensor, first: Tensor) -> bool:
    """Equal but for what operations in another order would do, as those of a GPU."""
    if x.shape != first.shape or torch.equal(x, first):
        return True  # mapped in another way, if the shapes differ
    if not (x.is_floating_point() or x.is_complex()):
        return False
    close = torch.finfo(x.dtype).eps ** 0.5
    return torch.allclose(x, first, rtol=close, atol=0, equal_nan=True)


class _Plan(NamedTuple):
    fn: Recomputation
    pullback: Pullback
    surroundings: "Surroundings"
    keep_outputs: bool


class _Recomputed(torch.autograd.Function):
    # Lets torch.func.vmap map over forward and backward, each with its own batching.
    generate_vmap_rule = True

    @staticmethod
    def forward(plan: _Plan, *inputs: Tensor) -> tuple[Tensor, ...]:
        return plan.fn.fn(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.plan = inputs[0]
        ctx.plan.fn.keep(output)
        ctx.save_for_backward(*inputs[1:], *(output if ctx.plan.keep_outputs else ()))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        saved: Sequence[Tensor] = ctx.saved_tensors
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        with ctx.plan.surroundings.restored(), explained():
            found = ctx.plan.pullback(ctx.plan.fn, saved, cotangents, wanted)
        grads: list[Tensor | None] = [None] * (len(ctx.needs_input_grad) - 1)
        for i, grad in zip(wanted, found, strict=True):
            grads[i] = grad
        return None, *grads


def recomputed(
    fn: Callable[[Any], Any], inputs: Any, pullback: Pullback, keep_outputs: bool = False
) -> Any:
    """`fn(inputs)`, differentiated by `pullback` and remembered by its inputs alone.

    Random numbers are drawn again as they were, and under the same autocast: a pullback that
    calls `fn` sees the same dropout masks and precision. Works under `torch.func.vmap` and
    `torch.func.grad`, inside and out.

    Args:
        fn: from a pytree to a pytree of tensors. A tensor that it closes over gets no gradient
            (see `metarun.unroll.gradients.closure`).
        inputs: a pytree; what is no tensor in it is a constant.
        pullback: see `Pullback`.
        keep_outputs: give the pullback the outputs too, behind the inputs.
    """
    of_tensors = flattened(fn, inputs)
    structures: list[pytree.TreeSpec] = []

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        outputs, structure = pytree.tree_flatten(of_tensors(*tensors))
        structures[:] = [structure]
        # An output that is an input as it came would be taken for a view of it.
        return tuple(out.clone() if any(out is t for t in tensors) else out for out in outputs)

    tensors = tensor_leaves(inputs)
    plan = _Plan(Recomputation(flat), pullback, Surroundings(tensors), keep_outputs)
    outputs = _Recomputed.apply(plan, *tensors)
    return pytree.tree_unflatten(list(outputs), structures[0])


def tensor_leaves(tree: Any) -> list[Tensor]:
    """The tensors of a pytree, in its order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def flattened(fn: Callable[[Any], Any], inputs: Any) -> Callable[..., Any]:
    """`fn` as a function of the tensors of its pytree argument, which it does not keep."""
    leaves, structure = pytree.tree_flatten(inputs)
    constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def of_tensors(*tensors: Tensor) -> Any:
        values = list(constants)
        for i, tensor in zip(places, tensors, strict=True):
            values[i] = tensor
        return fn(pytree.tree_unflatten(values, structure))

    return of_tensors


def distinct(tree: Any) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    """The tensors of a pytree, each once, and a function from such a list back to the pytree."""
    leaves, structure = pytree.tree_flatten(tree)
    tensors = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}
    place = {key: i for i, key in enumerate(tensors)}
    places = [place.get(id(leaf)) for leaf in leaves]
    constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def rebuild(values: Sequence[Tensor]) -> Any:
        filled = [
            constant if i is None else values[i]
            for constant, i in zip(constants, places, strict=True)
        ]
        return pytree.tree_unflatten(filled, structure)

    return list(tensors.values()), rebuild


def restrict_to(
    fn: Callable[..., Any], inputs: Sequence[Tensor], wanted: Sequence[int]
) -> Callable[..., Any]:
    """Make `fn` a function of the wanted inputs, with the others held fixed."""

    def restricted(*values: Tensor) -> Any:
        every = list(inputs)
        for i, value in zip(wanted, values, strict=True):
            every[i] = value
        return fn(*every)

    return restricted


def by_reverse(
    fn: Flat, inputs: Sequence[Tensor], cotangents: Sequence[Tensor], wanted: Sequence[int]
) -> Sequence[Tensor]:
    """The pullback that evaluates `fn` again, this time with a graph."""
    restricted = restrict_to(fn, inputs, wanted)
    if plain_autograd_will_do([*inputs, *cotangents]):
        with torch.enable_grad():
            leaves = [inputs[i].detach().requires_grad_() for i in wanted]
            pairs = zip(restricted(*leaves), cotangents, strict=True)
            outputs, slopes = zip(*((o, c) for o, c in pairs if o.requires_grad), strict=True)
        return torch.autograd.grad(outputs, leaves, slopes, materialize_grads=True)
    pull = torch.func.vjp(restricted, *(inputs[i] for i in wanted))[1]
    grads: Sequence[Tensor] = pull(tuple(cotangents))
    return grads


def plain_autograd_will_do(tensors: Sequence[Tensor]) -> bool:
    """Whether no transform of `torch.func` is involved, and no further derivative is to come.

    Then autograd itself does what a transform would, with a layer of wrappers less.
    """
    transformed = maybe_current_level() is not None or any(
        is_functorch_wrapped_tensor(t) for t in tensors
    )
    return not transformed and not torch.is_grad_enabled()


ALSO_RESTORED: list[Callable[[], Callable[[], AbstractContextManager[None]]]] = []
"""What else a computation runs under: each gives, when it is called, how to enter it again."""


class Surroundings:
    """The random state, the autocast and whatever else a computation ran under."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.random_state = RandomState(tensors)
        self.autocasts = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in sorted({"cpu", *(t.device.type for t in tensors)})
        ]
        self.others = [seen() for seen in ALSO_RESTORED]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Them inside the block, what was before after it."""
        with ExitStack() as stack:
            stack.enter_context(self.random_state.restored())
            for kind, dtype, enabled in self.autocasts:
                stack.enter_context(torch.autocast(kind, dtype, enabled))
            for enter in self.others:
                stack.enter_context(enter())
            yield


class RandomState:
    """The random state of the CPU and of the CUDA devices that tensors are on.

    With it go the places that the loss changes (see `metarun.unroll.effects.surroundings`).
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.devices = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
        self.cpu = torch.get_rng_state()
        self.cuda = [torch.cuda.get_rng_state(device) for device in self.devices]
        self.kept = values_of(tracked())

    @contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        """A fresh state inside the block, on the same devices; what it was before after it."""
        with torch.random.fork_rng(self.devices):
            torch.default_generator.manual_seed(seed)
            for device in self.devices:
                torch.cuda.default_generators[device].manual_seed(seed)
            yield

    def restore(self) -> None:
        """Make this the state again."""
        torch.set_rng_state(self.cpu)
        for device, state in zip(self.devices, self.cuda, strict=True):
            torch.cuda.set_rng_state(state, device)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """This state inside the block, what it was before after it."""
        with torch.random.fork_rng(self.devices):
            self.restore()
            if not self.kept:
                yield
                return
            places = [place for place, _ in self.kept]
            before = values_of(places)
            put_back(self.kept)
            try:
                with tracking(places):
                    yield
            finally:
                put_back(before)
