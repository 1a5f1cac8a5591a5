"""Importing the modules of `+plugins=[a,b]`: the user's own, and nothing else by mistake."""

import importlib
import importlib.util
import logging
import os
import sys
from pathlib import Path

from metarun.config.catalogue import plugins
from metarun.errors import ConfigError

log = logging.getLogger(__name__)


def import_plugins(names: list[str]) -> None:
    """Import modules, also from the working directory, for the components that they register.

    Raises:
        ConfigError: a name is that of a file, of a module that another one hides, or of none; or
            the module cannot be imported.
    """
    if names and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a plugin is often a file beside the experiment
    for name in names:
        _refuse_path(name)
        _refuse_hidden(name)
        before, new = len(plugins()), name not in sys.modules
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:  # whatever a user's module may do wrong
            reason = f"{type(error).__name__}: {error}"
            if isinstance(error, ModuleNotFoundError) and error.name == name.partition(".")[0]:
                reason += f"; a plugin is an installed module or a file in {os.getcwd()}"
            raise ConfigError(f"cannot import the plugin {name!r}: {reason}") from error
        if new and len(plugins()) == before:
            log.warning(
                "the plugin %r registers no component: it must call "
                "metarun.components.register(group, name, schema, build)", name,
            )  # fmt: skip


def _refuse_path(name: str) -> None:
    """Refuse a path, and say which module it is."""
    if not name.endswith(".py") and "/" not in name and os.sep not in name:
        return
    path = Path(name)
    plain = os.path.normpath(path.with_suffix("") if name.endswith(".py") else path)
    if path.is_absolute() or plain.startswith(".."):
        folder, stem = Path(plain).parent, Path(plain).name
        hint = f"start metarun in {folder}, or set PYTHONPATH={folder}, and give +plugins=[{stem}]"
    else:
        hint = f"did you mean +plugins=[{plain.replace(os.sep, '.')}]?"
    raise ConfigError(f"plugins=[{name}]: give the name of a module, not of a file; {hint}")


def _refuse_hidden(name: str) -> None:
    """Refuse a file of the working directory that another module of its name would hide.

    To import it all the same would hide that module from whatever needs it.
    """
    first = name.partition(".")[0]
    here = Path.cwd().resolve()
    file, package = here / f"{name.replace('.', os.sep)}.py", here / first / "__init__.py"
    if not file.exists() and not package.exists():
        return
    module = sys.modules.get(first)
    spec = importlib.util.find_spec(first) if module is None else module.__spec__
    found = None if spec is None else spec.origin
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    is_own = any(Path(place).resolve().is_relative_to(here) for place in [*places, found or "?"])
    if spec is None or (is_own and found not in ("built-in", "frozen")):
        return
    raise ConfigError(
        f"plugins=[{name}]: another module has the name {first!r} "
        f"({found or ', '.join(map(str, places))}) and would be imported in the place of yours in "
        "this folder: give yours another name"
    )
