"""Hydra's side of the configs: the schemas it knows, and its errors in plain words."""

import re
import traceback
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from metarun.config import own_yaml, typed
from metarun.config._hydra import Hydra, store_schema
from metarun.config.catalogue import GROUPS, plugins, schemas
from metarun.config.checks import check_types
from metarun.config.launchers import register as register_launchers
from metarun.config.run import TrainConfig, flat
from metarun.config.trained import COMMANDS, NEEDED
from metarun.errors import ConfigError, did_you_mean, first_line

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException)
MOST_LISTED = 50  # options that a message names


def register_schemas() -> None:
    """Tell Hydra the schemas. They live in a group of their own, out of the users' sight."""
    register_launchers()
    store = ConfigStore.instance()
    for name, config in COMMANDS.items():
        store_schema("_schema", name, config, package="_global_")
    for group in GROUPS:
        for name, schema in schemas(group).items():
            store_schema(f"_schema/{group}", name, schema, package=group)
    for group, name in plugins():  # these have no YAML file: the schema is the option
        option = {"defaults": [{f"/_schema/{group}": name}, "_self_"]}
        usual = getattr(schemas(group)[name], "usual", {})
        store.store(group=group, name=name, node=option | usual, package="_global_")


def to_config(cfg: DictConfig) -> Any:
    """The composed config as the dataclass of its schema, every value checked.

    Raises:
        ConfigError: a required key is missing, or a value is not allowed.
    """
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        needed = ", ".join(
            f"{key}=<{NEEDED[key]}>" if key in NEEDED else f"{key}=…" for key in missing
        )
        raise ConfigError(f"not given: {needed}")
    try:
        config: Any = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise ConfigError(first_line(error)) from error
    _refuse_extra_keys(cfg, config)
    for part in fields(config):
        component = getattr(config, part.name)
        if is_dataclass(component):
            check_types(part.name, component)
        elif is_dataclass(part.default_factory):
            raise ConfigError(f"{part.name}={component}: it is a group of settings, no value")
    if isinstance(config, TrainConfig):
        _check_components(config)
    return config


def _check_components(config: TrainConfig) -> None:
    """Each group holds a component under its own name: neither `~group` nor `group.name=…`."""
    for group in GROUPS:
        component = getattr(config, group)
        if isinstance(component, dict) and "name" in component:  # of a file without defaults
            raise _without_defaults(group, str(component["name"]))
        name = str(getattr(component, "name", None))
        if type(component) is not schemas(group).get(name):
            raise ConfigError(f"choose {group}={'|'.join(schemas(group))}, not {group}.name={name}")


def composed(command: str, overrides: list[str]) -> Any:
    """The config of a command line without running it; required keys may be missing."""
    with initialize_config_module(config_module="metarun.conf", version_base="1.3"):
        cfg = compose(config_name=command, overrides=overrides)
    for key in OmegaConf.missing_keys(cfg):
        OmegaConf.update(cfg, str(key), "<required>")
    return OmegaConf.to_object(cfg)


def _refuse_extra_keys(cfg: DictConfig, config: Any, prefix: str = "") -> None:
    """`+key=value` adds a key that nothing reads: an error, not a silent wish."""
    known = [f.name for f in fields(config)]
    for key in map(str, cfg):
        if key not in known:
            hint = did_you_mean(key, known, prefix=prefix)
            raise ConfigError(f"there is no setting '{prefix}{key}'{hint}")
        if is_dataclass(value := getattr(config, key)):
            _refuse_extra_keys(cfg[key], value, f"{prefix}{key}.")


