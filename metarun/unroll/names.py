"""Choosing parameters by name."""

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from fnmatch import fnmatchcase, translate


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern is the name itself or, shell-style, matches it.

    A name may have characters that mean something in a pattern, such as the brackets of
    "weights[0]"; written in full it always matches itself.

    Args:
        name: a parameter's name.
        pattern: a name, or a pattern with *, ? or [characters]. A * also matches dots.

    Returns:
        True or False. Case counts.

    Example:
        >>> from metarun.unroll import matches
        >>> matches("head.0.weight", "head.*"), matches("weights[0]", "weights[0]")
        (True, True)
    """
    return name == pattern or fnmatchcase(name, pattern)


def selects(pattern: str, name: str, names: Collection[str]) -> bool:
    """Whether a pattern means a name, among others.

    A pattern that is one of the names means that name only: beside "weights0", "weights[0]" is no
    pattern.

    Args:
        pattern: a name or a shell-style pattern, as of `matches`.
        name: one of `names`.
        names: all names that there are.

    Returns:
        True or False.

    Example:
        >>> from metarun.unroll.names import selects
        >>> [selects("w[0]", name, ["w[0]", "w0"]) for name in ("w[0]", "w0")]
        [True, False]
        >>> selects("w[0]", "w0", ["w0"])
        True
    """
    return name == pattern if pattern in names else matches(name, pattern)


def matcher(patterns: Sequence[str]) -> Callable[[Iterable[str]], list[str]]:
    """`match_names` for given patterns, to be called again and again, also in compiled code."""
    # `torch.compile` can follow compiled expressions, but not how fnmatch makes them.
    expressions = {pattern: re.compile(translate(pattern)) for pattern in patterns}

    def matched(names: Iterable[str]) -> list[str]:
        names = list(names)
        exact = {name for name in names if name in expressions}
        wild = {p: expression for p, expression in expressions.items() if p not in exact}
        for pattern, expression in wild.items():
            if not any(expression.match(name) for name in names):
                raise ValueError(f"no parameter matches {pattern!r}; there are: {', '.join(names)}")
        return [
            name for name in names if name in exact or any(e.match(name) for e in wild.values())
        ]

    return matched


def match_names(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The names that match any of the patterns, in the order of `names`.

    A pattern that is one of the names stands for that name only.

    Args:
        names: parameter names.
        patterns: names or shell-style patterns, as of `matches`.

    Returns:
        The matching names, each once.

    Raises:
        ValueError: a pattern matches nothing.

    Example:
        >>> from metarun.unroll import match_names
        >>> match_names(["body.weight", "head.weight", "head.bias"], ["*.bias", "head.*"])
        ['head.weight', 'head.bias']
    """
    return matcher(patterns)(names)
