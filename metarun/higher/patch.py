"""Modules with exchangeable parameters: the fast weights of an inner loop.

A patched module is a structural copy of the user's model. Its parameters' places hold plain
tensors, the current fast weights, and each update puts new tensors there. The copy runs the
model's own code on them, so that whatever reads a parameter sees the current one: the forward
pass, a submodule or another method that is called directly, hooks, closures, parametrizations,
modules that read the weights of their submodules (`nn.MultiheadAttention`), and `state_dict`. A
parameter that is used in several places is one fast weight. The user's model is never touched.
(`torch.func.functional_call` exchanges parameters too, but for the length of one call of the whole
model only.)

The classes are made from the model's: `isinstance(fmodel, MyModel)` holds.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from metarun.higher.fast_weights import FastWeights, python_modules
from metarun.higher.patched import PatchedModule, patched_class
from metarun.higher.twins import buffer_sync, copy_modules
from metarun.higher.utils import copy_tensor

__all__ = ["PatchedModule", "_MonkeyPatchBase", "buffer_sync", "make_functional", "monkeypatch"]

_MonkeyPatchBase = PatchedModule  # the name that code written for `higher` annotates with


class _Root(PatchedModule):
    """The outermost patched module, which users call `fmodel`."""

    def parameters(self, recurse: bool = True, time: int | None = None) -> Iterator[Any]:
        """The fast weights, as tensors, in the order of the model's `parameters()`.

        Args:
            recurse: False gives the module's own only, without its submodules'.
            time: 0 for the initial ones, k for those after the k-th update; None or -1 for the
                current ones.

        Raises:
            ValueError: there are none, or `time` asks for history that is not kept.
        """
        fast = self._weights()
        if not fast.history:
            raise ValueError("this patched module has no fast weights: call update_params first")
        if not fast.track and time not in (None, -1, 0):
            raise ValueError("only the latest fast weights are kept with track_higher_grads=False")
        try:
            params = fast.history[-1 if time is None else time]
        except IndexError:
            raise ValueError(f"time={time}: there were {len(fast.history) - 1} updates") from None
        return (p for p, name in zip(params, fast.names, strict=True) if recurse or "." not in name)

    @property
    def fast_params(self) -> list[Tensor] | None:
        """The current fast weights; None while there are none. Can be assigned to."""
        history = self._weights().history
        return history[-1] if history else None

    @fast_params.setter
    def fast_params(self, value: Iterable[Tensor]) -> None:
        self.update_params(value)

    @property
    def init_fast_params(self) -> list[Tensor]:
        """The initial fast weights.

        Raises:
            ValueError: they are not kept with track_higher_grads=False.
        """
        fast = self._weights()
        if not fast.track or not fast.history:
            raise ValueError("initial fast weights are only kept with track_higher_grads=True")
        return fast.history[0]

    def update_params(self, params: Iterable[Tensor]) -> None:
        """Make `params` the current fast weights.

        Args:
            params: one tensor a parameter, in the order of `parameters()`.

        Raises:
            ValueError: their number is wrong.
        """
        self._weights().update(params)

    def __deepcopy__(self, memo: dict[int, Any]) -> "PatchedModule":
        """A patched module that goes on from the same fast weights, independently.

        The tensors themselves are the same, so that derivatives reach what they came from.
        """
        twins = copy_modules(python_modules(self), {}, type)
        fast = self._weights()
        places = [
            [(twins.memo[id(c)], key) for c, key in places if id(c) in twins.memo]
            for places in fast.places
        ]
        copy = FastWeights(places, fast.names, fast.originals, fast.aliases)
        copy.go_on_from(fast)
        copy.attach(twins.modules)
        memo[id(self)] = twins.root
        return twins.root  # type: ignore[no-any-return]


def make_functional(
    module: nn.Module, encapsulator: Callable[[Any, nn.Module], None] | None = None
) -> Any:
    """A patched copy of a module, without fast weights yet: call it with `params=`.

    Args:
        module: any `nn.Module`; it is not changed.
        encapsulator: called as `encapsulator(fmodule, module)` before the copy is returned, to
            give it fast weights (`fmodule.update_params`) or buffers.

    Returns:
        The patched module, of a class that is made from the module's.

    Raises:
        ValueError: the module is patched, compiled, scripted or distributed already, has
            parameters without a shape, or keeps parameters in a tuple.

    Example:
        >>> import torch
        >>> from metarun.higher.patch import make_functional
        >>> fmodel = make_functional(torch.nn.Linear(2, 1, bias=False))
        >>> fmodel(torch.ones(2), params=[torch.tensor([[3.0, 4.0]])])
        tensor([7.])
    """
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"what is to be patched is no module, but of the class {type(module).__name__}: the "
            "module comes first, as in innerloop_ctx(model, optimizer)"
        )
    modules, params, buffers = _walk(module)
    _refuse_unfit(modules, params)

    def twin_class(part: nn.Module) -> type:
        kind: Any = type(part)
        return patched_class(kind, _Root if part is module else PatchedModule)

    twins = copy_modules(modules, params, twin_class)
    originals = {**params, **buffers}
    FastWeights(twins.places, list(params), originals, twins.aliases).attach(twins.modules)
    if encapsulator is not None:
        encapsulator(twins.root, module)
    return twins.root


def _walk(
    module: nn.Module,
) -> tuple[list[nn.Module], dict[str, nn.Parameter], dict[str, Tensor]]:
    """The modules of a tree, and its parameters and buffers by name, each once."""
    modules: list[nn.Module] = []
    params: dict[str, nn.Parameter] = {}
    buffers: dict[str, Tensor] = {}
    seen: set[int] = set()
    for prefix, part in module.named_modules():
        found: Any
        if isinstance(part, torch.jit.ScriptModule):
            for name, _ in (*part.named_parameters(prefix), *part.named_buffers(prefix)):
                raise ValueError(
                    f"{name} cannot be exchanged in a scripted module: patch the module that "
                    "torch.jit.script or torch.jit.trace was given"
                )
            continue  # a function, in effect, which the copy may share
        modules.append(part)
        for into, held in ((params, part._parameters), (buffers, part._buffers)):
            for key, found in held.items():
                if found is not None and id(found) not in seen:
                    seen.add(id(found))
                    into[f"{prefix}.{key}" if prefix else key] = found
    return modules, params, buffers


def _refuse_unfit(modules: list[nn.Module], params: dict[str, nn.Parameter]) -> None:
    for part in modules:
        if isinstance(part, PatchedModule):
            raise ValueError("the module is patched already")
        if "_orig_mod" in part._modules:
            raise ValueError("patch the module that torch.compile was given, not what it returned")
        if isinstance(part, nn.parallel.DistributedDataParallel) or (
            isinstance(part, nn.DataParallel) and len(getattr(part, "device_ids", ())) > 1
        ):
            raise ValueError(
                f"{type(part).__name__} copies parameters between devices, and does not know fast "
                "weights: patch the module that it wraps (model.module)"
            )
    for name, p in params.items():
        if is_lazy(p):
            raise ValueError(
                f"the parameter {name} has no shape yet: call the model once on an example before "
                "it is patched, and build the optimizer after that"
            )


def monkeypatch(
    module: nn.Module,
    device: torch.device | str | None = None,
    copy_initial_weights: bool = True,
    track_higher_grads: bool = True,
) -> Any:
    """A patched copy of a module whose initial fast weights are the module's parameters.

    Buffers (such as running statistics) are copied too, and carried on by the copy; the
    module's own stay as they are.

    Args:
        module: any `nn.Module`; it is not changed.
        device: where fast weights and buffers shall be; where the module's are, if None.
        copy_initial_weights: True starts from detached copies, so that no derivative reaches
            the module's parameters. False keeps that connection, as MAML needs it.
        track_higher_grads: True keeps the fast weights of all times and the derivatives through
            updates; False only the latest, detached, as for evaluation.

    Returns:
        The patched module, of a class that is made from the module's.

    Raises:
        ValueError: as `make_functional`.

    Example:
        >>> import torch
        >>> import metarun.higher as higher
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> fmodel = higher.monkeypatch(model, copy_initial_weights=False)
        >>> fmodel.update_params([2 * p for p in fmodel.parameters()])
        >>> torch.autograd.grad(fmodel(torch.ones(2)).sum(), model.weight)
        (tensor([[2., 2.]]),)
    """
    fmodule = make_functional(module)
    fmodule.track_higher_grads = track_higher_grads
    if device is not None:
        buffer_sync(module, fmodule, device)
    params = fmodule._weights().original_params()
    if copy_initial_weights:
        fmodule.update_params(copy_tensor(p, device) for p in params)
    else:
        fmodule.update_params(p.clone() if device is None else p.clone().to(device) for p in params)
    return fmodule
