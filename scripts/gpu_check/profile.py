"""How busy meta-steps keep a device, and how often they wait for it.

    python -m scripts.gpu_check.profile --device cuda --out profile.json

Busy is the part of the time in which at least one kernel runs: the union of their intervals, from
the first one's begin to the last one's end. On a CPU its operations take the place of kernels.
"""

import argparse
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from metarun.config.compose import composed, register_schemas
from metarun.training.device import choose_device
from metarun.training.loop import meta_step
from metarun.training.setup import build
from metarun.training.state import fresh

GLYPHS = ("data=glyphs", "backbone=conv4", "backbone.width=64", "trainer.meta_batch=32")
CASES = {
    "W1, 5 inner steps": ("data=sinusoid", "backbone=mlp", "trainer.meta_batch=25"),
    "W2, 5 inner steps": (*GLYPHS, "inner_opt.lr=0.4"),
    "ProtoNet": (*GLYPHS, "algo=protonet"),
}
"""Those of the benchmark with drawn characters, so that no data are needed."""
FIVE = ("algo.inner_steps=5",)
WITHOUT = ("engine.cuda_graphs=false",)
WARM_UP, TIMED = 12, 20  # meta-steps


def busy(intervals: Sequence[tuple[float, float]]) -> float:
    """Which part of the time from the first begin to the last end some interval covers."""
    if not intervals:
        return 0.0
    covered, end = 0.0, min(begin for begin, _ in intervals)
    first = end
    for begin, until in sorted(intervals):
        covered += max(0.0, until - max(begin, end))
        end = max(end, until)
    return covered / (end - first) if end > first else 0.0


def measure(settings: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Profile meta-steps of a run after its first ones, which record or compile."""
    config: Any = composed("train", [*settings, "trainer.steps=1000000"])
    setup = build(config, device)
    state = fresh(setup)
    for _ in range(WARM_UP):
        meta_step(setup, state)
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as seen:
        for _ in range(TIMED):
            meta_step(setup, state)
        if cuda:
            torch.cuda.synchronize(device)
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    of_device = [event for event in seen.events() or [] if event.device_type == wanted]
    spans = [(event.time_range.start, event.time_range.end) for event in of_device]
    return {
        "busy": busy(spans),
        "kernels_per_step": len(of_device) / TIMED if cuda else None,
        "ms_per_step": (max(e for _, e in spans) - min(b for b, _ in spans)) / 1e3 / TIMED,
        "waits_per_step": waits(lambda: meta_step(setup, state)) if cuda else None,
    }


def waits(step: Any) -> float:
    """How often a step waits for the device, as far as torch notices; of a few steps, the mean."""
    count = 4
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(count):
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in told) / count


def main() -> None:
    """Profile every case and write the figures."""
    parser = argparse.ArgumentParser(description="Profile meta-steps on a device.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    register_schemas()
    device = choose_device(options.device)
    found = {}
    cases = dict(CASES)
    for name, settings in CASES.items():
        cases[f"{name}, without a graph"] = (*settings, *WITHOUT)
    for name, settings in cases.items():
        if device.type == "cpu":  # a rehearsal
            settings = (*settings, "trainer.meta_batch=2", "engine.compile=replay")
        if "inner steps" in name:
            settings = (*settings, *FIVE)
        found[name] = measure(settings, device)
        print(name, json.dumps(found[name]))
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
