"""Differentiable versions of `torch.optim` optimizers, behind `higher`'s interface.

The update rules are those of `metarun.unroll.optim`. Each parameter has a state of its own, since
`torch.optim` leaves a parameter that has no gradient at some step, and its state, as they are.
"""

import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from metarun.higher.differentiable import DifferentiableOptimizer
from metarun.higher.settings import (
    Override,
    apply_trainable_opt_params,
    get_trainable_opt_params,
)
from metarun.unroll.optim.base import InnerOptimizer, decayed_gradient, hyper_for, is_off, signed
from metarun.unroll.optim.from_torch import continued_state, torch_state, translate

__all__ = [
    "DifferentiableASGD",
    "DifferentiableAdadelta",
    "DifferentiableAdafactor",
    "DifferentiableAdagrad",
    "DifferentiableAdam",
    "DifferentiableAdamW",
    "DifferentiableAdamax",
    "DifferentiableMuon",
    "DifferentiableNAdam",
    "DifferentiableOptimizer",
    "DifferentiableRAdam",
    "DifferentiableRMSprop",
    "DifferentiableRprop",
    "DifferentiableSGD",
    "_GroupedGradsType",
    "_get_mask_closure",
    "apply_trainable_opt_params",
    "create_diff_optim",
    "get_diff_optim",
    "get_trainable_opt_params",
    "register_optim",
]


# Two names that `higher`'s guide to writing one's own optimizer refers to.
_GroupedGradsType = list[list[Tensor]]


def _get_mask_closure(mask: Tensor) -> Callable[[Tensor], Tensor]:
    """A hook that makes a gradient, and its own gradients, zero where `mask` is True."""

    def hook(grad: Tensor) -> Tensor:
        masked = torch.where(mask, torch.zeros_like(grad), grad)
        if masked.requires_grad:
            masked.register_hook(_get_mask_closure(mask))  # type: ignore[no-untyped-call]
        return masked

    return hook


