"""W7: how long a command takes from nothing, in a process of its own."""

import os
import subprocess
import sys
import tempfile
import time

FIRST_STEP = """\
import os
from metarun.cli import main as cli
from metarun.training import loop as trainer
whole_step = trainer.meta_step
def first_step(setup, state):
    whole_step(setup, state)
    if setup.device.type == "cuda":
        import torch
        torch.cuda.synchronize()
    os._exit(0)
trainer.meta_step = first_step
cli.main()
os._exit(1)
"""
"""`metarun train …` that ends with its first meta-step."""


def commands(device: str) -> dict[str, list[str]]:
    """What is started, by the name that a table shows; the first one is what each needs."""
    python, metarun = [sys.executable, "-c"], [sys.executable, "-m", "metarun"]
    train = ["train", "data=sinusoid", "backbone=mlp", f"device={device}"]
    return {
        "import torch": [*python, "import torch"],
        "metarun --help": [*metarun, "--help"],
        "metarun train --cfg job": [*metarun, "train", "--cfg", "job"],
        "metarun train, compiled, to the end of the first meta-step": [
            *python, FIRST_STEP, *train, "engine.compile=inductor",
        ],
        "metarun train, replayed, to the end of the first meta-step": [
            *python, FIRST_STEP, *train, "engine.compile=replay",
        ],
    }  # fmt: skip


def run(command: list[str], threads: int | None) -> float:
    """Seconds from the start of the process to its end.

    Raises:
        RuntimeError: the command failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        # What is compiled, no earlier run has compiled for it.
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder}
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        begin = time.perf_counter()
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
        )
        seconds = time.perf_counter() - begin
    if done.returncode:
        told = " ".join(done.stderr.strip().splitlines()[-1:])
        raise RuntimeError(f"{' '.join(command[:4])}: exit code {done.returncode}: {told}")
    return seconds
