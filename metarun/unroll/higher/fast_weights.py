"""The fast weights of a patched module, and the watch over the modules that they stand in."""

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metarun.unroll.higher.twins import Place

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
        originals: the original model's parameters and buffers by name.
        original_names: their names by id.
        watched: those of them that are not fast weights themselves.
    """

    def __init__(
        self, places: list[list[Place]], names: list[str], originals: dict[str, Tensor]
    ) -> None:
        self.places = places
        self.names = names
        self.history: list[list[Tensor]] = []
        self.track = True
        self.running = False
        self.originals = originals
        self.original_names = {id(x): name for name, x in originals.items()}
        self.watched: Sequence[Tensor] = list(originals.values())
        self._written: list[tuple[int, Any]] = []

    def attach(self, modules: Sequence[nn.Module]) -> None:
        """Make `modules`, the outermost one first, those that hold these weights."""
        self._root = weakref.ref(modules[0])  # a reference would be a cycle
        for module in modules:
            attributes = vars(module)
            attributes["_metarun"] = self
            attributes["_compiled_call_impl"] = None  # of the original's `compile()`
        own = {id(vars(module)["_parameters"]) for module in modules}
        self._flat = [
            (container, key, i, id(container) in own)
            for i, places in enumerate(self.places)
            for container, key in places
        ]
        _look(modules)

    def original_params(self) -> list[Tensor]:
        """The original model's parameters, in the order of the fast weights."""
        return [self.originals[name] for name in self.names]

    def go_on_from(self, other: "FastWeights") -> None:
        """Take over the history of another patched module, whose places hold it already."""
        self.history = [list(params) for params in other.history]
        self.track = other.track
        self._written = other._written
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
        self.check()
        self.place(params)
        if self.track:
            self.history.append(params)
        else:
            self.history[:] = [params]
        nodes = [p.grad_fn for p in params]
        self._written = [
            (0 if node is None else p._version, node) for p, node in zip(params, nodes, strict=True)
        ]
        given = set(map(id, params))
        if not given.isdisjoint(self.original_names):  # such as `params=model.parameters()`
            self.watched = [x for x in self.originals.values() if id(x) not in given]
        elif len(self.watched) != len(self.originals):
            self.watched = list(self.originals.values())

    def place(self, params: Sequence[Tensor]) -> None:
        """Put tensors where the fast weights stand."""
        for places, value in zip(self.places, params, strict=True):
            for container, key in places:
                container[key] = value

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
        if root is not None and not _is_as_it_was(root):
            self._adopt(root)
        if not self.history:
            return
        now = self.history[-1]
        for container, key, i, is_own in self._flat:
            try:
                found = container[key]
            except (KeyError, IndexError):
                found = None
            # Lists and dicts are the model's own affair, unless new weights are put there.
            if found is not now[i] and (is_own or _is_weight(found)):
                raise ValueError(
                    f"the fast weight {self.names[i]!r} was taken out of the patched module, or "
                    "another put in its place unseen. Assign it as an attribute (fmodel.layer."
                    "weight = tensor), give all of them to fmodel.update_params, or change the "
                    "model before it is patched"
                )
        for name, p, (version, node) in zip(self.names, now, self._written, strict=True):
            if node is not None and p._version != version and p.grad_fn is node:
                raise ValueError(
                    f"the fast weight {name!r} was written in place under torch.no_grad(), as "
                    "torch.nn.init does. Derivatives would be those of its old value. Assign a "
                    "new tensor instead: fmodel.layer.weight = tensor.requires_grad_()"
                )

    def _adopt(self, root: nn.Module) -> None:
        known = {(id(container), key) for container, key, _, _ in self._flat}
        for prefix, module in root.named_modules():
            for key, p in module._parameters.items():
                if p is not None and (id(module._parameters), key) not in known:
                    name = f"{prefix}.{key}" if prefix else key
                    raise ValueError(
                        f"the patched module has got a new parameter, {name!r}, which no step "
                        "would adapt. Change the model before it is patched (by innerloop_ctx or "
                        "monkeypatch), and build the optimizer from its parameters then"
                    )
        _look(python_modules(root))


def python_modules(root: nn.Module) -> list[nn.Module]:
    """A module and its submodules but scripted ones, whose attributes are not Python's."""
    return [part for part in root.modules() if not isinstance(part, torch.jit.ScriptModule)]


def _look(modules: Sequence[nn.Module]) -> None:
    """Note down in the outermost module what all of them look like."""
    tree: list[tuple[Any, ...]] = []
    for module in modules:
        attributes = vars(module)
        children, parameters = dict(attributes["_modules"]), attributes["_parameters"]
        empty = [key for key, p in parameters.items() if p is None]
        # In place of the outermost one's own attributes None: they would be a cycle.
        tree.append((attributes if tree else None, children, len(parameters), empty))
    vars(modules[0])[_TREE] = tree


def _is_as_it_was(root: nn.Module) -> bool:
    for attributes, children, parameters, empty in vars(root)[_TREE]:
        now = vars(root) if attributes is None else attributes
        if now["_modules"] != children or len(now["_parameters"]) != parameters:
            return False
        for key in empty:
            if now["_parameters"].get(key) is not None:
                return False
    return True


def _is_weight(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_leaf and value.requires_grad
