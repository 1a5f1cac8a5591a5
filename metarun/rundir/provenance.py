"""Where a run comes from: the code, versions, device and machine of each attempt at it."""

import contextlib
import os
import platform
import socket
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import metarun
from metarun.system.files import write_json

EARLIER = "earlier_attempts"


def write_provenance(path: Path, last: dict[str, Any], device: str, ranks: int) -> None:
    """Write provenance.json of this attempt at a run.

    Args:
        path: of the file.
        last: what it held of the attempts before; they are kept, the first one first.
        device: what it trains on, in words.
        ranks: how many processes share it.
    """
    before = last.pop(EARLIER, [])
    earlier = [*(before if isinstance(before, list) else []), last] if last else []
    write_json(path, {**_provenance(device), "ranks": ranks, EARLIER: earlier})


def _provenance(device: str) -> dict[str, Any]:
    import torch  # here, because reports read provenance without it

    return {
        "time": now(),
        "argv": sys.argv,
        "versions": {"python": platform.python_version(), **_versions()},
        "git": git_state(),
        "device": device,
        "cpu_threads": torch.get_num_threads(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "pid": os.getpid(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in ("metarun", "torch", "torchvision", "hydra-core", "omegaconf", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def git_state() -> dict[str, Any] | None:
    """Revision of metarun's own checkout; None for an installed package.

    It is dirty where the package differs from that; runs and notes beside it do not count.
    """
    folder = Path(metarun.__file__).parent
    if not (folder.parent / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {
            "revision": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", ".")),
        }
    except (OSError, subprocess.CalledProcessError):
        return None


def codes_of(provenance: dict[str, Any]) -> tuple[str, ...]:
    """What a run was made with, by its provenance.json: each code once, the first one first.

    That is the git revision of a checkout, else the version of metarun. A run that went on with
    other code has several.
    """
    earlier = provenance.get(EARLIER)
    attempts = [*(earlier if isinstance(earlier, list) else []), provenance]
    return tuple(dict.fromkeys(_code(attempt) for attempt in attempts if isinstance(attempt, dict)))


def _code(attempt: dict[str, Any]) -> str:
    git, versions = attempt.get("git"), attempt.get("versions")
    if isinstance(git, dict) and isinstance(git.get("revision"), str):
        changed = " with changes" if git.get("dirty") else ""
        return f"revision {git['revision'][:12]}{changed}"
    version = versions.get("metarun") if isinstance(versions, dict) else None
    return f"version {version}" if isinstance(version, str) else "an unknown version"


def now() -> str:
    """The time of day, with its zone, as files of a run say it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
