"""The page of a check on a GPU, from what its stages have left in a folder.

python -m scripts.gpu_check.page outputs/gpu_check
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from metarun.system.files import write_json, write_text

Record = dict[str, Any]

WANTED = {
    ("W1", "higher"): 30.0,
    ("W1", "learn2learn"): 30.0,
    ("W1", "vmap"): 3.0,
    ("W2", "higher"): 30.0,
    ("W2", "learn2learn"): 30.0,
    ("W2", "vmap"): 3.0,
    ("W3", "higher"): 5.0,
    ("W3", "learn2learn"): 5.0,
    ("W3", "vmap"): 1.5,
}
"""How many times a peer's meta-step shall take metarun's, with five inner steps of second order."""
BUSY = 0.9
"""The part of the time in which the device shall compute."""


def verdict(value: float, wanted: float) -> str:
    """Whether a figure is what was wanted."""
    return f"reached ({wanted:g} wanted)" if value >= wanted else f"missed ({wanted:g} wanted)"


def bench_rows(records: list[Record]) -> list[str]:
    """A line for each implementation, with what was wanted of five steps of second order."""
    rows = []
    for record in records:
        family = record["workload"].partition("-")[0]
        wanted = WANTED.get((family, record["implementation"]))
        judged = wanted is not None and record["inner_steps"] == 5 and record["order"] == 2
        judged = judged and record["device"] != "cpu"  # whose rehearsal is of small networks
        steps = "" if record["inner_steps"] is None else str(record["inner_steps"])
        ratio = f"{record['ratio']:.2f} ({record['ratio_min']:.2f}–{record['ratio_max']:.2f})"
        told = verdict(record["ratio"], wanted) if judged and wanted is not None else ""
        rows.append(
            f"| {record['workload']} | {steps} | {record['implementation']} | "
            f"{1e3 * record['median_s']:.3g} ms | {ratio} | {record['peak_mib'] or ''} | {told} |"
        )
    return rows


def page(folder: Path) -> tuple[str, Record]:
    """The page in Markdown, and the same figures as plain values."""
    stages = [line.split("\t") for line in (folder / "stages.tsv").read_text().splitlines() if line]
    bench = _read(folder / "bench" / "results.json", [])
    profile = _read(folder / "profile.json", {})
    trained = {
        path.parent.name: _read(path, {}) for path in sorted(folder.glob("train/*/result.json"))
    }
    machines = ", ".join(dict.fromkeys(record["machine"] for record in bench))
    lines = [f"# A check on {machines or torch.__version__}", ""]
    lines += ["| stage | ended with | seconds |", "|---|---|---|"]
    lines += [f"| {name} | {_ending(int(code))} | {seconds} |" for name, code, seconds in stages]
    if bench:
        lines += ["", "## Benchmark", ""]
        lines += [
            "| workload | inner steps | implementation | median | times metarun's | peak, MiB | |"
        ]
        lines += ["|---|---|---|---|---|---|---|", *bench_rows(bench)]
    if profile:
        lines += ["", "## Profile", ""]
        lines += ["| meta-steps of | ms | kernels | device busy | waits of the host |"]
        lines += ["|---|---|---|---|---|"]
        for name, seen in profile.items():
            waits = seen["waits_per_step"]
            on_device = seen["kernels_per_step"] is not None
            told = f"{100 * seen['busy']:.0f} %"
            told += f", {verdict(100 * seen['busy'], 100 * BUSY)}" if on_device else ""
            lines.append(
                f"| {name} | {seen['ms_per_step']:.3g} | {seen['kernels_per_step'] or ''} | "
                f"{told} | {'' if waits is None else f'{waits:g}'} |"
            )
    if trained:
        lines += ["", "## Training", "", "| precision | test accuracy | meta-steps | seconds |"]
        lines += ["|---|---|---|---|"]
        lines += [
            f"| {name} | {100 * found['test']['accuracy']:.2f} ± "
            f"{100 * found['test']['ci95']:.2f} % | {found['steps']} | "
            f"{found['train_seconds']:.0f} |"
            for name, found in trained.items()
            if "test" in found
        ]
    plain = {
        "stages": [{"name": n, "code": int(c), "seconds": int(s)} for n, c, s in stages],
        "bench": bench,
        "profile": profile,
        "training": trained,
    }
    return "\n".join(lines) + "\n", plain


def _ending(code: int) -> str:
    return {0: "0", 124: "124 (too long)", 137: "137 (killed)"}.get(code, f"{code} (failed)")


def _read(path: Path, otherwise: Any) -> Any:
    return json.loads(path.read_text()) if path.exists() else otherwise


if __name__ == "__main__":
    place = Path(sys.argv[1])
    text, figures = page(place)
    write_text(place / "page.md", text)
    write_json(place / "gpu_check.json", figures)
