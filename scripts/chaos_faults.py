"""The faults of chaos.py: each disturbs a run, sees how it takes that, and lets it finish."""

import contextlib
import ctypes.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen

from chaos_check import differences

from metarun.rundir import checkpoint

DEADLINE = 300  # seconds after which a process counts as hanging
EVAL_EVERY, CHECKPOINT_EVERY = 50, 20


class Failure(Exception):
    """A run did not take a fault as it should."""


@dataclass
class Plan:
    """What all cases share: where they work, the run that they make, and its undisturbed twin."""

    folder: Path
    steps: int
    duration: float = 0.0  # seconds of an undisturbed run
    reference: Path = Path()

    def command(self, directory: Path) -> list[str]:
        """The run, in a directory."""
        return [
            sys.executable, "-m", "metarun", "train", "data=sinusoid", "backbone=mlp",
            "inner_opt.learn=[lr]", "inner_opt.granularity=parameter_step",
            "outer_opt.schedule=cosine", "outer_opt.clip_norm=5", f"trainer.steps={self.steps}",
            f"trainer.eval_every={EVAL_EVERY}", f"trainer.checkpoint_every={CHECKPOINT_EVERY}",
            "trainer.log_every=7", "trainer.eval_episodes=50", "trainer.test_episodes=50",
            f"hydra.run.dir={directory}",
        ]  # fmt: skip


@dataclass
class Case:
    """One or several runs, one after the other, that are disturbed."""

    name: str
    random: random.Random
    plan: Plan
    faults: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    skipped: str = ""
    log: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """The run directory."""
        return self.plan.folder / self.name / "run"

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.folder / "checkpoints"

    def start(self, **environment: str) -> Popen[bytes]:
        """Start the run, or go on with it; its messages go to a file."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("METARUN_", "HYDRA_"))}
        kept |= {"OMP_NUM_THREADS": "1", **environment}
        with open(self.folder.parent / "stderr", "wb") as errors:
            return Popen(
                self.plan.command(self.folder), cwd=self.folder.parent, env=kept,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors,
            )  # fmt: skip

    def messages(self) -> str:
        """What the last process said."""
        return (self.folder.parent / "stderr").read_text(errors="replace")

    def wait(self, process: Popen[bytes]) -> int:
        """Its exit code; it must end within the deadline and show no traceback."""
        try:
            code = process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise Failure(f"hangs: {self.messages()}") from None
        for word in ("Traceback", "unexpected"):
            if word in self.messages():
                raise Failure(f"exit {code} with a traceback: {self.messages()}")
        return code

    def finish(self, **environment: str) -> str:
        """Run to the end, compare with the undisturbed run, and return the messages."""
        code = self.wait(self.start(**environment))
        if code != 0:
            raise Failure(f"did not finish, exit {code}: {self.messages()}")
        self.compare()
        return self.messages()

    def refused(self, code: int, *words: str) -> None:
        """Try to run: it must end with this code and one message that has these words."""
        found = self.wait(self.start())
        self.expect_message(found, code, *words)

    def expect_message(self, found: int, code: int, *words: str) -> None:
        """Of the last process."""
        said = [line for line in self.messages().splitlines() if line.startswith("metarun: ")]
        if found != code or len(said) != 1 or not any(word in said[0] for word in words):
            raise Failure(f"exit {found} instead of {code} with {words}: {self.messages()}")

    def compare(self) -> None:
        """The run is done: it must equal the undisturbed one."""
        self.runs += 1
        known = self.plan.reference != Path()  # else this is the undisturbed run
        if known and (wrong := differences(self.folder, self.plan.reference)):
            raise Failure(f"differs: {wrong}")

    def step(self) -> int:
        """The last meta-step in metrics.jsonl, whose tail may be half written."""
        with contextlib.suppress(OSError):
            for line in reversed((self.folder / "metrics.jsonl").read_bytes()[-3000:].split(b"\n")):
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    return int(json.loads(line)["step"])
        return 0

    def reach(self, process: Popen[bytes], step: int) -> bool:
        """Wait for a meta-step of the log; False if the process ended before."""
        return until(process, lambda: self.step() >= step)

    def disturb_halfway(self) -> None:
        """Start, and kill somewhere after two checkpoints and before the end."""
        process = self.start()
        target = self.random.randint(2 * CHECKPOINT_EVERY + 1, self.plan.steps - 10)
        if not self.reach(process, target):
            raise Failure(f"ended before meta-step {target}: {self.messages()}")
        time.sleep(self.random.uniform(0, 0.1))
        process.kill()
        process.wait()

    def remove(self) -> None:
        """Delete the files of this case."""
        shutil.rmtree(self.folder.parent, ignore_errors=True)


def until(process: Popen[bytes], condition: Callable[[], bool]) -> bool:
    """Wait until something is so; False if the process ended first."""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.0003)
    raise Failure("the moment to strike never came")


def aim(case: Case, process: Popen[bytes]) -> str | None:
    """Wait for a drawn moment of a run and name it; None if the run ended before."""
    draw, folder, steps = case.random, case.folder, case.plan.steps
    moment = draw.choice(["any"] * 5 + list(MOMENTS))
    if moment == "any":
        end = time.monotonic() + draw.uniform(0, 1.1 * case.plan.duration)
        came = not until(process, lambda: time.monotonic() >= end) or process.poll() is None
    elif moment == "while opening":
        before = changed_at(folder / "config.yaml")
        came = until(process, lambda: changed_at(folder / "config.yaml") != before)
    elif moment == "while starting the log":
        before = changed_at(folder / "tb")
        came = until(process, lambda: changed_at(folder / "tb") != before)
    elif moment == "in a checkpoint":
        target = draw.randint(case.step(), steps)
        came = case.reach(process, target) and until(process, lambda: temporary(case.checkpoints))
    elif moment == "in a validation":
        target = EVAL_EVERY * draw.randint(case.step() // EVAL_EVERY, steps // EVAL_EVERY)
        came = case.reach(process, target - 3)  # the log line before
    elif moment == "in the test":
        came = until(process, lambda: b'"val/mse"' in last_line(case, steps))
    else:
        came = until(process, (folder / "result.json").exists)
    if not came or process.poll() is not None:
        return None
    time.sleep(draw.uniform(0, MOMENTS.get(moment, 0.0)))
    return moment


MOMENTS = {
    "while opening": 0.1,
    "while starting the log": 0.03,
    "in a checkpoint": 0.003,
    "in a validation": 0.05,
    "in the test": 0.2,
    "after the result": 0.03,
}
"""When to strike, and for how many seconds at most to wait then."""


def changed_at(path: Path) -> int:
    """When a file or folder last changed, in ns; 0 if it is not there."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def temporary(folder: Path) -> bool:
    """Whether a file is half written."""
    with contextlib.suppress(OSError):
        return any(name.endswith(".tmp") for name in os.listdir(folder))
    return False


