"""The results as JSON and as a page."""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from op_zoo.measure import WAYS

# Of several samples the first of these that one has counts.
VERDICTS = ["wrong", "failed", "not finite", "refused", "right", "not smooth", "skipped"]
PAGE = Path(__file__).with_name("page.md")


def summary(results: Iterable[dict[str, Any]], expected: int) -> dict[str, Any]:
    """What is kept of the results: for each operation and way the verdict and the remarks."""
    ways: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        for way in WAYS if result["way"] == "all" else [result["way"]]:
            ways[result["name"]][way].append(result)
    operations: dict[str, dict[str, list[str]]] = {}
    for name in sorted(ways):
        operations[name] = {}
        for way in WAYS:
            found = ways[name][way]
            verdict = min((r["verdict"] for r in found), key=VERDICTS.index)
            remarks = {r["remark"] for r in found if r["verdict"] == verdict and r["remark"]}
            operations[name][way] = [verdict, *sorted(remarks)]
    version = torch.__version__.partition("+")[0]
    return {"torch": version, "expected": expected, "operations": operations}


def page(summary: dict[str, Any]) -> str:
    """The page that docs/operations.md is."""
    operations = summary["operations"]
    counts = ["| way | " + " | ".join(VERDICTS) + " |", "|---" * (len(VERDICTS) + 1) + "|"]
    for way in WAYS:
        numbers = [sum(found[way][0] == v for found in operations.values()) for v in VERDICTS]
        counts.append(f"| {way} | " + " | ".join(map(str, numbers)) + " |")
    lists = []
    for verdict in ("wrong", "failed", "not finite", "refused", "skipped"):
        groups = _grouped(operations, verdict)
        lists += [f"## {verdict.capitalize()}", "", *(_listed(groups) if groups else ["None."]), ""]
    fallbacks = sorted(
        name
        for name, found in operations.items()
        if any("falls back" in remark for remark in found["mixed, loop"][1:])
    )
    lists += ["## Right in `mixed` by falling back to `checkpoint`", "", _names(fallbacks), ""]
    kinks = sorted(
        n for n, found in operations.items() if found["reverse, loop"][0] == "not smooth"
    )
    lists += ["## Not smooth where they were tried", "", _names(kinks)]
    return PAGE.read_text().format(
        count=f"{len(operations)} of {summary['expected']}",
        torch=summary["torch"],
        counts="\n".join(counts),
        lists="\n".join(lists),
    )


def _grouped(operations: Any, verdict: str) -> dict[tuple[str, str], list[str]]:
    """(sentence, ways) -> the operations."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, found in operations.items():
        by_remark: dict[str, list[str]] = defaultdict(list)
        for way, (its, *remarks) in found.items():
            if its == verdict:
                remark = remarks[0] if remarks else ""
                by_remark[remark[:200]].append(way)
        for remark, ways in by_remark.items():
            every = len(ways) == len(WAYS)
            groups[(remark, "every way" if every else "; ".join(ways))].append(name)
    return groups


def _listed(groups: dict[tuple[str, str], list[str]]) -> Iterable[str]:
    for (remark, ways), names in sorted(groups.items()):
        said = f" — {remark}" if remark else ""
        yield f"- {ways}{said}: {_names(names)}"


def _names(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) + "." if names else "None."


def write(results: list[dict[str, Any]], expected: int, folder: Path) -> None:
    """`operations.json` and `operations.md`."""
    kept = summary(results, expected)
    rows = [
        f" {json.dumps(name)}: {json.dumps(found)}" for name, found in kept["operations"].items()
    ]
    text = (
        f'{{"torch": "{kept["torch"]}", "expected": {expected}, "operations": {{\n'
        + ",\n".join(rows)
        + "\n}}\n"
    )
    (folder / "operations.json").write_text(text)
    (folder / "operations.md").write_text(page(kept))
