#!/usr/bin/env python3
"""Does a long run stay as small as it began? A real training, watched from outside.

Starts `metarun train` (MAML on sinusoids) and reads its resident memory, open files, threads and
the sizes of its logs from /proc and its directory while it goes on. Prints a table by meta-step,
writes it to `--out`, and exits with 1 if memory or the number of open files still grew in the
second half of the run, or the logs grew faster than the meta-steps. Needs Linux.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

MEMORY_SLACK = 8.0
"""MiB between the halves of a run that the allocator may take: far below one leaked object a
meta-step."""


def main() -> int:
    """Run, watch, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--samples", type=int, default=12, help="rows of the table")
    parser.add_argument("--out", default="outputs/long-run")
    options = parser.parse_args()
    out = Path(options.out).resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    run = out / "run"
    command = [
        sys.executable, "-m", "metarun", "train", "data=sinusoid", "backbone=mlp",
        "inner_opt.learn=[lr]", f"trainer.steps={options.steps}", "trainer.eval_every=200",
        "trainer.eval_episodes=50", "trainer.checkpoint_every=100", "trainer.log_every=20",
        f"hydra.run.dir={run}",
    ]  # fmt: skip
    with open(out / "stderr", "wb") as errors:
        process = subprocess.Popen(
            command,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
    rows = watch(process, run, options.steps // options.samples)
    code = process.wait()
    if code:
        print((out / "stderr").read_text(), f"exit code {code}", sep="\n")
        return 1
    print(table(rows))
    wrong = judge(rows)
    (out / "results.json").write_text(json.dumps({"rows": rows, "wrong": wrong}, indent=1) + "\n")
    for text in wrong:
        print(f"FAILED: {text}")
    return 1 if wrong else 0


def watch(process: subprocess.Popen[bytes], run: Path, every: int) -> list[dict[str, float]]:
    """A row for each `every` meta-steps; the logs are flushed at their own pace."""
    rows: list[dict[str, float]] = []
    due = every
    while process.poll() is None:
        step = last_step(run / "metrics.jsonl")
        if step >= due:
            with contextlib.suppress(OSError):  # it has just ended
                rows.append({"step": step, **measure(process.pid, run)})
            due = (step // every + 1) * every
        time.sleep(0.02)
    return rows


def last_step(path: Path) -> int:
    """The last meta-step of the log; 0 if there is none."""
    with contextlib.suppress(OSError, ValueError, IndexError), open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 2000))
        return int(json.loads(file.read().splitlines()[-1])["step"])
    return 0


def measure(pid: int, run: Path) -> dict[str, float]:
    """What the process holds and the directory weighs now; sizes in MiB, KiB for the logs."""
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return {
        "memory_mib": round(int(status["VmRSS"].split()[0]) / 1024, 1),
        "open_files": open_files(pid),
        "threads": int(status["Threads"]),
        "metrics_kib": round((run / "metrics.jsonl").stat().st_size / 1024, 1),
        "tensorboard_kib": round(sum(p.stat().st_size for p in (run / "tb").iterdir()) / 1024, 1),
        "files": sum(1 for path in run.rglob("*") if path.suffix != ".tmp" and path.is_file()),
    }


def open_files(pid: int) -> int:
    """The least of a few counts: a checkpoint that is being written does not matter."""
    counts = []
    for _ in range(5):
        counts.append(len(os.listdir(f"/proc/{pid}/fd")))
        time.sleep(0.01)
    return min(counts)


def judge(rows: list[dict[str, float]]) -> list[str]:
    """What grew that should not have, from the middle of the run to its end."""
    middle, end = rows[len(rows) // 2], rows[-1]
    wrong = []
    if end["memory_mib"] > middle["memory_mib"] + MEMORY_SLACK:
        wrong.append(f"memory grew from {middle['memory_mib']} to {end['memory_mib']} MiB")
    for name in ("open_files", "threads"):
        if end[name] > middle[name]:
            wrong.append(f"{name} grew from {middle[name]:.0f} to {end[name]:.0f}")
    for name in ("metrics_kib", "tensorboard_kib"):
        early, late = (row[name] / row["step"] for row in (middle, end))
        if late > 1.2 * early:
            wrong.append(f"{name} grew faster than the meta-steps")
    return wrong


def table(rows: list[dict[str, float]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| meta-step | memory (MiB) | open files | threads | metrics.jsonl (KiB) "
        "| TensorBoard (KiB) | files |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += ["| " + " | ".join(f"{value:g}" for value in row.values()) + " |" for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
