"""The components that there are: each is a file `metarun/components/<group>/<name>.py`.

`--help`, completion and `--cfg job` need the settings of all of them, and must not wait for torch,
which the files import. So `read` takes of a file what its settings classes need, and nothing else.
When the file itself is imported, later, `settings` gives it the classes that were read.

Settings stand above what is built from them, so a file is parsed down to its builder only: that is
a tenth of the time.
"""

import ast
import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import metarun
from metarun.config.component import HOME
from metarun.errors import ConfigError

GROUPS = ("algo", "data", "backbone", "inner_opt", "outer_opt")

_FOLDER = Path(metarun.__file__).parent / "components"
_BUILDER = re.compile(r"^@builds\((?P<schema>\w+)\)\n(?:@.*\n)*def (?P<function>\w+)", re.MULTILINE)


class Component(NamedTuple):
    """One option of a group.

    Attributes:
        schema: the class of its settings.
        build: what builds it, or the module and the name where that is.
        is_plugin: whether the user has registered it.
    """

    schema: type
    build: Callable[..., Any] | tuple[str, str]
    is_plugin: bool = False


@cache
def components(group: str) -> dict[str, Component]:
    """The components of a group by name. Plugins add theirs."""
    found = {}
    for path in sorted((_FOLDER / group).glob("[!_]*.py")):
        module = f"{HOME}{group}.{path.stem}"
        if marked := _BUILDER.search(_text(path)):
            schema = read(module)[marked["schema"]]
            found[path.stem] = Component(schema, (module, marked["function"]))
    return found


def schemas(group: str) -> dict[str, type]:
    """The settings classes of a group's components, by name."""
    return {name: component.schema for name, component in components(group).items()}


def builder(group: str, name: str) -> Callable[..., Any]:
    """What builds a component; its file is imported by now."""
    build = components(group)[name].build
    if isinstance(build, tuple):
        module, function = build
        found: Callable[..., Any] = getattr(importlib.import_module(module), function)
        return found
    return build


def build_component(group: str, component: Any, *args: Any, **options: Any) -> Any:
    """What a component's builder makes.

    Raises:
        ConfigError: its settings contradict, or do not fit what it is built for.
    """
    try:
        return builder(group, component.name)(*args, **options)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def import_files() -> None:
    """Import the files of all components, so that their settings can be pickled by their names."""
    for group in GROUPS:
        for name in components(group):
            builder(group, name)


def is_plugin(group: str, name: str) -> bool:
    """Whether a component was registered by a plugin."""
    return name in components(group) and components(group)[name].is_plugin


def is_in_shared_root(name: str) -> bool:
    """Whether a data set lies in the folder of all data sets, which the environment may name.

    Not so a plugin's, nor one whose folder is itself the data set.
    """
    schema = schemas("data")[name]
    has_root = "root" in {field.name for field in fields(schema)}
    return has_root and not is_plugin("data", name) and not getattr(schema, "own_root", False)


def plugins() -> list[tuple[str, str]]:
    """Group and name of the components that plugins have registered."""
    return [(g, name) for g in GROUPS for name, one in components(g).items() if one.is_plugin]


# ---------------------------------------------------------------- reading files without importing


@cache
def read(module: str) -> dict[str, Any]:
    """The settings classes of a file of `metarun.components`, and what they need."""
    path = _path(module)
    tree = _tree(path)
    origin = {name: node for node in tree.body for name in _defined(node)}
    wanted: list[ast.stmt] = [
        n for n in tree.body if isinstance(n, ast.ClassDef) and _is_settings(n)
    ]
    used: set[str] = set()
    for node in wanted:  # the loop adds to it
        used |= (own := _used(node))
        wanted += {origin[name] for name in own & origin.keys()}.difference(wanted)
    namespace: dict[str, Any] = {"__name__": module, "__file__": str(path)}
    body = []
    for node in tree.body:
        if node not in wanted:
            continue
        if isinstance(node, ast.ImportFrom) and f"{node.module}".startswith(HOME):
            names = {alias.asname or alias.name: alias.name for alias in node.names}
            namespace |= {own: read(f"{node.module}")[names[own]] for own in names.keys() & used}
        else:
            body.append(node)
    exec(compile(ast.Module(body, []), path, "exec"), namespace)
    return namespace


def source_of(schema: type) -> str:
    """The text of a settings class."""
    if not schema.__module__.startswith(HOME):
        return inspect.getsource(schema)
    path = _path(schema.__module__)
    node = next(n for n in _tree(path).body if getattr(n, "name", None) == schema.__name__)
    lines = _text(path).splitlines()  # with comments; a node has none
    return "\n".join(lines[node.lineno - 1 : node.end_lineno])


def _path(module: str) -> Path:
    return _FOLDER.joinpath(*module.removeprefix(HOME).split(".")).with_suffix(".py")


@cache
def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache
def _tree(path: Path) -> ast.Module:
    text = _text(path)
    builder = _BUILDER.search(text)
    return ast.parse(text[: builder.start()] if builder else text)


def _is_settings(node: ast.ClassDef) -> bool:
    return any(getattr(mark, "id", None) == "settings" for mark in node.decorator_list)


def _used(node: ast.stmt) -> set[str]:
    """The names whose values a statement looks up."""
    names = (part for part in ast.walk(node) if isinstance(part, ast.Name))
    return {name.id for name in names if isinstance(name.ctx, ast.Load)}


def _defined(node: ast.stmt) -> set[str]:
    """The names that a statement at the top of a file gives a value to."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return {node.name}
    targets = [*getattr(node, "targets", ()), getattr(node, "target", None)]
    return {t.id for part in targets if part for t in ast.walk(part) if isinstance(t, ast.Name)}
