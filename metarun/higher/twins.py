"""Copying a tree of modules so that its parameters can be exchanged from outside."""

import functools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import CellType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metarun.higher.utils import copy_tensor
from metarun.unroll.effects.surroundings import is_filled

Place = tuple[Any, Any]
"""A dict or list and the key in it."""

_CONSTANTS = {type(None), bool, int, float, str, type, torch.dtype, torch.device, torch.Size}
"""Classes of values that lead nowhere: most attributes of most modules."""

_OF_EVERY_MODULE = {
    key: type(value)
    for key, value in vars(nn.Module()).items()
    if type(value) in (dict, OrderedDict, set)
}
"""The containers of `nn.Module`: hooks, parameters, submodules."""


class Twins(NamedTuple):
    """A copied tree of modules.

    Attributes:
        root: the copy.
        modules: the copies of the module and of all submodules, each once.
        memo: what became of each module, buffer and container, by the original's id.
        places: for each of the tensors asked for, where the copy holds it.
        aliases: tensors of the original that share memory with one of those asked for, and its
            name: views, `.data`, entries of a `state_dict()`. The copy holds them too.
    """

    root: Any
    modules: list[Any]
    memo: dict[int, Any]
    places: list[list[Place]]
    aliases: list[tuple[Tensor, str]]


def copy_modules(
    modules: Sequence[nn.Module], tensors: Mapping[str, Tensor], kind: Callable[[nn.Module], type]
) -> Twins:
    """Copy a module and its submodules, so that nothing of the copy leads back to the original.

    Buffers are cloned. Lists and dicts are copied. Modules, buffers and methods bound to modules
    are those of the copy, also where they stand in lists, dicts, tuples, sets, weak references,
    `functools.partial`, or in the closure or the defaults of a function. A function that leads
    to a module is copied for that. Hooks are such functions. All other attributes are the
    original's own objects.

    Args:
        modules: the module and all its submodules, each once.
        tensors: the parameters by name. The copy keeps the same tensors, and their places are
            returned: in a module's parameters, or in lists and dicts that a module keeps besides.
        kind: gives the class of the copy of a module.

    Raises:
        ValueError: a parameter in a tuple or set, where it cannot be exchanged.
    """
    copier = _Copier(tensors)
    copies = [copier.add(module, kind(module)) for module in modules]
    for module, twin in zip(modules, copies, strict=True):
        copier.fill_module(vars(twin), vars(module))
        kind_of: Any = type(module)
        for slot in _slots(kind_of):
            if hasattr(module, slot):
                object.__setattr__(twin, slot, copier.copied(getattr(module, slot)))
    return Twins(copies[0], copies, copier.memo, copier.places, copier.aliases)


