"""Modules with exchangeable parameters: the fast weights of an inner loop.

A patched module is a structural copy of the user's model. Its parameters' places hold plain
tensors, the current fast weights, and each update puts new tensors there. The copy runs the
model's own code on them, so that whatever reads a parameter sees the current one: the forward
pass, a submodule or another method that is called directly, hooks, parametrizations, modules
that read the weights of their submodules (`nn.MultiheadAttention`), and `state_dict`. A
parameter that is used in several places is one fast weight. The user's model is never touched.
(`torch.func.functional_call` exchanges parameters too, but for the length of one call of the whole
model only.)

The classes are made from the model's: `isinstance(fmodel, MyModel)` holds.
"""

import functools
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from metarun.unroll.higher.guards import patched_call, without_cudnn
from metarun.unroll.higher.twins import Place, buffer_sync, copy_modules
from metarun.unroll.higher.utils import get_func_params

__all__ = ["PatchedModule", "_MonkeyPatchBase", "buffer_sync", "make_functional", "monkeypatch"]


class FastWeights:
    """The fast weights of a patched module, shared by all its submodules.

    Attributes:
        places: for each parameter, where in the modules it stands.
        names: the parameters' names, in the same order.
        history: the fast weights at each time; only the latest unless `track`.
        track: whether to keep the history, and derivatives through updates.
        running: whether a call of the module is under way.
    """

    def __init__(self, places: list[list[Place]], names: list[str]) -> None:
        self.places = places
        self.names = names
        self.history: list[list[Tensor]] = []
        self.track = True
        self.running = False

    def update(self, params: Iterable[Tensor]) -> None:
        """Make `params` the current fast weights."""
        params = list(params)
        if len(params) != len(self.places):
            raise ValueError(
                f"the model has {len(self.places)} parameters, not {len(params)}: "
                f"{', '.join(self.names)}"
            )
        if self.track:
            self.history.append(params)
        else:
            self.history[:] = [params]
        for places, value in zip(self.places, params, strict=True):
            for container, key in places:
                container[key] = value


class PatchedModule(nn.Module):
    """What all modules of a patched tree have in common. Not built directly."""

    _metarun: FastWeights | None = None  # None in what a patched nn.Sequential's slices return

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(super().__call__, args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, _NormBase) and self.training:
            # Updated in place, unseen by autograd, they would falsify the derivatives of what
            # was computed with them in evaluation mode.
            self._buffers.update(
                {k: b if b is None else b.clone() for k, b in self._buffers.items()}
            )
        with without_cudnn() if isinstance(self, nn.RNNBase) else nullcontext():
            return self._run(super().forward, args, kwargs)

    def _run(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        fast = self._metarun
        if fast is None or fast.running:
            return call(*args, **kwargs)
        params = kwargs.pop("params", None)
        if params is not None:
            fast.update(params)
        elif not fast.history:
            raise ValueError("this patched module has no fast weights: call it with params=")
        fast.running = True
        try:
            with patched_call(second_order=fast.track):
                return call(*args, **kwargs)
        finally:
            fast.running = False

    def __setattr__(self, name: str, value: Any) -> None:
        fast = self._metarun
        own = vars(self).get("_parameters", {})
        if fast is None or own.get(name) is None:
            super().__setattr__(name, value)
        elif not isinstance(value, Tensor):
            raise TypeError(f"the fast weight {name!r} must be a tensor, not {type(value)}")
        else:
            if not fast.history:
                raise ValueError("this patched module has no fast weights to replace one of")
            fast.update(
                value if any(c is own and key == name for c, key in places) else current
                for places, current in zip(fast.places, list(fast.history[-1]), strict=True)
            )

    @property
    def track_higher_grads(self) -> bool:
        """Whether the history of fast weights, and derivatives through it, are kept."""
        return self._weights().track

    @track_higher_grads.setter
    def track_higher_grads(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise ValueError(f"track_higher_grads is True or False, not {value!r}")
        self._weights().track = value

    def _weights(self) -> FastWeights:
        if self._metarun is None:
            raise ValueError("a slice of a patched module has no fast weights of its own")
        return self._metarun


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
        twins = copy_modules(self, (), type)
        fast = self._weights()
        places = [
            [(twins.memo[id(c)], key) for c, key in places if id(c) in twins.memo]
            for places in fast.places
        ]
        copy = FastWeights(places, fast.names)
        copy.history = [list(params) for params in fast.history]
        copy.track = fast.track
        _share(twins.root, copy)
        memo[id(self)] = twins.root
        return twins.root  # type: ignore[no-any-return]


def _share(root: nn.Module, fast: FastWeights) -> None:
    for module in root.modules():
        vars(module)["_metarun"] = fast
        vars(module)["_compiled_call_impl"] = None  # of the original's `compile()`


@functools.lru_cache(maxsize=256)
def _patched_class(kind: type, is_root: bool) -> type:
    base, prefix = (_Root, "Functional") if is_root else (PatchedModule, "InnerFunctional")
    namespace = {"__module__": kind.__module__, "__doc__": kind.__doc__}
    return types.new_class(
        prefix + kind.__name__, (base, kind), exec_body=lambda body: body.update(namespace)
    )


def make_functional(
    module: nn.Module, encapsulator: Callable[[Any, nn.Module], None] | None = None
) -> Any:
    """A patched copy of a module, without fast weights yet: call it with `params=`.

    Args:
        module: any `nn.Module`; it is not changed.
        encapsulator: called as `encapsulator(fmodule, module)` before the copy is returned, to
            give it fast weights (`fmodule.update_params`) or buffers.

    Raises:
        ValueError: the module is patched, compiled or scripted already, or keeps parameters in
            a tuple.
    """
    for part in module.modules():
        if isinstance(part, PatchedModule):
            raise ValueError("the module is patched already")
        if hasattr(part, "_orig_mod"):
            raise ValueError("patch the module that torch.compile was given, not what it returned")

    def twin_class(part: nn.Module) -> type:
        kind: Any = type(part)
        return _patched_class(kind, part is module)

    named = dict(module.named_parameters())
    twins = copy_modules(module, named.values(), twin_class)
    for name, places in zip(named, twins.places, strict=True):
        if not places:  # of a scripted module, which keeps them outside of Python
            raise ValueError(f"the parameter {name} cannot be exchanged in this kind of module")
    _share(twins.root, FastWeights(twins.places, list(named)))
    if encapsulator is not None:
        encapsulator(twins.root, module)
    return twins.root


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

    Raises:
        ValueError: as `make_functional`.
    """
    fmodule = make_functional(module)
    fmodule.track_higher_grads = track_higher_grads
    if device is not None:
        buffer_sync(module, fmodule, device)
    if copy_initial_weights:
        fmodule.update_params(get_func_params(module, device))
    else:
        fmodule.update_params(
            p.clone() if device is None else p.clone().to(device) for p in module.parameters()
        )
    return fmodule