def explain(error: Exception, command: str, overrides: list[str]) -> ConfigError:
    """Hydra's complaint about a command line as one clear message with a suggestion."""
    if isinstance(error, OverrideParseException):
        return typed.unreadable(error.override)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        return _no_such_option(error.missing_cfg_file, error.options, command)
    cause = error.__cause__ if isinstance(error, ConfigCompositionException) else error
    if (path := own_yaml.file_of(error)) is not None:
        return _wrong_file(path, str(error), command)
    if stored := re.match(r"In '([\w/]+)': .*\n(.*)\n\s*full_key: (.*)", str(error)):
        option, reason, key = stored.groups()
        group, _, name = option.partition("/")
        if group == "experiment":  # its components may have been exchanged by what was typed
            return ConfigError(f"{group}={name} sets {key}, which does not fit the rest: {reason}")
        hint = suggest_key(key, _known_keys(command, []))  # a plugin's settings have no file
        return ConfigError(f"`usual` of {group}={name}: {key}: {reason}{hint}")
    text = first_line(cause or error)
    if wrong := own_yaml.wrong_defaults(text, GROUPS):
        return wrong
    if signed := re.match(r"Could not append to config\. .*'(.*)'", first_line(error)):
        return ConfigError(f"{signed[1]} is a setting already: write {signed[1]}=… without the '+'")
    key = getattr(cause, "full_key", None)
    if not key or not isinstance(key, str):  # a position in a list has a number for its key
        key = _quoted_key(str(error)) or _merged_key(str(error))
    if key is not None and _is_unknown_key(error, cause):
        if lacking := _choices_without(key, command, overrides):
            return ConfigError(
                f"there is no setting {key!r} with {' and '.join(lacking)}: sweep over options "
                "that have it, and over the others in a command of their own"
            )
        known = _known_keys(command, [o for o in overrides if _key_of(o) != key])
        hint = _options_with(key) or suggest_key(key, [k for k in known if k != key])
        return ConfigError(
            f"there is no setting {key!r}{hint}. `metarun {command} --help` lists them all"
        )
    if several := re.match(r"(?:Ambiguous value for argument|Sweep parameters) '(.*?)'", text):
        return ConfigError(
            f"{several[1]} has several values: add -m for a run of each, or write key=[a,b] if it "
            "is one list"
        )
    if twice := re.match(
        r"(?:Multiple values for |_schema/|force-add .* '\+\+)([\w/]+)(?:[@=].*|\.$|\.)", text
    ):
        return ConfigError(
            f"{twice[1]} is given twice: write {twice[1]}=… once, without a '+', and in a file of "
            f"your own 'override /{twice[1]}: …'"
        )
    if key and "value ''" in text.lower():
        return ConfigError(f"{key}= is empty: give a value")
    if key and "is not a ListConfig" in text:
        given = next((o.partition("=")[2] for o in overrides if _key_of(o) == key), "…")
        return ConfigError(f"{key}={given}: it is a list, write '{key}=[{given}]'")
    missing = re.match(r"Interpolation key '(.*)' not found", text)
    if missing:
        return _nothing_to_put_in(missing[1], error)
    return ConfigError(f"{key}: {text[:1].lower()}{text[1:]}" if key else text)


def refuse_signs(command: str, overrides: Sequence[str]) -> None:
    """Refuse `~key`, after which Hydra would go on without a setting or a component.

    Raises:
        ConfigError: says what to type instead.
    """
    for override in overrides:
        key, _, value = override.partition("=")
        name = _key_of(override)
        own = ("hydra", "experiment", "_tuned", "_usual")
        if key.startswith("~") and name.partition(".")[0] not in own:
            if name not in _known_keys(command, []):
                continue  # Hydra says so
            choices = "|".join(schemas(name)) if name in GROUPS else "…"
            raise ConfigError(
                f"{override}: {name} cannot be taken away: leave the argument out for the default, "
                f"or write {name}={choices}"
            )
        if name in GROUPS and value in ("null", "None"):
            raise ConfigError(f"{override}: choose {name}={'|'.join(schemas(name))}")


def _no_such_option(path: str, options: Sequence[str], command: str) -> ConfigError:
    """The error for a file `group/option` that is not there beside others, such as `options`."""
    group, _, option = path.rpartition("/")
    key = re.sub("^experiment/(.*)=", r"experiment=\1/", f"{group}=")  # experiment=cpu/…
    hint = did_you_mean(option, options, prefix=key)
    many = len(options) > MOST_LISTED
    told = f"`metarun {command} --help` says" if many else "choose from"
    which = "which there are" if many else ", ".join(sorted(options))
    return ConfigError(f"{key}{option}: there is no such option{hint}; {told} {which}")


def _nothing_to_put_in(name: str, error: BaseException) -> ConfigError:
    """The error for `${name}` that refers to no setting."""
    group = name.removesuffix(".name")
    if group != name and group in GROUPS:
        return _without_defaults(group, next(iter(schemas(group))))
    found = set()
    for frame, _ in traceback.walk_tb(error.__traceback__):
        for config in frame.f_locals.values():
            if isinstance(config, DictConfig) and config._get_parent() is None:
                plain: Any = OmegaConf.to_container(config, resolve=False)
                values = flat(plain)
                found |= {str(k) for k, v in values.items() if f"${{{name}" in str(v)}
    where = " and ".join(sorted(found - {"hydra.overrides.task", "hydra.overrides.hydra"}))
    return ConfigError(f"{where or 'a value'} refers to ${{{name}}}, and there is no such setting")


def _without_defaults(group: str, name: str) -> ConfigError:
    """The error for a file that is an option of a group, and has no defaults list."""
    return ConfigError(
        f"the file of this {group}=… does not say which {group} it is: begin it with "
        f"'defaults: [{name}, _self_]' (there are {', '.join(schemas(group))}), and leave the "
        "name out"
    )


