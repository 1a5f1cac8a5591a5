"""The interface of `higher`, on this package's engine: `import metarun.higher as higher`.

Written for code that exists; `docs/from_higher.md` lists the differences, and what to use instead
in new code.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from metarun.higher import optim, patch, utils
from metarun.higher.optim import (
    DifferentiableOptimizer,
    create_diff_optim,
    get_diff_optim,
    register_optim,
)
from metarun.higher.patch import monkeypatch
from metarun.higher.settings import Override

__all__ = [
    "create_diff_optim",
    "get_diff_optim",
    "innerloop_ctx",
    "monkeypatch",
    "optim",
    "patch",
    "register_optim",
    "utils",
]


@contextmanager
def innerloop_ctx(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    device: torch.device | str | None = None,
    copy_initial_weights: bool = True,
    override: Override | None = None,
    track_higher_grads: bool = True,
) -> Iterator[tuple[Any, DifferentiableOptimizer]]:
    """An inner loop: a patched copy of `model`, and a differentiable `opt` that updates it.

    Neither `model` nor `opt` is changed.

    Args:
        model: the module to adapt.
        opt: an optimizer of all or some of its parameters; its settings and state are gone on
            from.
        device, copy_initial_weights: see `monkeypatch`.
        override: settings in place of `opt`'s: setting -> a list with one value for all
            parameter groups or one a group, or a bare value. Tensors receive derivatives.
        track_higher_grads: False for evaluation: nothing is kept of past steps.

    Yields:
        The patched module and the differentiable optimizer.

    Raises:
        ValueError: `opt` has no differentiable version, has settings that it lacks, or holds
            parameters that are not `model`'s; or an override is not fit.

    Example:
        >>> import torch
        >>> import metarun.higher as higher
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> opt, x = torch.optim.SGD(model.parameters(), lr=0.1), torch.ones(1, 1)
        >>> with higher.innerloop_ctx(model, opt, copy_initial_weights=False) as (fmodel, diffopt):
        ...     for _ in range(2):
        ...         _ = diffopt.step((fmodel(x) - 3).square().sum())
        ...     fmodel(x).sum().backward()
        >>> model.weight.grad  # (1 − 2 lr)²
        tensor([[0.6400]])

    References:
        Grefenstette et al. 2019, Generalized inner loop meta-learning (the interface).
    """
    fmodel = monkeypatch(model, device, copy_initial_weights, track_higher_grads)
    diffopt = get_diff_optim(
        opt,
        fmodel._weights().original_params(),
        fmodel=fmodel,
        device=device,
        override=override,
        track_higher_grads=track_higher_grads,
    )
    yield fmodel, diffopt