def last_line(case: Case, step: int) -> bytes:
    """The last line of the log if it is of this meta-step."""
    with contextlib.suppress(OSError, IndexError):
        line = (case.folder / "metrics.jsonl").read_bytes().splitlines()[-1]
        return line if f'"step": {step},'.encode() in line else b""
    return b""


def kills(case: Case, count: int) -> None:
    """SIGKILL, at any moment, some within the writing of a checkpoint."""
    _strike(case, count, _kill)


def signals(case: Case, count: int) -> None:
    """SIGTERM or SIGINT, at any moment, sometimes a second one."""
    _strike(case, count, _signal)


def _strike(case: Case, count: int, blow: Callable[[Case, Popen[bytes], str], None]) -> None:
    done = 0
    while done < count:
        process = case.start()
        moment = aim(case, process)
        if moment is not None:
            at = case.step()
            blow(case, process, moment)
            case.log.append(f"{moment} (log at {at})")
            done += 1
        elif case.wait(process) == 0:
            case.compare()
            shutil.rmtree(case.folder)  # done before it was struck: another one
        else:
            raise Failure(f"ended by itself: {case.messages()}")
    case.finish()


def _kill(case: Case, process: Popen[bytes], moment: str) -> None:
    process.kill()
    process.wait()
    half = " (half a file)" if temporary(case.checkpoints) else ""
    case.faults[f"{moment}{half}"] += 1


def _signal(case: Case, process: Popen[bytes], moment: str) -> None:
    number = case.random.choice([signal.SIGTERM, signal.SIGINT])
    process.send_signal(number)
    if case.random.random() < 0.2:
        time.sleep(case.random.uniform(0, 0.05))
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
    code = case.wait(process)
    if code == 130:
        case.expect_message(code, 130, "interrupted")
        when = moment
    elif code == 0 or (code == -number and '"completed"' in status(case)):
        case.compare()
        when = "after the end"
    elif code == -number and "interrupted by" in case.messages():
        when = f"{moment}, and again while it ended"
    elif code == -number and "run directory" not in case.messages():
        when = "while Python and torch start"
    else:
        raise Failure(f"exit {code} after {number.name}: {case.messages()}")
    case.faults[f"{number.name} {when}"] += 1


def status(case: Case) -> str:
    """The text of status.json."""
    with contextlib.suppress(OSError):
        return (case.folder / "status.json").read_text(errors="replace")
    return ""


