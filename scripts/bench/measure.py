"""A case from the check of its gradients to its records."""

import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bench import startup
from bench.problem import BATCHES
from bench.worker import Worker, WorkerFailed
from bench.workloads import METARUN, Case, omniglot_folder

Record = dict[str, Any]


class WrongGradient(Exception):
    """Two implementations of a case do not compute the same; the message says which."""


@dataclass(frozen=True)
class Options:
    """How everything is measured.

    Attributes:
        device: "cpu", "cuda" or "cuda:N".
        threads: CPU threads of each process; None leaves that to torch.
        repeats: timings of each implementation.
        timing_s: seconds that a timing lasts at least, in as many steps as it takes.
        warm_up_s: no warm-up step begins later than this.
        only: the implementations to take; None for all.
    """

    device: str
    threads: int | None
    repeats: int
    timing_s: float = 0.2
    warm_up_s: float = 120.0
    only: tuple[str, ...] | None = None


def run(case: Case, options: Options) -> tuple[list[Record], list[Record]]:
    """Check and time the implementations of a case.

    Returns:
        A record of each one that was measured, and one of each that was left out, with "why".

    Raises:
        WrongGradient: an implementation computes something else than the first one.
        WorkerFailed: the first one, metarun, failed.
    """
    only = options.only
    names = [name for name in case.implementations if only is None or name in only]
    if case.kind == "start-up":
        return _start_up(case, options), []
    if case.kind == "sampling" and omniglot_folder() is None:
        why = "METARUN_DATA names no folder with Omniglot"
        return [], [_left_out(case, options, name, why) for name in names]
    if not names:
        return [], []
    failed: dict[str, str] = {}
    if case.kind == "meta-step":
        check(case, names, options, failed)
    names = [name for name in names if name not in failed]
    records = _timed(case, names, options, failed)
    return records, [_left_out(case, options, name, why) for name, why in failed.items()]


def check(case: Case, names: Sequence[str], options: Options, failed: dict[str, str]) -> None:
    """Compare the meta-gradients of the first meta-steps in float64.

    Of several steps, since metarun may compute the first ones in another way than the later ones.
    `failed` gets a reason for each implementation that could not compute them.

    Raises:
        WrongGradient: they differ by more than the case allows.
        WorkerFailed: the first implementation failed.
    """
    size = f"trainer.meta_batch={case.check_tasks}"
    expected = None
    for name in names:
        overrides = [*_overrides(case, name), "engine.precision=float64"]
        overrides = [o for o in overrides if not o.startswith("trainer.meta_batch=")] + [size]
        try:
            with _worker(case, name, overrides, options) as worker:
                found = worker.gradients(BATCHES)
        except WorkerFailed as error:
            _give_up(case, names, name, error, failed)
            continue
        if expected is None:
            expected = found
        compared = found[:1] if name in case.rough else found
        for step, (wanted, got) in enumerate(zip(expected, compared, strict=False), start=1):
            if not (off := difference(wanted, got)) <= (allowed := case.tolerance(name)):
                raise WrongGradient(
                    f"{case.label}: the meta-gradient of {name} at meta-step {step} is {off:.1e} "
                    f"from that of {names[0]}, relative to its largest element; "
                    f"{allowed:.0e} is allowed. Nothing has been timed."
                )
        print(f"  {name}: gradients agree", file=sys.stderr)


def difference(wanted: Mapping[str, Any], got: Mapping[str, Any]) -> float:
    """The largest difference of two gradients, relative to the largest element of the first.

    NaN if either has one; infinite if they are not of the same parameters.
    """
    if {k: v.shape for k, v in wanted.items()} != {k: v.shape for k, v in got.items()}:
        return float("inf")
    largest = np.max([np.abs(grad).max() for grad in wanted.values()])
    apart = np.max([np.abs(got[name] - grad).max() for name, grad in wanted.items()])
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.float64(apart) / largest)


