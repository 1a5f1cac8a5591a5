"""The run directory: one run, its config, its status; resumed, never shared, never mixed."""

import contextlib
import json
import logging
import os
import stat
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from metarun.config.renamed import with_todays_options
from metarun.config.run import differing, flat
from metarun.errors import ConfigError, RunError
from metarun.rundir.longer import STEPS, check_length, keep_earlier_result
from metarun.rundir.provenance import now, write_provenance
from metarun.system.files import (
    LockedError,
    locked,
    remove_half_written,
    write_json,
    write_text,
)
from metarun.system.untrusted import UntrustedError, json_object, yaml_mapping

log = logging.getLogger(__name__)

FILES = (
    ".lock",
    "config.yaml",
    "metrics.jsonl",
    "provenance.json",
    "result.json",
    "status.json",
)
FOLDERS = ("checkpoints", "tb", "wandb")


def finished_result(directory: str | Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """The stored result if the directory holds a finished run of this config, else None.

    None as well if the run is to become longer than it is.

    Raises:
        ConfigError: the directory holds a run of another config, or something else.
    """
    directory = Path(directory)
    check_same_config(directory, config)
    status = read_status(directory)
    if status.get("status") != "completed":
        return None
    result = read_json(directory / "result.json")
    if not result.keys() >= {"test", "best", "steps"}:
        return None  # test it again
    learns = not isinstance(result["test"], dict) or result["test"].get("meta_learned", True)
    steps = flat(config).get(STEPS) if learns else 0  # a control takes none
    return result if result["steps"] == steps else None  # else: train on


@contextlib.contextmanager
def opened(
    directory: Path,
    config: dict[str, Any],
    device: str,
    ranks: int = 1,
    check: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Hold a run directory while its run goes on, and keep `status.json` true.

    Args:
        ranks: processes that compute the run; this one writes for all.
        check: called before anything is written, to refuse what the directory holds.

    Raises:
        ConfigError: the directory holds a run of another config.
        RunError: another process holds it, or it cannot be written.
    """
    with _locked(directory):
        check_same_config(directory, config)
        check()
        for folder in (directory, directory / "checkpoints"):
            remove_half_written(folder)
        keep_earlier_result(
            directory, read_json(directory / "result.json"), flat(config).get(STEPS)
        )
        attempts = _count(read_status(directory).get("attempts")) + 1
        write_text(directory / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))
        source = directory / "provenance.json"
        write_provenance(source, read_json(source), device, ranks)
        status: dict[str, Any] = {"status": "running", "attempts": attempts, "error": None}
        status["started"] = now()
        write_json(directory / "status.json", status)
        try:
            yield
            status["status"] = "completed"
        except KeyboardInterrupt:
            status["status"] = "interrupted"
            raise
        except BaseException as error:
            status["status"] = "failed"
            status["error"] = f"{type(error).__name__}: {error}"
            status["traceback"] = traceback.format_exc()
            raise
        finally:
            status["ended"] = now()
            _write_final_status(directory / "status.json", status)


def _write_final_status(path: Path, status: dict[str, Any]) -> None:
    """Write a status even on a full disk, where there is no room for a second file."""
    try:
        write_json(path, status)
    except OSError:
        brief = {key: status[key] for key in ("status", "attempts")}
        with contextlib.suppress(OSError), open(path, "r+") as file:
            file.write(json.dumps(brief))
            file.truncate()


def read_status(directory: str | Path) -> dict[str, Any]:
    """The content of `status.json`, or nothing if there is none."""
    return read_json(Path(directory) / "status.json")


def _count(value: object) -> int:
    return value if type(value) is int and value >= 0 else 0  # what a damaged file may hold


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object; nothing if the file is not there or damaged."""
    try:
        return json_object(Path(path))
    except (UntrustedError, NotADirectoryError) as error:
        log.warning("ignoring the damaged file %s (%s)", path, error)
        return {}


def check_same_config(directory: Path, config: dict[str, Any]) -> None:
    """Refuse a directory that holds a run of another config, or something that is no run.

    A run may become longer; see `metarun.rundir.longer`.

    Raises:
        ConfigError: names the settings that differ.
    """
    _check_entries(directory)
    path = directory / "config.yaml"
    if not path.exists():
        if (directory / "checkpoints").exists():
            raise ConfigError(f"{directory} has checkpoints but no config.yaml: not a run of ours")
        return
    stored = flat(_read_yaml(path))
    wanted = flat(config)
    others = differing(stored, wanted)
    if others == [STEPS]:
        check_length(stored, wanted, directory)
    elif others:
        shown = "; ".join(f"{k}: {stored.get(k)} there, {wanted.get(k)} here" for k in others[:5])
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        raise ConfigError(
            f"{directory} holds a run of another config ({shown}{more}): nothing was changed; "
            "choose another hydra.run.dir, or repeat that run's settings to resume it"
        )


def stored_config(directory: Path) -> dict[str, Any]:
    """The config of the run that a directory holds.

    Raises:
        ConfigError: it is damaged.
    """
    return _read_yaml(directory / "config.yaml")


def reads_elsewhere(directory: Path, config: dict[str, Any]) -> bool:
    """Whether a config has another folder of data than the run that a directory holds."""
    stored = flat(stored_config(directory)).get("data.root")
    return bool(stored != flat(config).get("data.root"))


def _check_entries(directory: Path) -> None:
    """Refuse a directory in which a run would write elsewhere, through a link, or wait for ever."""
    files = [*FILES, *(f"tb/{path.name}" for path in (directory / "tb").glob("events.*"))]
    for names, fits, kind in ((files, stat.S_ISREG, "file"), (FOLDERS, stat.S_ISDIR, "folder")):
        for name in names:
            try:
                mode = os.lstat(directory / name).st_mode
            except (FileNotFoundError, NotADirectoryError):
                continue
            if not fits(mode):
                what = "a link" if stat.S_ISLNK(mode) else f"no {kind}"
                raise ConfigError(
                    f"{directory / name} is {what}: a run writes to files and folders of its own "
                    "only; choose another hydra.run.dir, or move it away"
                )


def _read_yaml(path: Path) -> dict[str, Any]:
    """A config.yaml, whose interpolations stay what they are: text."""
    try:
        stored = {str(key): value for key, value in yaml_mapping(path).items()}
        return with_todays_options(stored)
    except (UntrustedError, OSError) as error:
        raise ConfigError(f"{path} is damaged, so nobody can tell whose run this is") from error


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """An exclusive lock that the system drops when the process ends, however it ends."""
    with contextlib.ExitStack() as held:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            _check_entries(directory)
            held.enter_context(locked(directory / ".lock"))
        except LockedError as error:
            raise RunError(
                f"another process is running in {directory} ({error}): wait for it, or end it, or "
                "choose another hydra.run.dir"
            ) from error
        except FileExistsError as error:
            raise RunError(f"{directory} is no folder: choose another hydra.run.dir") from error
        except OSError as error:
            raise RunError(f"cannot write to {directory}: {error.strerror}") from error
        yield