def checkpoints(case: Case, count: int) -> None:
    """The newest checkpoint truncated, bit-flipped, emptied or gone; sometimes both copies."""
    case.disturb_halfway()
    steps = sorted(case.checkpoints.glob("step-*.safetensors"))
    damage = case.random.choice(["truncated", "bit flipped", "emptied", "zeroed", "missing"])
    both = case.random.random() < 0.5
    for path in [case.checkpoints / "last.safetensors", *([steps[-1]] if both else [])]:
        content = bytearray(path.read_bytes())
        place = case.random.randrange(len(content))
        if damage == "truncated":
            path.write_bytes(content[:place])
        elif damage == "bit flipped":
            flip(path, case.random)
        elif damage == "emptied":
            path.write_bytes(b"")
        elif damage == "zeroed":
            path.write_bytes(bytes(len(content)))
        else:
            path.unlink()
    case.faults[f"{damage}{', both copies' if both else ''}"] += 1
    case.log.append(f"{damage} at {case.step()}")
    said = case.finish()
    if damage != "missing" and "trying the one before" not in said:
        raise Failure(f"did not say that it fell back: {said}")


def flip(path: Path, draw: random.Random) -> None:
    """Flip one bit among the tensors of a checkpoint, which are most of it."""
    content = bytearray(path.read_bytes())
    tensors = checkpoint.load(path)["meta"].values()
    data = max(tensors, key=lambda t: t.numel()).detach().numpy().tobytes()
    place = content.find(data) + draw.randrange(len(data))
    content[place] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def logs(case: Case, count: int) -> None:
    """The tail of metrics.jsonl or of the event file cut, overwritten or followed by rubbish."""
    case.disturb_halfway()
    name = case.random.choice(["metrics.jsonl"] * 3 + ["tb"])
    path = case.folder / name if name != "tb" else max((case.folder / "tb").iterdir())
    content = path.read_bytes()
    damage = case.random.choice(["cut", "NUL bytes", "zeroed", "garbage", "foreign lines"])
    tail = case.random.randint(1, min(400, len(content)))
    path.write_bytes({
        "cut": content[:-tail],
        "NUL bytes": content + bytes(tail),
        "zeroed": content[:-tail] + bytes(tail),
        "garbage": content + case.random.randbytes(tail),
        "foreign lines": content + b'[1]\n"x"\n5\n{"step": "y"}\n{}\nnull\n',
    }[damage])  # fmt: skip
    case.faults[f"{name} {damage}"] += 1
    case.log.append(f"{name} {damage} ({tail} bytes) at {case.step()}")
    case.finish()


def files(case: Case, count: int) -> None:
    """status.json, provenance.json, result.json or config.yaml truncated or full of zeros."""
    name = case.random.choice(["status.json", "provenance.json", "result.json", "config.yaml"])
    if name == "result.json":
        case.finish()
    else:
        case.disturb_halfway()
    path = case.folder / name
    content = path.read_bytes()
    damage = case.random.choice(["truncated", "zeroed", "foreign"])
    wrong = {
        "truncated": content[: case.random.randrange(len(content) - 2)],
        "zeroed": bytes(len(content)),
        "foreign": b'{"status": [], "attempts": "x", "earlier_attempts": 3}',
    }[damage]
    path.write_bytes(wrong)
    case.faults[f"{name} {damage}"] += 1
    case.log.append(f"{name} {damage} at {case.step()}")
    if name == "config.yaml":
        case.refused(2, "damaged", "another config", "no config.yaml")
        if path.read_bytes() != wrong:
            raise Failure("a refused run was changed")
        path.write_bytes(content)
    case.finish()


@contextlib.contextmanager
def small_disk(case: Case) -> Iterator[bool]:
    """A file system of 4 MiB under the case's folder; False, with the reason, if we may not."""
    folder = case.folder.parent
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "metarun-chaos", str(folder)]
    made = shutil.which("mount") and os.geteuid() == 0
    if not made or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        case.skipped = "mounting a file system needs root on Linux"
        yield False
        return
    try:
        yield True
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def full_disk(case: Case, count: int) -> None:
    """The disk fills up while the run goes on; then there is room again."""
    with small_disk(case) as possible:
        if not possible:
            return
        process = case.start()
        target = case.random.randint(0, case.plan.steps)
        if case.reach(process, target):
            ballast = case.folder.parent / "ballast"
            fill(ballast, case.random.choice([0, 0, 4096, 40960, 81920]))
            code = case.wait(process)
            case.faults["while running"] += 1
            case.log.append(f"full at {target}")
            if code != 0:  # it may have had room enough for all that was left to write
                case.expect_message(code, 1, "No space left on device")
                for path in case.checkpoints.glob("*.safetensors"):
                    checkpoint.load(path)
                case.refused(1, "No space left on device")
                case.faults["at the start"] += 1
            ballast.unlink()
        else:
            case.wait(process)
        case.finish()


