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
import importlib.util
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

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

    def run(self, tests: Iterable[str], limit: float, *options: str) -> tuple[int | None, str]:
        """Run tests: pytest's exit code, or None if time ran out, and what it printed."""
        command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=line", "--no-header"]
        with tempfile.TemporaryFile("w+", dir=self.folder.parent) as output:
            process = subprocess.Popen(
                [*command, "-p", "no:cacheprovider", *options, *tests],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:  # what failed tests have started and left behind goes too
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            output.seek(0)
            return code, output.read()


def judge(breakage: Breakage, tree: Tree, limit: float) -> Outcome:
    """Break a tree, run the tests that should notice, mend it again."""
    start = time.monotonic()
    sound = (tree.folder / breakage.file).read_text()
    tree.write(breakage.file, broken(breakage, tree.folder))
    try:
        code, printed = tree.run(breakage.tests, limit, "-x")
    finally:
        tree.write(breakage.file, sound)
    by = re.search(r"^(?:FAILED|ERROR) (\S+)", printed, re.MULTILINE)
    if code not in (PASSED, FAILED, INTERRUPTED, None):
        raise Misfit(f"{breakage.name}: pytest ended with {code}\n{printed[-2000:]}")
    ended = "hangs" if code is None else "caught" if code else "survived"
    return Outcome(breakage, ended, by.group(1) if by else "", time.monotonic() - start)


def judge_all(chosen: list[Breakage], folder: Path, jobs: int, limit: float) -> list[Outcome]:
    """Judge breakages, some at a time, each time in a copy of its own."""
    trees: queue.Queue[Tree] = queue.Queue()
    for number in range(jobs):
        trees.put(Tree(folder / str(number)))
    for breakage in chosen:
        broken(breakage)
    tests = list(dict.fromkeys(test for breakage in chosen for test in breakage.tests))
    first = trees.get()
    print(f"the unbroken code under all tests: {len(tests)} files or names", flush=True)
    start = time.monotonic()
    code, printed = first.run(tests, limit * len(tests))
    trees.put(first)
    if code != PASSED:
        raise Misfit(f"the unbroken code fails:\n{printed[-4000:]}")
    print(f"passes, {time.monotonic() - start:.0f} s", flush=True)

    def one(breakage: Breakage) -> Outcome:
        tree = trees.get()
        try:
            return judge(breakage, tree, limit)
        finally:
            trees.put(tree)

    outcomes = []
    with ThreadPoolExecutor(jobs) as pool:
        for done in as_completed([pool.submit(one, breakage) for breakage in chosen]):
            outcomes.append(outcome := done.result())
            own = outcome.breakage
            name = f"{own.topic}/{own.name}"
            print(f"{outcome.ended:9} {outcome.seconds:4.0f} s  {name:55} {outcome.by}", flush=True)
    return sorted(outcomes, key=lambda outcome: chosen.index(outcome.breakage))


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
    with tempfile.TemporaryDirectory(prefix="metarun-mutate-") as folder:
        try:
            outcomes = judge_all(chosen, Path(folder).resolve(), options.jobs, options.limit)
        except Misfit as misfit:
            print(f"error: {misfit}", file=sys.stderr)
            return 2
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
