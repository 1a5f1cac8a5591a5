"""Several processes for one run: each computes a share of the tasks of every meta-batch.

They are started by `torchrun --nproc-per-node=N -m metarun …`, or by submitit with several tasks
a job; torch.distributed connects them. What passes between their hosts goes through gloo, also
for GPUs: it waits for no kernel, and it notices at once when a process is gone.
"""

import contextlib
import logging
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d
from torch.distributed.rendezvous import rendezvous

from metarun.errors import ConfigError, MetarunError, RunError, explain
from metarun.system.interrupts import Interrupted

T = TypeVar("T")

log = logging.getLogger(__name__)

TIMEOUT = "METARUN_RANK_TIMEOUT"
"""Environment variable: seconds that a rank waits for another one."""


class LostRank(RunError):
    """Another process of the run has died, or does not answer."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, seen from one of them. The default is a run of one process.

    Attributes:
        rank: this process, from 0.
        count: processes.
        local: this process among those of its machine, from 0.
        group: what sums go through if not through gloo.
    """

    rank: int = 0
    count: int = 1
    local: int = 0
    group: Any = None  # torch leaves it untyped

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and messages."""
        return self.rank == 0

    def share(self, tasks: int) -> tuple[int, int]:
        """The first of this rank's tasks, and how many it has; the shares differ by one at most."""
        start, stop = (r * tasks // self.count for r in (self.rank, self.rank + 1))
        return start, stop - start

    def on(self, device: torch.device) -> "Ranks":
        """The same ranks, with sums by NCCL if every rank has a GPU of its own."""
        if self.count == 1 or device.type != "cuda":
            return self
        own = (socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid))
        if len(set(self.gather(own))) < self.count:
            log.warning("ranks share a GPU: sums go by way of the CPU")
            return self
        torch.cuda.set_device(device)
        return replace(self, group=dist.new_group(backend="nccl", timeout=_timeout()))

    def total(self, values: Tensor) -> Tensor:
        """The elementwise sum over ranks, in their order: the same bits on every rank.

        Raises:
            LostRank: another rank is gone.
        """
        if self.count == 1:
            return values
        sent = values if self.group is not None else values.cpu()
        parts = sent.new_empty(self.count, *sent.shape)
        with _connection():
            dist.all_gather_into_tensor(parts.flatten(0, 1), sent, group=self.group)
        summed = parts[0]
        for part in parts[1:]:
            summed = summed + part
        return summed.to(values.device)

    def largest(self, values: list[int]) -> list[int]:
        """The largest of the ranks' values, one by one; every rank waits for all.

        Raises:
            LostRank: another rank is gone.
        """
        held = torch.tensor(values)
        if self.count > 1:
            with _connection():
                dist.all_reduce(held, op=dist.ReduceOp.MAX)
        return [int(value) for value in held]

    def gather(self, value: T) -> list[T]:
        """The ranks' values, in their order; every rank waits for all.

        Raises:
            LostRank: another rank is gone.
        """
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        with _connection():
            dist.all_gather_object(found, value)
        return found

    def broadcast_from_first(self, value: T) -> T:
        """The value of rank 0; every rank waits for it.

        Raises:
            LostRank: rank 0 is gone.
        """
        if self.count == 1:
            return value
        held = [value]
        with _connection():
            dist.broadcast_object_list(held, src=0)
        return held[0]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Make an error in this block on one rank an error on every rank.

        Raises:
            MetarunError: that error, or the first rank's of several, with its exit code.
            LostRank: another rank is gone.
        """
        if self.count == 1:
            yield
            return
        own: Exception | None = None
        try:
            yield
        except LostRank:
            raise
        except Exception as error:
            own = error
        outcomes = self.gather(None if own is None else explain(own))
        for rank, outcome in enumerate(outcomes):
            if outcome is not None:
                message, code = outcome
                shared = MetarunError(f"rank {rank}: {message}" if rank else message)
                shared.exit_code = code
                raise shared from own


ALONE = Ranks()


_current = ALONE
_store: Any = None  # of the launcher or of rank 0: it outlives a broken connection


def join() -> Ranks:
    """The processes of this run; connects to the others, the first time, if there are any.

    From then on all but rank 0 are silent.

    Raises:
        ConfigError: the launcher's environment variables make no sense.
        RunError: the others cannot be reached.
    """
    global _current, _store
    if _current.count > 1:
        return _current
    _adopt_submitit()
    rank, count, local = (_from_environment(k) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if rank is None or count is None or count < 2:
        return _current
    try:
        store, *_ = next(rendezvous("env://", timeout=_timeout()))
        # torchrun keeps its store when it starts the processes anew, and gloo's keys with it.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        _store = c10d.PrefixStore(f"metarun/{attempt}", store)
        dist.init_process_group(
            "gloo",
            timeout=_timeout(),
            world_size=count,
            rank=rank,
            store=c10d.PrefixStore("gloo", _store),
        )
    except (RuntimeError, ValueError) as error:
        raise RunError(f"rank {rank} of {count} cannot reach the others: {error}") from error
    _current = Ranks(rank, count, local or 0)
    if not _current.first:
        logging.getLogger().setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    return _current


def _adopt_submitit() -> None:
    """Describe submitit's tasks in the variables of torchrun."""
    if "SUBMITIT_EXECUTOR" not in os.environ or "RANK" in os.environ:
        return
    from submitit.helpers import TorchDistributedEnvironment

    found = TorchDistributedEnvironment()
    if found.world_size > 1:
        found.export(set_cuda_visible_devices=False)


def _from_environment(name: str) -> int | None:
    value = os.environ.get(name)
    if value is None:
        return None
    if not value.isdigit():
        raise ConfigError(f"the environment variable {name}={value}: a launcher sets a number")
    return int(value)


def _timeout() -> timedelta:
    value = os.environ.get(TIMEOUT, "600")
    if not value.isdigit() or int(value) < 1:
        raise ConfigError(f"{TIMEOUT}={value}: give whole seconds, 1 or more")
    return timedelta(seconds=int(value))


@contextlib.contextmanager
def _connection() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = "it has died"
        if "timed out" in str(error).lower():
            reason = f"no answer for {_timeout().total_seconds():.0f} s ({TIMEOUT})"
        with contextlib.suppress(RuntimeError):
            if _store.check(["error"]):
                reason = _store.get("error").decode()
        raise LostRank(f"lost another rank of this run: {reason}") from error


def tell(error: BaseException, message: str) -> bool:
    """Whether this process is to print the message that the run ends with: one of them is.

    It is the first to come for an error that is not known to all of them.
    """
    if _current.count == 1 or _known_to_all(error):
        return _current.first
    try:
        if _store.add("told", 1) > 1:
            return False
        _store.set("error", f"rank {_current.rank}: {message}")
    except RuntimeError:  # the store is gone with its process
        pass
    return True


def leave(error: BaseException | None, code: int) -> None:
    """Come to the end of this process.

    torchrun ends all processes as soon as it sees one fail. So those that fail together wait for
    each other to do and say what is left.
    """
    if _current.count == 1:
        return
    if error is not None and _known_to_all(error):
        with contextlib.suppress(RuntimeError):
            if _store.add("ended", 1) == _current.count:
                _store.set("all ended", "")
            _store.wait(["all ended"], _timeout())
    elif error is not None:
        sys.stderr.flush()
        os._exit(code)  # the threads of a broken connection may never end
    dist.destroy_process_group()


def _known_to_all(error: BaseException) -> bool:
    """Whether the ranks have come to an error together, as to all of `together` and `check`."""
    return isinstance(error, MetarunError | Interrupted) and not isinstance(error, LostRank)