def fill(path: Path, leave: int) -> None:
    """Fill the file system, then give some bytes back."""
    with open(path, "wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        file.truncate(max(0, file.tell() - leave))


def read_only(case: Case, count: int) -> None:
    """The directory is read-only when the run is to go on, or to begin."""
    with small_disk(case) as possible:
        if not possible:
            return
        if case.random.random() < 0.7:
            case.disturb_halfway()
        folder = str(case.folder.parent)
        remount = ["mount", "-o"]
        errors = case.folder.parent / "stderr"
        errors.touch()
        subprocess.run([*remount, "remount,ro", folder], check=True)
        case.log.append(f"read-only at {case.step()}")
        try:
            done = subprocess.run(
                case.plan.command(case.folder), capture_output=True, text=True, check=False,
                cwd=folder, timeout=DEADLINE,
            )  # fmt: skip
        finally:
            subprocess.run([*remount, "remount,rw", folder], check=True)
        errors.write_text(done.stderr)
        case.expect_message(done.returncode, 1, "Read-only file system")
        case.faults["read-only"] += 1
        case.finish()


def clock(case: Case, count: int) -> None:
    """The clock jumps by hours or days, forwards and backwards, between and within attempts."""
    library = faketime()
    if library is None:
        case.skipped = "needs libfaketime (Debian's package faketime)"
        return
    folder = case.folder.parent
    folder.mkdir(parents=True, exist_ok=True)
    offset = folder / "offset"
    fake = {
        "LD_PRELOAD": library, "FAKETIME_TIMESTAMP_FILE": str(offset), "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }  # fmt: skip
    for _ in range(2):
        jump(case, offset)
        process = case.start(**fake)
        begin = case.step()
        if not case.reach(process, case.random.randint(begin, case.plan.steps)):
            break
        jump(case, offset)
        if not case.reach(process, min(case.step() + 60, case.plan.steps)):
            break
        process.kill()
        process.wait()
    process.wait()
    jump(case, offset)
    case.finish(**fake)


def jump(case: Case, offset: Path) -> None:
    """Set the clock that the processes of a case see."""
    seconds = case.random.choice([-1, 1]) * case.random.choice([30, 3600, 86400, 400 * 86400])
    offset.write_text(f"{seconds:+d}\n")
    case.faults["back" if seconds < 0 else "forward"] += 1
    case.log.append(f"{seconds:+d} s at {case.step()}")


def faketime() -> str | None:
    """The library that fakes the clock."""
    found = [*Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")]
    return str(found[0]) if found else ctypes.util.find_library("faketimeMT")


def locks(case: Case, count: int) -> None:
    """A second process in the directory of a run that goes on, is stopped, or has been killed."""
    kind = case.random.choice(["running", "stopped", "killed", "both at once"])
    case.faults[kind] += 1
    case.log.append(kind)
    first = case.start()
    if kind == "both at once":
        messages = first_messages = case.folder.parent / "stderr"
        messages.rename(first_messages := messages.with_name("stderr-of-the-first"))
        second = case.start()
        codes = [case.wait(second), first.wait(DEADLINE)]
        said = case.messages() + first_messages.read_text()
        if codes == [0, 0]:  # the machine was slow: one after the other
            case.compare()
        elif sorted(codes) != [0, 1] or "another process" not in said:
            raise Failure(f"exits {codes}: {said}")
        case.finish()
        return
    if not case.reach(first, case.random.randint(1, case.plan.steps // 2)):
        raise Failure(f"ended by itself: {case.messages()}")
    if kind == "killed":
        first.kill()  # and not waited for: the lock goes with the process
    else:
        if kind == "stopped":
            first.send_signal(signal.SIGSTOP)
        before = (case.folder / "config.yaml").read_bytes()
        try:
            case.refused(1, f"process {first.pid} on ")
        except Failure:
            late = "finished: nothing to do" in case.messages()  # the run was done by then
            if kind == "stopped" or not late or first.wait(DEADLINE) != 0:
                first.kill()
                raise
        if first.poll() is None and (case.folder / "config.yaml").read_bytes() != before:
            raise Failure("the refused process changed the run")
        first.send_signal(signal.SIGCONT)
        if first.wait(DEADLINE) != 0:
            raise Failure("the first process did not finish")
    case.finish()
    first.wait()


FAULTS: dict[str, Callable[[Case, int], None]] = {
    "kills": kills,
    "signals": signals,
    "full-disk": full_disk,
    "read-only": read_only,
    "clock": clock,
    "checkpoints": checkpoints,
    "logs": logs,
    "files": files,
    "locks": locks,
}
