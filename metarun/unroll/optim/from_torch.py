"""A `torch.optim` optimizer, or one of its param groups, as a differentiable inner optimizer."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metarun.unroll._torch import has_gradient_hooks, has_step_hooks
from metarun.unroll.optim.base import Hyper, InnerOptimizer, Params, State, parts
from metarun.unroll.optim.optimizers import OPTIMIZERS
from metarun.unroll.optim.partition import partition

_SPLIT = {
    "betas": ("beta1", "beta2"),
    "etas": ("eta_minus", "eta_plus"),
    "step_sizes": ("step_size_min", "step_size_max"),
    "ns_coefficients": ("ns_a", "ns_b", "ns_c"),
    "eps": ("eps1", "eps2"),  # Adafactor's; the others' is one number
}
"""torch's tuples -> the names of their items here."""

_EXECUTION = {"foreach", "fused", "capturable", "differentiable"}
_SCHEDULERS = {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"}
_PASSED_OVER = {"params", "param_names"} | _EXECUTION | _SCHEDULERS

_REFUSED = {
    torch.optim.LBFGS: "it evaluates the loss as often as its line search wants",
    torch.optim.SparseAdam: "the gradients of an unroll are dense; use Adam",
}

_MOMENTS = {"first": "exp_avg", "second": "exp_avg_sq"}
_KEYS: dict[type[torch.optim.Optimizer], dict[str, Any]] = {
    torch.optim.SGD: {"momentum": "momentum_buffer"},
    torch.optim.Adam: {**_MOMENTS, "max_second": ("max_exp_avg_sq",)},
    torch.optim.AdamW: {**_MOMENTS, "max_second": ("max_exp_avg_sq",)},
    torch.optim.NAdam: {**_MOMENTS, "mu_product": "mu_product"},
    torch.optim.RAdam: _MOMENTS,
    torch.optim.Adamax: {"first": "exp_avg", "norm": "exp_inf"},
    torch.optim.Adadelta: {"second": "square_avg", "moves": "acc_delta"},
    torch.optim.Adagrad: {"sum": "sum"},
    torch.optim.RMSprop: {
        "second": "square_avg",
        "momentum": "momentum_buffer",
        "first": ("grad_avg",),
    },
    torch.optim.Rprop: {"previous": "prev", "step_size": "step_size"},
    torch.optim.ASGD: {"ax": "ax", "eta": "eta", "mu": "mu"},
    torch.optim.Adafactor: {"second": ("row_var", "col_var", "variance")},
    torch.optim.Muon: {"momentum": "momentum_buffer"},
}
"""Field of a parameter's state here -> torch's key, or keys where the field is a tuple."""

_BEGUN: dict[type[torch.optim.Optimizer], str] = {
    torch.optim.Adagrad: "sum",
    torch.optim.ASGD: "eta",
    torch.optim.Rprop: "step_size",
}
"""What begins with a hyperparameter at the first step."""

_IN_DEFAULT_TYPE = {"mu_product", "eta", "mu"}
"""Numbers that torch keeps in its default type, with the rounding that this means."""


class Continued(NamedTuple):
    """A live torch optimizer, taken over; see `from_torch`, whose example uses one.

    Attributes:
        optimizer: a `partition` with one part a param group: hyperparameters "0.lr", "1.lr" ….
        state: where the torch optimizer stands; goes to `unroll(state=...)`.
    """

    optimizer: InnerOptimizer
    state: State


def translate(kind: type[torch.optim.Optimizer], group: Mapping[str, Any]) -> InnerOptimizer:
    """The differentiable optimizer with the options of one param group.

    Args:
        kind: a class of `torch.optim`.
        group: its options by torch's names; numbers or tensors, also within tuples. Options
            left out have this package's defaults. `params`, `param_names` and what schedulers
            note down (`initial_lr` …) are passed over; so are `foreach`, `fused`, `capturable`
            and `differentiable`, which say how torch computes and not what.

    Returns:
        The optimizer; its `hyper` has the group's values, tensors as they are.

    Raises:
        ValueError: a class without counterpart, an unknown option, or one that contradicts.

    Example:
        >>> import torch
        >>> from metarun.unroll import translate
        >>> translate(torch.optim.Adam, {"lr": 0.1, "betas": (0.5, 0.9)}).hyper
        {'lr': 0.1, 'beta1': 0.5, 'beta2': 0.9, 'eps': 1e-08, 'weight_decay': 0.0}
    """
    if kind in _REFUSED:
        raise ValueError(f"{kind.__name__} cannot be unrolled: {_REFUSED[kind]}")
    if kind not in OPTIMIZERS:
        known = ", ".join(known.__name__ for known in OPTIMIZERS)
        raise ValueError(f"{kind.__name__} has no differentiable counterpart; there are: {known}")
    factory = OPTIMIZERS[kind]
    options: dict[str, Any] = {}
    for key, value in group.items():
        if key in _PASSED_OVER:
            continue
        if key in _SPLIT and isinstance(value, tuple | list):
            options |= zip(_SPLIT[key], value, strict=True)
        else:
            options[key] = value
    if kind is torch.optim.AdamW and options.pop("decoupled_weight_decay", True) is not True:
        raise ValueError("decoupled_weight_decay=False: AdamW without it is Adam")
    unknown = set(options) - _parameters_of(factory)
    if unknown:
        raise ValueError(f"{kind.__name__} has no option {', '.join(sorted(unknown))}")
    return factory(**{key: _scalar(value) for key, value in options.items()})


@cache
def _parameters_of(factory: Callable[..., InnerOptimizer]) -> frozenset[str]:
    return frozenset(inspect.signature(factory).parameters)


def from_torch(
    optimizer: torch.optim.Optimizer, params: nn.Module | Iterable[tuple[str, nn.Parameter]]
) -> Continued:
    """Go on, differentiably, from where a torch optimizer stands.

    Steps of the result are the steps that the torch optimizer would have taken next, with its
    param groups and its state (momenta, step counts …), which is copied. One difference is
    deliberate: torch skips a parameter whose `grad` is None, whereas in an unroll a parameter
    without influence has the gradient zero, and so still moves by momentum or weight decay.

    Parameters that the torch optimizer does not have, and those that do not require gradients,
    belong to no part and stay where they are.

    Args:
        optimizer: a live optimizer of `torch.optim`.
        params: a module, or the names and parameters under which the unroll knows them.

    Returns:
        The differentiable optimizer and the state to start it in.

    Raises:
        ValueError: as `translate`; `params` has no names; a parameter of the optimizer is not
            among `params`; the optimizer has hooks, or a gradient has; the state of a parameter has
            begun at step 0.

    Example:
        >>> import torch
        >>> from metarun.unroll import from_torch, unroll
        >>> params = {"w": torch.nn.Parameter(torch.zeros(1))}
        >>> warm = torch.optim.SGD(params.values(), lr=0.1, momentum=0.9)
        >>> (params["w"] - 3).square().sum().backward()
        >>> warm.step()  # the momentum buffer is −6 now, and w is 0.6
        >>> optimizer, state = from_torch(warm, params.items())
        >>> end = unroll(lambda p, step: p["w"].sum() * 0, params, optimizer, 1, state=state)
        >>> end.params["w"].detach()  # 0.6 + 0.1 · 0.9 · 6
        tensor([1.1400])
    """
    if has_step_hooks(optimizer):
        raise ValueError(
            "the optimizer has hooks (register_step_pre_hook, register_step_post_hook), which an "
            "unroll does not call: change gradients by clip_norm, clip_value or precondition"
        )
    named = list(params.named_parameters() if isinstance(params, nn.Module) else params)
    if any(not isinstance(pair, tuple) for pair in named):
        raise ValueError("from_torch needs names: give the module, or model.named_parameters()")
    name_of = {id(p): name for name, p in named}
    kind = type(optimizer)
    owners, states = [], []
    moving: set[str] = set()
    for index, group in enumerate(optimizer.param_groups):
        functional = translate(kind, settings_of(optimizer, group))
        owned = {}
        for p in group["params"]:
            if id(p) not in name_of:
                raise ValueError(
                    f"group {index} of the optimizer has a parameter of shape {tuple(p.shape)} "
                    "that is not among those given: is it another model's?"
                )
            if has_gradient_hooks(p):
                raise ValueError(
                    f"{name_of[id(p)]} has a hook on its gradient (register_hook, "
                    "register_post_accumulate_grad_hook), which an unroll does not call: change "
                    "gradients by clip_norm, clip_value or precondition"
                )
            refuse_begun_at_step_0(optimizer, p, name_of[id(p)])
            if p.requires_grad:
                owned[name_of[id(p)]] = p
        fresh = functional.init({name: p.detach() for name, p in owned.items()})
        owners.append((list(owned), functional))
        moving.update(owned)
        states.append(
            {
                name: continued_state(kind, optimizer.state.get(p, {}), fresh[name])
                for name, p in owned.items()
            }
        )
    still = frozenset(name_of.values()) - moving
    return Continued(_leaving(partition(owners), still), tuple(states))


def _leaving(optimizer: InnerOptimizer, still: frozenset[str]) -> InnerOptimizer:
    """The optimizer for all parameters but some, which stay where they are."""

    def others(params: Params) -> Params:
        return {name: p for name, p in params.items() if name not in still}

    def init(params: Params) -> State:
        return optimizer.init(others(params))

    def update(grads: Params, state: State, params: Params, hyper: Hyper) -> tuple[Params, State]:
        moved, state = optimizer.update(others(grads), state, others(params), hyper)
        return {name: moved.get(name, p) for name, p in params.items()}, state

    return InnerOptimizer(init, update, optimizer.hyper)


def settings_of(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of one of an optimizer's groups by which torch computes."""
    key = "initial_accumulator_value"
    # Adagrad has begun its sums when it was made, by the value that it was made with.
    begun = isinstance(optimizer, torch.optim.Adagrad)
    return {**group, key: optimizer.defaults[key]} if begun else dict(group)


def refuse_begun_at_step_0(optimizer: torch.optim.Optimizer, p: Tensor, name: str) -> None:
    """Refuse a state that somebody has set back to step 0 and that is none before the first step.

    Here such a state begins at its first step, by the hyperparameters, which may be learned.

    Raises:
        ValueError: names the parameter.
    """
    live = optimizer.state.get(p) or {}
    key = next((key for kind, key in _BEGUN.items() if isinstance(optimizer, kind)), None)
    if key not in live or float(live.get("step", 1)) != 0:
        return
    if isinstance(optimizer, torch.optim.Adagrad):
        start = optimizer.defaults["initial_accumulator_value"]
        if bool((parts(live[key]) == start).all()):  # of a complex sum, both of its parts
            return
    raise ValueError(
        f"{name}: its state is at step 0, but its {key} is not that of a beginning, with which a "
        "first step would replace it: keep its step, or begin with a new optimizer"
    )


def _scalar(value: Any) -> Any:
    """torch takes tensors of one element, whatever their shape, for numbers."""
    return value.reshape(()) if isinstance(value, Tensor) and value.numel() == 1 else value


def continued_state(kind: type[torch.optim.Optimizer], live: Mapping[str, Any], fresh: Any) -> Any:
    """The state of one parameter: torch's where it has one, a fresh one where it has not."""
    taken: dict[str, Any] = {}
    for field, keys in _KEYS[kind].items():
        value = getattr(fresh, field)
        if isinstance(value, tuple):
            present = [key for key in keys if live.get(key) is not None]
            if len(present) == len(value):
                taken[field] = tuple(map(_copy, (live[key] for key in present), value))
        elif live.get(keys) is not None:
            taken[field] = _copy(live[keys], value)
        elif keys in _IN_DEFAULT_TYPE:
            taken[field] = value.to(torch.get_default_dtype())
    if hasattr(fresh, "step"):  # ours are float64; torch's SGD does not count: a buffer will do
        steps = 1.0 if kind is torch.optim.SGD and taken else live.get("step", 0.0)
        taken["step"] = _copy(steps, fresh.step).double()
    return fresh._replace(**taken)


def torch_state(kind: type[torch.optim.Optimizer], state: Any) -> dict[str, Any]:
    """What torch keeps for a parameter in this state, detached: undoes `continued_state`."""
    kept: dict[str, Tensor] = {}
    for field, keys in _KEYS[kind].items():
        value = getattr(state, field)
        if kind is torch.optim.SGD and not state.step:
            continue  # its buffer begins with the first step that has momentum
        if isinstance(value, tuple):  # Adafactor's single statistic goes by its last name
            kept |= zip(keys[-1:] if len(value) == 1 else keys, value, strict=False)
        else:
            kept[keys] = value
    if kind not in (torch.optim.SGD, torch.optim.Muon):  # some only say by it that they began
        steps: Tensor = getattr(state, "step", torch.ones(()))
        kept["step"] = steps.cpu().to(torch.get_default_dtype())
    return {key: value.detach().clone() for key, value in kept.items()}


def _copy(value: Any, like: Tensor) -> Tensor:
    return torch.as_tensor(value, device=like.device).detach().clone()
