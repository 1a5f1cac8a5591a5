"""How strong the tests are: breaks the code on purpose, one place at a time, and runs them.

    python scripts/mutate.py                     # every breakage: minutes on two cores
    python scripts/mutate.py --topic engine      # those of one file in scripts/mutations
    python scripts/mutate.py --only min-lr-dropped

A breakage is an entry of scripts/mutations/<topic>.toml: a text of one file and what takes its
place, of the kind that gives a wrong figure without a word, and the tests that should notice.
It is made in a copy of the working tree, which itself is never touched. It is *caught* if one of
its tests fails, *survives* if they all pass, and *hangs* if they do not end in time, which does
not count as caught. First the tests run on the unbroken copy, where all must pass.

Exits with 1 if less than 95 % are caught, and with 2 if the unbroken code fails or a breakage
does not fit the code any more.
"""

import argparse
import ast
import contextlib
import gc
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "scripts" / "mutations"
WANTED = 0.95  # share of the breakages that tests must catch
PASSED, FAILED, INTERRUPTED = 0, 1, 2  # pytest's exit codes; the last is a failed import


class Breakage(NamedTuple):
    """One place in the code and what is put there.

    Attributes:
        topic: name of its file in scripts/mutations.
        name: its own, unique.
        file: path in the repository.
        old: text that the file has exactly once.
        new: what takes its place.
        tests: files or node ids for pytest, the likeliest to fail first.
        why: what would go wrong without a word.
    """

    topic: str
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    why: str


class Outcome(NamedTuple):
    """What came of a breakage: "caught", "survived" or "hangs", and by which test."""

    breakage: Breakage
    ended: str
    by: str
    seconds: float


class Misfit(Exception):
    """A breakage that does not fit the code."""


def load(topics: Iterable[str] = ()) -> list[Breakage]:
    """The breakages of some topics, or of all."""
    wanted = list(topics) or sorted(path.stem for path in DATA.glob("*.toml"))
    found = []
    for topic in wanted:
        entries = tomllib.loads((DATA / f"{topic}.toml").read_text())["breakage"]
        found += [Breakage(topic=topic, **e | {"tests": tuple(e["tests"])}) for e in entries]
    return found


def broken(breakage: Breakage, tree: Path = ROOT) -> str:
    """The text of the file with the breakage in it.

    Raises:
        Misfit: the old text is not there exactly once, or what comes out is no Python.
    """
    text = (tree / breakage.file).read_text()
    if (count := text.count(breakage.old)) != 1:
        raise Misfit(f"{breakage.name}: {breakage.file} has its old text {count} times, not once")
    changed = text.replace(breakage.old, breakage.new)
    try:
        if ast.dump(ast.parse(changed)) == ast.dump(ast.parse(text)):
            raise Misfit(f"{breakage.name}: the new text means the same as the old one")
    except SyntaxError as error:
        raise Misfit(f"{breakage.name}: {error}") from error
    return changed


class Tree:
    """A copy of the working tree, in which tests are run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "metarun"
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout
        for name in names.decode().split("\0"):
            if name and (source := ROOT / name).is_file():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, self.folder / name)
        # An editable install would find these YAML files where they were copied from.
        (self.folder / "metarun" / "conf").symlink_to("../conf")
        self.environment = os.environ | {
            "PYTHONPATH": str(self.folder),
            "METARUN_CACHE": str(folder / "cache"),
            "TMPDIR": str(folder),
        }
        self._check_imports()

    def _check_imports(self) -> None:
        names = ["metarun", "metarun.conf", "hydra_plugins.metarun"]
        lines = "".join(f"import {name}; print({name}.__path__[0])\n" for name in names)
        done = subprocess.run(
            [sys.executable, "-c", lines],
            cwd=self.folder.parent,
            env=self.environment,
            capture_output=True,
            text=True,
            check=True,
        )
        for name, place in zip(names, done.stdout.split(), strict=True):
            if not Path(place).is_relative_to(self.folder):
                raise Misfit(f"{name} is imported from {place}, not from the copy")

    def write(self, file: str, text: str) -> None:
        """Change a file of the copy, and have Python forget what it compiled of it."""
        path = self.folder / file
        path.write_text(text)
        Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)

    def start(self, tests: Iterable[str], limit: float, *options: str) -> "Run":
        """Run tests in a process of its own, for some seconds at most."""
        number, name = tempfile.mkstemp(dir=self.folder.parent)
        flags = ["-q", "-rfE", "--tb=line", "--no-header", "-p", "no:cacheprovider"]
        if (pid := os.fork()) == 0:
            self._become([*flags, *options, *tests], number)
        os.close(number)
        return Run(pid, Path(name), time.monotonic(), limit)

    def _become(self, arguments: list[str], output: int) -> NoReturn:
        """Be pytest, in this forked process."""
        code: int = 3
        try:
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.chdir(self.folder)
            os.environ |= self.environment
            sys.path[0] = str(self.folder)
            import pytest

            code = pytest.main(arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)


class Run(NamedTuple):
    """Tests that run."""

    pid: int
    output: Path
    start: float
    limit: float

    def result(self) -> tuple[int | None, str] | None:
        """pytest's exit code, None for one that was out of time, and its words; None: it runs."""
        ended, status = os.waitpid(self.pid, os.WNOHANG)
        late = time.monotonic() - self.start > self.limit
        if not ended and not late:
            return None
        with contextlib.suppress(ProcessLookupError):  # with what failed tests have left behind
            os.killpg(self.pid, signal.SIGKILL)
        if not ended:
            os.waitpid(self.pid, 0)
        text = self.output.read_text(errors="replace")
        self.output.unlink()
        return (os.waitstatus_to_exitcode(status) if ended else None), text

    def wait(self) -> tuple[int | None, str]:
        """Its result, when it has one."""
        while (result := self.result()) is None:
            time.sleep(0.05)
        return result


