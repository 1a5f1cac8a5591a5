"""What a meta-step would take if the machine computed, or copied, at its measured peak.

The arithmetic is counted operation by operation, as are the bytes that operations read and write.
Operations that are merged, and tensors that stay in a cache, need fewer bytes than that.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bench import problem
from bench.tables import seconds
from bench.workloads import Case
from metarun.training import setup
from metarun.training.device import choose_device

BEST_OF = 20

HEAD = (
    "| workload | inner steps | GFLOP | GB, each operation by itself | arithmetic at peak "
    "| bytes at peak | measured | times the arithmetic |",
    "|---|---|---|---|---|---|---|---|",
)


class Peaks(NamedTuple):
    """The best of the machine, in float32: operations and bytes a second."""

    product: float  # of two 2048×2048 matrices
    convolution: float  # 3×3, 64 channels to 64, 128 images of 28×28
    copy: float  # of 256 MiB; read and written bytes count


def peaks(device: torch.device) -> Peaks:
    """Measure them."""
    a, b = torch.randn(2, 2048, 2048, device=device)
    images = torch.randn(128, 64, 28, 28, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(64, 64, 3, 3, device=device)
    weight = weight.contiguous(memory_format=torch.channels_last)
    source, target = torch.ones(2, 2**26, device=device)
    convolution = 2 * 9 * 64 * 64 * 28 * 28 * 128
    return Peaks(
        2 * 2048**3 / _best(lambda: a @ b, device),
        convolution / _best(lambda: F.conv2d(images, weight, padding=1), device),
        2 * 4 * 2**26 / _best(lambda: target.copy_(source), device),
    )


def counted(case: Case, device: torch.device) -> tuple[float, float]:
    """Floating-point operations and bytes of one meta-gradient, neither recorded nor compiled."""
    config = problem.config_of([*case.overrides, "engine.compile=none"])
    built = setup.build(config, choose_device(str(device)))
    tasks = built.source.sample("train", 0, config.trainer.meta_batch)
    meta = built.algorithm.init()
    with FlopCounterMode(display=False) as arithmetic:
        built.gradient(meta, tasks)
    with _Bytes() as traffic:
        built.gradient(meta, tasks)
    return float(arithmetic.get_total_flops()), float(traffic.total)


def write(folder: Path, cases: Sequence[Case], device: torch.device) -> None:
    """Write `limits.json` and `limits.md`; times are those of metarun in `results.json`."""
    best = peaks(device)
    path = folder / "results.json"
    measured = json.loads(path.read_text()) if path.exists() else []
    records = []
    for case in cases:
        arithmetic, traffic = counted(case, device)
        found = [
            record["median_s"]
            for record in measured
            if record["implementation"] == "metarun"
            and record["device"] == str(device)
            and (record["workload"], record["inner_steps"]) == (case.workload, case.inner_steps)
        ]
        records.append(
            {
                "workload": case.workload,
                "inner_steps": case.inner_steps,
                "flop": arithmetic,
                "bytes": traffic,
                "arithmetic_s": arithmetic / max(best.product, best.convolution),
                "bytes_s": traffic / best.copy,
                "measured_s": found[0] if found else None,
            }
        )
    folder.mkdir(parents=True, exist_ok=True)
    content = {"device": str(device), "peaks": best._asdict(), "limits": records}
    (folder / "limits.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / "limits.md").write_text(markdown(best, records))


def markdown(best: Peaks, records: Sequence[dict[str, Any]]) -> str:
    """The machine's peaks in words, and a table."""
    words = (
        f"Peaks in float32: matrix product {best.product / 1e9:.0f} GFLOP/s, convolution "
        f"{best.convolution / 1e9:.0f} GFLOP/s, copy {best.copy / 1e9:.0f} GB/s."
    )
    return "\n".join([words, "", *HEAD, *(_row(record) for record in records), ""])


def _row(record: dict[str, Any]) -> str:
    arithmetic, measured = record["arithmetic_s"], record["measured_s"]
    cells = [
        record["workload"],
        str(record["inner_steps"]),
        f"{record['flop'] / 1e9:.3g}",
        f"{record['bytes'] / 1e9:.3g}",
        seconds(arithmetic),
        seconds(record["bytes_s"]),
        "" if measured is None else seconds(measured),
        "" if measured is None else f"{measured / arithmetic:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def _best(act: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of several calls."""
    spent = []
    for _ in range(BEST_OF):
        begin = time.perf_counter()
        act()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent.append(time.perf_counter() - begin)
    return min(spent)


class _Bytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that operations read and write; views cost nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if not func.is_view and func is not torch.ops.aten._unsafe_view.default:
            tensors = pytree.tree_leaves((args, kwargs, results))
            self.total += sum(
                x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor)
            )
        return results