class _Copier:  # a class, since functions that call each other would be a cycle that holds memory
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.names = list(tensors)
        self.index = {id(tensor): i for i, tensor in enumerate(tensors.values())}
        self.places: list[list[Place]] = [[] for _ in self.index]
        self.memo: dict[int, Any] = {}
        self.aliases: list[tuple[Tensor, str]] = []
        self._tensors = tensors

    @functools.cached_property
    def names_by_memory(self) -> dict[int, str]:
        """The names of the tensors that may change, by where their numbers are."""
        may_change = ((name, x) for name, x in self._tensors.items() if x.requires_grad)
        return {place: name for name, x in may_change if (place := _memory(x))}

    def alias(self, value: Tensor) -> str | None:
        """The name of the tensor whose numbers these are too."""
        return self.names_by_memory.get(_memory(value)) if id(value) not in self.index else None

    def add(self, module: nn.Module, kind: type) -> Any:
        """An empty copy of the module, and copies of its buffers."""
        twin: Any = object.__new__(kind)
        self.memo[id(module)] = twin
        self.memo[id(vars(module))] = vars(twin)
        for buffer in module._buffers.values():
            if buffer is not None and id(buffer) not in self.memo:
                if name := self.alias(buffer):
                    self.memo[id(buffer)] = buffer
                    self.aliases.append((buffer, name))
                else:
                    self.memo[id(buffer)] = buffer.detach().clone()
        return twin

    def fill_module(self, copy: dict[str, Any], given: dict[str, Any]) -> None:
        """Put copies of a module's attributes into its twin's, most of them without a look."""
        copy.update(given)
        for key, empty in _worth_a_look(tuple(given), tuple(map(type, given.values()))):
            value = given[key]
            if empty is not None and not value:  # most hooks
                copy[key] = empty()
            else:
                self.put(copy, key, value)

    def fill(self, copy: dict[Any, Any], given: dict[Any, Any]) -> dict[Any, Any]:
        """Put copies of a dict's values into another dict."""
        copy.update(given)
        for key, value in given.items():
            if type(value) not in _CONSTANTS:
                self.put(copy, key, value)
        return copy

    def put(self, copy: dict[Any, Any], key: Any, value: Any) -> None:
        """Put the copy of a value into a dict or list."""
        number = id(value)
        if number in self.index:
            self.places[self.index[number]].append((copy, key))
            copy[key] = value
        else:
            copy[key] = self.memo[number] if number in self.memo else self.copied(value)

    def copied(self, value: Any) -> Any:
        """What the copy has in place of a value."""
        if id(value) in self.memo:
            return self.memo[id(value)]
        if isinstance(value, Tensor):
            if name := self.alias(value):
                self.aliases.append((value, name))
            return value
        kind = type(value)
        if kind in (dict, OrderedDict):
            self.memo[id(value)] = kind()
            return self.fill(self.memo[id(value)], value)
        if kind is list:
            copy = self.memo[id(value)] = list(value)
            for i, item in enumerate(value):
                if id(item) in self.index:
                    self.places[self.index[id(item)]].append((copy, i))
                copy[i] = self.copied(item)
            return copy
        if kind in (tuple, set, frozenset):
            for item in value:
                if id(item) in self.index:
                    raise ValueError(
                        f"a module keeps parameters in a {kind.__name__} (or in the defaults of a "
                        f"function): {self.names[self.index[id(item)]]!r}, where no fast weight "
                        "can take its place; keep them in a list or a ParameterList"
                    )
            return kind(self.copied(item) for item in value)
        if kind is MethodType:
            return self.method(value)
        if kind is functools.partial:
            partial = functools.partial(self.copied(value.func), *self.copied(value.args))
            self.fill(partial.keywords, value.keywords)
            return partial
        if kind is weakref.ref:
            return weakref.ref(self.copied(value())) if self.leads(value) else value
        if kind is FunctionType:
            return self.function(value) if self.leads(value) else value
        return value

    def method(self, given: MethodType) -> MethodType:
        """The same method of what became of the object."""
        function, owner = given.__func__, given.__self__
        twin = self.copied(owner)
        if twin is not owner and getattr(type(owner), function.__name__, None) is function:
            return MethodType(getattr(type(twin), function.__name__), twin)
        return MethodType(self.copied(function), twin)

    def function(self, given: FunctionType) -> FunctionType:
        """A function with the same code on what became of what it closes over."""
        cells = tuple(map(self.cell, given.__closure__ or ()))
        copy = FunctionType(given.__code__, given.__globals__, given.__name__, None, cells)
        self.memo[id(given)] = copy  # by now, since a function may close over itself
        for cell, copied in zip(given.__closure__ or (), cells, strict=True):
            if copied is not cell and not is_filled(copied):
                copied.cell_contents = self.copied(cell.cell_contents)
        copy.__defaults__ = self.copied(given.__defaults__)
        copy.__kwdefaults__ = self.copied(given.__kwdefaults__)
        copy.__qualname__, copy.__doc__ = given.__qualname__, given.__doc__
        copy.__module__, copy.__annotations__ = given.__module__, given.__annotations__
        vars(copy).update({key: self.copied(value) for key, value in vars(given).items()})
        return copy

    def cell(self, given: CellType) -> CellType:
        """An empty cell where the contents will be others; one for all functions that share it."""
        if id(given) not in self.memo and self.leads(given):
            self.memo[id(given)] = CellType()
        return self.memo.get(id(given), given)  # type: ignore[no-any-return]

    def leads(self, value: Any, seen: set[int] | None = None) -> bool:
        """Whether a value leads to a module, buffer or parameter of the original."""
        seen = set() if seen is None else seen
        if type(value) in _CONSTANTS or id(value) in seen:
            return False
        if id(value) in self.memo or id(value) in self.index:
            return True
        if isinstance(value, Tensor):
            return self.alias(value) is not None
        seen.add(id(value))
        return any(self.leads(item, seen) for item in _behind(value))