def outcome_of(breakage: Breakage, result: tuple[int | None, str], seconds: float) -> Outcome:
    """What the tests of a breakage have said."""
    code, printed = result
    if code not in (PASSED, FAILED, INTERRUPTED, None):
        raise Misfit(f"{breakage.name}: pytest ended with {code}\n{printed[-2000:]}")
    by = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", printed, re.MULTILINE)
    ended = "hangs" if code is None else "caught" if code else "survived"
    return Outcome(breakage, ended, by.group(1) if by else "", seconds)


def check_unbroken(chosen: list[Breakage], tree: Tree, limit: float) -> None:
    """Run all tests of some breakages on the code as it is.

    Raises:
        Misfit: one fails.
    """
    tests = list(dict.fromkeys(test for breakage in chosen for test in breakage.tests))
    print(f"the unbroken code under all tests: {len(tests)} files or names", flush=True)
    run = tree.start(tests, limit * len(tests))
    code, printed = run.wait()
    if code != PASSED:
        raise Misfit(f"the unbroken code fails, {code}:\n{printed[-4000:]}")
    print(f"passes, {time.monotonic() - run.start:.0f} s", flush=True)


def judge(chosen: list[Breakage], free: list[Tree], limit: float) -> Iterator[Outcome]:
    """Break trees, run the tests that should notice, mend them again; in each tree at a time."""
    waiting, running = list(chosen), list[tuple[Breakage, Tree, str, Run]]()
    while waiting or running:
        while waiting and free:
            breakage, tree = waiting.pop(0), free.pop()
            sound = (tree.folder / breakage.file).read_text()
            tree.write(breakage.file, broken(breakage, tree.folder))
            running.append((breakage, tree, sound, tree.start(breakage.tests, limit, "-x")))
        time.sleep(0.05)
        for entry in list(running):
            breakage, tree, sound, run = entry
            if (result := run.result()) is not None:
                running.remove(entry)
                tree.write(breakage.file, sound)
                free.append(tree)
                yield outcome_of(breakage, result, time.monotonic() - run.start)


def preload() -> None:
    """Import what tests import and no breakage touches: seconds for each process."""
    # Not hydra, which is a plugin of pytest's: it wants to import those itself.
    for name in ("pytest", "torch._dynamo", "torch.fx.experimental.proxy_tensor", "scipy.stats"):
        importlib.import_module(name)
    gc.freeze()  # else a collection in a forked process copies all memory


def table(outcomes: list[Outcome]) -> str:
    """How many were caught of each topic, and what was not."""
    lines = [f"{'topic':12} {'made':>5} {'caught':>7}"]
    for topic in dict.fromkeys(outcome.breakage.topic for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.breakage.topic == topic]
        caught = sum(outcome.ended == "caught" for outcome in own)
        lines.append(f"{topic:12} {len(own):5} {caught:7}")
    for outcome in outcomes:
        if outcome.ended != "caught":
            own = outcome.breakage
            lines.append(f"{outcome.ended}: {own.name} ({own.file}): {own.why}")
    return "\n".join(lines)


def main() -> int:
    """Judge the breakages that the arguments ask for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--topic", action="append", default=[], help="default: all")
    parser.add_argument("--only", action="append", default=[], help="one breakage by its name")
    parser.add_argument("--jobs", type=int, default=2, help="breakages at a time")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one breakage")
    parser.add_argument("--out", type=Path, help="a JSON file for the outcomes")
    options = parser.parse_args()
    chosen = [b for b in load(options.topic) if not options.only or b.name in options.only]
    if not chosen:
        parser.error("there is no such breakage")
    start = time.monotonic()
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="metarun-mutate-") as folder:
        try:
            for breakage in chosen:
                broken(breakage)
            trees = [Tree(Path(folder).resolve() / str(i)) for i in range(options.jobs)]
            preload()
            check_unbroken(chosen, trees[0], options.limit)
            for outcome in judge(chosen, trees, options.limit):
                outcomes.append(outcome)
                own, name = outcome, f"{outcome.breakage.topic}/{outcome.breakage.name}"
                print(f"{own.ended:9} {own.seconds:4.0f} s  {name:60} {own.by}", flush=True)
        except Misfit as misfit:
            print(f"error: {misfit}", file=sys.stderr)
            return 2
    outcomes.sort(key=lambda outcome: chosen.index(outcome.breakage))
    if options.out:
        listed = [
            o.breakage._asdict() | {"ended": o.ended, "by": o.by, "seconds": round(o.seconds, 1)}
            for o in outcomes
        ]
        options.out.write_text(json.dumps(listed, indent=2) + "\n")
    caught = sum(outcome.ended == "caught" for outcome in outcomes)
    print(table(outcomes))
    print(f"{caught} of {len(outcomes)} caught, {(time.monotonic() - start) / 60:.0f} minutes")
    return 0 if caught >= WANTED * len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
