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
HEAD = """# Derivatives of every operation

`make op-zoo` takes each differentiable operation of torch's own database of operations, and a zoo
of modules, losses and delicate points, as an inner loss. It unrolls {steps}, in each exact
gradient mode, in a loop and under vmap, through the drop-in for `higher`, and by three Newton
steps; and compares the derivative of the whole along a random direction with central differences,
in float64. This page is its result, with torch {torch}; the figures are in
[operations.json](operations.json).

- *right*: equal to finite differences.
- *refused*: an error, whose sentence is below. Nothing is computed.
- *not finite*: NaN or infinite, although finite differences converge. It cannot be missed: runs
  stop at it.
- *not smooth*: finite differences do not converge where the operation was tried: it has a kink
  there, or it is too ill-conditioned to tell.
- *skipped*: it cannot be tried; the reasons are below.
- *wrong*: a finite number that is not the derivative. There must be none.

## Counts
"""
MENDED = """
## What torch gets wrong, and what happens here

| operation | what is wrong in torch | here |
|---|---|---|
| `weight_norm` (both kinds) | the second derivative of its fused kernel | written out |
| `det` | the second derivative is NaN where two singular values are equal, and where the matrix is singular | by `slogdet`, or as a polynomial where the matrix is singular (up to 16 rows) |
| `layer_norm`, `group_norm`, `batch_norm`, `instance_norm` | third derivatives: saved statistics count as constants | written out for loss-driven optimizers and for unrolls within unrolls; the kernels themselves (`native_layer_norm` …) are refused there |
| `as_strided_scatter` | the first derivative | refused |
| `max_unpool…d` with windows that overlap | the first derivative, where two maxima are one element | refused |
| `embedding` with `max_norm` | changes its weight in place, unseen by derivatives | refused |
| `solve`, `det`, `slogdet`, `logdet`, `tensorsolve`, `prod`, `cumprod` | tangents of their backward pass, unless a graph of it is made | `mixed` makes the graph |
| `cholesky_inverse`, `triangular_solve`, products by `scatter_reduce` | tangents | `mixed` falls back to `checkpoint`, with a warning |
| anything else of which forward and reverse mode differ | | `mixed` compares them once for each program, and falls back to `checkpoint`, with a warning |

Two things no table can see. A loss that was computed outside `unroll` and handed to
`metarun.unroll.multi` is refused if its graph shows one of the first three rows' norms: compute it
within `with metarun.unroll.RightDerivatives():`. And at the kink of a norm, a distance or a
standard deviation (at zero) torch's derivative is a convention; a square that smooths the kink
out does not bring the second derivative back. Use `(x * x).sum()` instead of `x.norm() ** 2`.
"""


def summary(results: Iterable[dict[str, Any]]) -> dict[str, Any]:
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
    return {"torch": torch.__version__.partition("+")[0], "operations": operations}


def page(summary: dict[str, Any]) -> str:
    """The page that docs/operations.md is."""
    operations = summary["operations"]
    modules = sum(name.startswith(("nn.", "loss: ", "point: ")) for name in operations)
    steps = f"two steps of SGD ({len(operations)} operations, modules and points)"
    lines = [HEAD.format(steps=steps, torch=summary["torch"]).rstrip(), ""]
    del modules
    lines += ["| way | " + " | ".join(VERDICTS) + " |", "|---" * (len(VERDICTS) + 1) + "|"]
    for way in WAYS:
        counts = [sum(found[way][0] == v for found in operations.values()) for v in VERDICTS]
        lines.append(f"| {way} | " + " | ".join(map(str, counts)) + " |")
    lines += [MENDED.rstrip(), ""]
    for verdict in ("wrong", "failed", "not finite", "refused", "skipped"):
        groups = _grouped(operations, verdict)
        lines += [f"## {verdict.capitalize()}", ""]
        lines += [*_listed(groups)] if groups else ["None."]
        lines.append("")
    fallbacks = sorted(
        n
        for n, found in operations.items()
        if len(found["mixed, loop"]) > 1 and "falls back" in found["mixed, loop"][1]
    )
    lines += ["## Right in `mixed` by falling back to `checkpoint`", "", _names(fallbacks), ""]
    kinks = sorted(
        n for n, found in operations.items() if found["reverse, loop"][0] == "not smooth"
    )
    lines += ["## Not smooth where they were tried", "", _names(kinks), ""]
    return "\n".join(lines)


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


def write(results: list[dict[str, Any]], folder: Path) -> None:
    """`operations.json` and `operations.md`."""
    kept = summary(results)
    rows = [
        f" {json.dumps(name)}: {json.dumps(found)}" for name, found in kept["operations"].items()
    ]
    text = f'{{"torch": "{kept["torch"]}", "operations": {{\n' + ",\n".join(rows) + "\n}}\n"
    (folder / "operations.json").write_text(text)
    (folder / "operations.md").write_text(page(kept))
