"""Peak memory and time of each gradient mode against the number of inner steps.

    python scripts/unroll_memory.py --out docs/unroll_memory
    python scripts/unroll_memory.py --network transformer --steps 1 2 4

Second-order MAML of one 5-way 5-shot task in float32: of 28 × 28 images on Conv4 with 64
channels, or of sequences of 64 tokens on 12 transformer blocks of width 128. Each measurement is
a process of its own. On a GPU, memory is torch's peak of allocated bytes; on a CPU, the peak of
the resident set, with an allocator that gives freed blocks back at once (so that it counts live
tensors), and time is taken in processes with the usual allocator. The peak of a meta-gradient
without any inner step is subtracted. `higher` unrolls the same network, if it is installed.

Writes <out>.json (every measurement) and <out>.png.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from metarun.components.backbone.conv4 import Conv4
from metarun.training.result import peak_memory_gib
from metarun.unroll import BlockLoss, Checkpoint, Truncated, sgd, unroll

MODES: dict[str, Any] = {
    "reverse": "reverse",
    "first_order": "first_order",
    "truncated (last 5)": Truncated(5),
    "checkpoint": "checkpoint",
    "checkpoint (√K blocks)": Checkpoint(None),
    "mixed": "mixed",
    "mixed by blocks": "mixed",
}
MEASURED = {
    "conv4": ["reverse", "first_order", "truncated (last 5)", "checkpoint",
              "checkpoint (√K blocks)", "mixed", "higher"],
    "transformer": ["reverse", "checkpoint", "mixed", "mixed by blocks"],
}  # fmt: skip
# As glibc grows its threshold with use, freed blocks would otherwise stay in the process.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class Block(nn.Module):
    """A transformer block with the normalisation first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project, self.join = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(examples, tokens, width) -> the same shape."""
        projected = self.project(self.before(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = (part.transpose(1, 2) for part in projected.unbind(2))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.join(attended)
        return x + self.mlp(self.between(x))


class Head(nn.Module):
    """The mean over tokens, classified."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(examples, tokens, width) -> (examples, outputs)."""
        return self.linear(x.mean(dim=1))


def problem(network: str, device: torch.device) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """The network, the examples of a task and their labels."""
    torch.manual_seed(0)
    y = torch.arange(5, device=device).repeat(5)
    if network == "conv4":
        model: nn.Module = Conv4((1, 28, 28), 5, width=64)
        return model.to(device), torch.rand(25, 1, 28, 28, device=device), y
    model = nn.Sequential(*[Block(128, 4) for _ in range(12)], Head(128, 5))
    return model.to(device), torch.randn(25, 64, 128, device=device), y


def meta_step(mode: str, steps: int, network: str, device: torch.device) -> Callable[[], Any]:
    """One meta-gradient: `steps` inner steps, a query loss, its gradient."""
    model, x, y = problem(network, device)

    if mode == "higher":
        import higher

        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

        def by_higher() -> Any:
            with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (fast, diff):
                for _ in range(steps):
                    diff.step(F.cross_entropy(fast(x), y))
                query = F.cross_entropy(fast(x), y)
            return torch.autograd.grad(query, list(model.parameters()))

        return by_higher

    start = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}

    def loss(params: dict[str, torch.Tensor], step: int, task: Any) -> torch.Tensor:
        return F.cross_entropy(functional_call(model, params, (task[0],)), task[1])

    inner_loss: Any = loss
    if mode == "mixed by blocks":
        assert isinstance(model, nn.Sequential)
        inner_loss = BlockLoss(
            model, inputs=lambda task: task[0], loss=lambda out, task: F.cross_entropy(out, task[1])
        )

    def by_metarun() -> Any:
        end = unroll(inner_loss, start, sgd(0.01), steps, context=(x, y), gradient=MODES[mode])
        return torch.autograd.grad(loss(end.params, 0, (x, y)), list(start.values()))

    return by_metarun


def measure(
    mode: str, steps: int, repeats: int, network: str, device: torch.device
) -> dict[str, Any]:
    """Peak memory in MB of one meta-step, and the seconds of each of `repeats` more."""
    if mode != "higher":  # so that what torch loads at its first derivative is not counted
        w = torch.ones(1, device=device, requires_grad=True)
        tiny = unroll(lambda p, _: p["w"].pow(2).sum(), {"w": w}, sgd(), 1, gradient=MODES[mode])
        torch.autograd.grad(tiny.params["w"].sum(), w)
    run = meta_step(mode, steps, network, device)
    cuda = device.type == "cuda"
    run()
    seconds = []
    for _ in range(repeats):
        if cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    peak = peak_memory_gib(torch.device(device)) * 2**10
    return {"mode": mode, "steps": steps, "peak_mb": peak, "seconds": seconds}


