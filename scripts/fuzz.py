"""Thousands of damaged and hostile checkpoints, run directories and command lines.

    python scripts/fuzz.py --cases 10000 --seed 0

Each case is one run of `metarun.cli.main` in a process of its own, which is forked from one that
has imported everything, with a limit on its memory. It must end within its time with the exit
code of a clean ending (0, 1, 2) and a message; without a traceback or an "unexpected" error;
without writing, connecting or starting anything outside its own folder; and with the input as
it was. Evaluations and resumptions share the composition of their command, which is the same for
all of them, and are forked after it.

The cases of a seed are always the same. Prints how many ended how, and each failure with the
command that repeats it; exits with 1 if there was one. Linux only.
"""

import argparse
import collections
import hashlib
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fuzz_mutations as mutations
import torch

KINDS = ("checkpoints", "configs", "commands")
MEMORY = 6 * 2**30  # bytes that a case may ask for beyond what it starts with
SECONDS = 120  # that a case may take on a busy machine
SMALL = ["data=sinusoid", "backbone=mlp", "backbone.hidden=[4]"]
SHORT = [
    "trainer.steps=4",
    "trainer.meta_batch=2",
    "trainer.eval_episodes=2",
    "trainer.test_episodes=2",
]
RUN = [
    "train", *SMALL, *SHORT, "trainer.eval_every=2", "trainer.checkpoint_every=2",
    "trainer.log_every=3", "outer_opt.schedule=cosine", "inner_opt.learn=[lr]",
    "hydra.run.dir=run",
]  # fmt: skip
EVAL = ["eval", "ckpt=case.safetensors", "episodes=2", "hydra.run.dir=out"]


class Failure(Exception):
    """A case that did not end as it should."""


