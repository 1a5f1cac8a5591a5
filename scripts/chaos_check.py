"""Is a disturbed run what it would have been? Used by chaos.py and the tests.

Everything that a run leaves is compared with the same run left in peace, but for what no two
runs share: times, memory, and how often it was started.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metarun.rundir import checkpoint
from metarun.rundir.checkpoint_fields import ELAPSED_FIELD

CHANGING_RESULTS = {"train_seconds", "test_seconds", "peak_memory_gib"}
"""What may differ in result.json."""


def differences(run: Path, reference: Path) -> list[str]:
    """What is wrong with a finished run, in words; nothing if it equals the undisturbed one."""
    status = _json(run / "status.json").get("status")
    if status != "completed":
        return [f"the status is {status}"]
    return [
        *_checkpoints(run / "checkpoints", reference / "checkpoints"),
        *_metrics(run, reference),
        *_tensorboard(run, reference),
        *_result(run, reference),
        *(f"left behind: {p.relative_to(run)}" for p in run.rglob("*") if p.suffix == ".tmp"),
    ]


def _checkpoints(run: Path, reference: Path) -> Iterator[str]:
    """Step files need not be the same ones: an interruption saves one of its own."""
    names = {path.name for path in reference.glob("*.safetensors")}
    found = {path.name for path in run.glob("*.safetensors")}
    if missing := {"last.safetensors", "best.safetensors"} - found:
        yield f"no {sorted(missing)}"
    for name in sorted(names & found):
        ours, theirs = (checkpoint.load(f / name) for f in (run, reference))
        for key in sorted((ours.keys() | theirs.keys()) - {ELAPSED_FIELD}):
            if not same(ours.get(key), theirs.get(key)):
                yield f"{name}: {key} differs"


def same(ours: Any, theirs: Any) -> bool:
    """Equal values, tensors bit for bit."""
    if isinstance(theirs, torch.Tensor):
        return isinstance(ours, torch.Tensor) and torch.equal(ours, theirs)
    if isinstance(theirs, dict) and isinstance(ours, dict):
        return list(ours) == list(theirs) and all(same(ours[k], theirs[k]) for k in theirs)
    if isinstance(theirs, list | tuple) and isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return bool(type(ours) is type(theirs) and ours == theirs)


def entries(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, each of which must be whole."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _metrics(run: Path, reference: Path) -> Iterator[str]:
    def comparable(entry: dict[str, Any]) -> dict[str, Any]:
        return {tag: value for tag, value in entry.items() if not tag.startswith("time")}

    try:
        ours, theirs = entries(run), entries(reference)
    except ValueError as error:
        yield f"metrics.jsonl: {error}"
        return
    if list(map(comparable, ours)) != list(map(comparable, theirs)):
        steps = [[entry["step"] for entry in log] for log in (ours, theirs)]
        where = "values" if steps[0] == steps[1] else f"steps {steps[0]} instead of {steps[1]}"
        yield f"metrics.jsonl: {where}"
    speeds = [v for r in ours for tag, v in r.items() if tag.startswith("time/")]
    if any(v is None or not (math.isfinite(v) and v > 0) for v in speeds):
        yield "metrics.jsonl: a speed that is not above 0"


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run: steps and values by tag."""
    events = EventAccumulator(str(run / "tb"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in
            events.Tags()["scalars"]}  # fmt: skip


def _tensorboard(run: Path, reference: Path) -> Iterator[str]:
    ours, theirs = scalars(run), scalars(reference)
    if ours.keys() != theirs.keys():
        yield f"TensorBoard: tags {sorted(ours.keys() ^ theirs.keys())}"
    for tag in sorted(ours.keys() & theirs.keys()):
        if [step for step, _ in ours[tag]] != [step for step, _ in theirs[tag]]:
            steps = [step for step, _ in ours[tag]]
            twice = sorted({step for step in steps if steps.count(step) > 1})
            yield f"TensorBoard: {tag} has other steps (twice: {twice})"
        elif ours[tag] != theirs[tag] and not tag.startswith("time/"):
            yield f"TensorBoard: values of {tag}"


def _result(run: Path, reference: Path) -> Iterator[str]:
    ours, theirs = _json(run / "result.json"), _json(reference / "result.json")
    for key in sorted((ours.keys() | theirs.keys()) - CHANGING_RESULTS):
        if ours.get(key) != theirs.get(key):
            yield f"result.json: {key}"
    if any(ours.get(key, -1) < 0 for key in ("train_seconds", "test_seconds")):
        yield "result.json: a negative duration"


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
