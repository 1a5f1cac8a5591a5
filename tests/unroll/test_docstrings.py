"""Everything that the engine exports has a docstring and an example.

`tests/test_docstrings.py` runs the examples.
"""

import inspect
from types import ModuleType
from typing import Any

from metarun import higher, unroll
from metarun.higher import optim as higher_optim
from metarun.higher import patch, utils
from metarun.unroll import optim, schedules

MODULES = (unroll, optim, schedules, higher, higher_optim, patch, utils)

WITHOUT_EXAMPLE = {
    "CompilationError": "it takes a compiler that fails",
    "Continued": "the example of from_torch has one",
    "LearnedHyper": "the example of learn_hyper uses one",
    "LookAhead": "the example of look_ahead reads them",
    "Unrolled": "the example of unroll reads one",
}


def public(module: ModuleType) -> dict[str, Any]:
    """The functions and classes that a module exports; not constants and aliases of types."""
    names = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
    exported = {name: getattr(module, name) for name in names}
    return {
        name: value
        for name, value in exported.items()
        if inspect.isclass(value) or inspect.isroutine(value)
        if value.__module__.startswith("metarun.")  # State is typing.Any
    }


def test_everything_public_is_documented() -> None:
    for module in MODULES:
        assert module.__doc__, module.__name__
        for name, value in public(module).items():
            own = value.__dict__.get("__doc__") if inspect.isclass(value) else value.__doc__
            assert own, f"{module.__name__}.{name}"


def test_everything_the_engine_exports_has_an_example() -> None:
    exported = public(unroll)
    assert len(exported) > 50, "the test sees what is exported"
    without = {name for name, value in exported.items() if ">>>" not in (value.__doc__ or "")}
    assert without == set(WITHOUT_EXAMPLE)
