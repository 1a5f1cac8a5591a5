"""A process of its own for each implementation, which times itself when it is asked to."""

import contextlib
import math
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

LEAST_STEPS, AGREEMENT = 5, 0.2
"""Warm-up: at least so many steps, and until two successive ones are so near to each other."""

LEAD_IN = 2
"""A timing begins with this part of its steps, uncounted."""


class WorkerFailed(Exception):
    """The implementation raised, or its process died; the message says why in one line."""


class Worker:
    """An implementation in its process; every method waits for the answer.

    Each raises `WorkerFailed` if there will be none.
    """

    def __init__(
        self, name: str, kind: str, overrides: Sequence[str], device: str, threads: int | None
    ) -> None:
        """Start the process, which builds the program at once."""
        context = get_context("spawn")
        self.name = name
        self._pipe, theirs = context.Pipe()
        self._folder = tempfile.TemporaryDirectory(prefix="bench-")
        what = (name, kind, tuple(overrides), device)
        self._process = context.Process(
            target=serve, args=(theirs, what, threads, self._folder.name)
        )
        self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        """Nothing more to do."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the process."""
        self._pipe.close()  # it then ends by itself
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._folder.cleanup()

    def gradients(self, steps: int) -> list[Any]:
        """The meta-gradients of the first `steps` meta-steps, each an array by name."""
        return list(self._ask("gradients", steps))

    def warm_up(self, most_seconds: float, least_seconds: float) -> tuple[float, int]:
        """Take steps until their time settles.

        Args:
            most_seconds: no step begins later than this.
            least_seconds: what a timing shall last.

        Returns:
            Seconds that it took, and the steps of a timing.
        """
        seconds, calls = self._ask("warm_up", most_seconds, least_seconds)
        return float(seconds), int(calls)

    def time(self, calls: int) -> float:
        """Seconds a step, the mean over `calls` of them, after half as many that do not count."""
        return float(self._ask("time", calls))

    def peak_mib(self) -> float | None:
        """Peak memory so far beyond that of before the first step; None if unknown."""
        peak = self._ask("peak_mib")
        return None if peak is None else float(peak)

    def _ask(self, *request: Any) -> Any:
        try:
            self._pipe.send(request)
            good, answer = self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            self._process.join(timeout=10)
            raise WorkerFailed(f"its process ended with code {self._process.exitcode}") from error
        if not good:
            raise WorkerFailed(answer)
        return answer


def serve(
    pipe: Connection,
    what: tuple[str, str, tuple[str, ...], str],
    threads: int | None,
    compiled: str,
) -> None:
    """The process: build the program, answer requests until the pipe is closed.

    Args:
        what: the program's name, kind, overrides and device.
        compiled: an empty folder for what it compiles, so that no earlier run has done it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends when its pipe is closed
    # Before anything imports torch. The last one is metarun's own.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = compiled
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    served: _Served | None = None
    with contextlib.suppress(EOFError, ConnectionError):  # until nobody listens
        while True:
            request, *arguments = pipe.recv()
            try:
                if served is None:
                    served = _Served(*what, threads)
                answer = (True, getattr(served, request)(*arguments))
            except Exception as error:  # whatever a peer may do wrong
                text = next(iter(str(error).strip().splitlines()), "")
                answer = (False, f"{type(error).__name__}: {text}"[:300])
            pipe.send(answer)


class _Served:
    """The process's side of each of `Worker`'s methods."""

    def __init__(
        self, name: str, kind: str, overrides: tuple[str, ...], device: str, threads: int | None
    ) -> None:
        import torch

        from bench.programs import program

        if threads is not None:
            torch.set_num_threads(threads)
        self.device = device
        self.cuda = device.startswith("cuda")
        self.program = program(name, kind, overrides, device)
        _load_what_torch_loads_late(device)
        self.before = self._reset_peak()

    def gradients(self, steps: int) -> list[Any]:
        found = []
        for _ in range(steps):
            self.program.step()
            found.append({k: grad.numpy() for k, grad in self.program.gradient().items()})
        return found

    def warm_up(self, most_seconds: float, least_seconds: float) -> tuple[float, int]:
        begin, seconds = time.perf_counter(), [math.inf]
        while True:
            seconds.append(self.time(1))
            spent = time.perf_counter() - begin
            settled = abs(seconds[-1] - seconds[-2]) <= AGREEMENT * max(seconds[-2:])
            if spent > most_seconds or (len(seconds) > LEAST_STEPS and settled):
                return spent, max(1, math.ceil(least_seconds / seconds[-1]))

    def time(self, calls: int) -> float:
        for _ in range(calls // LEAD_IN):  # a process that has waited finds its caches cold
            self.program.step()
        self._synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            self.program.step()
        self._synchronize()
        return (time.perf_counter() - begin) / calls

    def peak_mib(self) -> float | None:
        if self.before is None:
            return None
        return max(0.0, self._peak() - self.before)

    def _synchronize(self) -> None:
        if self.cuda:
            import torch

            torch.cuda.synchronize(self.device)

    def _peak(self) -> float:
        if self.cuda:
            import torch

            return torch.cuda.max_memory_allocated(self.device) / 2**20
        return _status_mib("VmHWM")

    def _reset_peak(self) -> float | None:
        """Forget the peak of building the program; the memory that is left, None if unknown."""
        if self.cuda:
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device) / 2**20
        try:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is now what is
            return _status_mib("VmRSS")
        except OSError:
            return None


def _status_mib(key: str) -> float:
    """A size of this process, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {key}")


def _load_what_torch_loads_late(device: str) -> None:
    """Small second derivatives, both ways: what torch imports for them is no step's memory."""
    import torch

    w = torch.ones(4, 4, device=device, requires_grad=True)
    (first,) = torch.autograd.grad((w @ w).tanh().sum(), w, create_graph=True)
    torch.autograd.grad(first.sum(), w)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return (x @ x).tanh().sum()

    torch.func.vmap(torch.func.grad(loss))(torch.ones(2, 4, 4, device=device))
    torch.optim.Adam([w]).step()
