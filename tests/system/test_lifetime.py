"""How the process of a command begins and ends."""

import gc
import subprocess
import sys

import pytest

from metarun.system.lifetime import collect_from_here, imports_not_collected

END = """
import atexit, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from metarun.system.lifetime import end_at_once

class Freed:
    def __del__(self):
        print("freed")

def late():
    time.sleep(0.3)
    print("thread")

kept = Freed()
pool = ThreadPoolExecutor(1)
pool.submit(print, "pool").result()
atexit.register(print, "handler")
threading.Thread(target=late).start()
sys.stdout.write("unflushed ")
{end}
sys.exit(3)
"""


@pytest.mark.parametrize(
    ("end", "last"), [("end_at_once(3)", ["handler"]), ("", ["handler", "freed"])]
)
def test_the_end_leaves_out_the_freeing_alone(end: str, last: list[str]) -> None:
    script = [sys.executable, "-c", END.format(end=end)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 3
    assert done.stdout.split() == ["pool", "unflushed", "thread", *last]
    assert done.stderr == ""


def test_no_garbage_is_collected_during_imports_and_what_they_made_never() -> None:
    with imports_not_collected():
        assert not gc.isenabled()
        collect_from_here()
        assert gc.isenabled()
        frozen = gc.get_freeze_count()
        assert frozen > 1000
        new = [[] for _ in range(100)]  # type: ignore[var-annotated]
        collect_from_here()
        assert gc.get_freeze_count() <= frozen, "a later job freezes nothing"
        del new
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_collection_is_back_when_a_command_fails() -> None:
    with pytest.raises(ValueError, match="wrong"), imports_not_collected():
        raise ValueError("wrong")
    assert gc.isenabled()
