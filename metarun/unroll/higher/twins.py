"""Copying a tree of modules so that its parameters can be exchanged from outside."""

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metarun.unroll.higher.utils import copy_tensor

Place = tuple[Any, Any]
"""A dict or list and the key in it."""


class Twins(NamedTuple):
    """A copied tree of modules.

    Attributes:
        root: the copy.
        memo: what became of each module, buffer and container, by the original's id.
        places: for each of the tensors asked for, where the copy holds it.
    """

    root: Any
    memo: dict[int, Any]
    places: list[list[Place]]


def copy_modules(
    root: nn.Module, tensors: Iterable[Tensor], kind: Callable[[nn.Module], type]
) -> Twins:
    """Copy a module and its submodules; nothing of the copy leads back to the original.

    Buffers are cloned. Hooks and other attributes are the original's own objects, except that
    lists and dicts are copied, and that modules, buffers and methods bound to modules are those
    of the copy, also where they stand in lists, dicts, tuples, sets or `functools.partial`.

    Args:
        root: the module.
        tensors: the parameters. The copy keeps the same tensors, and their places are returned:
            in a module's parameters, or in lists and dicts that a module keeps besides.
        kind: gives the class of the copy of a module.

    Raises:
        ValueError: a parameter in a tuple or set, where it cannot be exchanged.
    """
    copier = _Copier(tensors)
    for module in root.modules():
        copier.add(module, kind(module))
    for module in root.modules():
        copier.fill(copier.memo[id(vars(module))], vars(module).items())
    return Twins(copier.memo[id(root)], copier.memo, copier.places)


class _Copier:  # a class, since functions that call each other would be a cycle that holds memory
    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.index = {id(tensor): i for i, tensor in enumerate(tensors)}
        self.places: list[list[Place]] = [[] for _ in self.index]
        self.memo: dict[int, Any] = {}

    def add(self, module: nn.Module, kind: type) -> None:
        """An empty copy of the module, and copies of its buffers."""
        twin: Any = object.__new__(kind)
        self.memo[id(module)] = twin
        self.memo[id(vars(module))] = vars(twin)
        for buffer in module._buffers.values():
            if buffer is not None and id(buffer) not in self.memo:
                self.memo[id(buffer)] = buffer.detach().clone()

    def fill(self, copy: Any, items: Iterable[tuple[Any, Any]]) -> Any:
        for key, value in items:
            if id(value) in self.index:
                self.places[self.index[id(value)]].append((copy, key))
            copy[key] = self.copied(value)
        return copy

    def copied(self, value: Any) -> Any:
        if id(value) in self.memo:
            return self.memo[id(value)]
        kind = type(value)
        if kind in (dict, OrderedDict):
            self.memo[id(value)] = kind()
            return self.fill(self.memo[id(value)], value.items())
        if kind is list:
            self.memo[id(value)] = [None] * len(value)
            return self.fill(self.memo[id(value)], enumerate(value))
        if kind in (tuple, set, frozenset):
            if any(id(item) in self.index for item in value):
                raise ValueError(
                    f"a module keeps parameters in a {kind.__name__}, where fast weights "
                    "cannot take their place; keep them in a list or a ParameterList"
                )
            return kind(self.copied(item) for item in value)
        if kind is MethodType:
            return MethodType(value.__func__, self.copied(value.__self__))
        if kind is functools.partial:
            arguments = [self.copied(a) for a in value.args]
            keywords = {key: self.copied(a) for key, a in value.keywords.items()}
            return functools.partial(self.copied(value.func), *arguments, **keywords)
        return value


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
    """
    for name, buffer in module._buffers.items():
        fmodule._buffers[name] = None if buffer is None else copy_tensor(buffer.detach(), device)
    for name, child in module._modules.items():
        if name not in fmodule._modules:
            raise KeyError(f"{type(fmodule).__name__} has no submodule {name!r} to copy to")
        other = fmodule._modules[name]
        if child is not None and other is not None:
            buffer_sync(child, other, device)
