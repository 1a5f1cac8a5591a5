"""Wrong kinds of arguments end in one sentence that says what to type."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metarun.higher as higher
from metarun.unroll import (
    adam,
    clip_norm,
    clip_value,
    from_torch,
    map_tasks,
    mean_gradient,
    meta_gradient,
    mixed,
    partition,
    sgd,
    task_mapping,
    unroll,
)
from metarun.unroll.multi import FirstOrder

MODEL = nn.Linear(3, 2)
W = {"w": torch.ones(2)}


def square(params: dict[str, Tensor], step: int) -> Tensor:
    return params["w"].pow(2).sum()


PARAMS: dict[str, tuple[Any, str]] = {
    "parameters()": (MODEL.parameters(), r"params is a generator.*dict\(model.named_parameters"),
    "named_parameters()": (MODEL.named_parameters(), "params is a generator: give a dict"),
    "list": (list(MODEL.parameters()), "params is a list: give a dict"),
    "tuple": (tuple(MODEL.parameters()), "params is a tuple: give a dict"),
    "pairs": (list(MODEL.named_parameters()), "params is a list: give a dict"),
    "tensor": (torch.ones(2), r"params is a tensor of shape \(2,\)"),
    "module": (MODEL, r"params is a module \(Linear\): give a dict"),
    "parameter list": (nn.ParameterList([torch.ones(2)]), r"params is a module \(ParameterList\)"),
    "None": (None, "params is None: give a dict"),
    "state dict": (
        nn.BatchNorm1d(2).state_dict(),
        r"params\['num_batches_tracked'\] is of the type torch.int64.*leave out buffers",
    ),
    "bool": ({"w": torch.ones(2) > 0}, r"params\['w'\] is of the type torch.bool"),
    "number": ({"w": 1.0}, r"params\['w'\] is 1.0, not a tensor"),
    "nested": ({"a": {"w": torch.ones(2)}}, r"params\['a'\] is a dict, not a tensor"),
    "numpy": ({"w": torch.ones(2).numpy()}, r"params\['w'\] is a ndarray, not a tensor"),
    "numbered": ({0: torch.ones(2)}, "params has the name 0, which is no string"),
    "empty": ({}, "no parameters to adapt"),
}


@pytest.mark.parametrize("kind", PARAMS)
def test_what_is_no_dict_of_parameters_is_refused(kind: str) -> None:
    params, message = PARAMS[kind]
    with pytest.raises(ValueError, match=message):
        unroll(square, params, sgd(0.1), 1)


def test_other_mappings_serve_as_well() -> None:
    params: Any = nn.ParameterDict({"w": nn.Parameter(torch.ones(2))})
    end = unroll(square, params, sgd(0.1), 2)
    expected = unroll(square, {"w": params["w"]}, sgd(0.1), 2)
    assert torch.equal(end.params["w"], expected.params["w"])
    grads = torch.autograd.grad(end.params["w"].sum(), params["w"])[0]
    torch.testing.assert_close(grads, torch.full((2,), 0.64))


class Oddly(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def of_params(params: dict[str, Tensor]) -> Tensor:
    return params["w"].sum()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": sgd("0.1")}, "hyperparameter 'lr' is '0.1': give a number or a tensor"),  # type: ignore[arg-type]
        ({"optimizer": sgd(None)}, "hyperparameter 'lr' is None"),  # type: ignore[arg-type]
        ({"hyper": {**sgd(0.1).hyper, "lr": {"w": "0.1"}}}, "hyperparameter 'lr' is '0.1'"),
        ({"optimizer": sgd(0.1, momentum=0.9), "state": {"x": 1}}, "state is a dict that this opt"),
        (
            {"optimizer": adam(0.1), "state": torch.optim.Adam([torch.ones(2)]).state_dict()},
            r"state is a dict .*optimizer\.init\(params\).*from_torch",
        ),
        ({"loss_fn": of_params}, r"called as loss\(params, step\), since unroll was given no con"),
        (
            {"loss_fn": of_params, "context": 1},
            r"called as loss\(params, step, context\), since th",
        ),
        ({"loss_fn": Oddly()}, r"called as loss\(params, step\)"),
    ],
    ids=["text", "None", "text by name", "state", "torch state", "one", "two", "module"],
)
@pytest.mark.parametrize("gradient", ["reverse", "checkpoint", "mixed"])
def test_other_wrong_arguments_end_in_a_sentence(
    change: dict[str, Any], message: str, gradient: Any
) -> None:
    params = {"w": torch.ones(2, requires_grad=True)}
    given: dict[str, Any] = {"loss_fn": square, "optimizer": sgd(0.1), "steps": 1} | change
    with pytest.raises(ValueError, match=message):
        unroll(params=params, gradient=gradient, **given)


def test_a_type_error_within_the_loss_is_its_own() -> None:
    def loss(params: dict[str, Tensor], step: int) -> Tensor:
        return params["w"].sum() + "1"  # type: ignore[operator, no-any-return]

    with pytest.raises(TypeError, match="unsupported operand"):
        unroll(loss, W, sgd(0.1), 1)


def test_what_goes_around_an_optimizer_wants_one_of_ours() -> None:
    theirs: Any = torch.optim.SGD(MODEL.parameters(), 0.1)
    for wrap in (
        lambda: clip_norm(theirs, 1.0),
        lambda: clip_value(theirs, 1.0),
        lambda: partition([("*", theirs)]),
        lambda: mixed([("*", theirs)]),
    ):
        with pytest.raises(ValueError, match=r"torch optimizer \(SGD\).*from_torch"):
            wrap()
    with pytest.raises(ValueError, match=r"from_torch needs names: give the module"):
        from_torch(theirs, MODEL.parameters())  # type: ignore[arg-type]


def test_the_drop_in_takes_the_module_first() -> None:
    theirs: Any = torch.optim.SGD(MODEL.parameters(), 0.1)
    for model, optimizer in ((MODEL.parameters(), theirs), (theirs, MODEL)):
        with (
            pytest.raises(ValueError, match=r"no module, .*innerloop_ctx\(model, optimizer\)"),
            higher.innerloop_ctx(model, optimizer),  # type: ignore[arg-type]
        ):
            pass


OPTIMIZERS: dict[str, tuple[Any, str]] = {
    "instance": (torch.optim.SGD(MODEL.parameters(), 0.1), r"torch optimizer \(SGD\).*from_torch"),
    "class": (torch.optim.SGD, r"a class \(SGD\).*sgd\(lr=0.1\)"),
    "name": ("sgd", r"'sgd', not an inner optimizer.*sgd\(lr=0.1\)"),
    "uncalled": (adam, r"call it first: adam\(…\)"),
    "None": (None, "None, not an inner optimizer"),
    "continued": (
        from_torch(torch.optim.SGD(MODEL.parameters(), 0.1), MODEL),
        "a Continued.*attribute `optimizer`",
    ),
    "multi": (FirstOrder(sgd(0.1)), "a FirstOrder.*attribute `optimizer`"),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_is_no_inner_optimizer_is_refused(kind: str) -> None:
    optimizer, message = OPTIMIZERS[kind]
    with pytest.raises(ValueError, match=f"optimizer is .*{message}"):
        unroll(square, W, optimizer, 1)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (1.0, "steps is 1.0: give the number"),
        (True, "steps is True: give the number"),
        ("2", "steps is '2': give the number"),
        (None, "steps is None: give the number"),
        (torch.ones(2), r"steps is a tensor of shape \(2,\)"),
        (torch.tensor(2.0), "steps is a tensor"),
        (-1, "0 or more, not -1"),
    ],
    ids=str,
)
def test_what_is_no_number_of_steps_is_refused(steps: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unroll(square, W, sgd(0.1), steps)


def test_a_whole_number_in_a_tensor_is_one_of_steps() -> None:
    assert len(unroll(square, W, sgd(0.1), torch.tensor(2)).losses) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda p, step: None, "not None: does it `return` one"),
        (lambda p, step: 1.0, "not float: take its mean or sum, and return nothing else"),
        (lambda p, step: (p["w"].sum(), 1), "not tuple"),
        (lambda p, step: {"loss": p["w"].sum()}, "not dict"),
        (lambda p, step: p["w"].sum().item(), "not float"),
        (lambda p, step: p["w"], r"not \(2,\)"),
        (lambda p, step: p["w"].sum()[None], r"not \(1,\)"),
        (lambda p, step: p["w"].sum().int(), "real number, not of the type torch.int32"),
        (lambda p, step: p["w"].sum() > 0, "real number, not of the type torch.bool"),
        (lambda p, step: p["w"].sum() * 1j, "real number, not of the type torch.complex64"),
    ],
)
@pytest.mark.parametrize("gradient", ["reverse", "first_order", "checkpoint", "mixed", "implicit"])
def test_what_is_no_loss_is_refused(loss: Any, message: str, gradient: Any) -> None:
    with pytest.raises(ValueError, match=message):
        unroll(loss, W, sgd(0.1), 1, gradient=gradient)


@pytest.mark.parametrize("hyper", [0.1, [0.1], "lr", torch.tensor(0.1)], ids=str)
def test_hyperparameters_are_a_dict(hyper: Any) -> None:
    with pytest.raises(ValueError, match=r"hyper is .*optimizer\.hyper"):
        unroll(square, W, sgd(0.1), 1, hyper=hyper)
    with pytest.raises(ValueError, match=r"hyper is .*optimizer\.hyper"):
        unroll(square, W, sgd(0.1), 1, hyper=lambda step: hyper)


def test_inference_mode_is_refused() -> None:
    with torch.inference_mode(), pytest.raises(ValueError, match=r"use torch\.no_grad\(\)"):
        unroll(square, W, sgd(0.1), 1)


# ---------------------------------------------------------------- tasks

X, Y = torch.ones(3, 4, 2), torch.ones(3, 4)
TASKS: dict[str, tuple[Any, str]] = {
    "list of tuples": ([(x, x) for x in X], r"tasks is a list of 3 tasks.*torch\.stack"),
    "list of dicts": ([{"x": x} for x in X], r"tasks is a list of 3 tasks.*torch\.stack"),
    "ragged": ((X, Y[:2]), r"as many tasks.*3 in tasks\[0\], 2 in tasks\[1\]"),
    "ragged dict": ({"x": X[:1], "y": Y}, r"as many tasks.*1 in tasks\['x'\], 3 in tasks\['y'\]"),
    "none": (X[:0], "there are no tasks"),
    "empty": ((), "there are no tasks"),
    "no dimension": ((X, torch.ones(())), r"tasks\[1\] has no dimension"),
    "number": ((X, 3), r"tasks\[1\] is 3: tasks must be a pytree of tensors"),
    "generator": ((x for x in X), "tasks is a generator: tasks must be"),
    "None": ((X, None), r"tasks\[1\] is None"),
}


@pytest.mark.parametrize("batching", ["vmap", "loop"])
@pytest.mark.parametrize("kind", TASKS)
def test_what_is_no_batch_of_tasks_is_refused(kind: str, batching: Any) -> None:
    tasks, message = TASKS[kind]

    def loss(meta: Any, task: Any) -> tuple[Tensor, Tensor]:
        return meta["w"].sum(), meta["w"].sum()

    for call in (
        lambda: map_tasks(loss, W, tasks, batching),
        lambda: task_mapping(loss, batching)(W, tasks),
        lambda: meta_gradient(loss, W, tasks, batching),
        lambda: mean_gradient(loss, batching)(W, tasks),
        lambda: mean_gradient(loss, batching, chunk=2)(W, tasks),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("batching", ["vmap", "loop"])
def test_a_list_of_tensors_is_a_batch(batching: Any) -> None:
    """As a data loader collates them."""
    sums = map_tasks(lambda meta, task: task[0].sum() + task[1].sum(), W, [X, Y], batching)
    assert sums.tolist() == [12, 12, 12]


@pytest.mark.parametrize("batching", ["vmap", "loop"])
@pytest.mark.parametrize(
    ("meta", "message"),
    [
        (MODEL, r"meta is a module \(Linear\)"),
        (MODEL.parameters(), "meta is a generator"),
        ({"n": torch.ones(2).int()}, r"meta\['n'\] is of the type torch.int32"),
    ],
    ids=["module", "generator", "int"],
)
def test_meta_parameters_are_a_dict_of_numbers(meta: Any, message: str, batching: Any) -> None:
    with pytest.raises(ValueError, match=message):
        meta_gradient(lambda meta, task: (task.sum(), task), meta, X, batching)


@pytest.mark.parametrize("batching", ["vmap", "loop"])
@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda meta: meta["w"].sum(), "must return a loss and a pytree of tensors"),
        (lambda meta: None, "must return a loss and a pytree of tensors"),
        (lambda meta: (meta["w"], meta["w"]), r"must be a scalar tensor, not \(2,\)"),
        (lambda meta: (1.0, meta["w"]), "must be a scalar tensor, not float"),
        (lambda meta: (meta["w"].sum(), 1.0), "holds a float"),
    ],
)
def test_a_task_loss_that_is_none_is_refused(returned: Any, message: str, batching: Any) -> None:
    with pytest.raises(ValueError, match=message):
        meta_gradient(lambda meta, task: returned(meta), W, X, batching)
