"""Small copies of published data sets, in their formats byte for byte."""

import io
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from metarun.components.data._benchmarks import BenchmarkConfig, read_source
from metarun.components.data._class_lists import ClassList
from metarun.components.data._finding import Benchmark, find
from metarun.episodes.store import ClassStore

SPLITS = ("train", "val", "test")
Pictures = dict[str, np.ndarray]  # class -> (pictures, height, width, 3)


def drawn(classes: ClassList, side: int, count: int = 2) -> Pictures:
    """Noise: no two pictures are alike."""
    rng = np.random.default_rng(0)
    names = [name for own in classes.splits.values() for name in own]
    return {n: rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8) for n in names}


def bare(name: str) -> str:
    """A class without its superclass."""
    return name.split("/")[-1]


def png(pixels: np.ndarray) -> bytes:
    """A PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_pngs(folder: Path, pictures: np.ndarray, name: str = "") -> list[str]:
    """A file for each picture; their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{name}{number:08}.png" for number in range(len(pictures))]
    for file, pixels in zip(names, pictures, strict=True):
        (folder / file).write_bytes(png(pixels))
    return names


def of_split(classes: ClassList, pictures: Pictures, split: str) -> tuple[np.ndarray, list[int]]:
    """All pictures of a split, classes taking turns, and the number of the class of each."""
    own = [pictures[name] for name in classes.splits[split]]
    return np.stack(own, 1).reshape(-1, *own[0].shape[1:]), [*range(len(own))] * len(own[0])


def python2(value: Any) -> bytes:
    """A pickle as Python 2 wrote it with its highest protocol, the second."""
    return b"\x80\x02" + _python2(value) + b"."


def _python2(value: Any) -> bytes:
    match value:
        case None:
            return b"N"
        case str():
            return _words(value.encode())
        case int():
            return b"J" + struct.pack("<i", value)
        case list():
            return b"](" + b"".join(map(_python2, value)) + b"e"
        case dict():
            return b"}(" + b"".join(_python2(k) + _python2(v) for k, v in value.items()) + b"u"
        case np.ndarray():
            shape = b"(" + b"".join(map(_python2, value.shape)) + b"t"
            order = _words(value.dtype.byteorder.replace("=", "<").encode())
            dtype = (
                b"cnumpy\ndtype\n" + _words(value.dtype.str[1:].encode()) + b"K\x00K\x01\x87R"
                b"(K\x03" + order + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
            )
            made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
            return made + b"(K\x01" + shape + dtype + b"I00\n" + _words(value.tobytes()) + b"tb"
    raise TypeError(value)


def _words(content: bytes) -> bytes:
    if len(content) < 256:
        return b"U" + struct.pack("<B", len(content)) + content
    return b"T" + struct.pack("<i", len(content)) + content


def write_python2(path: Path, value: Any) -> None:
    """Write such a pickle, which Python's own reader reads as the same."""
    content = python2(value)
    np.testing.assert_equal(pickle.loads(content, encoding="latin1"), value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def opened(benchmark: Benchmark, own: BenchmarkConfig) -> dict[str, ClassStore]:
    """The data set in a folder, in whatever layout it is."""
    return read_source(
        benchmark, find(benchmark, Path(str(own.root)), getattr(own, "layout", "auto")), own
    )


def same(stores: dict[str, ClassStore], classes: ClassList, pictures: Pictures) -> None:
    """The stores have these classes with these pictures, of each class in any order."""
    for split in SPLITS:
        store = stores[split]
        assert [*store.class_names] == classes.splits[split]
        for name, start, size in zip(
            store.class_names, store.starts.tolist(), store.sizes.tolist(), strict=True
        ):
            found = store.images[start : start + size].numpy().transpose(0, 2, 3, 1)
            assert {one.tobytes() for one in found} == {one.tobytes() for one in pictures[name]}
            assert len(found) == len(pictures[name])
