"""What all optimizers of the `higher` interface have in common."""

import abc
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from metarun.higher.settings import Override, values_by_group
from metarun.higher.utils import copy_tensor, map_leaves
from metarun.unroll._torch import has_step_hooks
from metarun.unroll.advice import explained
from metarun.unroll.gradients.proof import try_once
from metarun.unroll.optim.from_torch import refuse_begun_at_step_0, settings_of

Gradients = Sequence[Tensor | None]
GradCallback = Callable[[list[Tensor | None]], Gradients]


class DifferentiableOptimizer(abc.ABC):
    """An optimizer whose steps can be differentiated. Subclasses define `_update`.

    Args:
        other: the torch optimizer to go on from: its settings and its state are copied.
        reference_params: the parameters of the original model, in the order in which fast
            weights are given to `step`.
        fmodel: a patched module (`higher.patch`), whose fast weights `step` reads and updates.
        device: where the state shall be.
        override: settings in place of the optimizer's; see `metarun.higher.settings`.
            Tensors in it take part in differentiation.
        grad_callback: applied to the list of gradients at each step, such as clipping; in the
            order of `reference_params`, with None for a parameter without a gradient.
        track_higher_grads: False detaches the parameters after each step.

    Attributes:
        param_groups: the settings of each group.
        state: for each group a dict from the parameter's number in it to its state: torch's, a
            dict of copies, until the first update, and what `_update` makes of it after.

    Raises:
        ValueError: the optimizer holds a parameter that is not in `reference_params`, the state
            of one has begun at step 0, or an override is not fit.

    Example:
        A torch optimizer's differentiable version, one from scratch, and an update rule of one's
        own, which `register_optim` can make that of a class of torch optimizers:

        >>> import torch
        >>> import metarun.higher as higher
        >>> w = torch.ones(1, requires_grad=True)
        >>> adam = higher.get_diff_optim(torch.optim.Adam([w], lr=0.1), [w])
        >>> adam.step(w.square().sum(), params=[w])[0].detach()
        tensor([0.9000])
        >>> sgd = higher.create_diff_optim(torch.optim.SGD, {"lr": 0.1}, params=[w])
        >>> sgd.step(w.square().sum(), params=[w])[0].detach()
        tensor([0.8000])
        >>> class BySign(higher.optim.DifferentiableOptimizer):
        ...     def _update(self, grouped_grads, **kwargs):
        ...         for group, grads in zip(self.param_groups, grouped_grads):
        ...             for i, grad in enumerate(grads):
        ...                 if grad is not None:
        ...                     group["params"][i] = group["params"][i] - group["lr"] * grad.sign()
        >>> by_sign = BySign(torch.optim.SGD([w], lr=0.5), [w])
        >>> by_sign.step(w.square().sum(), params=[w])[0].detach()
        tensor([0.5000])
    """

    def __init__(
        self,
        other: torch.optim.Optimizer,
        reference_params: Iterable[Tensor],
        fmodel: Any = None,
        device: torch.device | str | None = None,
        override: Override | None = None,
        grad_callback: GradCallback | None = None,
        track_higher_grads: bool = True,
    ) -> None:
        if has_step_hooks(other):
            raise ValueError(
                "the optimizer has hooks (register_step_pre_hook, register_step_post_hook), which "
                "no differentiable step calls: give grad_callback"
            )
        index = {id(p): i for i, p in enumerate(reference_params)}

        def copied(x: Any) -> Any:
            return copy_tensor(x, device) if isinstance(x, Tensor) else x

        self.param_groups: list[dict[str, Any]] = []
        self.state: list[defaultdict[int, Any]] = []
        self._indices: list[list[int]] = []
        for group in other.param_groups:
            params = group["params"]
            try:
                self._indices.append([index[id(p)] for p in params])
            except KeyError:
                raise ValueError(
                    "the optimizer holds a parameter that is not one of the model's: build it "
                    "from parameters of the model that is given with it"
                ) from None
            for number, p in zip(self._indices[-1], params, strict=True):
                refuse_begun_at_step_0(other, p, f"parameter {number}")
            settings = settings_of(other, group)
            self.param_groups.append({**settings, "params": [None] * len(params)})
            state = {
                i: map_leaves(copied, dict(other.state[p]))
                for i, p in enumerate(params if other.state else ())
                if p in other.state
            }
            self.state.append(defaultdict(dict, state))
        for group, values in zip(
            self.param_groups, values_by_group(override or {}, self.param_groups), strict=True
        ):
            group.update(values)
        self._fmodel = fmodel
        self._grad_callback = grad_callback
        self._track_higher_grads = track_higher_grads
        self._tried = False  # whether its steps can be differentiated

    def step(
        self,
        loss: Tensor,
        params: Iterable[Tensor] | None = None,
        override: Override | None = None,
        grad_callback: GradCallback | None = None,
    ) -> list[Tensor]:
        """Take one step on `loss`, in place of `zero_grad`, `backward` and `step`.

        Args:
            loss: a scalar that was computed with the current fast weights.
            params: the parameters to differentiate with respect to and to update; the patched
                module's current ones, if None.
            override: settings for this step only.
            grad_callback: in place of the optimizer's own, for this step only.

        Returns:
            The new parameters, which the patched module has too. Where the loss does not depend
            on a parameter, or that is frozen, it is unchanged.

        Raises:
            ValueError: there are no parameters, the loss is no scalar or does not depend on
                any of them, a gradient is sparse, or an override is not fit.
        """
        if params is None:
            params = None if self._fmodel is None else self._fmodel.fast_params
        if params is None:
            raise ValueError("give params= to step: there is no patched module to take them from")
        params = list(params)
        grads = _gradients(loss, params, create_graph=self._track_higher_grads)
        callback = self._grad_callback if grad_callback is None else grad_callback
        if callback is not None:
            changed = list(callback(list(grads)))
            if len(changed) != len(grads):
                raise ValueError(f"grad_callback returned {len(changed)} of {len(grads)} gradients")
            grads = changed

        new_params = self._stepped(params, grads, override or {})
        if not self._tried and self._track_higher_grads and torch.is_grad_enabled():
            self._tried = True
            kinds = () if self._fmodel is None else self._fmodel._weights().kinds
            try_once(loss, new_params, params, kinds)
        if self._fmodel is not None:
            self._fmodel.update_params(new_params)
        return new_params

    def _stepped(self, params: list[Tensor], grads: Gradients, override: Override) -> list[Tensor]:
        values = values_by_group(override, self.param_groups)
        groups = list(zip(self.param_groups, values, self._indices, strict=True))
        before = [{key: group[key] for key in new} for group, new, _ in groups]
        new_params = list(params)
        try:
            for group, new, indices in groups:
                group.update(new, params=[params[i] for i in indices])
            with nullcontext() if self._track_higher_grads else torch.no_grad():
                self._update([[grads[i] for i in indices] for indices in self._indices])
            for group, _, indices in groups:
                for i, p in zip(indices, group["params"], strict=True):
                    if not self._track_higher_grads:
                        p = p.detach().requires_grad_(params[i].requires_grad)
                    new_params[i] = p
        finally:
            for (group, _, _), old in zip(groups, before, strict=True):
                # No group holds on to parameters, and with them to the graph of past steps.
                group.update(old, params=[None] * len(group["params"]))
        return new_params

    def state_dict(self) -> dict[str, Any]:
        """Settings and state as of now, detached, for `load_state_dict` of the torch optimizer."""

        def plain(x: Any) -> Any:
            return x.detach().clone() if isinstance(x, Tensor) else x

        states: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        for group, of_group in zip(self.param_groups, self.state, strict=True):
            first = sum(len(g["params"]) for g in groups)
            numbers = list(range(first, first + len(group["params"])))
            groups.append({**map_leaves(plain, group), "params": numbers})
            for i, state in of_group.items():
                states[numbers[i]] = map_leaves(plain, self._torch_state(state))
        return {"state": states, "param_groups": groups}

    def _torch_state(self, state: Any) -> dict[str, Any]:
        """A parameter's state with torch's keys."""
        return dict(state)

    @abc.abstractmethod
    def _update(self, grouped_grads: list[list[Tensor | None]], **kwargs: Any) -> None:
        """Replace each `self.param_groups[g]["params"][i]` by its value after a step.

        Args:
            grouped_grads: the gradients by group, in the order of the group's parameters; None
                where there is none, and then nothing of that parameter shall change.
            kwargs: none; for subclasses.
        """


def _gradients(loss: Tensor, params: list[Tensor], create_graph: bool) -> list[Tensor | None]:
    if loss.numel() != 1:
        raise ValueError(f"the inner loss must be a scalar, not of shape {tuple(loss.shape)}")
    targets = [p for p in params if p.requires_grad]
    found: Iterable[Tensor | None] = [None for _ in targets]
    if loss.requires_grad and targets:
        with explained():
            found = torch.autograd.grad(loss, targets, create_graph=create_graph, allow_unused=True)
    given = iter(found)
    grads = [next(given) if p.requires_grad else None for p in params]
    present = [g for g in grads if g is not None]
    if not present:
        raise ValueError(
            "the inner loss does not depend on any of the fast weights: compute it with the "
            "patched module (not with the original model), with its current parameters"
        )
    if any([g.layout != torch.strided for g in present]):  # a list is quicker than a generator
        raise ValueError(
            "sparse gradients are not supported: build the embedding with sparse=False"
        )
    return grads
