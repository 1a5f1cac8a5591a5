"""The file of a store: mapped and not read, verified, and readable by any tool."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from metarun.episodes import store_file
from metarun.episodes.cache import cached, kept
from metarun.episodes.store import ClassStore, from_sizes, moved, packed, select_classes
from metarun.episodes.store_file import StaleError, header, open_store, picture_names, write_store

SIZES = torch.tensor([3, 1, 2])
NAMES = ("a", "b é", "c/ж")


def store() -> ClassStore:
    images = torch.randint(1, 256, (6, 3, 4, 4), dtype=torch.uint8)
    return from_sizes(images, SIZES, NAMES)


def test_what_is_written_is_what_is_opened(tmp_path: Path) -> None:
    one = store()
    write_store(tmp_path / "one.safetensors", one, key="what and how")
    again = open_store(tmp_path / "one.safetensors", "what and how")
    assert torch.equal(again.images, one.images) and torch.equal(again.starts, one.starts)
    assert torch.equal(again.sizes, SIZES) and again.class_names == NAMES
    assert again.known == one.identity and picture_names(again) == []


def test_any_tool_opens_it(tmp_path: Path) -> None:
    one = store()
    write_store(tmp_path / "one.safetensors", one)
    tensors = load_file(tmp_path / "one.safetensors")
    assert torch.equal(tensors["images"], one.images) and torch.equal(tensors["sizes"], SIZES)
    with safe_open(tmp_path / "one.safetensors", "pt") as file:
        fields = json.loads(file.metadata()["metarun"])
    assert fields["class_names"] == list(NAMES) and fields["identity"] == one.identity


def mapped(path: Path) -> list[range]:
    """Where a file is mapped into the memory of this process."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    bounds = [line.split()[0].split("-") for line in lines if line.endswith(str(path))]
    return [range(int(start, 16), int(stop, 16)) for start, stop in bounds]


def test_images_and_views_are_the_file_itself(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    write_store(path, store())
    opened = open_store(path)
    view = select_classes(opened, [2, 0])
    assert all(any(s.images.data_ptr() in r for r in mapped(path)) for s in (opened, view))
    assert view.starts.tolist() == [4, 0] and view.sizes.tolist() == [2, 3]
    assert torch.equal(packed(view).images, torch.cat([opened.images[4:], opened.images[:3]]))
    there = moved({"all": opened, "some": view}, torch.device("cpu"))
    assert {s.images.data_ptr() for s in there.values()} == {opened.images.data_ptr()}


def test_a_view_of_neighbours_has_their_images_alone(tmp_path: Path) -> None:
    one = store()
    assert torch.equal(select_classes(one, [1, 2]).images, one.images[3:])


@pytest.mark.parametrize("most", [store_file.VERIFIED, 0])
def test_damage_is_seen(most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong pixel only in a file that is small enough to be read whole."""
    path, one = tmp_path / "one.safetensors", store()
    write_store(path, one)
    monkeypatch.setattr(store_file, "VERIFIED", most)
    whole = path.read_bytes()
    pixel = whole.index(one.images.numpy().tobytes()) + 7
    path.write_bytes(whole[:pixel] + bytes([whole[pixel] ^ 1]) + whole[pixel + 1 :])
    if most:
        with pytest.raises(ValueError, match="bad checksum"):
            open_store(path)
    else:
        open_store(path)
    for damaged in (b"", whole[:9], whole[:-1], whole + b"\0", b"\xff" * 200):
        path.write_bytes(damaged)
        with pytest.raises(Exception):  # noqa: B017
            open_store(path)


def test_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    images = torch.zeros(6, 1, 2, 2, dtype=torch.uint8)
    for sizes in ([3, 1, 1], [3, 3, 0], [3, 1, 2, 4]):
        head = header(images.shape, [*"abcd"][: len(sizes)], identity="sha256:x")
        path.write_bytes(
            head.text + torch.tensor(sizes).numpy().tobytes() + images.numpy().tobytes()
        )
        with pytest.raises(ValueError, match="do not fit together"):
            open_store(path)


def test_a_file_of_something_else_is_stale(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    write_store(path, store(), key="this")
    with pytest.raises(StaleError, match="has changed"):
        open_store(path, "that")
    text = path.read_bytes().replace(b'\\"format\\": 3', b'\\"format\\": 2')
    path.write_bytes(text)
    with pytest.raises(StaleError, match="another version"):
        open_store(path, "this")


def test_room_in_the_header_moves_nothing() -> None:
    long = header((6, 1, 2, 2), NAMES, files=100, skipped=100, key="k", identity="i" * 71)
    short = header((5, 1, 2, 2), NAMES, files=9, key="k", identity="i" * 71, room=len(long.text))
    assert (long.sizes, long.images) == (short.sizes, short.images) and long.images % 8 == 0
    assert len(short.text) == len(long.text)


def test_a_cache_that_cannot_be_written_costs_time_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    one = store()
    assert cached(tmp_path / "file" / "one.safetensors", lambda: one) is one
    assert "could not cache" in caplog.text


def test_an_error_of_what_is_built_is_not_taken_for_one_of_the_cache(tmp_path: Path) -> None:
    def build() -> ClassStore:
        raise FileNotFoundError("the pictures")

    with pytest.raises(FileNotFoundError, match="the pictures"):
        cached(tmp_path / "one.safetensors", build)


def test_what_is_stale_is_made_anew_without_alarm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    path, one = tmp_path / "one.safetensors", store()
    write_store(path, store(), key="before")
    found = kept(path, lambda: open_store(path, "now"), lambda: write_store(path, one, "now"))
    assert torch.equal(found.images, one.images)
    assert "anew" in caplog.text and "damaged" not in caplog.text
