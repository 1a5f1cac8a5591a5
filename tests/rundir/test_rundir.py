"""The run directory: held by one process, and not upset by what a crash left in it."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from metarun.errors import ConfigError, RunError
from metarun.rundir import directory as rundir
from metarun.rundir.metrics import read_metrics
from metarun.system.files import write_atomically

CONFIG = {"seed": 0, "trainer": {"steps": 3}}


def opened(directory: Path):
    return rundir.opened(directory, CONFIG, "cpu")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_lock_goes_with_its_process_and_not_before(
    tmp_path: Path, number: signal.Signals
) -> None:
    """A child of the holder that outlives it, as a background process would, changes nothing."""
    code = (
        "import subprocess, sys; from pathlib import Path\n"
        "from metarun.rundir import directory as rundir\n"
        f"with rundir.opened(Path(sys.argv[1]), {CONFIG}, 'cpu'):\n"
        "    child = subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL)\n"
        "    print(child.pid, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        holder.send_signal(number)
        if number == signal.SIGSTOP:
            with pytest.raises(RunError, match=rf"process {holder.pid} on .*: wait for it"):
                opened(tmp_path / "run").__enter__()
        else:
            holder.wait()
            with opened(tmp_path / "run"):
                assert rundir.read_status(tmp_path / "run")["attempts"] == 2
    finally:
        os.kill(child, signal.SIGKILL)
        holder.kill()
        holder.communicate()


def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    with opened(tmp_path / "run"):
        assert "without locks (Function not implemented): see to it" in caplog.text


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    ours = [tmp_path / ".status.json.123.tmp", tmp_path / "checkpoints" / ".last.safetensors.4.tmp"]
    others = [tmp_path / "notes.tmp", tmp_path / ".notes.tmp", tmp_path / "checkpoints" / "a.pt"]
    others.append(tmp_path / "another-run" / ".status.json.123.tmp")  # which may be going on
    others[-1].parent.mkdir()
    for path in (*ours, *others):
        path.write_text("x")
    (tmp_path / "config.yaml").write_text("seed: 0\ntrainer:\n  steps: 3\n")
    with opened(tmp_path):
        assert not any(path.exists() for path in ours)
        assert all(path.exists() for path in others)


@pytest.mark.parametrize("name", ["status.json", "provenance.json"])
@pytest.mark.parametrize(
    "wrong",
    [b"", b'{"attempts": 1', bytes(100), b"\xff\xfe{}", b"[1]", b'{"attempts": "x", '
     b'"earlier_attempts": 3}', b'{"attempts": -7, "earlier_attempts": null}'],
)  # fmt: skip
def test_damaged_records_of_earlier_attempts_do_not_stop_a_run(
    tmp_path: Path, name: str, wrong: bytes
) -> None:
    with opened(tmp_path):
        pass
    (tmp_path / name).write_bytes(wrong)
    with opened(tmp_path):
        pass
    status = rundir.read_status(tmp_path)
    assert status["status"] == "completed"
    assert status["attempts"] == (1 if name == "status.json" else 2)
    assert isinstance(json.loads((tmp_path / "provenance.json").read_text()), dict)


@pytest.mark.parametrize("wrong", ['{"test": {}}', '{"test', "[]", "\0\0\0"])
def test_a_finished_run_without_its_result_is_not_taken_for_finished(
    tmp_path: Path, wrong: str
) -> None:
    with opened(tmp_path):
        pass
    result = {"test": {}, "best": {}, "steps": 3}
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert rundir.finished_result(tmp_path, CONFIG) == result
    (tmp_path / "result.json").write_text(wrong)
    assert rundir.finished_result(tmp_path, CONFIG) is None


@pytest.mark.parametrize("length", [0, 5, 12, -2])
def test_a_truncated_config_is_refused(tmp_path: Path, length: int) -> None:
    with opened(tmp_path):
        pass
    path = tmp_path / "config.yaml"
    path.write_bytes(path.read_bytes()[:length])
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match=r"damaged|another config"):
        opened(tmp_path).__enter__()
    assert before == {p: p.read_bytes() for p in tmp_path.iterdir()}


def test_the_status_tells_of_a_full_disk_even_without_room_for_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, value: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with pytest.raises(OSError, match="No space"), opened(tmp_path):
        monkeypatch.setattr(rundir, "write_json", full)
        full(tmp_path / "checkpoint", None)
    assert rundir.read_status(tmp_path) == {"status": "failed", "attempts": 1}


def test_a_file_keeps_its_name_only_after_it_has_been_checked(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    write_atomically(path, lambda file: file.write(b"old"))

    def refuse(written: Path) -> None:
        assert written.read_bytes() == b"new" and path.read_bytes() == b"old"
        raise OSError(errno.EIO, "cannot read it back")

    with pytest.raises(OSError, match="read it back"):
        write_atomically(path, lambda file: file.write(b"new"), refuse)
    assert [p.read_bytes() for p in path.parent.iterdir()] == [b"old"]


@pytest.mark.parametrize(("kib", "file"), [(2, "run/tb/events.out."), (20, "run/checkpoints/")])
def test_a_disk_without_room_ends_a_run_in_one_message(
    tmp_path: Path, environment: dict[str, str], kib: int, file: str
) -> None:
    """Here by a limit of the size of files, which needs no file system of one's own."""
    done = subprocess.run(
        ["bash", "-c", f'ulimit -f {kib} && exec "$@"', "-", sys.executable, "-m", "metarun",
         "train", "data=sinusoid", "backbone=mlp", "trainer.steps=5", "trainer.log_every=1",
         "trainer.eval_episodes=5", "hydra.run.dir=run"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"metarun: File too large: {file}")
    assert rundir.read_status(tmp_path / "run")["status"] == "failed"


@pytest.mark.parametrize("name", [*rundir.FILES, *rundir.FOLDERS])
def test_a_run_writes_to_nothing_outside_its_directory(tmp_path: Path, name: str) -> None:
    directory, outside = tmp_path / "run", tmp_path / "outside"
    with opened(directory):
        pass
    if name in rundir.FOLDERS:
        outside.mkdir()
        (outside / "step-00000001.safetensors").write_text("precious")
    else:
        outside.write_bytes(
            (directory / name).read_bytes() if (directory / name).exists() else b"precious"
        )
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to(outside)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for _ in range(2):
        with pytest.raises(ConfigError, match=rf"{name} is a link: a run writes to files and"):
            opened(directory).__enter__()
        with pytest.raises(ConfigError, match=rf"{name} is a link"):
            rundir.finished_result(directory, CONFIG)
        assert before == {path: path.read_bytes() for path in before}
        if name in rundir.FILES:  # now one that leads to nothing
            before.pop(outside, None)
            before.pop(directory / name, None)
            outside.unlink(missing_ok=True)
    assert name in rundir.FOLDERS or not outside.exists()


def test_an_event_file_that_is_a_link_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "tb").mkdir()
    (tmp_path / "tb" / "events.out.tfevents.1").symlink_to(tmp_path / "precious")
    with pytest.raises(ConfigError, match=r"events\.out\.tfevents\.1 is a link"):
        opened(tmp_path).__enter__()


@pytest.mark.parametrize("name", rundir.FILES)
def test_a_pipe_in_a_run_directory_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(ConfigError, match=f"{name} is no file: a run writes to"):
        opened(tmp_path).__enter__()
    assert rundir.read_json(tmp_path / name) == {}
    with pytest.raises(OSError, match="it is no regular file"):
        read_metrics(tmp_path / name)


def test_devices_and_endless_files_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/zero")
    with pytest.raises(OSError, match="it is no regular file"):
        read_metrics(tmp_path / "metrics.jsonl")
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 2**40)  # takes no room on the disk
    with pytest.raises(OSError, match="larger than"):
        read_metrics(tmp_path / "large")
    assert rundir.read_json(tmp_path / "large") == {}
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "config.yaml").write_text("a: [" + "1," * 2**17 + "]")
    monkeypatch.setattr("yaml.parse", None)  # whose parser would take seconds
    with pytest.raises(ConfigError, match="damaged"):
        rundir.finished_result(tmp_path, CONFIG)


def test_a_run_directory_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(RunError, match=r"run is no folder: choose another hydra\.run\.dir"):
        opened(tmp_path / "run").__enter__()
