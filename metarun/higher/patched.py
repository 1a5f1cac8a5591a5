"""What all modules of a patched tree have in common, and their classes."""

import functools
import inspect
import types
from abc import ABCMeta
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from metarun.higher.fast_weights import FastWeights
from metarun.higher.guards import guarded_call, without_cudnn
from metarun.higher.originals import Watched
from metarun.unroll._torch import NormBase
from metarun.unroll.corrected.right_derivatives import RIGHT_MODULES, aside


class PatchedModule(nn.Module):
    """What all modules of a patched tree have in common. Not built directly, but by `monkeypatch`.

    The current fast weights, through which derivatives go, stand in its parameters' places.
    """

    _metarun: FastWeights | None = None  # None in what a patched nn.Sequential's slices return

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Nothing of what the user's class does here: keywords, a registry, a refusal."""

    def __setattr__(self, name: str, value: Any) -> None:
        fast = self._metarun
        own = vars(self).get("_parameters", {})
        if fast is None:
            super().__setattr__(name, value)
        elif own.get(name) is not None:
            if not isinstance(value, Tensor):
                raise TypeError(f"the fast weight {name!r} must be a tensor, not {type(value)}")
            if not fast.history:
                raise ValueError("this patched module has no fast weights to replace one of")
            if own[name].requires_grad and not value.requires_grad:
                raise ValueError(
                    f"no step would adapt the fast weight {name!r} any more, since the new tensor "
                    "does not require gradients: assign tensor.requires_grad_()"
                )
            fast.update(
                value if any(c is own and key == name for c, key in places) else current
                for places, current in zip(fast.places, list(fast.history[-1]), strict=True)
            )
        elif name in _SETTINGS:  # whatever the user's class may say of new attributes
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)
            if isinstance(value, nn.Module | nn.Parameter):
                fast.check()

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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What `to`, `double`, `cuda` … call: an update, which derivatives go through."""
        fast = self._weights()
        modules = list(self.modules()) if recurse else [self]
        inside = {id(module._parameters) for module in modules}
        params = fast.history[-1] if fast.history else []
        moved = [
            fn(p) if any(id(container) in inside for container, _ in places) else p
            for p, places in zip(params, fast.places, strict=bool(params))
        ]
        if not fast.track:
            moved = [
                p.detach().requires_grad_(was.requires_grad) if p is not was else p
                for p, was in zip(moved, params, strict=True)
            ]
        if any(p is not was for p, was in zip(moved, params, strict=True)):
            fast.update(moved)
        for module in modules:
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else fn(buffer)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Freeze fast weights that no update has made yet, or let them move again.

        Raises:
            ValueError: a fast weight to freeze depends on earlier ones.
        """
        for p in self.parameters():
            if p.requires_grad and not p.is_leaf and not requires_grad:
                raise ValueError(
                    "a fast weight that was computed from others cannot be frozen: freeze the "
                    "model's parameter before it is patched, or let grad_callback return None "
                    "for its gradient"
                )
            if p.is_leaf:
                p.requires_grad_(requires_grad)
        return self

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Give the values to new fast weights, which depend on nothing; the history stays.

        Args:
            state_dict, strict: as in torch.
            assign: of no effect. The values are copied.
        """
        fast = self._weights()
        if not fast.history:
            raise ValueError("this patched module has no fast weights to load values into")
        fast.check()
        before = fast.history[-1]
        loaded = [p.detach().clone().requires_grad_(p.requires_grad) for p in before]
        fast.place(loaded)
        try:
            return super().load_state_dict(state_dict, strict)
        finally:
            now = [new if new._version else p for new, p in zip(loaded, before, strict=True)]
            fast.place(before)
            fast.update(now)


_SETTINGS = {"track_higher_grads", "fast_params"}


def _with_fresh_statistics(forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.training:
            # Updated in place, unseen by autograd, they would falsify the derivatives of what
            # was computed with them in evaluation mode.
            self._buffers.update(
                {k: b if b is None else b.clone() for k, b in self._buffers.items()}
            )
        return forward(self, *args, **kwargs)

    return call


def _without_cudnn(forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with without_cudnn():
            return forward(self, *args, **kwargs)

    return call


def _guarded(
    fast: FastWeights, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    fast.check()
    names: Mapping[int, str] = fast.original_names
    given = _tensors(args[1:]) | _tensors(kwargs.values())
    if not given.isdisjoint(names):  # what the caller hands in is meant
        names = {key: name for key, name in names.items() if key not in given}
    fast.running = True
    try:
        watched = Watched(fast.watched, names, fast.current)
        return guarded_call(call, args, kwargs, fast.track, watched)
    finally:
        fast.running = False


def _tensors(values: Iterable[Any]) -> set[int]:
    """The ids of the tensors among arguments, and of those of modules among them."""
    found = set()
    for value in values:
        if isinstance(value, Tensor):
            found.add(id(value))
        elif isinstance(value, nn.Module):
            found.update(map(id, (*nn.Module.parameters(value), *value.buffers())))
        elif isinstance(value, list | tuple):
            found |= _tensors(value)
        elif isinstance(value, dict):
            found |= _tensors(value.values())
    return found


@functools.lru_cache(maxsize=256)
def patched_class(kind: Any, base: type[PatchedModule]) -> type:
    """The class of a patched module.

    Args:
        kind: the class of the original.
        base: `PatchedModule`, or that of the outermost module.

    Raises:
        ValueError: Python does not let a class be derived from `kind`.
    """
    name = ("InnerFunctional" if base is PatchedModule else "Functional") + kind.__name__
    forward: Any = kind.forward
    if issubclass(kind, NormBase):
        forward = _with_fresh_statistics(forward)
    if issubclass(kind, nn.RNNBase):
        forward = _without_cudnn(forward)
    if kind in RIGHT_MODULES:
        forward = aside(forward)
    plain = kind.__call__ is nn.Module.__call__  # then `_call_impl` is what it leads to
    namespace = {
        "__module__": kind.__module__,
        "__doc__": kind.__doc__,
        "__call__": _patched_call(nn.Module._call_impl if plain else kind.__call__),
        "forward": _patched_call(forward),
        **_guarded_methods(kind),
    }
    bases = (base, kind)
    try:
        if type(kind) in (type, ABCMeta):
            return types.new_class(name, bases, exec_body=lambda body: body.update(namespace))
        # A metaclass of the user's may ask for keywords, count classes, or refuse them.
        made: type = type.__new__(type(kind), name, bases, namespace)
        return made
    except TypeError as error:
        raise ValueError(
            f"{kind.__name__} cannot be patched, since Python derives no class from it: {error}"
        ) from error


def _patched_call(call: Callable[..., Any]) -> Callable[..., Any]:
    # A closure and not `super()`, for speed: every module of a model goes through two of these.
    def patched(self: PatchedModule, *args: Any, **kwargs: Any) -> Any:
        fast = self._metarun
        if fast is None or fast.running:
            return call(self, *args, **kwargs)
        params = kwargs.pop("params", None)
        if params is not None:
            fast.update(params)
        elif not fast.history:
            raise ValueError("this patched module has no fast weights: call it with params=")
        return _guarded(fast, call, (self, *args), kwargs)

    return patched


def _guarded_methods(kind: type) -> dict[str, Any]:
    """The methods that users may call directly in place of `forward`, such as `encode`."""
    methods = {}
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        for name in vars(base).keys() - vars(nn.Module).keys():
            method = inspect.getattr_static(kind, name)
            if isinstance(method, types.FunctionType) and not name.startswith("_"):
                methods[name] = _guarded_method(method)
    return methods


def _guarded_method(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: PatchedModule, *args: Any, **kwargs: Any) -> Any:
        fast = self._metarun
        if fast is None or fast.running or not fast.history:
            return method(self, *args, **kwargs)
        return _guarded(fast, method, (self, *args), kwargs)

    return call