class _Translated(DifferentiableOptimizer):
    """An optimizer whose update rule is that of `kind`'s counterpart in `metarun.unroll.optim`.

    Raises:
        ValueError: also for settings that the counterpart does not have.
    """

    kind: ClassVar[type[torch.optim.Optimizer]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._counterparts: dict[int, tuple[list[Any], InnerOptimizer]] = {}
        for number in range(len(self.param_groups)):
            self._translated(number)

    def _update(self, grouped_grads: list[list[Tensor | None]], **kwargs: Any) -> None:
        for number, (group, grads) in enumerate(zip(self.param_groups, grouped_grads, strict=True)):
            self._update_group(group, self.state[number], grads, self._translated(number))

    def _update_group(
        self,
        group: dict[str, Any],
        states: dict[int, Any],
        grads: list[Tensor | None],
        optimizer: InnerOptimizer,
    ) -> None:
        for i, grad in enumerate(grads):
            if grad is None:
                continue
            params = {"": group["params"][i]}
            state = states[i]
            if isinstance(state, dict):  # torch's, which is empty before the first step
                fresh = optimizer.init(params)[""]
                state = continued_state(self.kind, state, fresh) if state else fresh
            moved, new = optimizer.update({"": grad}, {"": state}, params, optimizer.hyper)
            group["params"][i], states[i] = moved[""], new[""]

    def _translated(self, number: int) -> InnerOptimizer:
        """The counterpart with a group's present settings, made anew only where they changed."""
        group = self.param_groups[number]
        values = [value for key, value in group.items() if key != "params"]
        known = self._counterparts.get(number)
        if known is None or not all(map(operator.is_, values, known[0])):
            known = self._counterparts[number] = (values, _counterpart(self.kind, group))
        return known[1]

    def _torch_state(self, state: Any) -> dict[str, Any]:
        return dict(state) if isinstance(state, dict) else torch_state(self.kind, state)


_PLAIN = {bool, int, float, str, type(None)}


def _counterpart(kind: type[torch.optim.Optimizer], group: Mapping[str, Any]) -> InnerOptimizer:
    """What `translate` gives: the same object for the same plain numbers, as in every task."""
    options = tuple((key, value) for key, value in group.items() if key != "params")
    if all(_is_plain(value) for _, value in options):
        known: InnerOptimizer = _counterpart_of(kind, *options)  # type: ignore[arg-type]
        return known
    return translate(kind, group)


def _is_plain(value: Any) -> bool:
    return type(value) in _PLAIN or (type(value) is tuple and all(map(_is_plain, value)))


@functools.lru_cache(maxsize=64)
def _counterpart_of(kind: type[torch.optim.Optimizer], *options: tuple[str, Any]) -> InnerOptimizer:
    return translate(kind, dict(options))


class DifferentiableSGD(_Translated):
    """Differentiable `torch.optim.SGD`. It has no state while it has no momentum, as in torch."""

    kind = torch.optim.SGD

    def _update_group(
        self,
        group: dict[str, Any],
        states: dict[int, Any],
        grads: list[Tensor | None],
        optimizer: InnerOptimizer,
    ) -> None:
        if not is_off(group["momentum"]):
            return super()._update_group(group, states, grads, optimizer)
        lr, decay = (hyper_for(optimizer.hyper, key, "") for key in ("lr", "weight_decay"))
        plain = is_off(decay) and not group["maximize"]
        params = group["params"]
        for i, grad in enumerate(grads):
            if grad is not None:
                if not plain:
                    grad = decayed_gradient(signed(grad, group["maximize"]), params[i], decay)
                if isinstance(lr, Tensor):
                    params[i] = params[i] - lr * grad
                else:  # one operation, as in torch's step
                    params[i] = params[i].sub(grad, alpha=lr)


class DifferentiableAdam(_Translated):
    """Differentiable `torch.optim.Adam`."""

    kind = torch.optim.Adam


class DifferentiableAdamW(_Translated):
    """Differentiable `torch.optim.AdamW`."""

    kind = torch.optim.AdamW


class DifferentiableNAdam(_Translated):
    """Differentiable `torch.optim.NAdam`."""

    kind = torch.optim.NAdam


class DifferentiableRAdam(_Translated):
    """Differentiable `torch.optim.RAdam`."""

    kind = torch.optim.RAdam


class DifferentiableAdamax(_Translated):
    """Differentiable `torch.optim.Adamax`."""

    kind = torch.optim.Adamax


class DifferentiableAdadelta(_Translated):
    """Differentiable `torch.optim.Adadelta`."""

    kind = torch.optim.Adadelta


class DifferentiableAdagrad(_Translated):
    """Differentiable `torch.optim.Adagrad`."""

    kind = torch.optim.Adagrad


class DifferentiableRMSprop(_Translated):
    """Differentiable `torch.optim.RMSprop`."""

    kind = torch.optim.RMSprop


class DifferentiableRprop(_Translated):
    """Differentiable `torch.optim.Rprop`. Only signs of gradients enter: derivatives through
    the gradients are zero."""

    kind = torch.optim.Rprop


class DifferentiableASGD(_Translated):
    """Differentiable `torch.optim.ASGD`."""

    kind = torch.optim.ASGD


class DifferentiableAdafactor(_Translated):
    """Differentiable `torch.optim.Adafactor`."""

    kind = torch.optim.Adafactor


class DifferentiableMuon(_Translated):
    """Differentiable `torch.optim.Muon`."""

    kind = torch.optim.Muon


_opt_mapping: dict[type[torch.optim.Optimizer], type[DifferentiableOptimizer]] = {
    cls.kind: cls for cls in _Translated.__subclasses__()
}


def register_optim(
    optim_type: type[torch.optim.Optimizer], diff_optim_type: type[DifferentiableOptimizer]
) -> None:
    """Use `diff_optim_type` for optimizers of the class `optim_type` from now on."""
    _opt_mapping[optim_type] = diff_optim_type


def _differentiable(kind: type[torch.optim.Optimizer]) -> type[DifferentiableOptimizer]:
    if kind not in _opt_mapping:
        known = ", ".join(known.__name__ for known in _opt_mapping)
        raise ValueError(
            f"{kind.__name__} has no differentiable version; there are: {known}. "
            "register_optim adds one"
        )
    return _opt_mapping[kind]


def get_diff_optim(
    opt: torch.optim.Optimizer,
    reference_params: Iterable[Tensor],
    fmodel: Any = None,
    device: torch.device | str | None = None,
    override: Override | None = None,
    track_higher_grads: bool = True,
    **kwargs: Any,
) -> DifferentiableOptimizer:
    """The differentiable version of an optimizer, going on from where it stands.

    Args:
        opt: an optimizer of `torch.optim`, or of a registered class.
        reference_params: the parameters of the model whose parameters `opt` holds.
        fmodel, device, override, track_higher_grads: see `DifferentiableOptimizer`.
        kwargs: further arguments of the differentiable optimizer, such as `grad_callback`.

    Raises:
        ValueError: `opt`'s class has no differentiable version, or as `DifferentiableOptimizer`.
    """
    return _differentiable(type(opt))(
        opt,
        reference_params,
        fmodel=fmodel,
        device=device,
        override=override,
        track_higher_grads=track_higher_grads,
        **kwargs,
    )


def create_diff_optim(
    opt_type: type[torch.optim.Optimizer],
    opt_kwargs: Mapping[str, Any] | None = None,
    params: Iterable[Any] | None = None,
    fmodel: Any = None,
    device: torch.device | str | None = None,
    override: Override | None = None,
    track_higher_grads: bool = True,
    **kwargs: Any,
) -> DifferentiableOptimizer:
    """A differentiable optimizer from scratch.

    Args:
        opt_type: a class of `torch.optim`, or a registered one.
        opt_kwargs: the arguments of `opt_type`, such as `{"lr": 0.1}`.
        params: the (fast) weights that it shall update, or param groups of them: dicts with
            "params" and the group's settings. Only their shapes matter, and their order, which
            is that in which `step` takes parameters; except that groups of an `fmodel`'s
            parameters are parts of those. All parameters of `fmodel`, if None.
        fmodel, device, override, track_higher_grads: see `DifferentiableOptimizer`.
        kwargs: further arguments of the differentiable optimizer, such as `grad_callback`.

    Raises:
        ValueError: there are no `params` and no `fmodel`, `params` are neither `fmodel`'s nor
            as many, or as `get_diff_optim`.
    """
    kind = _differentiable(opt_type)
    if params is None and fmodel is not None:
        params = fmodel.parameters()
    groups: list[Any] = list(params or ())
    if not groups:
        raise ValueError("give params= or fmodel= to create_diff_optim")
    if not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    groups = [{**g, "params": _tensors(g["params"])} for g in groups]
    given = [p for group in groups for p in group["params"]]
    reference = given if fmodel is None else list(fmodel.parameters())
    if not {id(p) for p in given} <= {id(p) for p in reference}:
        if len(given) != len(reference):
            raise ValueError(
                f"params= has {len(given)} tensors, fmodel {len(reference)} parameters: give all "
                "of them, or groups of fmodel.parameters() themselves"
            )
        reference = given
    stand_ins = {id(p): torch.zeros_like(p, requires_grad=True) for p in reference}
    opt = opt_type(
        [{**g, "params": [stand_ins[id(p)] for p in g["params"]]} for g in groups],
        **(opt_kwargs or {}),
    )
    return kind(
        opt,
        [stand_ins[id(p)] for p in reference],
        fmodel=fmodel,
        device=device,
        override=override,
        track_higher_grads=track_higher_grads,
        **kwargs,
    )


def _tensors(params: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [params] if isinstance(params, Tensor) else list(params)
