"""Wrong kinds of arguments, refused in one sentence that says what to type."""

import inspect
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metarun.unroll._torch import pytree
from metarun.unroll.advice import describe
from metarun.unroll.optim.base import InnerOptimizer, LossOptimizer, Params

_BY_NAME = "give a dict from names to tensors, such as dict(model.named_parameters())"


def checked_params(params: Any, what: str = "params") -> Params:
    """Parameters as a dict.

    Args:
        params: a dict from names to floating-point tensors, or another mapping of that kind
            (`nn.ParameterDict`).
        what: the argument's name, for messages.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(params, Mapping | nn.ParameterDict):
        raise ValueError(f"{what} is {describe(params)}: {_BY_NAME}")
    for name, value in params.items():
        if not isinstance(name, str):
            raise ValueError(f"{what} has the name {name!r}, which is no string: {_BY_NAME}")
        if not isinstance(value, Tensor):
            raise ValueError(f"{what}[{name!r}] is {describe(value)}, not a tensor: {_BY_NAME}")
        if not (value.is_floating_point() or value.is_complex()):
            raise ValueError(
                f"{what}[{name!r}] is of the type {value.dtype}, which has no gradient: leave out "
                "buffers and integers (dict(model.named_parameters()) has neither; "
                "model.state_dict() may have both)"
            )
    return dict(params.items())


def checked_steps(steps: Any) -> int:
    """The number of inner steps.

    Raises:
        ValueError: it is no whole number, or below 0.
    """
    try:
        count = None if isinstance(steps, bool) else operator.index(steps)
    except (TypeError, RuntimeError):  # a float; a tensor of several numbers or of each task
        count = None
    if count is None:
        raise ValueError(f"steps is {describe(steps)}: give the number of inner steps, an int")
    if count < 0:
        raise ValueError(f"the number of inner steps must be 0 or more, not {count}")
    return count


def check_gradients_possible() -> None:
    """Refuse to differentiate where torch keeps nothing for it.

    Raises:
        ValueError: within `torch.inference_mode()`.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "an unroll takes gradients, which torch.inference_mode() rules out: use "
            "torch.no_grad() in its place"
        )


def checked_hyper(hyper: Any) -> Mapping[str, Any]:
    """Hyperparameters by name.

    Raises:
        ValueError: they are no mapping.
    """
    if not isinstance(hyper, Mapping):
        raise ValueError(
            f"hyper is {describe(hyper)}: give a dict of all hyperparameters, such as "
            "{**optimizer.hyper, 'lr': 0.1}, or a function from the step to one"
        )
    for name, value in hyper.items():
        for one in value.values() if isinstance(value, Mapping) else (value,):
            if not isinstance(one, Tensor | int | float | complex):
                raise ValueError(
                    f"the hyperparameter {name!r} is {describe(one)}: give a number or a tensor, "
                    "or a dict of them with one for each parameter"
                )
    return hyper


def check_hyper(hyper: Any, optimizer: InnerOptimizer | LossOptimizer) -> None:
    """Refuse hyperparameters that are not the optimizer's.

    Raises:
        ValueError: as `checked_hyper`; or the names are others.
    """
    if set(checked_hyper(hyper)) != set(optimizer.hyper):
        wrong = ", ".join(sorted(set(hyper) ^ set(optimizer.hyper)))
        raise ValueError(
            f"hyper must have the names {', '.join(optimizer.hyper)}, neither more nor less: "
            f"see {wrong} (start from optimizer.hyper)"
        )


def checked_state(state: Any, fresh: Any) -> Any:
    """The state that an optimizer goes on from, which must be of the form that it has.

    Args:
        state: what was given; None is the state at the start.
        fresh: the optimizer's state at the start.

    Raises:
        ValueError: it is of another form.
    """
    if state is None:
        return fresh
    if pytree.tree_structure(state) != pytree.tree_structure(fresh):
        raise ValueError(
            f"state is {describe(state)} that this optimizer does not have for these parameters: "
            "give optimizer.init(params), the `state` that another unroll of them has returned, or "
            "that of from_torch(torch_optimizer, model)"
        )
    return state


def check_signature(loss_fn: Any, has_context: bool) -> None:
    """Refuse a loss that cannot be called as it will be.

    Raises:
        ValueError: it says how it is called.
    """
    wanted = "params, step, context" if has_context else "params, step"
    try:
        called = loss_fn.forward if isinstance(loss_fn, nn.Module) else loss_fn
        inspect.signature(called).bind(*wanted.split(", "))
    except ValueError:  # a function of C, which does not tell
        return
    except TypeError as error:
        why = "since there is a context" if has_context else "since unroll was given no context"
        raise ValueError(
            f"the inner loss is called as loss({wanted}), {why}, and does not take that: {error}"
        ) from error


def check_real(tree: Any) -> None:
    """Refuse complex numbers, for the gradient modes whose formulas are of real ones.

    Raises:
        ValueError: it says which modes take them.
    """
    if any(isinstance(x, Tensor) and x.is_complex() for x in pytree.tree_leaves(tree)):
        raise ValueError(
            "gradient='implicit' and 'evolution' do not take complex parameters or context: choose "
            "gradient='checkpoint', or give real and imaginary parts (torch.view_as_real)"
        )


def check_tasks(tasks: Any) -> int:
    """The number of tasks in a batch.

    Raises:
        ValueError: it is no pytree of tensors with as many tasks in each, or has none.
    """
    leaves = pytree.tree_leaves(tasks)
    if leaves and not isinstance(tasks, list) and all(isinstance(x, Tensor) for x in leaves):
        sizes = {x.shape[:1] for x in leaves}
        if len(sizes) == 1 and any(size := next(iter(sizes))):
            return int(size[0])
    stacked = "a pytree of tensors whose first dimension is that of the tasks"
    if isinstance(tasks, list) and tasks and not isinstance(tasks[0], Tensor):
        structures = {str(pytree.tree_structure(task)) for task in tasks}
        if len(structures) == 1 and not pytree.tree_structure(tasks[0]).is_leaf():
            raise ValueError(
                f"tasks is a list of {len(tasks)} tasks: give {stacked}, such as "
                "torch.utils._pytree.tree_map(lambda *x: torch.stack(x), *tasks). (Where a list "
                "is meant as the parts of a task, make it a tuple.)"
            )
    paths = pytree.tree_flatten_with_path(tasks)[0]
    counts: dict[str, int] = {}
    for path, leaf in paths:
        name = f"tasks{pytree.keystr(path)}"
        if not isinstance(leaf, Tensor):
            raise ValueError(f"{name} is {describe(leaf)}: tasks must be {stacked}")
        if not len(leaf.shape):
            raise ValueError(f"{name} has no dimension: tasks must be {stacked}")
        counts[name] = leaf.shape[0]
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{count} in {name}" for name, count in counts.items())
        raise ValueError(f"each tensor must have as many tasks, and there are {listed}")
    if not counts or not next(iter(counts.values())):
        raise ValueError(f"there are no tasks: give {stacked}, one or more")
    return next(iter(counts.values()))
