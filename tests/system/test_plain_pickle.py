"""Pickles as plain values: the same as Python reads, and nothing that runs."""

import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metarun.system.pickled_arrays import Array, Span
from metarun.system.plain_pickle import read_pickle
from metarun.system.untrusted import DamagedError, UntrustedError

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def written(path: Path, content: bytes) -> Path:
    (path / "some.pkl").write_bytes(content)
    return path / "some.pkl"


def plain(value: Any) -> Any:
    """What was read, with arrays and bytes in memory."""
    match value:
        case Array():
            return value.numpy()
        case Span(kind="bytes"):
            return value.read()
        case Span():
            return value.read().decode("latin-1")
        case dict():
            return {key: plain(own) for key, own in value.items()}
        case list() | tuple():
            return type(value)(plain(own) for own in value)
    return value


VALUES = {
    "numbers": [0, 1, -1, 255, 256, 65536, 2**31, -(2**40), 2**80, 0.5, -1e300, True, False, None],
    "words": ["", "a", "n01532829", "ä" * 300, "x" * 5000],
    "bytes": [b"some", b"\x80\xff" * 3000],
    "containers": {"a": [1, [2, (3,), (), (1, 2), (1, 2, 3), (1, 2, 3, 4)]], 5: {}, (1, "b"): []},
    "shared": [[shared := [1, 2], shared], shared],
    "sets": [{1, 2}, frozenset({3})],
    "arrays": [
        np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
        np.arange(5000, dtype=">i4"),
        np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        np.array(["ab", "c"]),
        np.zeros((0, 3)),
        np.array(7),
        np.array([True, False]),
    ],
    "scalars": [np.int64(3), np.float32(0.25)],
}

EVERY = [
    (name, protocol)
    for name in VALUES
    for protocol in PROTOCOLS
    if name != "bytes" or protocol >= 3  # before, Python 3 writes them as text, which it is here
]


@pytest.mark.parametrize(("name", "protocol"), EVERY)
def test_values_are_those_that_python_reads(name: str, protocol: int, tmp_path: Path) -> None:
    value = VALUES[name]
    read = plain(read_pickle(written(tmp_path, pickle.dumps(value, protocol))))
    np.testing.assert_equal(read, value)


def test_large_arrays_stay_in_the_file(tmp_path: Path) -> None:
    images = np.arange(2**16, dtype=np.uint8).reshape(16, 64, 64)
    path = written(tmp_path, pickle.dumps([0, images], protocol=4))
    _, array = read_pickle(path)
    place = array.place
    assert path.read_bytes()[place.offset :][: place.length] == images.tobytes()


def test_an_array_that_is_not_in_the_file_as_it_is_says_what_to_do(tmp_path: Path) -> None:
    for value, protocol in (
        (np.full((99, 99), 200, np.uint8), 2),
        (np.ones((9, 9)).T.copy("F"), 4),
    ):
        array = read_pickle(written(tmp_path, pickle.dumps(value, protocol=protocol)))
        with pytest.raises(UntrustedError, match="pickle it again by Python 3 with protocol 4"):
            _ = array.place


class Hostile:
    """What runs when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_nothing_in_a_hostile_pickle_runs(protocol: int, tmp_path: Path) -> None:
    marker = tmp_path / "it ran"
    content = pickle.dumps({"image_data": Hostile(marker)}, protocol)
    pickle.loads(content)
    assert marker.exists(), "the pickle is hostile indeed"
    marker.unlink()
    with pytest.raises(UntrustedError, match=r"some.pkl would .*: only numbers, words"):
        read_pickle(written(tmp_path, content))
    assert not marker.exists()


HOSTILE = {
    "a call by name": b"cos\nsystem\n(S'touch MARKER'\ntR.",
    "a call by name from the stack": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
    "an instance": b"(S'touch MARKER'\nios\nsystem\n.",
    "an object": b"(cos\nsystem\nS'touch MARKER'\no.",
    "a new object": b"\x80\x02cos\nsystem\nU\x0ctouch MARKER\x85\x81.",
    "a new object with keywords": b"\x80\x04\x8c\x02os\x8c\x06system\x93)}\x92.",
    "a state": b"cos\nsystem\n}b.",
    "an extension": b"\x80\x02\x82\x01.",
    "a persistent object": b"Pit\n.",
    "eval": b'cbuiltins\neval\n(S\'open("MARKER", "w")\'\ntR.',
    "getattr": b"cbuiltins\ngetattr\n(cos\nsystem\nS'x'\ntR.",
    "an array of objects": pickle.dumps(np.array([{}], dtype=object)),
    "an array with fields": pickle.dumps(np.zeros(1, dtype=[("a", "i4")])),
    "a type of objects": b"cnumpy\ndtype\n(S'O8'\ntR.",
    "a buffer out of the file": b"\x80\x05\x97.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_would_make_an_object_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = HOSTILE[name]
    if name == "a type of objects":  # refused where an array is of it
        content = pickle.dumps(np.array([None], dtype=object), 2)
    with pytest.raises(UntrustedError, match=r"^some.pkl \w+"):
        read_pickle(written(tmp_path, content))
    assert not (tmp_path / "MARKER").exists()


def test_every_pickle_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    content = pickle.dumps({"a": [1, 2.5, "b", np.arange(3)], "c": b"d"}, protocol=4)
    for length in range(len(content)):
        with pytest.raises(DamagedError):
            read_pickle(written(tmp_path, content[:length]))


def test_every_code_of_a_pickle_may_be_damaged(tmp_path: Path) -> None:
    """Whatever byte is another one, the answer is a value or one of two errors."""
    content = pickle.dumps({"a": [1, "b", np.arange(3, dtype=np.uint8)]}, protocol=2)
    for place in range(len(content)):
        for code in (0, 46, 82, 98, 99, 113, 255):
            changed = content[:place] + bytes([code]) + content[place + 1 :]
            try:
                read_pickle(written(tmp_path, changed))
            except UntrustedError:
                continue


def test_each_code_is_known(tmp_path: Path) -> None:
    for op in pickletools.opcodes:
        with pytest.raises(UntrustedError):
            read_pickle(written(tmp_path, op.code.encode("latin-1")))
