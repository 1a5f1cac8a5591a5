"""Archives of data sets: unpacked into the cache while they are converted, and no longer."""

import contextlib
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from metarun.errors import DataError
from metarun.system.files import make_folder

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2")


def archive_name(path: Path) -> str | None:
    """The name of an archive without its ending; None: it is no archive."""
    for ending in ARCHIVES:
        if path.name.lower().endswith(ending):
            return path.name[: -len(ending)]
    return None


@contextlib.contextmanager
def unpacked(archive: Path, folder: Path) -> Iterator[None]:
    """Put the content of an archive into a folder, which is deleted at the end.

    Nothing is put outside of it. What a killed process has left there is deleted before.

    Raises:
        DataError: the archive is damaged or would leave the folder, or the disk has no room.
    """
    try:
        shutil.rmtree(folder, ignore_errors=True)
        make_folder(folder)
        _unpack(archive, folder)
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unpack(archive: Path, folder: Path) -> None:
    try:
        if archive.name.lower().endswith(".zip"):
            with zipfile.ZipFile(archive) as opened:
                _room(archive, sum(one.file_size for one in opened.infolist()), folder)
                _inside(archive, [one.filename for one in opened.infolist()])
                opened.extractall(folder)
        else:
            _room(archive, archive.stat().st_size, folder)
            with tarfile.open(archive) as opened:
                opened.extractall(folder, filter="data")
    except DataError:
        raise
    except tarfile.FilterError as error:
        raise DataError(f"{archive} is not safe to unpack: {error}") from error
    except OSError as error:
        raise DataError(f"cannot unpack {archive} into {folder.parent}: {error}") from error
    except Exception as error:  # damage has many types in tarfile, zipfile and zlib
        raise DataError(f"{archive} is damaged ({error}): put a good copy there") from error


def _inside(archive: Path, names: list[str]) -> None:
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DataError(f"{archive} is not safe to unpack: {name!r} would be outside")


def _room(archive: Path, needed: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"unpacking {archive} takes {needed / 2**30:.1f} GiB, of {free / 2**30:.1f} that are "
            f"free in {folder.parent}: METARUN_CACHE=<folder> puts it elsewhere"
        )
