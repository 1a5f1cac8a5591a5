"""The cache of a data set, used by several processes."""

import select
import subprocess
import sys
from pathlib import Path

PREPARE = """
import logging, sys
from pathlib import Path
import torch
from metarun.episodes.cache import cached
from metarun.episodes.store import from_equal_classes

def build():
    print("building", flush=True)
    sys.stdin.readline()
    return from_equal_classes(torch.zeros(2, 1, 1, 2, 2, dtype=torch.uint8), ["a", "b"])

logging.basicConfig(level=logging.INFO, format="%(message)s")
print(cached(Path(sys.argv[1]), build).class_names)
"""


def prepare(path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PREPARE, str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def assert_waits(process: subprocess.Popen[str]) -> None:
    """A process that does not wait says on the other stream that it builds: no time is lost."""
    streams = [process.stdout, process.stderr]
    assert None not in streams
    first, *_ = select.select(streams, [], [])[0]
    said = first.readline()
    assert first is process.stderr and "waiting for another process" in said, said


def test_one_of_two_processes_prepares_the_data_and_the_other_waits(tmp_path: Path) -> None:
    path = tmp_path / "new" / "store.safetensors"
    first = prepare(path)
    assert first.stdout is not None and first.stdout.readline() == "building\n"
    second = prepare(path)
    assert_waits(second)
    assert first.communicate("go on\n", timeout=60)[0] == "('a', 'b')\n"
    assert second.communicate("", timeout=60)[0] == "('a', 'b')\n", "it has built it as well"


def test_a_process_that_dies_leaves_the_preparation_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "store.safetensors"
    first = prepare(path)
    assert first.stdout is not None and first.stdout.readline() == "building\n"
    second = prepare(path)
    assert_waits(second)
    first.kill()
    first.communicate()
    assert second.communicate("go on\n", timeout=60)[0] == "building\n('a', 'b')\n"