def _wrong_file(path: Path, text: str, command: str) -> ConfigError:
    """What is wrong in a YAML file: `In '…': SomeError raised while composing config: …`."""
    reason = [line for line in text.splitlines() if line.strip()][1:]
    keys = [line.partition(":")[2].strip() for line in reason if "full_key:" in line]
    key = keys[0] if keys else ""
    if wrong := own_yaml.wrong_package(path, key):
        return wrong
    where = own_yaml.place(path, key) if key else str(path)
    if re.match(r"Key '.*' not in ", reason[0]):
        hint = suggest_key(key, [k for k in _known_keys(command, []) if k != key])
        return ConfigError(f"{where}: there is no setting {key!r}{hint}")
    if "Merge error" in reason[0] or "Cannot merge" in reason[0]:
        where = own_yaml.no_group(path, [*GROUPS, "task", "trainer", "engine"])
        return ConfigError(
            f"{where}: expected groups of settings, as in 'trainer: {{steps: 100}}', not a value "
            "or a list in the place of one"
        )
    return ConfigError(f"{where}: {key}: {reason[0][:1].lower()}{reason[0][1:]}")


def was_composing(error: BaseException) -> bool:
    """Whether an error arose while Hydra put a config together: nothing of ours was running."""
    composing = Hydra.compose_config.__code__
    return any(frame.f_code is composing for frame, _ in traceback.walk_tb(error.__traceback__))


def _options_with(key: str) -> str:
    """' (the options of inner_opt that have it: sgd, …)' for a setting that only others have."""
    group, _, name = key.partition(".")
    if group not in GROUPS:
        return ""
    having = [
        option for option, own in schemas(group).items() if name in {f.name for f in fields(own)}
    ]
    return f" here (the options of {group} that have it: {', '.join(having)})" if having else ""


def suggest_key(key: str, known: Sequence[str]) -> str:
    """A suggestion for a wrong dotted key: a like name in the same group, or the same name,
    or a like one, in another: `trainer.steps` for `trainer.stepz`, `inner_opt.lr` for `lr`."""
    group, dot, leaf = key.rpartition(".")
    siblings = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == group]
    if hint := did_you_mean(leaf, siblings, prefix=group + dot):
        return hint
    same = [k for k in known if k.rpartition(".")[2] == leaf]
    if same:
        return f" (did you mean {' or '.join(same[:3])}?)"
    return did_you_mean(key, [k for k in known if "." in k]) if group not in known else ""


def _is_unknown_key(error: Exception, cause: BaseException | None) -> bool:
    missing = isinstance(cause, ConfigKeyError | ConfigAttributeError)
    return missing or str(error).startswith("Could not ")


def _quoted_key(text: str) -> str | None:
    match = re.search(
        r"Could not (?:override|append to config|delete from config).*?'([^']+)'", text
    )
    return match.group(1).partition("@")[0] if match else None


def _merged_key(text: str) -> str | None:
    match = re.match(r"Error merging override (.*)", text, re.DOTALL)
    return _key_of(match.group(1)) if match else None


def _key_of(override: str) -> str:
    return override.lstrip("+~").partition("=")[0].partition("@")[0]


def _choices_without(key: str, command: str, overrides: list[str]) -> list[str]:
    """Of the options that a sweep takes of a group, those that lack a key; if some have it."""
    groups = {_key_of(o): o for o in overrides if "." not in _key_of(o).partition("=")[0]}
    swept = {group: found for group, o in groups.items() if (found := _options(group, o))}
    fixed = [o for group, o in groups.items() if group not in swept and group in GROUPS]
    for group, options in swept.items():
        choices = [f"{group}={option}" for option in options]
        lacking = [c for c in choices if key not in _known_keys(command, [*fixed, c])]
        if 0 < len(lacking) < len(choices):
            return lacking
    return []


def _options(group: str, override: str) -> list[str]:
    """The options of a group that an override sweeps over; none if it does not."""
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:
        return []
    if not parsed.is_sweep_override() or not (group in GROUPS or group == "experiment"):
        return []
    value = parsed.value()
    if isinstance(value, Glob):
        return value.filter(list(schemas(group)) if group in GROUPS else [])
    return list(parsed.sweep_string_iterator()) if isinstance(value, ChoiceSweep) else []


def _known_keys(command: str, overrides: list[str]) -> list[str]:
    """All dotted keys of the config; group names too."""
    usable = [o for o in overrides if "=" in o and not o.startswith(("hydra.", "-"))]
    for attempt in (usable, []):
        try:
            GlobalHydra.instance().clear()
            with initialize_config_module(config_module="metarun.conf", version_base="1.3"):
                return _dotted(compose(config_name=command, overrides=attempt))
        except Exception as error:  # Hydra lets some mistakes fail anywhere inside it
            if not was_composing(error):
                raise
            # Another override is wrong as well: suggest from the defaults.
    return []


def _dotted(cfg: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for key in map(str, cfg):
        keys.append(f"{prefix}{key}")
        value = cfg._get_node(key)
        if isinstance(value, DictConfig):
            keys += _dotted(value, f"{prefix}{key}.")
    return keys
