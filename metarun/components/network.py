"""What of a network is neither learned nor drawn anew: its buffers and its frozen parameters.

Learned parameters are passed to a network from outside (`torch.func.functional_call`). Buffers and
frozen parameters are the network's own. They are part of a run's state all the same: checkpoints
hold them, and who restores a checkpoint puts them back. Whether torch would keep a buffer in a
`state_dict` (`persistent`) makes no difference here, since a run must go on with the same bits.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from metarun.errors import ConfigError
from metarun.system.archive import DTYPES
from metarun.unroll._torch import pytree
from metarun.unroll.gradients.recompute import unwrapped

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class _Slot(NamedTuple):
    """Where a buffer is, and the tensor that was there when the network was built."""

    holder: dict[str, Any]
    key: str
    original: Tensor | None


def _is_constant(value: Any) -> bool:
    """Whether an attribute of a module is a tensor that a checkpoint can hold."""
    return (
        type(value) is Tensor
        and not value.requires_grad
        and value.layout is torch.strided
        and value.dtype in DTYPES
    )


class Network:
    """A network's buffers and frozen parameters, to be read and put back.

    Tensors in plain attributes of its modules (`self.projection = torch.randn(3, 4)`) are buffers
    as well.

    Attributes:
        frozen: parameters that the network was built with `requires_grad=False`, by name.
        changing: names of the buffers that training changes; what a run does about them is in
            `metarun.training.buffers`. All other buffers are constants of the run.
    """

    def __init__(self, model: nn.Module) -> None:
        self.frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        self.changing: tuple[str, ...] = ()
        self._slots = {
            f"{prefix}.{key}" if prefix else key: _Slot(holder, key, value)
            for prefix, module in model.named_modules()
            # Hooks before each call make attributes anew (nn.utils.spectral_norm): no state.
            for holder in (module._buffers, {} if module._forward_pre_hooks else vars(module))
            for key, value in holder.items()
            if holder is module._buffers or _is_constant(value)
        }
        self._constants = self.buffers()

    @property
    def buffered(self) -> bool:
        """Whether there are buffers, also ones that are None for the time being."""
        return bool(self._slots)

    def buffers(self) -> dict[str, Tensor]:
        """Copies of the buffers by name, without those that are None."""
        found = {name: slot.holder.get(slot.key) for name, slot in self._slots.items()}
        return {name: _plain(value) for name, value in found.items() if value is not None}

    def frozen_values(self) -> dict[str, Tensor]:
        """Copies of the frozen parameters by name."""
        return {name: _plain(p) for name, p in self.frozen.items()}

    def put(
        self, buffers: Mapping[str, Tensor], frozen: Mapping[str, Tensor] | None = None
    ) -> None:
        """Put values back, into the tensors that the network was built with where they fit.

        Args:
            buffers: by name, on the network's device; those that are missing become None.
            frozen: some of the frozen parameters, likewise.
        """
        for name, slot in self._slots.items():
            slot.holder[slot.key] = _filled(slot.original, buffers.get(name))
        for name, value in (frozen or {}).items():
            self.frozen[name].data = _filled(self.frozen[name].data, value)
        if not self.changing:
            self._constants = self.buffers()

    def changed(self) -> tuple[str, ...]:
        """Names of the buffers that differ from what was there at first, or was put back last."""
        now, before = self.buffers(), self._constants
        return tuple(name for name in self._slots if not _same(now.get(name), before.get(name)))

    def with_graph(self) -> tuple[str, ...]:
        """Names of the buffers that hold a result with its graph, and not just its value."""
        found = {name: slot.holder.get(slot.key) for name, slot in self._slots.items()}
        return tuple(n for n, v in found.items() if v is not None and unwrapped(v).requires_grad)

    def settle(self) -> None:
        """Take what the last meta-step has left in the buffers as their values.

        A checkpoint holds the same values, so a run that goes on from one has the same tensors.
        """
        if self.changing:
            self.put(self.buffers())


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """The model's buffers after the block are those of before."""
    network = Network(model)
    before = network.buffers()
    try:
        yield
    finally:
        network.put(before)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """A look at a model: its tensors, its attributes and the random state are those of before.

    Of attributes this is what is assigned to them; what is changed within a list, say, stays.
    """
    modules = list(model.modules())
    attributes = [dict(vars(module)) for module in modules]
    # In a module that has two names `functional_call` leaves what it was given (torch 2.14).
    parameters = [dict(module._parameters) for module in modules]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with kept(model), torch.random.fork_rng(sorted(devices)):
        try:
            yield
        finally:
            for module, values, own in zip(modules, attributes, parameters, strict=True):
                vars(module).clear()
                vars(module).update(values)
                module._parameters.update(own)


