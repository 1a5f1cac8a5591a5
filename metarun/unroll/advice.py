"""Plain words for what torch says when a model cannot be unrolled or mapped over tasks."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_LOOP = "use a loop over tasks (batching='loop'; engine.batching=loop of a command)"
_FIRST_ORDER = (
    "use another operation, or first order: gradient='first_order' of the unroll, algo.order=1 of "
    "a command, step(…, grad_callback=lambda grads: [g.detach() for g in grads]) of metarun.higher"
)

_INSTEAD = {
    "embedding_bag": "nn.Embedding with a sum, mean or maximum over the bag",
    "ctc_loss": "",
    "hardsigmoid": "(x / 6 + 0.5).clamp(0, 1)",
    "multi_margin_loss": "(margin - x.gather(1, y[:, None]) + x).clamp(min=0) without column y",
    "multilabel_margin_loss": "F.multilabel_soft_margin_loss",
    "segment_reduce": "index_add",
    "geqrf": "torch.linalg.qr",
    "linalg_ldl_factor_ex": "torch.linalg.cholesky or torch.linalg.eigh",
}
"""Operations without a second (or any) derivative -> what computes the same and has it."""

_ADVICE = {
    r"aten::embedding_renorm_": (
        "an embedding with max_norm changes its weights in its forward pass: build it without, "
        "and normalise what it gives"
    ),
    r"would mutate a captured Tensor|vmap: .*in-place": (
        "the model changes a tensor in place in its forward pass, most likely the running "
        "statistics of a batch normalisation, which the tasks of a batch would share: use "
        "track_running_stats=False (or metarun.components.backbone.norm.BatchNorm), or call "
        "model.eval()"
    ),
    r"vmap: (inplace arithmetic|aten::\w+_\()": (
        "the model writes values of one task into a tensor that all tasks share, such as "
        "h = torch.zeros(…); h[:] = x: make it from x (x.new_zeros(…), torch.stack, torch.cat), or "
        + _LOOP
    ),
    r"vmap: It looks like you're .*calling \.item\(\)": (
        "the loss turns a tensor into a Python number (.item(), float(), `if` on a tensor, or an "
        "operation that does so, such as F.one_hot), which is not possible when tasks are mapped "
        "by vmap: use torch.where (F.one_hot with num_classes: (y[..., None] == "
        "torch.arange(classes)).to(x)), or " + _LOOP
    ),
    r"dynamic shape|differently shaped Tensor": (
        "the size of what the loss computes depends on the values of a tensor (a boolean mask as "
        "index, nonzero, unique), which is not possible when tasks are mapped by vmap: use "
        "torch.where or multiply by the mask, or " + _LOOP
    ),
    r"different inplace randomness on an unbatched tensor": (
        "the loss fills a tensor that all tasks share with random numbers: make it from one of the "
        "task's own (torch.rand_like(x), x.new_empty(…)), or " + _LOOP
    ),
    r"randomness error mode": (
        "the loss draws random numbers under torch.func.vmap: give vmap "
        "randomness='different', as metarun.unroll.map_tasks does"
    ),
    r"[Ss]parse": (
        "the loss has sparse gradients or matrices, which cannot be mapped over tasks by vmap or "
        "differentiated in mixed mode: build nn.Embedding and nn.EmbeddingBag with sparse=False, "
        "and use dense matrices (x.to_dense())"
    ),
    r"argument #\d+ 'workspace'": (
        "torch's LSTM for float32 on a CPU cannot be differentiated in this mode or mapped over "
        "tasks: set torch.backends.mkldnn.enabled = False before the unroll, or use float64 "
        "(engine.precision=float64 of a command) or gradient='reverse' in a loop over tasks"
    ),
    r"Batching rule not implemented|doesn't match the broadcast shape|we do not yet support": (
        "an operation of the model cannot be mapped over tasks by vmap (recurrent layers cannot, "
        "but for LSTMs in float32): " + _LOOP
    ),
    r"saved tensor hooks|must override the setup_context staticmethod": (
        "torch.func cannot differentiate the model: it checkpoints its own activations, "
        "save_on_cpu or the like surrounds the unroll, or an operation of its own has an autograd "
        "formula without setup_context. Switch the first two off and use gradient='checkpoint' "
        "of the unroll instead (engine.gradient=checkpoint of a command)"
    ),
    r"Tensor\.(requires_grad_|retain_grad)\(\)": (
        "the loss calls requires_grad_(), retain_grad() or backward() on a tensor of its own: take "
        "derivatives within it by torch.func.grad, or run the model by metarun.higher"
    ),
    r"access data pointer|data pointer of Tensor that doesn't have storage": (
        "the loss leaves torch: it reads a tensor's numbers (.numpy(), .tolist(), packed "
        "sequences), which torch.func does not allow, detached or not. Compute with tensors (a "
        "mask in place of a packed sequence), or run the model by metarun.higher"
    ),
    r"NestedTensor": (
        "the loss uses nested tensors, which torch.func cannot differentiate: pad them "
        "(torch.nn.utils.rnn.pad_sequence) and use a mask"
    ),
    r"escaped from inside a function|level <= current_level": (
        "the model keeps a tensor from one call to the next in a list or in an object that is no "
        "module, which transforms cannot follow: register it as a buffer, and assign new values "
        "to that (self.mean = …), detached"
    ),
    r"have the same dtype|type \(.+\) should be the same|expected scalar type": (
        "the loss mixes tensors of two types, such as float32 and float64: make a tensor with "
        "dtype=x.dtype (x.new_zeros(…)) of what it meets, and keep a constant of a module as a "
        "buffer, which follows the module's type"
    ),
    r"must implement the jvp function": (
        "forward-mode derivatives (torch.func.jvp, jacfwd, hessian) do not pass through this "
        "gradient mode: use gradient='reverse' of the unroll, or torch.func.jacrev(torch.func.grad("
        "…)) for a Hessian"
    ),
    r"once_differentiable": (
        "an operation of the model can be differentiated once only (samples of a Dirichlet or Beta "
        "distribution can, for one): " + _FIRST_ORDER
    ),
    r"modified by an inplace operation": (
        "the model writes on a tensor that its derivative still needs: clone it before, or use an "
        "operation that is not in place"
    ),
}
"""Patterns in torch's words -> ours. The first that matches counts."""


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
    if isinstance(error, UnsuitableModel):
        error = error.__cause__  # torch's own words: ours name other causes as well
    text = str(error)
    for pattern, reason in _REASONS.items():
        if re.search(pattern, text):
            return reason
    return f"{type(error).__name__}: {text.partition(chr(10))[0]}"


