"""Models of unusual classes: they are patched, or a sentence says what to do instead."""

import abc
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from metarun.higher.patch import monkeypatch

F64 = torch.float64
X = torch.randn(5, 3, dtype=F64, generator=torch.Generator().manual_seed(0))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.body(x).tanh())
        return scores


subclasses: list[type] = []


class Registry(Plain):
    def __init_subclass__(cls, *, kind: str) -> None:
        subclasses.append(cls)


class WithKeyword(Registry, kind="a"):
    pass


class Last(Plain):
    """Refuses to have subclasses."""

    def __init_subclass__(cls) -> None:
        raise TypeError("no subclasses")


class Closed(Plain):
    """Refuses new attributes."""

    def __init__(self) -> None:
        super().__init__()
        vars(self)["is_closed"] = True

    def __setattr__(self, name: str, value: Any) -> None:
        if vars(self).get("is_closed"):
            raise AttributeError(f"no attribute {name}")
        super().__setattr__(name, value)


class Slots(Plain):
    __slots__ = ("__scale", "parts", "unset")

    def __init__(self) -> None:
        super().__init__()
        self.__scale, self.parts = 1.5, [self.body]

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.parts[0](x).tanh()) * self.__scale
        return scores


class Keyed(type):
    def __new__(cls, name: str, bases: tuple[type, ...], body: dict[str, Any], *, tag: int) -> Any:
        return super().__new__(cls, name, bases, body)

    def __init__(cls, name: str, bases: Any, body: Any, *, tag: int) -> None:
        super().__init__(name, bases, body)


class OfKeyedMeta(Plain, metaclass=Keyed, tag=1):
    pass


class Final(type):
    def __new__(cls, name: str, bases: tuple[type, ...], body: dict[str, Any]) -> Any:
        if any(isinstance(base, Final) for base in bases):
            raise TypeError("no subclasses")
        return super().__new__(cls, name, bases, body)


class OfFinalMeta(Plain, metaclass=Final):
    pass


class Abstract(Plain, abc.ABC):
    @abc.abstractmethod
    def name(self) -> str: ...


class Concrete(Abstract):
    def name(self) -> str:
        return "concrete"


class Delegating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Plain()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.body(x).tanh())
        return scores


class Intercepting(Plain):
    def __getattribute__(self, name: str) -> Any:
        return 2.0 if name == "scale" else super().__getattribute__(name)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Uncopied(Plain):
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("not to be copied")

    def __reduce__(self) -> Any:
        raise RuntimeError("not to be pickled")


class OwnCall(Plain):
    def __call__(self, *args: Any) -> Any:
        return 2 * super().__call__(*args)


class OwnForward(Plain):
    """Wraps its `forward` at the instance."""

    def __init__(self) -> None:
        super().__init__()
        forward = self.forward
        self.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(3), nn.Tanh(), nn.Linear(3, 2))


def lazy_but_called() -> nn.Module:
    model = lazy()
    model(X.float())
    return model


class Activation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


def scripted_activation() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), torch.jit.script(Activation()), nn.Linear(3, 2))


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "a keyword of __init_subclass__": WithKeyword,
    "__init_subclass__ raises": Last,
    "__setattr__ raises": Closed,
    "__slots__": Slots,
    "a metaclass with keywords": OfKeyedMeta,
    "a final class": OfFinalMeta,
    "an abstract base": Concrete,
    "__getattr__": Delegating,
    "__getattribute__": Intercepting,
    "__deepcopy__ raises": Uncopied,
    "__call__": OwnCall,
    "a forward of the instance": OwnForward,
    "lazy, but called": lazy_but_called,
    "a scripted activation": scripted_activation,
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_models_of_unusual_classes_are_patched(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = build().double()
    known = list(subclasses)
    fmodel = monkeypatch(model)
    weights = {name: 1.5 * p for name, p in model.named_parameters()}
    fmodel.update_params(weights.values())
    output = fmodel(X)
    expected = functional_call(model, weights, (X,))
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-13)
    grads = [torch.autograd.grad(y.sum(), list(weights.values())) for y in (output, expected)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-13)
    fork = copy.deepcopy(fmodel)
    fork.update_params([2 * p for p in fmodel.parameters()])
    torch.testing.assert_close(fmodel(X), expected, rtol=1e-12, atol=1e-13)
    assert (fork(X) - output).abs().max() > 0.01
    assert subclasses == known, "the user's own registry"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own imports
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_what_cannot_be_patched_says_what_can() -> None:
    with pytest.raises(ValueError, match=r"0\.weight has no shape yet: call the model once"):
        monkeypatch(lazy())
    partly = nn.Sequential(torch.jit.script(nn.Linear(3, 3)), nn.Tanh())
    with pytest.raises(ValueError, match=r"0\.weight cannot be exchanged in a scripted module"):
        monkeypatch(partly)
    with pytest.raises(ValueError, match=r"torch\.compile was given"):
        monkeypatch(nn.Sequential(torch.compile(Plain()), nn.Tanh()))
    parallel = nn.DataParallel(Plain().double())
    if not torch.cuda.is_available():  # then it only calls the module
        torch.testing.assert_close(monkeypatch(parallel)(X), parallel(X))
    parallel.device_ids = [0, 1]
    with pytest.raises(ValueError, match=r"patch the module that it wraps \(model\.module\)"):
        monkeypatch(parallel)


def test_a_layer_that_the_forward_pass_adds_is_refused() -> None:
    class Late(Plain):
        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "late"):
                self.late = nn.Linear(2, 2).double()
            scores: Tensor = self.late(super().forward(x))
            return scores

    with pytest.raises(ValueError, match=r"new parameter, 'late\.weight'"):
        monkeypatch(Late().double())(X)
