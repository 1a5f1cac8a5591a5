"""Arrays in files of NumPy, read where they lie."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from metarun.errors import DataError
from metarun.system.pickled_arrays import Span


def array_in_npz(path: Path, name: str) -> tuple[tuple[int, ...], np.dtype[Any], Span]:
    """Shape and type of an array in a file that `numpy.savez` wrote, and where its bytes are.

    Raises:
        DataError: it is not there, damaged, or compressed.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if f"{name}.npy" not in archive.namelist():
                have = ", ".join(one.removesuffix(".npy") for one in archive.namelist())
                raise DataError(f"{path} has {have or 'nothing'}, but no {name}")
            member = archive.getinfo(f"{name}.npy")
            if member.compress_type != zipfile.ZIP_STORED:
                raise DataError(
                    f"{path} is compressed, so that its {member.file_size / 2**30:.1f} GiB would "
                    "have to be in memory: write it again with numpy.savez"
                )
        with open(path, "rb") as file:
            file.seek(member.header_offset + 26)
            lengths = file.read(4)
            file.seek(int.from_bytes(lengths[:2], "little"), 1)
            file.seek(int.from_bytes(lengths[2:], "little"), 1)
            start = file.tell()
            version = np.lib.format.read_magic(file)
            reader = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, fortran, dtype = reader(file)
            offset = file.tell()
    except DataError:
        raise
    except Exception as error:  # damage has many types in zipfile and NumPy
        raise DataError(f"{path} is damaged: {error}") from error
    length = member.file_size - (offset - start)
    if fortran or dtype.hasobject or length != int(np.prod(shape)) * dtype.itemsize:
        raise DataError(f"{path}: {name} is no plain array of numbers")
    return shape, dtype, Span(path, offset, length, "bytes")
