"""How the site reads metarun's docstrings."""

import importlib
import inspect
import re
from dataclasses import fields
from typing import Any

import griffe

from metarun.cli.help import settings
from metarun.config.component import HOME


class Docstrings(griffe.Extension):
    """Sections as metarun writes them, and the settings of components as tables."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = sections(obj.docstring.value)

    def on_module(self, *, mod: griffe.Module, **kwargs: Any) -> None:
        """Show of a component's file the settings and the builder, and nothing of other files."""
        if not mod.path.startswith(HOME) or mod.path.count(".") != 3:
            return
        own = [f for f in mod.functions.values() if not f.is_alias]
        builders = [function for function in own if decorator(function, "builds")]
        mod.public = bool(builders)
        if builders:
            schema = str(decorator(builders[0], "builds").arguments[0])
            mod.exports = [schema, builders[0].name]
            add_settings(mod.classes[schema])


def decorator(function: griffe.Function, name: str) -> Any:
    """The call of that name which decorates a function; None: there is none."""
    calls = [one.value for one in function.decorators]
    found = (call for call in calls if isinstance(call, griffe.ExprCall))
    return next((call for call in found if str(call.function) == name), None)


def add_settings(kind: griffe.Class) -> None:
    """Give a class of settings a table of them: its own and inherited ones, as `--help` does."""
    schema = getattr(importlib.import_module(kind.module.path), kind.name)
    types = {field.name: field.type for field in fields(schema)}
    rows = [
        griffe.DocstringParameter(
            name=one.key,
            annotation=inspect.formatannotation(types[one.key]),
            description=one.meaning,
            value=repr(one.value),
        )
        for one in settings(schema())
        if one.key != "name"
    ]
    assert kind.docstring is not None
    if rows:
        kind.docstring.parsed = [
            *kind.docstring.parse("google"),
            griffe.DocstringSectionParameters(rows, title="Settings:"),
        ]


def sections(text: str) -> str:
    """A docstring as Griffe understands it.

    Its examples stand under the heading that Griffe knows, its references are a list, and what is
    said of several arguments together is said of each.

    >>> from scripts.site.docstrings import sections
    >>> sections("Example:\\n    >>> 1 + 1\\n    2")
    'Examples:\\n    >>> 1 + 1\\n    2'
    >>> print(sections("Args:\\n    a, b: a number\\n        each.\\n    c: another."))
    Args:
        a: a number
            each.
        b: a number
            each.
        c: another.
    >>> print(sections("References:\\n    Finn 2017, Model-\\n    agnostic.\\n    Nichol 2018."))
    References:
        - Finn 2017, Model-
        agnostic.
        - Nichol 2018.
    """
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    text = re.sub(r"^    (\w+(?:, \w+)+)(: .*(?:\n {8}.*)*)", of_each, text, flags=re.MULTILINE)
    head, found, block = text.partition("References:\n")
    return head + found + re.sub(r"(^|\.\n)    (?=\S)", r"\1    - ", block)


def of_each(together: re.Match[str]) -> str:
    """What is said of several arguments, for each of them."""
    return "\n".join(f"    {name}{together[2]}" for name in together[1].split(", "))
