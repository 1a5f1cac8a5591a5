"""The command line of the benchmark."""

import argparse
import re
import sys
from pathlib import Path

import torch

from bench import limits, measure, peers, results
from bench.worker import WorkerFailed
from bench.workloads import METARUN, Case, all_cases

DESCRIPTION = """\
Time one meta-step of metarun and of its peers: the same network, initial weights, tasks and inner
steps for all, which must give the same meta-gradient in float64 before anything is timed.

  W1  sinusoid regression, MLP             W8   first-order MAML on W2
  W2  Omniglot, conv4-64 strided           W9   ProtoNet, conv4-64: Omniglot, and 84×84×3
  W3  mini-ImageNet's shape, conv4-32      W10  R2D2, the same
  W4  ANIL on W2                           W11  MetaOptNet's support vector machine, the same
  W5  drawing tasks of Omniglot            W12  MAML++, Omniglot, conv4-64 strided
  W6  W2's small network, 1 to 100 steps   W13  Meta-SGD, the same
  W7  start-up of the command line         W14  MAML with ResNet-12, 84×84×3

METARUN_DATA names the folder of data sets; without Omniglot in it, random pixels of its shape take
its place, and W5 is left out.
"""


def main(arguments: list[str] | None = None) -> int:
    """Measure what the command line asks for; 0, or 1 if metarun failed or gradients differ."""
    options = _parser().parse_args(arguments)
    cases = [
        case
        for case in all_cases(options.quick)
        if options.workloads is None or {case.workload, _family(case)} & {*options.workloads}
        if options.inner_steps in (None, case.inner_steps)
    ]
    if options.limits:
        return _limits(options, cases)
    if not cases:
        print("bench: no case has these workloads and inner steps", file=sys.stderr)
        return 2
    how = measure.Options(
        options.device,
        options.threads,
        options.repeats if options.repeats is not None else 2 if options.quick else 7,
        timing_s=0.02 if options.quick else 0.2,
        only=options.implementations,
    )
    for number, case in enumerate(cases, start=1):
        print(f"[{number}/{len(cases)}] {case.label}: {case.what}", file=sys.stderr)
        try:
            measured, left_out = measure.run(case, how)
        except (measure.WrongGradient, WorkerFailed, RuntimeError) as error:
            print(f"bench: {error}", file=sys.stderr)
            return 1
        results.add(options.out, case, options.device, measured, left_out)
        results.present(options.out)
    print((options.out / "table.md").read_text())
    return 0


def _limits(options: argparse.Namespace, cases: list[Case]) -> int:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    meta_steps = [case for case in cases if case.kind == "meta-step"]
    limits.write(options.out, meta_steps, torch.device(options.device))
    print((options.out / "limits.md").read_text())
    return 0


def _family(case: Case) -> str:
    """The workload without its variant."""
    return case.workload.partition("-")[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python scripts/bench",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cases = all_cases(quick=True)
    known = [*dict.fromkeys([*map(_family, cases), *(case.workload for case in cases)])]
    names = [*METARUN, *peers.NAMES]
    parser.add_argument(
        "--workloads",
        type=lambda text: _listed(text, known),
        metavar="W1,W9-28",
        help="which ones, with all variants or one of them; all if not given",
    )
    parser.add_argument(
        "--implementations",
        type=lambda text: _listed(text, names),
        metavar="A,B",
        help=f"of those that a workload has: {', '.join(names)}; all if not given",
    )
    parser.add_argument(
        "--inner-steps", type=_positive, help="only cases with so many; all if not given"
    )
    parser.add_argument(
        "--device", type=_device, default="cpu", help="cpu (default), cuda or cuda:N"
    )
    parser.add_argument("--repeats", type=_positive, help="rounds of timings (default: 7)")
    parser.add_argument("--threads", type=_positive, help="CPU threads (default: torch's choice)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("outputs/bench"),
        help="folder of results.json, table.md and the plots; measurements of other cases that it "
        "holds are kept (default: outputs/bench)",
    )
    parser.add_argument(
        "--limits",
        action="store_true",
        help="measure the machine's peaks instead, and what a meta-step would take at them",
    )
    parser.add_argument(
        "--quick", action="store_true", help="2 repeats of small cases: does it work?"
    )
    return parser


def _listed(text: str, known: list[str]) -> tuple[str, ...]:
    chosen = tuple(part.strip() for part in text.split(",") if part.strip())
    for name in chosen:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name}: choose from {', '.join(known)}")
    return chosen


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text}: choose cpu, cuda or cuda:N")
    return text


def _positive(text: str) -> int:
    number = int(text) if text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be 1 or more")
    return number
