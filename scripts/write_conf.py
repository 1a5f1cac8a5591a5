"""Write the YAML of every component, and of every row of published figures.

    python scripts/write_conf.py            # write what is not there or has changed
    python scripts/write_conf.py --check    # only say what it would write

`conf/<group>/<name>.yaml` has each setting of a component, its default and its meaning. The text
comes from the settings class at the top of `metarun/components/<group>/<name>.py`.
`conf/experiment/<row>.yaml` and `conf/experiment/cpu/<row>.yaml` are the protocols of
`metarun/reproduction/rows/<data>.toml`.
"""

import argparse
import inspect
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from metarun.cli.help import settings
from metarun.config.catalogue import GROUPS, schemas
from metarun.reproduction.rows import FULL, Row, experiment, rows

CONF = Path(__file__).resolve().parent.parent / "conf"

# Where users keep their data sets is theirs to say once.
FROM_ENVIRONMENT = {("data", "root"): "${oc.env:METARUN_DATA,null}"}


def text_of(group: str, name: str, schema: type) -> str:
    """The YAML file of a component."""
    usual: dict[str, Any] = getattr(schema, "usual", {})
    what = (inspect.getdoc(schema) or "").partition("\n")[0]
    own = list(_settings(group, schema))
    lines = ["# @package _global_"] if usual else []
    lines += [
        f"# {what}",
        f"# Written by scripts/write_conf.py from metarun/components/{group}/{name}.py.",
        "defaults:",
        f"  - /_schema/{group}: {name}",
        "  - _self_",
    ]
    if own:
        lines.append("")
        lines += [f"{group}:", *(f"  {line}" for line in own)] if usual else own
    if usual:
        lines += ["", "# What is usual with it in other groups."]
        lines += [f"{part}: {_as_yaml(values)}" for part, values in usual.items()]
    return "\n".join(lines) + "\n"


def _settings(group: str, schema: type) -> Iterator[str]:
    meanings = {setting.key: setting for setting in settings(schema())}
    for field in fields(schema):
        if field.name == "name":
            continue
        setting = meanings[field.name]
        shared = not getattr(schema, "own_root", False) and (group, field.name) in FROM_ENVIRONMENT
        value = FROM_ENVIRONMENT[group, field.name] if shared else _as_yaml(setting.value)
        yield f"{field.name}: {value}  # {setting.meaning}".removesuffix("  # ")


def _as_yaml(value: Any) -> str:
    """A value as YAML, on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def text_of_row(row: Row, budget: str) -> str:
    """The YAML file of a row's experiment."""
    how = "by the protocol of its source" if budget == FULL else "its protocol in fewer meta-steps"
    lines = [
        "# @package _global_",
        f"# {row.title} on {row.data_title}, {row.setting}: {how}.",
        *_commented(f"Published: {_published(row)}."),
        *(line for text in row.differences for line in _commented(f"Otherwise: {text}.")),
        f"# Written by scripts/write_conf.py from metarun/reproduction/rows/{row.data}.toml.",
        "defaults:",
        *(f"  - override /{group}: {name}" for group, name in row.groups.items()),
        "",
        *(f"{part}: {_as_yaml(values)}" for part, values in sorted(row.settings[budget].items())),
    ]
    return "\n".join(lines) + "\n"


def _commented(text: str) -> list[str]:
    return textwrap.wrap(text, 98, initial_indent="# ", subsequent_indent="#   ")


def _published(row: Row) -> str:
    figure = row.published
    if figure is None:
        return "no figure that could be verified"
    unit, factor = (" %", 100) if figure.score == "accuracy" else ("", 1)
    value = f"{figure.value * factor:.4g}"
    if figure.ci95 is not None:
        value += f" ± {figure.ci95 * factor:.2g}"
    over = f" ({figure.over})" if figure.over else ""
    return f"{value}{unit}{over}, {figure.source}"


def stale() -> dict[Path, str]:
    """The files that differ from what they should be, and that text."""
    wanted = {
        CONF / group / f"{name}.yaml": text_of(group, name, schema)
        for group in GROUPS
        for name, schema in schemas(group).items()
    }
    wanted |= {
        CONF / "experiment" / f"{experiment(row, budget)}.yaml": text_of_row(row, budget)
        for row in rows().values()
        for budget in row.budgets
    }
    return {
        path: text
        for path, text in wanted.items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    }


def main() -> None:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if stale")
    only_check = parser.parse_args().check
    found = stale()
    for path, text in found.items():
        print(path.relative_to(CONF.parent))
        if not only_check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    sys.exit(1 if only_check and found else 0)


if __name__ == "__main__":
    main()
