"""Running a function of one task over a batch of tasks, and its mean gradient."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from metarun.unroll._torch import pytree
from metarun.unroll.advice import explained
from metarun.unroll.inputs import check_tasks, checked_params
from metarun.unroll.recording.recorded import Record, unrecorded

Batching = Literal["vmap", "loop"]
"""Tasks together, in batched kernels, or one after the other; see `map_tasks`."""

Meta = Mapping[str, Tensor]
"""Meta-parameters by name: initial weights, learned hyperparameters."""

TaskLoss = Callable[[Meta, Any], tuple[Tensor, Any]]


def map_tasks(
    fn: Callable[[Meta, Any], Any],
    meta: Meta,
    tasks: Any,
    batching: Batching,
    chunk: int | None = None,
) -> Any:
    """Apply `fn(meta, task)` to each task of a batch and stack the results.

    Args:
        fn: a function of the meta-parameters and of one task.
        meta: shared by all tasks.
        tasks: a pytree of tensors with the tasks as their first dimension.
        batching: "vmap" runs `chunk` tasks at a time (all, if None) in batched kernels, "loop"
            one after the other. Equal up to rounding; which is faster depends on the device
            and the model.
        chunk: see above.

    Returns:
        The pytree that `fn` returns, with a first dimension of tasks.

    Raises:
        ValueError: an unknown batching, a chunk below 1, or tasks that are not as above.

    Example:
        >>> import torch
        >>> from metarun.unroll import map_tasks
        >>> tasks = torch.arange(6.0).reshape(3, 2)  # 3 tasks of 2 numbers
        >>> def total(meta, task):
        ...     return meta["w"] * task.sum()
        >>> map_tasks(total, {"w": torch.tensor(2.0)}, tasks, "vmap")
        tensor([ 2., 10., 18.])
    """
    return task_mapping(fn, batching, chunk)(meta, tasks)


def task_mapping(
    fn: Callable[[Meta, Any], Any],
    batching: Batching,
    chunk: int | None = None,
    record: Record = unrecorded,
    threads: int = 1,
) -> Callable[[Meta, Any], Any]:
    """`map_tasks` as a function of `(meta, tasks)` that is called often.

    Args:
        fn, batching, chunk: as in `map_tasks`.
        record: applied to what computes a chunk; see `metarun.unroll.recording.recorded`.
        threads: chunks that a CPU computes at the same time, if they are recorded: a thread each,
            which share the threads that torch would otherwise use within each operation.

    Returns:
        `mapping(meta, tasks)`, which gives what `map_tasks` gives.

    Raises:
        ValueError: as `map_tasks`.

    Example:
        >>> import torch
        >>> from metarun.unroll import recorded, task_mapping
        >>> total = task_mapping(lambda meta, task: meta["w"] * task.sum(), "vmap", record=recorded)
        >>> for w in (1.0, 2.0):  # recorded, then replayed
        ...     total({"w": torch.tensor(w)}, torch.ones(3, 2))
        tensor([2., 2., 2.])
        tensor([4., 4., 4.])
    """
    _check(batching, chunk)
    run = record(partial(_run, fn, batching))

    def mapping(meta: Meta, tasks: Any) -> Any:
        check_tasks(tasks)
        parts = list(_each(run, meta, list(_chunks(tasks, batching, chunk)), threads))
        return pytree.tree_map(lambda *leaves: torch.cat(leaves), *parts)

    return mapping


def meta_gradient(
    task_loss: TaskLoss,
    meta: Meta,
    tasks: Any,
    batching: Batching,
    chunk: int | None = None,
) -> tuple[dict[str, Tensor], Any]:
    """The gradient of the mean task loss with respect to the meta-parameters.

    The graph of one chunk is freed before the next is built, so memory is that of a chunk
    (of a single task under "loop").

    Args:
        task_loss: `task_loss(meta, task) -> (loss, extra)`: a scalar and a pytree of tensors.
        meta: what the gradient is taken for.
        tasks, batching, chunk: as in `map_tasks`.

    Returns:
        The gradients by name (zero where a loss does not depend on a meta-parameter), and
        `extra`, detached, with a first dimension of tasks.

    Raises:
        ValueError: as `map_tasks`; or `task_loss` returns something else, or a loss that does not
            depend on the meta-parameters.

    Example:
        The gradient of MAML, for tasks that are targets:

        >>> import torch
        >>> from metarun.unroll import meta_gradient, sgd, unroll
        >>> def inner_loss(params, step, target):
        ...     return (params["w"] - target).square()
        >>> def task_loss(meta, target):
        ...     end = unroll(inner_loss, dict(meta), sgd(lr=0.1), steps=1, context=target)
        ...     return inner_loss(end.params, 1, target), end.params["w"]
        >>> tasks = torch.tensor([1.0, 3.0])
        >>> meta_gradient(task_loss, {"w": torch.tensor(0.0)}, tasks, "vmap")
        ({'w': tensor(-2.5600)}, tensor([0.2000, 0.6000]))

    References:
        Finn, Abbeel and Levine 2017, Model-agnostic meta-learning for fast adaptation of deep
        networks.
    """
    result: tuple[dict[str, Tensor], Any] = mean_gradient(task_loss, batching, chunk)(meta, tasks)
    return result


def mean_gradient(
    task_loss: TaskLoss,
    batching: Batching,
    chunk: int | None = None,
    record: Record = unrecorded,
    summary: Callable[[Meta, Any], Any] = lambda grads, extra: (grads, extra),
    threads: int = 1,
) -> Callable[[Meta, Any], Any]:
    """`meta_gradient` as a function of `(meta, tasks)` that is called often.

    Args:
        task_loss, batching, chunk: as in `meta_gradient`.
        record: applied to what computes a chunk; see `metarun.unroll.recording.recorded`.
        summary: what is made of the gradients and of `extra`; part of what is recorded if there
            is but one chunk.
        threads: as in `task_mapping`.

    Returns:
        `gradient(meta, tasks)`, which gives what `summary` gives: as `meta_gradient`, by default.

    Raises:
        ValueError: as `map_tasks`; when the result is called, as `meta_gradient`.

    Example:
        >>> import torch
        >>> from metarun.unroll import mean_gradient, recorded
        >>> def task_loss(meta, target):
        ...     loss = (meta["w"] - target).square()
        ...     return loss, loss
        >>> gradient = mean_gradient(task_loss, "vmap", record=recorded)
        >>> for w in (0.0, 2.0):  # recorded, then replayed
        ...     gradient({"w": torch.tensor(w)}, torch.tensor([1.0, 3.0]))
        ({'w': tensor(-4.)}, tensor([1., 9.]))
        ({'w': tensor(0.)}, tensor([1., 1.]))
    """
    _check(batching, chunk)
    checked = _checked(task_loss)
    of_chunk = partial(_gradient_of_one if batching == "loop" else _gradients_of_many, checked)

    def of_all(meta: Meta, tasks: Any) -> Any:
        grads, extra = of_chunk(meta, tasks)
        return summary(_divided(grads, _count(tasks)), extra)

    run_chunk, run_all = record(of_chunk), record(of_all)

    def gradient(meta: Meta, tasks: Any) -> Any:
        count, meta = check_tasks(tasks), checked_params(meta, "meta")
        if count <= _chunk_size(tasks, batching, chunk):
            return run_all(meta, tasks)
        totals: Meta | None = None
        extras = []
        parts = list(_chunks(tasks, batching, chunk))
        for grads, extra in _each(run_chunk, meta, parts, threads):
            share = _divided(grads, count)
            totals = share if totals is None else {k: totals[k] + share[k] for k in share}
            extras.append(extra)
        assert totals is not None
        return summary(totals, pytree.tree_map(lambda *own: torch.cat(own), *extras))

    return gradient


def _checked(task_loss: TaskLoss) -> TaskLoss:
    """The loss of a task, which must return what it should."""

    def checked(meta: Meta, task: Any) -> tuple[Tensor, Any]:
        returned = task_loss(meta, task)
        if not (isinstance(returned, tuple) and len(returned) == 2):
            raise ValueError(
                "the loss of a task must return a loss and a pytree of tensors to be stacked, "
                f"`return loss, extra`, not {type(returned).__name__}"
            )
        loss, extra = returned
        if not isinstance(loss, Tensor) or loss.dim():
            seen = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"the loss of a task must be a scalar tensor, not {seen}")
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise ValueError(
                "the loss of a task does not depend on what is learned, as far as derivatives can "
                "see: it is detached, rounded, or computed from other tensors"
            )
        for leaf in pytree.tree_leaves(extra):
            if not isinstance(leaf, Tensor):
                raise ValueError(
                    "what the loss of a task returns beside the loss must be tensors, and holds a "
                    f"{type(leaf).__name__}: torch.tensor(…) makes one of a number"
                )
        return loss, extra

    return checked


def _each(run: Callable[..., Any], meta: Meta, parts: list[Any], threads: int) -> Iterator[Any]:
    """`run(meta, part)` for each part, in order."""
    workers = min(threads, len(parts))
    if workers > 1 and hasattr(run, "program"):
        # As many threads in each operation from the first recording on, so that a part has the
        # same bits whether it was recorded before or is now.
        with _threads_of_operations(max(1, torch.get_num_threads() // workers)) as count:
            programs = [run.program(meta, part) for part in parts]
            if None not in programs:
                with ThreadPoolExecutor(workers, "tasks", torch.set_num_threads, (count,)) as pool:
                    yield from pool.map(lambda go, part: go(meta, part), programs, parts)
                return
    for part in parts:
        yield run(meta, part)


@contextmanager
def _threads_of_operations(count: int) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield count
    finally:
        torch.set_num_threads(before)


def _count(tasks: Any) -> int:
    return int(pytree.tree_leaves(tasks)[0].shape[0])


def _divided(grads: Meta, count: int) -> dict[str, Tensor]:
    return {name: grad / count for name, grad in grads.items()}


def _gradient_of_one(task_loss: TaskLoss, meta: Meta, part: Any) -> tuple[Meta, Any]:
    leaves = {name: value.detach().requires_grad_() for name, value in meta.items()}
    losses, extra = _run(task_loss, "loop", leaves, part)
    with explained():
        grads = torch.autograd.grad(losses.sum(), list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, grads, strict=True)), pytree.tree_map(torch.Tensor.detach, extra)


def _gradients_of_many(task_loss: TaskLoss, meta: Meta, part: Any) -> tuple[Meta, Any]:
    # The gradient of each task inside vmap, not that of their sum around it: vmap's rules for
    # layer, batch and instance norms take the saved mean and deviation for constants, so that
    # an autograd around it gets wrong second derivatives of them.
    fixed = {name: value.detach() for name, value in meta.items()}
    grads, extra = _run(torch.func.grad(task_loss, has_aux=True), "vmap", fixed, part)
    return {name: grad.sum(0) for name, grad in grads.items()}, extra


def _run(fn: Callable[[Meta, Any], Any], batching: Batching, meta: Meta, part: Any) -> Any:
    # Of torch's attention kernels, vmap and second derivatives have this one alone; the inner
    # loss is computed by it, too.
    with sdpa_kernel(SDPBackend.MATH):
        if batching == "vmap":
            with explained():
                return torch.func.vmap(fn, in_dims=(None, 0), randomness="different")(meta, part)
        single = fn(meta, pytree.tree_map(lambda x: x[0], part))
    return pytree.tree_map(lambda x: x[None], single)


def _check(batching: str, chunk: int | None) -> None:
    if batching not in get_args(Batching):
        allowed = ", ".join(get_args(Batching))
        raise ValueError(f"unknown batching {batching!r}: choose one of {allowed}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk}: must be 1 or more, or None for all tasks at once")


def _chunk_size(tasks: Any, batching: Batching, chunk: int | None) -> int:
    return 1 if batching == "loop" else chunk or _count(tasks)


def _chunks(tasks: Any, batching: Batching, chunk: int | None) -> Iterator[Any]:
    size = _chunk_size(tasks, batching, chunk)
    for start in range(0, _count(tasks), size):
        stop = start + size
        yield pytree.tree_map(lambda x, a=start, b=stop: x[a:b], tasks)
