"""Plain words for what torch says when a model cannot be unrolled or mapped over tasks."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

_ADVICE = {
    r"would mutate a captured Tensor|vmap: .*in-place": (
        "the model changes a tensor in place in its forward pass, most likely the running "
        "statistics of a batch normalisation, which the tasks of a batch would share: use "
        "track_running_stats=False (or metarun.backbones.norm.BatchNorm), or call model.eval()"
    ),
    r"vmap: It looks like you're .*calling \.item\(\)": (
        "the loss turns a tensor into a Python number (.item(), float(), `if` on a tensor), "
        "which is not possible when tasks are mapped by vmap: use torch.where, or a loop over "
        "tasks (batching='loop'; engine.batching=loop of a command)"
    ),
    r"access data pointer": (
        "the loss hands a tensor to numpy or to Python (.numpy(), .tolist()), which torch.func "
        "does not allow, detached or not: use torch's operations"
    ),
    r"randomness error mode": (
        "the loss draws random numbers under torch.func.vmap: give vmap "
        "randomness='different', as metarun.unroll.map_tasks does"
    ),
    r"Batching rule not implemented|doesn't match the broadcast shape": (
        "an operation of the model cannot be mapped over tasks by vmap (recurrent layers cannot, "
        "but for LSTMs): use a loop over tasks (batching='loop'; engine.batching=loop of a command)"
    ),
    r"saved tensor hooks|must override the setup_context staticmethod": (
        "torch.func cannot differentiate the model: it checkpoints its own activations, "
        "save_on_cpu or the like surrounds the unroll, or an operation of its own has an autograd "
        "formula without setup_context. Switch the first two off and use gradient='checkpoint' "
        "of the unroll instead (engine.gradient=checkpoint of a command)"
    ),
}


_REASONS = {
    r"one_hot": (
        "F.one_hot looks at the values of its labels, unless it is given the number of classes; "
        "torch.eye(n)[y] does not"
    ),
    r"in-place|inplace|mutate a captured": (
        "a tensor that all tasks share is written to in place, as h[:] = … does to "
        "h = torch.zeros(…); torch.cat, torch.stack or torch.where make a new one"
    ),
    r"calling \.item\(\)|data-dependent control flow|_local_scalar_dense": (
        "it looks at the value of a tensor (.item(), float(), `if`, F.one_hot); torch.where does "
        "without, and torch.eye(n)[y] for F.one_hot(y, n)"
    ),
    r"dynamic shape|boolean mask": (
        "the values of a tensor decide how large a result is (x[mask], nonzero); torch.where or a "
        "weighted sum does without"
    ),
    r"access data pointer": "it leaves torch (.numpy(), .tolist())",
    r"Batching rule not implemented|doesn't match the broadcast shape": (
        "one of its operations, a recurrent layer perhaps, cannot be mapped"
    ),
}


def plain_reason(error: BaseException | None) -> str:
    """Why torch could not map or record a function, in a few plain words."""
    text = str(error)
    for pattern, reason in _REASONS.items():
        if re.search(pattern, text):
            return reason
    return f"{type(error).__name__}: {text.partition(chr(10))[0]}"


class UnsuitableModel(RuntimeError):
    """A model does what cannot be unrolled or mapped over tasks; the message says what to do."""


@contextmanager
def explained() -> Iterator[None]:
    """Add advice to errors of torch inside the block whose cause is known."""
    try:
        yield
    except AttributeError as error:
        missing = re.search(r"has no attribute `(.+)`", str(error))  # of functional_call
        if missing is None:
            raise
        raise ValueError(
            f"the model has no {missing.group(1)}: params must be named as in "
            "model.named_parameters(), of the model that the loss calls"
        ) from error
    except RuntimeError as error:
        for pattern, advice in _ADVICE.items():
            if re.search(pattern, str(error)):
                reason = str(error).splitlines()[0]
                raise UnsuitableModel(f"{advice}\n(torch: {reason})") from error
        raise
