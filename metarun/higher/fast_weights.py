"""The fast weights of a patched module, and the watch over the modules that they stand in."""

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metarun.higher.twins import Place

_TREE = "_metarun_tree"
"""The attribute of a root that says what its modules looked like."""


class FastWeights:
    """The fast weights of a patched module, shared by all its submodules.

    Attributes:
        places: for each parameter, where in the modules it stands.
        names: the parameters' names, in the same order.
        history: the fast weights at each time; only the latest unless `track`.
        track: whether to keep the history, and derivatives through updates.
        running: whether a call of the module is under way.
        kinds: the classes of the modules.
        originals: the original model's parameters and buffers by name.
        aliases: tensors that share memory with one of them, and its name.
        original_names: their names by id.
        watched: those of them that are not fast weights themselves.
    """

    def __init__(
        self,
        places: list[list[Place]],
        names: list[str],
        originals: dict[str, Tensor],
        aliases: Sequence[tuple[Tensor, str]] = (),
    ) -> None:
        self.places = places
        self.names = names
        self.history: list[list[Tensor]] = []
        self.track = True
        self.running = False
        self.kinds: tuple[type, ...] = ()
        self.originals = originals
        self.aliases = aliases
        self.original_names = {id(x): name for name, x in originals.items()}
        self.original_names |= {id(x): name for x, name in aliases}
        self._all = list(
            {id(x): x for x in (*originals.values(), *(x for x, _ in aliases))}.values()
        )
        self.watched: Sequence[Tensor] = self._all
        self._ids: list[tuple[int, ...]] = []  # of the parameters of each module
        self._placed: tuple[int, ...] = ()  # of the fast weights themselves
        self._computed: list[tuple[str, Tensor, Any]] = []  # fast weights that have a graph
        self._versions: list[int] = []

    def attach(self, modules: Sequence[nn.Module]) -> None:
        """Make `modules`, the outermost one first, those that hold these weights."""
        self._root = weakref.ref(modules[0])  # a reference would be a cycle
        self.kinds = tuple(map(type, modules))
        for module in modules:
            attributes = vars(module)
            attributes["_metarun"] = self
            attributes["_compiled_call_impl"] = None  # of the original's `compile()`
        self._look(modules)

    def original_params(self) -> list[Tensor]:
        """The original model's parameters, in the order of the fast weights."""
        return [self.originals[name] for name in self.names]

    def go_on_from(self, other: "FastWeights") -> None:
        """Take over the history of another patched module, whose places hold it already."""
        self.history = [list(params) for params in other.history]
        self._placed = other._placed
        self.track = other.track
        self._computed, self._versions = other._computed, other._versions
        self.watched = other.watched

    def update(self, params: Iterable[Tensor]) -> None:
        """Make `params` the current fast weights.

        Raises:
            ValueError: their number is wrong, or as `check`.
        """
        params = list(params)
        if len(params) != len(self.places):
            raise ValueError(
                f"the model has {len(self.places)} parameters, not {len(params)}: "
                f"{', '.join(self.names)}"
            )
        if self.history:  # else nobody has had the modules yet
            self.check()
        self.place(params)
        if self.track:
            self.history.append(params)
        else:
            self.history[:] = [params]
        self._computed = [
            (name, p, node)
            for name, p in zip(self.names, params, strict=True)
            if (node := p.grad_fn) is not None
        ]
        self._versions = [p._version for _, p, _ in self._computed]
        given = set(map(id, params))
        if not given.isdisjoint(self.original_names):  # such as `params=model.parameters()`
            self.watched = [x for x in self._all if id(x) not in given]
        else:
            self.watched = self._all

    def place(self, params: Sequence[Tensor]) -> None:
        """Put tensors where the fast weights stand."""
        for places, value in zip(self.places, params, strict=True):
            for container, key in places:
                container[key] = value
        self._ids = [tuple(map(id, own.values())) for own in self._own]
        self._placed = tuple(map(id, params))

    def current(self, name: str) -> Tensor | None:
        """What the patched module has in place of the original's parameter or buffer."""
        if name in self.names:
            return self.history[-1][self.names.index(name)]
        root = self._root()
        try:
            return None if root is None else root.get_buffer(name)
        except AttributeError:
            return None

    def check(self) -> None:
        """Find out whether the modules still hold the fast weights, and no other parameters.

        Modules without parameters may be exchanged, and any module may be left out.

        Raises:
            ValueError: they do not; a step would not adapt what the module computes with.
        """
        root = self._root()
        if root is not None and not self._is_as_it_was(root):
            self._find_change(root)
        if [p._version for _, p, _ in self._computed] != self._versions:
            self._find_writing()

    def _look(self, modules: Sequence[nn.Module]) -> None:
        """Note down what the modules look like."""
        self._own = [vars(module)["_parameters"] for module in modules]
        self._ids = [tuple(map(id, own.values())) for own in self._own]
        own = set(map(id, self._own))
        # Lists and dicts are the model's own affair, unless new weights are put there.
        self._elsewhere = [
            (container, key, i)
            for i, places in enumerate(self.places)
            for container, key in places
            if id(container) not in own
        ]
        # In the outermost module, and without its own attributes, since references from here
        # would be cycles.
        vars(modules[0])[_TREE] = [
            (None if module is modules[0] else vars(module), dict(module._modules))
            for module in modules
        ]

    def _is_as_it_was(self, root: nn.Module) -> bool:
        attributes = vars(root)
        for (given, children), ids in zip(attributes[_TREE], self._ids, strict=True):
            now = given or attributes
            if now["_modules"] != children or tuple(map(id, now["_parameters"].values())) != ids:
                return False
        if self.history and tuple(map(id, self.history[-1])) != self._placed:
            return False  # the list that `fast_params` gave was written on
        if self._elsewhere and self.history:
            return not any(
                _is_weight(found := _at(container, key)) and found is not self.history[-1][i]
                for container, key, i in self._elsewhere
            )
        return True

    def _find_change(self, root: nn.Module) -> None:
        modules = python_modules(root)
        own = {id(module._parameters) for module in modules} | set(map(id, self._own))
        known = {(id(container), key) for places in self.places for container, key in places}
        for prefix, module in root.named_modules():
            for key, p in module._parameters.items():
                if p is not None and (id(module._parameters), key) not in known:
                    name = f"{prefix}.{key}" if prefix else key
                    raise ValueError(
                        f"the patched module has got a new parameter, {name!r}, which no step "
                        "would adapt. Change the model before it is patched (by innerloop_ctx or "
                        "monkeypatch), and build the optimizer from its parameters then"
                    )
        now = self.history[-1] if self.history else self.original_params()
        for name, places, value in zip(self.names, self.places, now, strict=True):
            for container, key in places:
                found = _at(container, key)
                if found is not value and (id(container) in own or _is_weight(found)):
                    raise ValueError(
                        f"the fast weight {name!r} was taken out of the patched module, or another "
                        "put in its place unseen. Assign it as an attribute (fmodel.layer.weight = "
                        "tensor), give all of them to fmodel.update_params, or change the model "
                        "before it is patched"
                    )
        self._look(modules)

    def _find_writing(self) -> None:
        for (name, p, node), version in zip(self._computed, self._versions, strict=True):
            if self.track and p._version != version and p.grad_fn is node:
                raise ValueError(
                    f"the fast weight {name!r} was written in place under torch.no_grad(), as "
                    "torch.nn.init does. Derivatives would be those of its old value. Assign a "
                    "new tensor instead: fmodel.layer.weight = tensor.requires_grad_()"
                )


def python_modules(root: nn.Module) -> list[nn.Module]:
    """A module and its submodules but scripted ones, whose attributes are not Python's."""
    return [part for part in root.modules() if not isinstance(part, torch.jit.ScriptModule)]


def _at(container: Any, key: Any) -> Any:
    try:
        return container[key]
    except (KeyError, IndexError):
        return None


def _is_weight(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_leaf and value.requires_grad