def main() -> int:
    """Run the cases that the arguments ask for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--what", choices=KINDS, action="append", help="default: all")
    parser.add_argument("--only", type=int, help="one case by its number")
    options = parser.parse_args()
    kinds = options.what or list(KINDS)
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the summary comes all the same
    start = time.monotonic()
    fuzz = Fuzz(options.seed, options.only)
    share = [options.cases // 2, options.cases // 4, options.cases - options.cases * 3 // 4]
    if len(kinds) < len(KINDS):
        share = [options.cases // len(kinds)] * len(kinds)
    with tempfile.TemporaryDirectory(prefix="metarun-fuzz-") as folder:
        fuzz.prepare(Path(folder).resolve() / "home", Path(folder) / "log")
        try:
            for kind, cases in zip(kinds, share, strict=False):
                getattr(fuzz, kind)(cases)
        except KeyboardInterrupt:
            print("interrupted; until then:")
    for name, codes in sorted(fuzz.ended.items()):
        counts = ", ".join(f"exit {code}: {count}" for code, count in sorted(codes.items()))
        print(f"{name:22} {sum(codes.values()):6} cases  {counts}")
    total = sum(sum(codes.values()) for codes in fuzz.ended.values())
    seconds = time.monotonic() - start
    print(f"{total} cases, seed {options.seed}, {seconds:.0f} s, {len(fuzz.failures)} failures")
    return 1 if fuzz.failures else 0


class Fuzz:
    """The cases, their processes and what came of them."""

    def __init__(self, seed: int, only: int | None) -> None:
        self.seed, self.only = seed, only
        self.ended: dict[str, collections.Counter[int]] = collections.defaultdict(
            collections.Counter
        )
        self.failures: list[str] = []
        self.home, self.log = Path(), Path()
        self.checkpoint = b""

    def prepare(self, home: Path, log: Path) -> None:
        """Train the run that is damaged later, which also imports all that the cases use."""
        self.home, self.log = home, log
        home.mkdir()
        for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME"):
            (home / name).mkdir()
            os.environ[name] = str(home / name)
        os.environ.pop("METARUN_DATA", None)
        os.environ["METARUN_CACHE"] = str(home / "XDG_CACHE_HOME")
        (home / "work").mkdir()
        os.chdir(home / "work")
        call(RUN)
        shutil.copytree("run", home / "run")
        self.checkpoint = (home / "run" / "checkpoints" / "step-00000002.safetensors").read_bytes()
        Path("case.safetensors").write_bytes(self.checkpoint)
        call(EVAL)
        self.clear()

    def clear(self) -> None:
        """Empty the folder that the cases run in."""
        for path in Path().iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def rng(self, kind: str, case: int) -> random.Random:
        """The random numbers of a case."""
        return random.Random(f"{self.seed}/{kind}/{case}")

    def numbers(self, cases: int) -> Iterator[int]:
        """The cases to run, by number."""
        return iter(range(cases) if self.only is None else [self.only])

    # ------------------------------------------------------------ kinds

    def checkpoints(self, cases: int) -> None:
        """Mutated checkpoints: four of five evaluated, the others resumed from."""

        def evaluate(case: int) -> tuple[str, set[str]]:
            name, data = self._mutated(case)
            Path("case.safetensors").write_bytes(data)
            return name, {"case.safetensors"}

        def resume(case: int) -> tuple[str, set[str]]:
            name, data = self._mutated(case)
            self._unfinished()
            Path("run/checkpoints/last.safetensors").write_bytes(data)
            return f"resume, {name}", set()

        numbers = list(self.numbers(cases))
        Path("case.safetensors").write_bytes(self.checkpoint)
        self._forked("eval", EVAL, [n for n in numbers if n % 5], "checkpoints", evaluate)
        self._unfinished()
        again = [n for n in numbers if n % 5 == 0]
        self._forked("train", RUN, again, "checkpoints", resume)

    def _mutated(self, case: int) -> tuple[str, bytes]:
        rng = self.rng("checkpoints", case)
        name = rng.choice(list(mutations.CHECKPOINT_MUTATIONS))
        return name, mutations.CHECKPOINT_MUTATIONS[name](rng, self.checkpoint)

    def _unfinished(self) -> None:
        """A run that was killed after its second meta-step."""
        shutil.rmtree("run", ignore_errors=True)
        shutil.copytree(self.home / "run", "run")
        for name in (
            "result.json",
            "checkpoints/step-00000004.safetensors",
            "checkpoints/step-00000002.safetensors",
        ):
            Path("run", name).unlink()
        shutil.copy(
            self.home / "run/checkpoints/step-00000002.safetensors",
            "run/checkpoints/last.safetensors",
        )
        status = Path("run/status.json")
        status.write_text(status.read_text().replace("completed", "failed"))

    def configs(self, cases: int) -> None:
        """Mutated files of a run directory that is recalled or resumed."""

        def damage(case: int) -> tuple[str, set[str]]:
            rng = self.rng("configs", case)
            if rng.random() < 0.5:
                self._unfinished()
            else:
                shutil.rmtree("run", ignore_errors=True)
                shutil.copytree(self.home / "run", "run")
            names = ("config.yaml", "config.yaml", "status.json", "result.json", "metrics.jsonl")
            name = rng.choice((*names, "provenance.json"))
            source = (self.home / "run" / name).read_bytes()
            Path("run", name).write_bytes(mutations.text_file(rng, source))
            return f"run, {name}", set()

        self._forked("train", RUN, list(self.numbers(cases)), "configs", damage)

    def commands(self, cases: int) -> None:
        """Damaged command lines."""
        keys = {name: settings_of(name) for name in ("train", "eval")}
        head = {"train": SMALL, "eval": ["ckpt=case.safetensors"]}
        tail = {"train": [*SHORT, "hydra.run.dir=out"], "eval": ["episodes=2", EVAL[-1]]}
        for case in self.numbers(cases):
            self.clear()
            Path("case.safetensors").write_bytes(self.checkpoint)
            words = mutations.command(self.rng("commands", case), keys, head, tail)
            self._one("commands", case, "command", {"case.safetensors"}, words)
        self.clear()

    # ------------------------------------------------------------ processes

    def _forked(
        self,
        command: str,
        arguments: list[str],
        cases: list[int],
        kind: str,
        lay_out: Callable[[int], tuple[str, set[str]]],
    ) -> None:
        """Compose a command once and fork a process for each case where it would run."""
        module = sys.modules[f"metarun.cli.{command}"]
        run = module.run  # type: ignore[attr-defined]

        class _InChild(BaseException):
            pass

        def run_cases(config: Any, directory: Path) -> float:
            for case in cases:
                self.clear()
                name, inputs = lay_out(case)
                self._one(kind, case, name, inputs, None)
                if self._child:
                    return float(run(config, directory))
            return 0.0

        self._child = False
        module.run = run_cases  # type: ignore[attr-defined]
        try:
            code = call(arguments)
        finally:
            module.run = run  # type: ignore[attr-defined]
        if self._child:
            leave(code)
        if code == 130:
            raise KeyboardInterrupt
        if code:
            raise RuntimeError(f"the fuzzer itself failed among the {kind}")
        self.clear()

    def _one(
        self,
        kind: str,
        case: int,
        name: str,
        inputs: set[str],
        words: list[str] | None,
    ) -> None:
        """Fork the process of one case and judge it; without words the child returns."""
        before = {path: digest(Path(path)) for path in inputs}
        child = os.fork()
        if child == 0:
            confine(self.log, self.home)
            self._child = True
            if words is not None:
                leave(call(words))
            return
        code = wait(child)
        text = self.log.read_text(errors="replace")
        try:
            judge(code, text)
            if any(digest(Path(path)) != old for path, old in before.items()):
                raise Failure("the input was changed")
            if half := [str(p) for p in Path().rglob("*.tmp")]:
                raise Failure(f"half-written files: {half}")
        except Failure as failure:
            again = f"--seed {self.seed} --what {kind} --only {case}"
            self.failures.append(f"{name}: {failure}")
            shown = f" {words}" if words else ""
            print(f"FAILED {again} ({name}{shown}): {failure}\n{text[-3000:]}\n", flush=True)
        self.ended[name][code] += 1


def call(words: list[str]) -> int:
    """`metarun <words>` in this process."""
    from metarun.cli import main as cli

    sys.argv = ["metarun", *words]
    try:
        return cli.main()
    except SystemExit as end:  # of argparse, which has said why
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        traceback.print_exc()
        return 70


def leave(code: int) -> None:
    """End a forked process at once: nothing of its parent's is cleaned up."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait(child: int) -> int:
    """The exit code of a process: negative for a signal, that of SIGKILL if it hangs."""
    handle = os.pidfd_open(child)
    try:
        ready, _, _ = select.select([handle], [], [], SECONDS)
        if not ready:
            os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        os.close(handle)