class UnsuitableModel(RuntimeError):
    """A model does what cannot be unrolled or mapped over tasks; the message says what to do."""


class WrongDerivative(ValueError):
    """torch's derivative of an operation would be wrong; the message says what to use instead."""


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
    except UnsuitableModel:
        raise
    except RuntimeError as error:  # NotImplementedError is one
        if advice := _advice(str(error)):
            reason = str(error).splitlines()[0]
            raise UnsuitableModel(f"{advice}\n(torch: {reason})") from error
        raise


def _advice(text: str) -> str | None:
    missing = re.search(r"derivative for '?(?:aten::)?(\w+?)'? is not implemented", text)
    if missing:
        return _without_derivative(missing.group(1))
    return next((advice for pattern, advice in _ADVICE.items() if re.search(pattern, text)), None)


def _without_derivative(name: str) -> str:
    operation = re.sub(r"(_backward|_grad)+$", "", name).lstrip("_")
    instead = _INSTEAD.get(operation)
    instead = f" (such as {instead})" if instead else ""
    if name.lstrip("_") == operation:
        return f"torch has no derivative of {operation}: use another operation{instead}"
    return (
        f"torch has no second derivative of {operation}, which this gradient mode needs: "
        + _FIRST_ORDER.replace("another operation", f"another operation{instead}")
    )


def describe(value: Any) -> str:
    """What something is, as a part of a sentence: "a module (Linear)"."""
    if isinstance(value, torch.optim.Optimizer):
        return f"a torch optimizer ({type(value).__name__})"
    if isinstance(value, nn.Module):
        return f"a module ({type(value).__name__})"
    if isinstance(value, type):
        return f"a class ({value.__name__})"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and type {value.dtype}"
    if isinstance(value, str | int | float) or value is None:
        return repr(value)
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
