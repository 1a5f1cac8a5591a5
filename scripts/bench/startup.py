"""W7: how long a command takes from nothing, in a process of its own."""

import os
import subprocess
import sys
import tempfile
import time

FIRST_STEP = """\
import os
from metarun import cli, trainer
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
        "metarun train, to the end of the first meta-step": [*python, FIRST_STEP, *train],
    }


def run(command: list[str], threads: int | None) -> tuple[float, float]:
    """Seconds from start to end, and the peak of the resident set in MiB.

    Raises:
        RuntimeError: the command failed.
    """
    threading = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as errors:
        begin = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | threading,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            told = errors.read().decode(errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(f"{' '.join(command[:4])}: {' '.join(told)}")
    return seconds, usage.ru_maxrss / 1024
