"""A process that has imported what metarun needs, and becomes a metarun command when asked.

Imports take three seconds of the five that a small run takes. Run as a script: each line of its
input is a command, and each line of its output that command's exit status.
"""

import gc
import importlib
import json
import os
import pkgutil
import runpy
import signal
import sys
import threading
from typing import Any


def preload() -> None:
    """Import what commands import, without starting threads, which a fork would lose."""
    import metarun

    for module in pkgutil.walk_packages(metarun.__path__, "metarun."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in ("torch._dynamo", "torch.fx.experimental.proxy_tensor", "scipy.stats"):
        importlib.import_module(name)
    gc.freeze()  # else a collection in a command copies all memory
    assert threading.active_count() == len(os.listdir("/proc/self/task")) == 1


def become(command: dict[str, Any]) -> None:
    """Be `python -m metarun` with the arguments, environment, folder and files of a command."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(command[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    signal.alarm(command["timeout"])  # kills it
    os.environ.clear()
    os.environ.update(command["environment"])
    os.chdir(command["folder"])
    sys.path[0] = command["folder"]
    sys.argv = ["metarun", *command["arguments"]]
    runpy.run_module("metarun", run_name="__main__", alter_sys=True)


def serve() -> None:
    """Fork for each line of the input, until it ends."""
    preload()
    answers = os.fdopen(os.dup(1), "w")
    os.set_inheritable(answers.fileno(), False)
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            become(json.loads(line))
            return
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, file=answers, flush=True)
    os._exit(0)  # without freeing what was imported


if __name__ == "__main__":
    serve()
