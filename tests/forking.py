"""Commands of metarun without the three seconds that their imports take.

Run as a script, this is a server: a process that has imported what metarun needs, and forks to
become a command. Each line of its input is a request, each line of its output the answer:
`{"start": …}`, a process id; `{"wait": process id}`, the exit status.

`Forks` is what asks it, and a `Fork` has what tests need of a `subprocess.Popen`.
"""

import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins


def preload() -> None:
    """Import what commands import, without starting threads, which a fork would lose.

    Also do what takes a while the first time: read the catalogue, look for Hydra's plugins, and
    make the tables of its parser.
    """
    import metarun

    for module in pkgutil.walk_packages(metarun.__path__, "metarun."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in ("torch._dynamo", "torch.fx.experimental.proxy_tensor", "scipy.stats"):
        importlib.import_module(name)
    for group in metarun.config.catalogue.GROUPS:
        metarun.config.catalogue.components(group)
    Plugins.instance()
    OverridesParser.create().parse_override("seed=0")
    gc.freeze()  # else a collection in a command copies all memory
    assert threading.active_count() == len(os.listdir("/proc/self/task")) == 1


def become(command: dict[str, Any]) -> None:
    """Be `python -m metarun` with the arguments, environment, folder and files of a command."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(command[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    signal.alarm(command["timeout"])  # kills it
    os.environ.clear()
    os.environ.update(command["environment"])
    os.chdir(command["folder"])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))  # torch has read the server's
    sys.path[0] = command["folder"]
    sys.argv = ["metarun", *command["arguments"]]
    runpy.run_module("metarun", run_name="__main__", alter_sys=True)


def serve() -> None:
    """Answer each line of the input, until it ends."""
    preload()
    answers = os.fdopen(os.dup(1), "w")
    os.set_inheritable(answers.fileno(), False)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        elif (answer := os.fork()) == 0:
            become(request["start"])
            return
        print(answer, file=answers, flush=True)
    os._exit(0)  # without freeing what was imported


class Fork:
    """A command of metarun in a process of its own.

    Args:
        forks: what has started it.
        pid: its process.
        streams: the files that it writes stdout and stderr to.
    """

    def __init__(self, forks: "Forks", pid: int, streams: tuple[str, str]) -> None:
        self.forks, self.pid, self.streams = forks, pid, streams
        self.returncode: int | None = None
        self._descriptor = os.pidfd_open(pid)

    def poll(self) -> int | None:
        """The exit status, or None while it runs."""
        return self._ended(0)

    def wait(self, timeout: float = 300) -> int:
        """The exit status.

        Raises:
            TimeoutExpired: it runs for longer than so many seconds.
        """
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout, *self._texts())
        return code

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """What it has written to stdout and stderr, once it has ended."""
        self.wait(timeout)
        return self._texts()

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send it SIGTERM, if it has not ended."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill it, if it has not ended."""
        self.send_signal(signal.SIGKILL)

    def _texts(self) -> tuple[str, str]:
        out, err = (Path(stream).read_text() for stream in self.streams)
        return out, err

    def _ended(self, timeout: float) -> int | None:
        if self.returncode is None and select.select([self._descriptor], [], [], timeout)[0]:
            self.returncode = self.forks.ask({"wait": self.pid})
            os.close(self._descriptor)
        return self.returncode


class Forks:
    """The server, from the tests' side."""

    def __init__(self, streams: Path) -> None:
        self.streams, self.count = streams, 0
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, request: dict[str, Any]) -> int:
        """The server's answer."""
        assert self.server.stdin is not None and self.server.stdout is not None
        print(json.dumps(request), file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())

    def start(
        self,
        arguments: Sequence[str],
        folder: str | Path,
        environment: Mapping[str, str],
        streams: tuple[str, str] | None = None,
    ) -> Fork:
        """Start `python -m metarun` with arguments in a folder.

        Args:
            streams: files for stdout and stderr; None: some of its own.
        """
        if streams is None:
            own = self.streams / str(self.count)
            own.mkdir()
            self.count += 1
            streams = str(own / "stdout"), str(own / "stderr")
        command = {
            "arguments": list(arguments),
            "environment": dict(environment),
            "folder": str(folder),
            "stdout": streams[0],
            "stderr": streams[1],
            "timeout": 300,
        }
        return Fork(self, self.ask({"start": command}), streams)

    def popen(self, command: Sequence[Any], **options: Any) -> Fork:
        """What `subprocess.Popen` does with `python -m metarun …`, for output to files."""
        assert [*map(str, command[:3])] == [sys.executable, "-m", "metarun"]
        out = getattr(options["stdout"], "name", os.devnull)
        err = out if options["stderr"] == subprocess.STDOUT else options["stderr"].name
        folder = options.get("cwd") or os.getcwd()
        return self.start([*map(str, command[3:])], folder, options["env"], (out, err))

    def end(self) -> None:
        """End the server."""
        assert self.server.stdin is not None
        with self.server:  # which ends when its input does
            self.server.stdin.close()
        assert self.server.returncode == 0


if __name__ == "__main__":
    serve()