@functools.lru_cache(maxsize=1024)
def _worth_a_look(
    keys: tuple[str, ...], kinds: tuple[type, ...]
) -> tuple[tuple[str, type | None], ...]:
    """The attributes of a module that its twin cannot share, by their names and classes.

    Beside each name stands the class of what the twin has where the attribute is empty: for the
    containers that every module has.
    """
    return tuple(
        (key, kind if _OF_EVERY_MODULE.get(key) is kind else None)
        for key, kind in zip(keys, kinds, strict=True)
        if kind not in _CONSTANTS
    )


def _memory(x: Tensor) -> int:
    """Where a tensor's numbers are; 0 where that cannot be said."""
    try:
        return x.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # of a kind that has no storage
        return 0


def _behind(value: Any) -> Iterable[Any]:
    """The values that a value of one of the copied kinds leads to."""
    kind = type(value)
    if kind in (dict, OrderedDict):
        return value.values()  # type: ignore[no-any-return]
    if kind in (list, tuple, set, frozenset):
        return value  # type: ignore[no-any-return]
    if kind is MethodType:
        return (value.__func__, value.__self__)
    if kind is functools.partial:
        return (value.func, value.args, value.keywords)
    if kind is weakref.ref:
        return (value(),)
    if kind is CellType:
        return (value.cell_contents,) if is_filled(value) else ()
    if kind is FunctionType:
        return (*(value.__closure__ or ()), value.__defaults__, value.__kwdefaults__)
    return ()


@functools.lru_cache(maxsize=256)
def _slots(kind: type) -> tuple[str, ...]:
    """The attributes of a class that are not in its instances' `__dict__`."""
    names: list[str] = []
    for base in kind.__mro__:
        given = vars(base).get("__slots__", ())
        for name in (given,) if isinstance(given, str) else given:
            private = name.startswith("__") and not name.endswith("__")
            names.append(f"_{base.__name__.lstrip('_')}{name}" if private else name)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def buffer_sync(
    module: nn.Module, fmodule: nn.Module, device: torch.device | str | None = None
) -> None:
    """Copy the buffers of `module` to `fmodule`, detached.

    With the arguments exchanged it brings the running statistics of an inner loop back to the
    model.

    Args:
        module: the source.
        fmodule: a module with the same submodules.
        device: where the copies shall be; where the source's are, if None.

    Raises:
        KeyError: `fmodule` lacks a submodule.

    Example:
        >>> import torch
        >>> from metarun.higher.patch import buffer_sync, monkeypatch
        >>> model = torch.nn.BatchNorm1d(1)
        >>> fmodel = monkeypatch(model)
        >>> _ = fmodel(torch.tensor([[8.0], [12.0]]))
        >>> model.running_mean
        tensor([0.])
        >>> buffer_sync(fmodel, model)
        >>> model.running_mean
        tensor([1.])
    """
    for name, buffer in module._buffers.items():
        fmodule._buffers[name] = None if buffer is None else copy_tensor(buffer.detach(), device)
    for name, child in module._modules.items():
        if name not in fmodule._modules:
            raise KeyError(f"{type(fmodule).__name__} has no submodule {name!r} to copy to")
        other = fmodule._modules[name]
        if child is not None and other is not None:
            buffer_sync(child, other, device)
