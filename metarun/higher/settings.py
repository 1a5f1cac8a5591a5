"""Settings of torch optimizers as learnable tensors: overrides, and the way there and back."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metarun.higher.utils import flatten, map_leaves

Override = Mapping[str, Any]
"""Setting -> a list with one value for all parameter groups or one a group; or a bare value."""

_NOT_LEARNED = {"params", "ns_steps"}


def values_by_group(
    override: Override, groups: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """For each parameter group the settings that an override puts in place.

    Raises:
        ValueError: a setting that a group does not have, or a list of another length than 1 and
            the number of groups.
    """
    chosen: list[dict[str, Any]] = [{} for _ in groups]
    for key, given in override.items():
        values = _listed(given)
        if len(values) not in (1, len(groups)):
            raise ValueError(
                f"override of {key!r}: a list has one value, or one for each of the {len(groups)} "
                f"parameter groups, not {len(values)}; a setting that is itself a tuple goes into "
                "a list, such as {'betas': [(b1, b2)]}"
            )
        for i, group in enumerate(groups):
            if key not in group or key == "params":
                known = ", ".join(k for k in group if k != "params")
                raise ValueError(f"cannot override {key!r}: the optimizer's settings are {known}")
            chosen[i][key] = values[0] if len(values) == 1 else values[i]
    return chosen


def _listed(given: Any) -> Sequence[Any]:
    if isinstance(given, list | tuple):
        return given
    if isinstance(given, Tensor) and given.dim() == 1:
        return list(given)
    return [given]


def get_trainable_opt_params(
    opt: torch.optim.Optimizer, device: torch.device | str | None = None
) -> dict[str, list[Any]]:
    """An override that makes an optimizer's numeric settings learnable.

    Args:
        opt: the optimizer.
        device: where the tensors shall be.

    Returns:
        Setting -> one value a parameter group, in which floats, ints and floating-point tensors
        are leaf tensors that require gradients (numbers: of shape (), in torch's default dtype).
        Tuples such as Adam's betas stay tuples. Settings that are booleans, None or mixtures
        are left out, and so is Muon's `ns_steps`, which counts iterations.

    Example:
        >>> import torch
        >>> from metarun.higher.optim import get_trainable_opt_params
        >>> opt = torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9)
        >>> get_trainable_opt_params(opt)["momentum"]
        [tensor(0.9000, requires_grad=True)]
    """

    def leaf(x: Any) -> Tensor:
        if isinstance(x, Tensor):
            return x.detach().clone().to(device).requires_grad_()
        return torch.tensor(float(x), device=device, requires_grad=True)

    trainable: dict[str, list[Any]] = {}
    for group in opt.param_groups:
        for key, value in group.items():
            leaves = flatten(value)
            if key not in _NOT_LEARNED and leaves and all(_is_numeric(x) for x in leaves):
                trainable.setdefault(key, []).append(map_leaves(leaf, value))
    return trainable


def _is_numeric(x: Any) -> bool:
    if isinstance(x, Tensor):
        return x.is_floating_point()
    return isinstance(x, int | float) and not isinstance(x, bool)


def apply_trainable_opt_params(opt: torch.optim.Optimizer, override: Override) -> None:
    """Write learned settings back into an optimizer's parameter groups.

    Each setting keeps its type: numbers become numbers again, tuples stay tuples, tensors are
    changed in place. An int that was learned to be no whole number becomes a float.

    Args:
        opt: the optimizer, whose groups are changed.
        override: the settings, as `get_trainable_opt_params` gives them.

    Raises:
        ValueError: as `values_by_group`; or a value of another kind or structure than the setting.

    Example:
        >>> import torch
        >>> from metarun.higher.optim import apply_trainable_opt_params
        >>> opt = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        >>> apply_trainable_opt_params(opt, {"lr": [torch.tensor(0.25)]})
        >>> opt.param_groups[0]["lr"]
        0.25
    """
    for group, values in zip(
        opt.param_groups, values_by_group(override, opt.param_groups), strict=True
    ):
        for key, value in values.items():
            group[key] = _applied(key, value, group[key])


def _applied(key: str, value: Any, setting: Any) -> Any:
    if isinstance(setting, list | tuple) and isinstance(value, list | tuple):
        if len(value) == len(setting):
            return type(setting)(_applied(key, v, s) for v, s in zip(value, setting, strict=True))
    elif isinstance(setting, Tensor):
        if setting.is_floating_point() and _is_number(value):
            with torch.no_grad():
                return setting.copy_(torch.as_tensor(value))
    elif _is_numeric(setting) and _is_number(value):
        number = float(value.detach() if isinstance(value, Tensor) else value)
        return int(number) if isinstance(setting, int) and number.is_integer() else number
    elif type(value) is type(setting):  # a switch, such as `nesterov`, or None
        return value
    raise ValueError(f"cannot apply {value!r} to the setting {key}={setting!r}")


def _is_number(value: Any) -> bool:
    return _is_numeric(value) or (isinstance(value, Tensor) and value.numel() == 1)
