"""The device of a run, made ready for reproducible work."""

import torch

from metarun.errors import ConfigError
from metarun.system.memory import keep_memory
from metarun.system.ranks import ALONE, Ranks
from metarun.system.turns import turn
from metarun.unroll._torch import set_cudnn


def choose_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    """The device of "auto", "cpu", "cuda" or "cuda:N", ready for reproducible work.

    Several ranks on a machine take a GPU each, unless `cuda:N` names one for all of them. Runs that
    share a machine take its GPUs in turn.

    Raises:
        ConfigError: no such device.
    """
    count = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if count else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and (kind == "cpu" or not index.isdigit())):
        raise ConfigError(f"device={name}: choose one of auto, cpu, cuda, cuda:N")
    if kind == "cpu":
        keep_memory()
        return torch.device("cpu")
    if int(index or 0) >= count:
        seen = f"{count} CUDA device{'s' * (count != 1)}" if count else "no CUDA device"
        raise ConfigError(f"device={name}: torch sees {seen}; use device=auto or device=cpu")
    if not index and ranks.count > 1:
        own = ranks.local if count > 1 else 0  # a single one: SLURM may show each task its own
        if own >= count:
            raise ConfigError(
                f"rank {ranks.rank} has no GPU of its own: torch sees {count} CUDA devices; start "
                "as many processes on a machine as it has GPUs"
            )
        name = f"cuda:{own}"
    elif not index and count > 1:
        name = f"cuda:{turn() % count}"
    if ":" in name:
        torch.cuda.set_device(name)  # that of generators, and of what plugins make
    torch.use_deterministic_algorithms(True, warn_only=True)
    set_cudnn(exact=True)  # float32 means float32, and another run has the same algorithm
    return torch.device(name)
