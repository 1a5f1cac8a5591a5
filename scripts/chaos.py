#!/usr/bin/env python3
"""A fault campaign: real runs are killed, starved and damaged, then run again to their end.

Each must end as if nothing had happened: the same bits in its checkpoints, every logged step
once in metrics.jsonl and TensorBoard, the same result. Prints a table, writes `results.json`
below `--out`, and exits with 1 if anything differed. The faults are drawn from `--seed`; the
moments at which they strike depend on the machine's speed as well.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import threading
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

from chaos_check import differences
from chaos_faults import FAULTS, Case, Failure, Plan

DEFAULTS = {
    "kills": 200, "signals": 50, "full-disk": 10, "read-only": 4, "clock": 8, "checkpoints": 20,
    "logs": 15, "files": 12, "locks": 8,
}  # fmt: skip
PER_RUN = {"kills": 5, "signals": 4}
"""Faults that one case deals out; the other kinds have one a case."""


def main() -> int:
    """Make the undisturbed run, then every case; report."""
    options = parse()
    out = Path(options.out).resolve()
    shutil.rmtree(out / "runs", ignore_errors=True)
    plan = Plan(out / "runs", options.steps)
    reference = Case("reference", Random(0), plan)
    start = time.perf_counter()
    reference.finish()
    plan.duration = time.perf_counter() - start
    print(f"undisturbed run: {options.steps} meta-steps in {plan.duration:.1f} s", flush=True)
    again = Case("again", Random(0), plan)
    again.finish()
    if wrong := differences(again.folder, reference.folder):
        print(f"two undisturbed runs differ, so there is nothing to compare with: {wrong}")
        return 1
    plan.reference = reference.folder
    cases = drawn(options, plan)
    lock = threading.Lock()
    outcomes: list[dict[str, Any]] = []

    def run(case: tuple[str, int, Case]) -> None:
        kind, count, one = case
        outcome = execute(kind, count, one)
        with lock:
            outcomes.append(outcome)
            print(f"[{len(outcomes)}/{len(cases)}] {line(outcome)}", flush=True)

    with ThreadPoolExecutor(options.workers) as pool:
        list(pool.map(run, cases))
    outcomes.sort(key=lambda outcome: str(outcome["case"]))
    report = {
        "seed": options.seed,
        "steps": options.steps,
        "workers": options.workers,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "undisturbed_seconds": round(plan.duration, 2),
        "minutes": round((time.perf_counter() - start) / 60, 1),
        "kinds": summary(outcomes),
        "cases": outcomes,
    }
    (out / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    print(table(report["kinds"]))
    failed = [str(outcome["case"]) for outcome in outcomes if outcome["failures"]]
    if failed:
        again_with = f"--seed {options.seed} --only {','.join(failed)}"
        print(f"FAILED: {', '.join(failed)}; their directories are in {plan.folder}; again with:")
        print(f"  {sys.executable} scripts/chaos.py {again_with}")
    return 1 if failed else 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    for kind, count in DEFAULTS.items():
        parser.add_argument(f"--{kind}", type=int, default=count, help=FAULTS[kind].__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=600, help="meta-steps of each run")
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time")
    parser.add_argument("--only", default="", help="names of cases, with commas between")
    parser.add_argument("--out", default="outputs/chaos")
    return parser.parse_args()


def drawn(options: argparse.Namespace, plan: Plan) -> list[tuple[str, int, Case]]:
    """The cases in random order; a case's faults depend on the seed and its name alone."""
    cases = []
    for kind in DEFAULTS:
        left, index = vars(options)[kind.replace("-", "_")], 0
        while left > 0:
            count = min(left, PER_RUN.get(kind, 1))
            name = f"{kind}-{index:03d}"
            cases.append((kind, count, Case(name, Random(f"{options.seed}-{name}"), plan)))
            left, index = left - count, index + 1
    if options.only:
        cases = [case for case in cases if case[2].name in options.only.split(",")]
    Random(options.seed).shuffle(cases)
    return cases


def execute(kind: str, count: int, case: Case) -> dict[str, Any]:
    """Deal out a case's faults, and keep its directories only if something was wrong."""
    failures = []
    try:
        FAULTS[kind](case, count)
    except Failure as failure:
        failures.append(str(failure))
    except Exception:
        failures.append(traceback.format_exc())
    if not failures:
        case.remove()
    return {
        "kind": kind,
        "case": case.name,
        "faults": case.faults,
        "runs": case.runs,
        "skipped": case.skipped,
        "failures": failures,
        "log": case.log,
    }


def line(outcome: dict[str, Any]) -> str:
    """One line for a case."""
    if outcome["skipped"]:
        return f"{outcome['case']}: skipped, {outcome['skipped']}"
    end = f"FAILED: {outcome['failures']} {outcome['log']}" if outcome["failures"] else "same bits"
    return f"{outcome['case']}: {'; '.join(outcome['log'])}: {end}"


def summary(outcomes: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Counts by kind of fault."""
    kinds = {}
    for kind in DEFAULTS:
        ours = [outcome for outcome in outcomes if outcome["kind"] == kind]
        if ours:
            faults: Counter[str] = sum((Counter(o["faults"]) for o in ours), Counter())
            kinds[kind] = {
                "faults": sum(faults.values()),
                "runs": sum(o["runs"] for o in ours),
                "failures": sum(bool(o["failures"]) for o in ours),
                "skipped": next((o["skipped"] for o in ours if o["skipped"]), ""),
                "of_which": dict(sorted(faults.items())),
            }
    return kinds


def table(kinds: dict[str, dict[str, Any]]) -> str:
    """The counts as a Markdown table."""
    lines = ["| kind | faults | runs compared | different | of which |", "|---|---|---|---|---|"]
    for kind, counts in kinds.items():
        which = ", ".join(f"{count} {name}" for name, count in counts["of_which"].items())
        shown = f"skipped: {counts['skipped']}" if counts["skipped"] else which
        lines.append(
            f"| {kind} | {counts['faults']} | {counts['runs']} | {counts['failures']} | {shown} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
