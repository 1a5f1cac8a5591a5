"""Settings and groups by short names that tell them apart."""

import itertools
import json
from collections.abc import Sequence
from typing import Any

OF_A_GROUP = ("task.train.", "augment.")
"""Settings whose last part says too little: there is a data.crop as well."""


def unique(texts: Sequence[str]) -> list[str]:
    """The texts, with a number behind each that has been there before."""
    given: list[str] = []
    for text in texts:
        numbered = (f"{text} ({number})" for number in itertools.count(2))
        given.append(text if text not in given else next(t for t in numbered if t not in given))
    return given


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Each dotted key -> as few of its last parts as tell it from the others.

    The name of a component stands for its group: `inner_opt.name` is "inner_opt".
    """
    plain = {key: key.removesuffix(".name") for key in keys}
    names = {}
    for key, text in plain.items():
        parts = text.split(".")
        for count in range(2 if key.startswith(OF_A_GROUP) else 1, len(parts) + 1):
            name = ".".join(parts[-count:])
            if sum(("." + other).endswith("." + name) for other in plain.values()) == 1:
                break
        names[key] = name
    return names


def as_text(value: Any) -> str:
    """A setting's value as one would type it."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, list):
        return f"[{', '.join(map(as_text, value))}]"
    return json.dumps(value, ensure_ascii=False, default=str)


def setting_texts(shown: dict[str, Any], names: dict[str, str]) -> list[str]:
    """Settings as a label has them: "anil", "lr=0.4"."""
    return [
        as_text(value) if key.endswith(".name") else f"{names[key]}={as_text(value)}"
        for key, value in shown.items()
    ]