def refuse_lost_state(model: nn.Module) -> None:
    """Refuse what could be neither learned nor kept, or what would not be learned silently.

    Raises:
        ConfigError: names the parameter, the buffer or the attribute.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in tensors.items():
        if is_lazy(tensor):
            raise ConfigError(
                f"{name} of the backbone has no size yet: give its layer all sizes in the place "
                "of a lazy one (nn.Linear, say, for nn.LazyLinear)"
            )
    for name, buffer in model.named_buffers():
        if buffer.requires_grad:
            raise ConfigError(
                f"the buffer {name} of the backbone requires gradients, but buffers are not "
                "learned: make it an nn.Parameter, or detach it"
            )
    kept_so = {name: t for name, t in tensors.items() if not t.requires_grad}
    for name, value in kept_so.items():
        if value.layout is not torch.strided or value.dtype not in DTYPES:
            raise ConfigError(
                f"{name} of the backbone has the type {value.dtype} and the layout {value.layout}, "
                "which checkpoints cannot hold: use a dense tensor of an ordinary type"
            )
    for name, part in model.named_modules():
        if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.sparse:
            raise ConfigError(
                f"{name or 'the backbone'} has sparse gradients, which cannot be added up over "
                "tasks: build it with sparse=False"
            )
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("the backbone has no parameter that could be learned")
    for name in _unregistered(model):
        raise ConfigError(
            f"{name} of the backbone requires gradients, but is no parameter that torch knows of, "
            "so it would never be learned: use nn.Parameter, nn.ParameterList or nn.ModuleList, or "
            "requires_grad_(False) for what is to stay as it is"
        )


def refuse_kept_results(model: nn.Module, input_shape: Sequence[int]) -> None:
    """Refuse a network that keeps what it has computed of its first data in an attribute.

    Whether it does is seen from calls with two inputs. A mask that is built at the first call and
    is the same for both may be kept.

    Args:
        input_shape: of one example.

    Raises:
        ConfigError: names the attribute.
    """
    p = next(model.parameters())
    numbers = torch.linspace(-1, 1, 4 * math.prod(input_shape), dtype=p.dtype, device=p.device)
    x = numbers.reshape(4, *input_shape)
    first = _kept_results(model, x)
    second = _kept_results(model, x.cos()) if first else {}
    for name, value in first.items():
        if name in second and not _same(value, second[name]):
            raise ConfigError(
                f"the backbone keeps in {name} what it computes of the first data that it sees, so "
                "its results depend on what was computed before: compute it anew at each call, or "
                "register it as a buffer that has a value from the beginning"
            )


def _kept_results(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The tensors that a call leaves in attributes of the modules; they are taken back."""
    modules = dict(model.named_modules())
    before = {name: dict(vars(module)) for name, module in modules.items()}
    with untouched(model):
        try:
            with torch.no_grad():
                model(x)
        except Exception:  # which whatever calls the model next will meet
            return {}
        return {
            f"{name}.{key}" if name else key: _plain(value)
            for name, module in modules.items()
            for key, value in vars(module).items()
            if type(value) is Tensor and not isinstance(before[name].get(key), Tensor)
        }


def _unregistered(model: nn.Module) -> Iterator[str]:
    """Attributes with what requires gradients but is not among the model's parameters."""
    parameters = {id(p) for p in model.parameters()}
    modules = {id(module) for module in model.modules()}
    for prefix, module in model.named_modules():
        for key, value in vars(module).items():
            leaves = [] if key in _OF_EVERY_MODULE else pytree.tree_leaves(value)
            for leaf in leaves:
                if isinstance(leaf, nn.Module) and id(leaf) not in modules:
                    lost = any(
                        p.requires_grad and id(p) not in parameters for p in leaf.parameters()
                    )
                else:
                    lost = (
                        isinstance(leaf, Tensor)
                        and leaf.is_leaf
                        and leaf.requires_grad
                        and id(leaf) not in parameters
                    )
                if lost:
                    yield f"{prefix}.{key}" if prefix else key


def _plain(value: Tensor) -> Tensor:
    """A copy of the values, with memory of its own."""
    value = unwrapped(value).detach().resolve_conj().resolve_neg()
    return value.clone(memory_format=torch.contiguous_format)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def _filled(target: Tensor | None, value: Tensor | None) -> Any:
    """The target with these values; a new tensor where it cannot hold them."""
    if value is None:
        return None
    if target is None or (target.shape, target.dtype) != (value.shape, value.dtype):
        return value
    # An accelerator would have to be waited for to compare them.
    if target.device.type != "cpu" or not _same(_plain(target), value):
        if any(s == 0 and n > 1 for s, n in zip(target.stride(), target.shape, strict=True)):
            return value  # an expanded tensor has not the memory for them
        with torch.no_grad():
            target.copy_(value)
    return target
