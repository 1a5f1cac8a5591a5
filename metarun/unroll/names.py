"""Choosing parameters by name."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern is the name itself or, shell-style, matches it.

    A name may have characters that mean something in a pattern, such as the brackets of
    "weights[0]"; written in full it always matches itself.
    """
    return name == pattern or fnmatchcase(name, pattern)


def match_names(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The names that match any of the patterns, in the order of `names`.

    A pattern that is one of the names stands for that name only.

    Raises:
        ValueError: a pattern matches nothing.
    """
    names = list(names)
    exact = set(names) & set(patterns)
    wild = [pattern for pattern in patterns if pattern not in exact]
    for pattern in wild:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"no parameter matches {pattern!r}; there are: {', '.join(names)}")
    return [name for name in names if name in exact or any(fnmatchcase(name, p) for p in wild)]