def in_process(
    mode: str, steps: int, repeats: int, network: str, device: str, **env: str
) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--one", mode, str(steps), str(repeats)]
    done = subprocess.run(
        [*command, "--network", network, "--device", device],
        env=os.environ | env,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{mode}, {steps} steps:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def slope(points: dict[int, float]) -> float:
    """Least-squares growth for each step."""
    mean_x, mean_y = statistics.mean(points), statistics.mean(points.values())
    above = sum((x - mean_x) * (y - mean_y) for x, y in points.items())
    return above / sum((x - mean_x) ** 2 for x in points)


def draw(results: dict[str, dict[int, dict[str, Any]]], title: str, path: Path) -> None:
    """Memory and time against inner steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (memory, seconds) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    markers = iter("osD^vPX*")
    for mode, points in results.items():
        marker = next(markers)
        steps = sorted(points)
        memory.plot(steps, [points[k]["peak_mb"] for k in steps], marker=marker, label=mode)
        medians = [statistics.median(points[k]["seconds"]) for k in steps]
        seconds.plot(steps, medians, marker=marker, label=mode)
    memory.set(xlabel="inner steps", ylabel="peak memory of the inner steps (MB)", ylim=(0, None))
    seconds.set(xlabel="inner steps", ylabel="seconds for a meta-gradient (median)", ylim=(0, None))
    for axes in (memory, seconds):
        axes.grid(alpha=0.3)
    memory.legend(frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure every mode, print the table, write the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/unroll_memory"))
    parser.add_argument("--network", choices=list(MEASURED), default="conv4")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 40])
    parser.add_argument("--rounds", type=int, default=5, help="interleaved timings of each")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        warnings.simplefilter("ignore")  # old `higher` uses what torch has deprecated
        mode, steps, repeats = options.one
        device = torch.device(options.device)
        found = measure(mode, int(steps), int(repeats), options.network, device)
        print(json.dumps(found))
        return

    modes = [m for m in MEASURED[options.network] if m != "higher" or find_spec("higher")]
    where = (options.network, options.device)
    results: dict[str, dict[int, dict[str, Any]]] = {mode: {} for mode in modes}
    without = {mode: in_process(mode, 0, 0, *where, **GIVE_BACK)["peak_mb"] for mode in modes}
    for steps in options.steps:
        for mode in modes:
            results[mode][steps] = in_process(mode, steps, 0, *where, **GIVE_BACK)
            results[mode][steps]["peak_mb"] -= without[mode]
            results[mode][steps]["seconds"] = []
        for _ in range(options.rounds):  # interleaved, so that a busy moment hits all modes
            for mode in modes:
                timed = in_process(mode, steps, 3, *where)
                results[mode][steps]["seconds"] += timed["seconds"]
        print(f"{steps} inner steps done", file=sys.stderr)

    growth = {
        mode: slope({k: point["peak_mb"] for k, point in points.items()})
        for mode, points in results.items()
    }
    least, most = min(options.steps), max(options.steps)
    device_name = (
        torch.cuda.get_device_name()
        if options.device.startswith("cuda")
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    print(f"{device_name}, torch {torch.__version__.partition('+')[0]}")
    head = f"{'mode':24} {'MB at ' + str(least):>9} {'MB/step':>9} {'of reverse':>11}"
    print(f"{head} {'time ratio at ' + str(most):>22}")
    for mode, points in results.items():
        ratios = [
            a / b
            for a, b in zip(
                points[most]["seconds"], results["reverse"][most]["seconds"], strict=True
            )
        ]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
        share = growth[mode] / growth["reverse"]
        first = points[least]["peak_mb"]
        print(f"{mode:24} {first:9.1f} {growth[mode]:9.3f} {share:11.3f} {spread:>22}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"device": device_name, "torch": torch.__version__, "growth_mb": growth}
    record["results"] = [point for points in results.values() for point in points.values()]
    options.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    title = f"One second-order meta-gradient, {options.network}, 5-way 5-shot ({device_name})"
    draw(results, title, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
