"""Tensors and plain values in one file: whole, exact, and refused where it is anything else."""

import hashlib
import json
import math
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from metarun.system import archive
from metarun.system.archive import DTYPES, from_bytes, to_bytes
from metarun.system.memory import machine_memory
from metarun.system.untrusted import DamagedError, UntrustedError

MARK = "0123456789abcdef" * 4


def opened(data: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """What each tensor is, the fields of ours, the bytes of the tensors: read by hand."""
    size = int.from_bytes(data[:8], "little")
    tensors = json.loads(data[8 : 8 + size])
    fields = json.loads(tensors.pop("__metadata__")["metarun"])
    return tensors, fields, data[8 + size :]


def sealed(tensors: dict[str, Any], fields: dict[str, Any] | str, body: bytes) -> bytes:
    """A file of these parts whose digest is right."""
    words = fields if isinstance(fields, str) else json.dumps(fields | {"sha256": MARK})
    head = json.dumps({"__metadata__": {"metarun": words}, **tensors}).encode()
    whole = len(head).to_bytes(8, "little") + head + body
    digest = hashlib.sha256(whole.replace(MARK.encode(), b"0" * 64)).hexdigest()
    return whole.replace(MARK.encode(), digest.encode())


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, torch.Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(theirs, dict):
        return list(ours) == list(theirs) and all(same(ours[k], theirs[k]) for k in theirs)
    if isinstance(theirs, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(theirs, float) and math.isnan(theirs):
        return type(ours) is float and math.isnan(ours)
    return type(ours) is type(theirs) and ours == theirs


VALUES: dict[str, Any] = {
    "numbers": [0, -1, 2**63 - 1, 0.1, -0.0, 1e-320, math.inf, math.nan, True, None, "é\n\0"],
    "tree": {"a": [{"b": torch.ones(2)}, []], "": {}},
    "meta": {"body.0.weight": torch.randn(2, 3), "step": torch.tensor(3.5)},
    "types": {str(dtype): torch.ones(2, 1).to(dtype) for dtype in DTYPES},
    "odd": [torch.ones(3, 5).T, torch.ones(0, 4), torch.ones(1).expand(9), torch.tensor(1.0)],
    "conjugate": torch.tensor([1 + 2j]).conj(),
}


def test_values_come_back_as_they_were(tmp_path: Path) -> None:
    data = to_bytes(VALUES, ["meta"])
    assert same(from_bytes(data), VALUES)
    assert to_bytes(VALUES, ["meta"]) == data  # the same bytes
    (tmp_path / "a").write_bytes(data)
    archive.verify(tmp_path / "a")
    assert same(archive.read(tmp_path / "a"), VALUES)


def test_it_is_a_file_that_the_library_itself_reads(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(to_bytes(VALUES, ["meta"]))
    found = safetensors.torch.load_file(tmp_path / "a")
    assert torch.equal(found["body.0.weight"], VALUES["meta"]["body.0.weight"])
    assert torch.equal(found["tree/a/0/b"], torch.ones(2))
    assert safetensors.safe_open(tmp_path / "a", "pt").metadata().keys() == {"metarun"}


def test_two_tensors_never_share_a_name() -> None:
    one, two, three = torch.zeros(1), torch.ones(1), torch.full((1,), 2.0)
    values = {"meta": {"a/b": one, "rng/cpu": two}, "a": {"b": three}, "rng": {"cpu": one}}
    assert same(from_bytes(to_bytes(values, ["meta"])), values)


def test_a_tensor_that_shares_memory_is_kept_whole() -> None:
    whole = torch.arange(6.0)
    values = {"a": whole, "b": whole[:2], "c": whole}
    assert same(from_bytes(to_bytes(values)), values)


@pytest.mark.parametrize("value", [{1: 2}, {"a": {1, 2}}, {"a": b"x"}, {"a": torch.float32}])
def test_what_json_cannot_hold_is_not_written(value: dict) -> None:
    with pytest.raises(ValueError, match=r"no words|neither a plain value nor a tensor"):
        to_bytes(value)


def test_every_changed_byte_shows() -> None:
    data = to_bytes({"config": {"seed": 1}, "meta": {"w": torch.ones(5)}}, ["meta"])
    for place in range(len(data)):
        for bit in (1, 64):
            broken = bytearray(data)
            broken[place] ^= bit
            with pytest.raises(UntrustedError):
                from_bytes(bytes(broken))
    for cut in range(len(data)):
        with pytest.raises(UntrustedError):
            from_bytes(data[:cut])


def test_what_has_no_digest_of_ours_is_damaged() -> None:
    for foreign in (
        b"", b"PK\3\4", b"\0" * 8, b"not a checkpoint",
        safetensors.torch.save({"w": torch.ones(1)}),
        safetensors.torch.save({"w": torch.ones(1)}, {"metarun": "{}"}),
        safetensors.torch.save({"w": torch.ones(1)}, {"metarun": '{"sha256": ""}'}),
        safetensors.torch.save({"w": torch.ones(1)}, {"metarun": "[" * 10_000}),
    ):  # fmt: skip
        with pytest.raises(DamagedError):
            from_bytes(foreign)


GOOD = {"values": {"w": None}, "tensors": [[["w"], "w"]], "complex": []}
W = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
HOSTILE: dict[str, tuple[dict[str, Any], Any, bytes]] = {
    "a tensor beyond the file": ({"w": W["w"] | {"shape": [10**9]}}, GOOD, bytes(8)),
    "a tensor that claims more": ({"w": W["w"] | {"data_offsets": [0, 2**40]}}, GOOD, bytes(8)),
    "tensors over each other": (W | {"v": W["w"]}, GOOD, bytes(8)),
    "an unknown type": ({"w": W["w"] | {"dtype": "PICKLE"}}, GOOD, bytes(8)),
    "bytes that belong to no tensor": (W, GOOD, bytes(9)),
    "a tensor without a place": (W, GOOD | {"tensors": []}, bytes(8)),
    "a place without a tensor": (W, GOOD | {"tensors": [[["w"], "v"]]}, bytes(8)),
    "two places for a tensor": (
        W, GOOD | {"values": {"w": None, "v": None}, "tensors": [[["w"], "w"], [["v"], "w"]]},
        bytes(8),
    ),
    "a place that is taken": (W, GOOD | {"values": {"w": 1}}, bytes(8)),
    "a place that is not there": (W, GOOD | {"tensors": [[["a", "b"], "w"]]}, bytes(8)),
    "a place in a word": (
        W, GOOD | {"values": {"w": "ab"}, "tensors": [[["w", 0], "w"]]}, bytes(8)
    ),
    "no path": (W, GOOD | {"tensors": [[[], "w"]]}, bytes(8)),
    "a path that is none": (W, GOOD | {"tensors": [[[["w"]], "w"]]}, bytes(8)),
    "values that are no dictionary": (
        W, GOOD | {"values": [None], "tensors": [[[0], "w"]]}, bytes(8)
    ),
    "pairs that are none": ({"w": W["w"] | {"shape": [2, 1]}}, GOOD | {"complex": ["w"]}, bytes(8)),
    "a number without end": (
        W, json.dumps(GOOD | {"sha256": MARK, "n": 1})[:-2] + "9" * 400 + "}", bytes(8)
    ),
    "deep values": (
        W, GOOD | {"values": {"w": None, "d": json.loads("[" * 99 + "]" * 99)}}, bytes(8)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_with_a_right_digest_is_refused(name: str) -> None:
    assert same(from_bytes(sealed(W, GOOD, bytes(8))), {"w": torch.zeros(2)})
    with pytest.raises(UntrustedError):
        from_bytes(sealed(*HOSTILE[name]))


def test_a_long_header_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MOST_HEADER", 1000)
    with pytest.raises(ValueError, match="too many"):
        to_bytes({"words": ["x"] * 1000})
    monkeypatch.setattr(archive, "_json", None)
    with pytest.raises(UntrustedError, match="header is too long"):
        from_bytes(sealed(W, GOOD | {"values": {"w": "x" * 1000}}, bytes(8)))


def test_a_file_takes_little_more_memory_than_it_has_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(to_bytes({"w": torch.ones(1000)}))
    tracemalloc.start()
    archive.read(path)
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()
    os.truncate(path, 2 * machine_memory())  # takes no room on the disk
    with pytest.raises(OSError, match="it is larger than"):
        archive.read(path)