def ratios(seconds: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """Median, least and most of the ratio in each round."""
    each = [a / b for a, b in zip(seconds, base, strict=True)]
    return statistics.median(each), min(each), max(each)


def machine(options: Options) -> str:
    """The device and torch's version, in words."""
    if options.device.startswith("cuda"):
        name = torch.cuda.get_device_name(options.device)
    else:
        threads = options.threads or torch.get_num_threads()
        name = f"{platform.machine()} CPU, {threads} thread{'s' * (threads != 1)}"
    return f"{name}, torch {torch.__version__.partition('+')[0]}"


def in_turn(names: Sequence[str], turn: int) -> list[str]:
    """The order of a round: another one starts each time, and every other cycle runs backwards."""
    first = turn % len(names)
    order = [*names[first:], *names[:first]]
    return order if turn // len(names) % 2 == 0 else order[::-1]


def _timed(
    case: Case, names: Sequence[str], options: Options, failed: dict[str, str]
) -> list[Record]:
    """Rounds in which each implementation is timed once, in changing order."""
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        warm: dict[str, tuple[float, int]] = {}
        for name in names:
            worker = stack.enter_context(_worker(case, name, _overrides(case, name), options))
            try:
                warm[name] = worker.warm_up(options.warm_up_s, options.timing_s)
            except WorkerFailed as error:
                _give_up(case, names, name, error, failed)
                continue
            workers[name] = worker
            print(f"  {name}: warm after {warm[name][0]:.1f} s", file=sys.stderr)
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        for turn in range(options.repeats):
            for name in in_turn([*workers], turn):
                try:
                    seconds[name].append(workers[name].time(warm[name][1]))
                except WorkerFailed as error:
                    _give_up(case, names, name, error, failed)
                    del workers[name]
        return [
            _record(case, options, name, seconds[name], seconds[names[0]], workers[name].peak_mib())
            | {"warmup_s": warm[name][0], "steps_a_timing": warm[name][1]}
            for name in workers
        ]


def _start_up(case: Case, options: Options) -> list[Record]:
    commands = startup.commands(options.device)
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(options.repeats + 1):
        for name, command in commands.items():
            spent = startup.run(command, options.threads)
            if turn:  # the first round reads the files from the disk
                seconds[name].append(spent)
    base = seconds[next(iter(commands))]
    return [_record(case, options, name, seconds[name], base, None) for name in commands]


def _worker(case: Case, name: str, overrides: Sequence[str], options: Options) -> Worker:
    return Worker(name, case.kind, overrides, options.device, options.threads)


def _overrides(case: Case, name: str) -> list[str]:
    return [*case.overrides, *METARUN.get(name, ())]


def _give_up(
    case: Case, names: Sequence[str], name: str, error: WorkerFailed, failed: dict[str, str]
) -> None:
    if name == names[0]:
        raise WorkerFailed(f"{case.label}: {name}: {error}") from error
    failed[name] = str(error)
    print(f"  {name}: left out: {error}", file=sys.stderr)


def _identity(case: Case, options: Options, name: str) -> Record:
    return {
        "workload": case.workload,
        "inner_steps": case.inner_steps,
        "order": case.order,
        "device": options.device,
        "implementation": name,
    }


def _record(
    case: Case,
    options: Options,
    name: str,
    seconds: Sequence[float],
    base: Sequence[float],
    peak_mib: float | None,
) -> Record:
    ratio, least, most = ratios(seconds, base)
    return {
        **_identity(case, options, name),
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "peak_mib": None if peak_mib is None else round(peak_mib, 1),
        "repeats": len(seconds),
        "machine": machine(options),
        "ratio": ratio,
        "ratio_min": least,
        "ratio_max": most,
        "what": case.what,
    }


def _left_out(case: Case, options: Options, name: str, why: str) -> Record:
    return _identity(case, options, name) | {"why": why}
