"""The pass over all operations: in processes, each with a time limit."""

import argparse
import json
import multiprocessing
import time
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from op_zoo import database, modules, report
from op_zoo.measure import measured

REPO = Path(__file__).resolve().parents[2]
LIMIT = 120.0  # seconds for an operation


def results_of(name: str) -> list[dict[str, Any]]:
    """All verdicts about an operation: one dict for each sample and way."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    try:
        zoo = modules.zoo()
        cases = [zoo[name]()] if name in zoo else list(database.cases(name))
    except Exception as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        return [{"name": name, "way": "all", "verdict": "skipped", "remark": text}]
    found = [
        {"name": name, "sample": i, "way": way, "verdict": verdict, "remark": remark}
        for i, case in enumerate(cases)
        for way, verdict, remark in measured(case)
    ]
    nothing = {"name": name, "way": "all", "verdict": "skipped", "remark": "no small real sample"}
    return found or [nothing]


def _work(pipe: Connection) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    while (name := pipe.recv()) is not None:
        pipe.send(results_of(name))


class _Worker:
    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.name = ""
        self.since = time.monotonic()

    def give(self, name: str) -> None:
        self.name, self.since = name, time.monotonic()
        self.pipe.send(name)

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def run(names: list[str], processes: int) -> Iterator[list[dict[str, Any]]]:
    """The results of each operation, as they come."""
    waiting = list(reversed(names))
    busy = [_Worker() for _ in range(min(processes, len(names)))]
    for worker in busy:
        worker.give(waiting.pop())
    while busy:
        wait([worker.pipe for worker in busy], timeout=1.0)
        for i, worker in reversed(list(enumerate(busy))):
            found = _received(worker)
            if found is None:
                continue
            yield found
            if not worker.process.is_alive():
                worker.end()
                if waiting:
                    worker = busy[i] = _Worker()
            if waiting:
                worker.give(waiting.pop())
            else:
                worker.end()
                del busy[i]


def _received(worker: _Worker) -> list[dict[str, Any]] | None:
    """What a worker has found; None while it is at work."""
    failed = {"name": worker.name, "way": "all", "verdict": "failed"}
    try:
        if worker.pipe.poll():
            found: list[dict[str, Any]] = worker.pipe.recv()
            return found
    except EOFError:
        worker.end()
        return [{**failed, "remark": "the process died"}]
    if time.monotonic() - worker.since > LIMIT:
        worker.end()
        return [{**failed, "remark": f"took more than {LIMIT:.0f} s"}]
    return None


def main(parser: argparse.ArgumentParser) -> None:
    """Measure, and write the tables."""
    parser.add_argument("--only", help="names that contain this")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=REPO / "outputs" / "op_zoo.jsonl")
    options = parser.parse_args()
    names = [*modules.zoo(), *database.operations()]
    if options.only:
        names = [name for name in names if options.only in name]
        for found in run(names, options.processes):
            for result in found:
                print(*(result.get(k, "") for k in ("name", "sample", "way", "verdict", "remark")))
        return
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.touch()
    done = [json.loads(line) for line in options.out.read_text().splitlines()]
    left = [name for name in names if name not in {result["name"] for result in done}]
    with options.out.open("a") as file:
        for count, found in enumerate(run(left, options.processes), 1):
            done += found
            file.write("".join(json.dumps(result) + "\n" for result in found))
            file.flush()
            print(f"{count} of {len(left)}: {found[0]['name']}", flush=True)
    report.write(done, len(names), REPO / "docs")
