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
    index = {id(tensor): i for i, tensor in enumerate(tensors)}
    places: list[list[Place]] = [[] for _ in index]
    memo: dict[int, Any] = {}

    def fill(copy: Any, items: Iterable[tuple[Any, Any]]) -> Any:
        for key, value in items:
            if id(value) in index:
                places[index[id(value)]].append((copy, key))
            copy[key] = converted(value)
        return copy

    def converted(value: Any) -> Any:
        if id(value) in memo:
            return memo[id(value)]
        kind_of = type(value)
        if kind_of in (dict, OrderedDict):
            memo[id(value)] = kind_of()
            return fill(memo[id(value)], value.items())
        if kind_of is list:
            memo[id(value)] = [None] * len(value)
            return fill(memo[id(value)], enumerate(value))
        if kind_of in (tuple, set, frozenset):
            if any(id(item) in index for item in value):
                raise ValueError(
                    f"a module keeps parameters in a {kind_of.__name__}, where fast weights "
                    "cannot take their place; keep them in a list or a ParameterList"
                )
            return kind_of(converted(item) for item in value)
        if kind_of is MethodType:
            return MethodType(value.__func__, converted(value.__self__))
        if kind_of is functools.partial:
            arguments = [converted(a) for a in value.args]
            keywords = {k: converted(v) for k, v in value.keywords.items()}
            return functools.partial(converted(value.func), *arguments, **keywords)
        return value

    modules = list(root.modules())
    for module in modules:
        twin: Any = object.__new__(kind(module))
        memo[id(module)] = twin
        memo[id(vars(module))] = vars(twin)
        for buffer in module._buffers.values():
            if buffer is not None and id(buffer) not in memo:
                memo[id(buffer)] = buffer.detach().clone()
    for module in modules:
        fill(vars(memo[id(module)]), vars(module).items())
    return Twins(memo[id(root)], memo, places)


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
