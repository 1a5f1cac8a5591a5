"""The README keeps its promises."""

import re
import shlex
import subprocess
import sys

import pytest

from tests.conftest import REPO, Metarun

README = (REPO / "README.md").read_text()
START = (REPO / "docs" / "index.md").read_text()
COMMANDS = [
    line.partition("#")[0].strip()
    for block in re.findall(r"```\n(.*?)```", (README + START).replace("\\\n", ""), flags=re.S)
    for line in block.splitlines()
    if line.startswith("metarun train ") and "…" not in line
]


def test_the_library_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    numbers = [float(n) for n in re.findall(r"-?\d+\.\d+", done.stdout)]
    # w_5 = 3 - 3 (1 - 2 lr)^5, so the meta-loss is 9 (1 - 2 lr)^10
    assert numbers == pytest.approx([-6 * 0.8**10, -180 * 0.8**9], rel=1e-3)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_compose(metarun: Metarun, command: str) -> None:
    arguments = shlex.split(command)[1:]
    if "-m" in arguments:  # one run of the sweep
        arguments = [a.partition(",")[0] for a in arguments if a != "-m"]
    assert "algo:" in metarun(*arguments, "--cfg", "job").stdout


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) >= 5


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (REPO / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
