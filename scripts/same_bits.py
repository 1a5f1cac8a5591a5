"""Check that a change leaves the figures of runs alone, bit for bit.

    python scripts/same_bits.py record before.json      # on the old code
    python scripts/same_bits.py compare before.json     # on the new code

Each of a dozen short runs, of every kind, is trained in a process of its own. What is compared is
a digest of the meta-parameters in its last checkpoint, and the scores of its result. Both commands
must run on the same machine, with the same torch and the same number of threads.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from metarun.rundir import checkpoint

SMALL = [
    "trainer.steps=4",
    "trainer.meta_batch=2",
    "trainer.eval_episodes=4",
    "trainer.test_episodes=8",
    "device=cpu",
]
IMAGES = ["data=glyphs", "backbone.width=8", *SMALL]
CURVES = ["data=sinusoid", "backbone=mlp", "backbone.hidden=[16]", *SMALL]

RUNS: dict[str, list[str]] = {
    "maml on images": [*IMAGES],
    "maml, unrecorded": [*IMAGES, "engine.compile=none"],
    "maml, replayed": [*IMAGES, "engine.compile=replay"],
    "maml by vmap": [*IMAGES, "engine.batching=vmap"],
    "maml, first order": [*IMAGES, "algo.order=1", "backbone.pool=max"],
    "anil": [*IMAGES, "algo=anil", "algo.inner_steps=3"],
    "checkpoint": [*IMAGES, "engine.gradient=checkpoint", "algo.inner_steps=3"],
    "sinusoid": [*CURVES],
    "sinusoid, compiled": [*CURVES, "engine.compile=inductor"],
    "learned rates": [*CURVES, "inner_opt.learn=[lr]", "inner_opt.granularity=parameter_step"],
    "inner adam": [*CURVES, "inner_opt=adam", "inner_opt.lr=0.01", "algo.inner_steps=2"],
    "truncated": [*CURVES, "engine.gradient=truncated", "engine.last=1", "algo.inner_steps=3"],
    "implicit": [*CURVES, "engine.gradient=implicit", "algo.inner_steps=4"],
    "evolution": [*CURVES, "engine.gradient=evolution"],
    "outer adamw, cosine, clipped": [
        *CURVES,
        "outer_opt=adamw",
        "outer_opt.schedule=cosine",
        "outer_opt.clip_norm=0.1",
    ],
    "double precision": [*CURVES, "engine.precision=float64", "seed=3"],
}


def outcome(arguments: list[str], directory: Path) -> dict[str, Any]:
    """The digest of the last meta-parameters, and the scores, of a run with these arguments."""
    command = [sys.executable, "-m", "metarun", "train", *arguments, f"hydra.run.dir={directory}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")

    content = checkpoint.load(directory / "checkpoints" / "last.safetensors")
    digest = hashlib.sha256()
    for name, value in sorted(content["meta"].items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    result = json.loads((directory / "result.json").read_text())
    return {"meta": digest.hexdigest(), "best": result["best"], "test": result["test"]}


def main() -> None:
    """Record or compare; exit with 1 where a run differs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", help="the run of this name")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    before = json.loads(options.file.read_text()) if options.action == "compare" else {}
    found, differing = {}, []
    for name, arguments in RUNS.items():
        if options.only not in (None, name):
            continue
        with tempfile.TemporaryDirectory() as folder:
            found[name] = outcome(arguments, Path(folder) / "run")
        if options.action == "compare":
            wanted, now = before[name], found[name]
            keys = wanted["test"].keys() & now["test"].keys()
            same = wanted["meta"] == now["meta"] and all(
                wanted["test"][key] == now["test"][key] for key in keys
            )
            differing += [] if same else [name]
            print(f"{name}: {'the same' if same else 'DIFFERENT'}", flush=True)
        else:
            print(f"{name}: {found[name]['meta'][:16]}", flush=True)
    if options.action == "record":
        options.file.write_text(json.dumps(found, indent=1))
    sys.exit(f"{len(differing)} runs differ" if differing else 0)


if __name__ == "__main__":
    main()