def judge(code: int, text: str) -> None:
    """Raise `Failure` unless a process ended cleanly."""
    if code == -signal.SIGKILL:
        raise Failure(f"it took more than {SECONDS} s, or too much memory")
    if code not in (0, 1, 2):
        raise Failure(f"exit code {code}")
    if bad := re.search(r"Traceback|unexpected [A-Z]\w+:|FORBIDDEN|\x1b\[2J", text):
        raise Failure(f"its output has {bad[0]!r}")
    if code and not re.search(r"^metarun.*: \S", text, re.MULTILINE):
        raise Failure("it ended without a message")


def confine(log: Path, home: Path) -> None:
    """Send output to a file, limit memory, and report what reaches beyond the folder."""
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)

    def forbid(what: str) -> None:
        os.write(2, f"FORBIDDEN {what}\n".encode(errors="replace"))
        raise PermissionError(f"the fuzzer forbids {what}")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if flags else False
            if mode and set(str(mode)) & set("wax+"):
                writes = True
            if writes and isinstance(path, str | bytes) and not within(path, home):
                forbid(f"writing to {path!r}")
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate"):
            if not within(arguments[0], home):
                forbid(f"{event} of {arguments[0]!r}")
        elif event in ("os.rename", "os.link", "os.symlink"):
            if not all(within(path, home) for path in arguments[:2]):
                forbid(f"{event} of {arguments[:2]!r}")
        elif event == "subprocess.Popen":
            if Path(str(arguments[0])).name != "git":  # the state of the checkout
                forbid(f"running {arguments[0]!r}")
        elif event in ("os.system", "os.exec", "os.posix_spawn", "socket.connect"):
            forbid(event)
        elif event == "socket.getaddrinfo":
            raise OSError("no network in here")

    sys.addaudithook(hook)


def within(path: Any, home: Path) -> bool:
    """Whether a path is in the folder of the fuzzer, or no file that keeps what is written."""
    if isinstance(path, int):
        return True
    full = os.path.realpath(os.fsdecode(path))
    if full == "/dev/null" or re.fullmatch(r"/proc/\d+/clear_refs", full):  # of this process
        return True
    return full == str(home) or full.startswith(f"{home}/")


def digest(path: Path) -> str:
    """The content of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "none"


def settings_of(command: str) -> list[str]:
    """The dotted settings of a command, its groups among them."""
    from omegaconf import OmegaConf

    from metarun.config import compose
    from metarun.config.run import flat

    settings = OmegaConf.to_container(OmegaConf.structured(compose.composed(command, [])))
    assert isinstance(settings, dict)
    plain = {str(key): value for key, value in settings.items()}
    return [*flat(plain), *(key for key, value in plain.items() if isinstance(value, dict))]


if __name__ == "__main__":
    sys.exit(main())
