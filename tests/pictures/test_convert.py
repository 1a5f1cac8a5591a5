"""Pictures become a store once: the same pixels however it is done, whatever happens meanwhile."""

import errno
import os
import signal
import zipfile
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from metarun.episodes.store import split_stores
from metarun.episodes.store_file import picture_names, skipped_names
from metarun.errors import DataError
from metarun.pictures import convert as module
from metarun.pictures import partial
from metarun.pictures.convert import converted, read_pixels
from metarun.pictures.decode import Pixels, Preprocessing, UnreadableError, decode
from metarun.pictures.folders import class_folders
from metarun.pictures.layouts import list_pictures
from metarun.pictures.listing import Listing, Picture, listed
from tests.pictures.drawing import colour, content, draw, draw_classes

HOW = Preprocessing(size=3)
NAMES = [f"class{number}" for number in range(6)]
COUNT = 5


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own; two batches of pictures for each class, nearly."""
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(partial, "MOST", 4)
    return tmp_path / "cache"


@pytest.fixture
def listing(tmp_path: Path) -> Listing:
    return list_pictures(draw_classes(tmp_path / "data", NAMES, COUNT))


def files_of(cache: Path) -> list[str]:
    return sorted(p.name for p in cache.iterdir() if p.suffix != ".lock") if cache.exists() else []


def wanted() -> torch.Tensor:
    """The colour of every picture, (pictures, 3)."""
    return torch.tensor([colour(c, n) for c in range(len(NAMES)) for n in range(COUNT)])


def assert_whole(images: torch.Tensor) -> None:
    assert images.shape == (30, 3, 3, 3) and images.dtype == torch.uint8
    assert (images == wanted()[:, :, None, None]).all()


def test_every_picture_has_its_place(listing: Listing, cache: Path) -> None:
    store = converted("mine", listing, HOW)
    assert_whole(store.images)
    assert store.class_names == tuple(NAMES) and store.sizes.tolist() == [COUNT] * 6
    assert picture_names(store)[:2] == ["class0/0.png", "class0/1.png"]
    parts = split_stores(store, {"train": [0, 3, 4], "val": [1], "test": [2, 5]})
    assert picture_names(parts["test"])[0] == "class2/0.png"
    for part, classes in (("train", [0, 3, 4]), ("val", [1]), ("test", [2, 5])):
        own = parts[part]
        for number, kind in enumerate(classes):
            first = int(own.starts[number])
            assert (own.images[first : first + COUNT, 0] == colour(kind, 0)[0]).all()
    storage = store.images.untyped_storage().data_ptr()
    assert {s.images.untyped_storage().data_ptr() for s in parts.values()} == {storage}, "a copy"
    assert [name.split("-")[0] for name in files_of(cache)] == ["mine"]


def test_the_second_time_nothing_is_converted(
    listing: Listing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = converted("mine", listing, HOW)
    monkeypatch.setattr(module, "convert", None)
    second = converted("mine", listing, HOW)
    assert torch.equal(first.images, second.images) and first.identity == second.identity
    assert second.known is not None, "the digest is computed at each opening"
    (tmp_path / "link").symlink_to(tmp_path / "data")
    for same in (tmp_path / "link", tmp_path / "cache" / ".." / "data"):
        assert torch.equal(converted("mine", list_pictures(same), HOW).images, first.images)


def test_all_cores_give_the_same_bytes(
    listing: Listing, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def here_and_there(picture: Picture, how: Preprocessing) -> Pixels:
        pixels = read_pixels(picture, how)
        # All of the number: the remainders of two processes can be one.
        pixels[0].flat[:4] = list(os.getpid().to_bytes(4, "little"))
        return pixels

    alone = converted("alone", listing, HOW)
    monkeypatch.setattr(module, "FEW", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda who: {0, 1, 2})
    before = torch.get_rng_state()
    together = converted("together", listing, HOW)
    assert torch.equal(alone.images, together.images) and alone.identity == together.identity
    assert torch.equal(torch.get_rng_state(), before), "a run would have other random numbers"
    written = converted("who", listing, HOW, read=here_and_there).images[:, 0].flatten(1)[:, :4]
    processes = {int.from_bytes(bytes(number), "little") for number in written.tolist()}
    assert len(processes) == 3 and os.getpid() not in processes


def test_what_has_changed_is_converted_anew(listing: Listing, cache: Path, tmp_path: Path) -> None:
    first = converted("mine", listing, HOW)
    draw(tmp_path / "data" / "class3" / "2.png", (1, 2, 3))
    os.utime(tmp_path / "data" / "class3" / "2.png", ns=(10**18, 10**18))
    second = converted("mine", list_pictures(tmp_path / "data"), HOW)
    differ = (first.images != second.images).flatten(1).any(1)
    assert differ.nonzero().flatten().tolist() == [3 * COUNT + 2]
    assert len(files_of(cache)) == 1, "the old file stays"
    others = [HOW._replace(size=4), HOW._replace(color="grey"), HOW._replace(resize="pad")]
    assert [tuple(converted("mine", listing, h).images.shape[1:]) for h in others] == [
        (3, 4, 4), (1, 3, 3), (3, 3, 3),
    ]  # fmt: skip
    assert len(files_of(cache)) == 4


def test_the_folder_of_the_pictures_is_left_alone(listing: Listing, tmp_path: Path) -> None:
    def state() -> dict[Path, int]:
        root = tmp_path / "data"
        return {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]}

    before = state()
    for path in before:
        path.chmod(0o555 if path.is_dir() else 0o444)
    converted("mine", listing, HOW)
    assert state() == before


class Counted:
    """Reads pictures, and remembers which; ends its process before one of them."""

    def __init__(self, fatal: str | None = None) -> None:
        self.fatal, self.read = fatal, []

    def __call__(self, picture: Picture, how: Preprocessing) -> Pixels:
        if self.fatal is not None and picture.file.endswith(self.fatal):
            os.kill(os.getpid(), signal.SIGKILL)
        self.read.append(picture.file)
        return read_pixels(picture, how)


def killed(listing: Listing, before: str) -> None:
    """Convert in a process that is killed when it comes to a picture."""
    process = get_context("fork").Process(
        target=converted, args=("mine", listing, HOW), kwargs={"read": Counted(before)}
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def journal_of(cache: Path) -> Path:
    return next(cache.glob(".*.journal"))


def data_of(cache: Path) -> Path:
    return next(cache.glob(".*.partial"))


def end_in_the_middle_of_a_line(cache: Path) -> None:
    with open(journal_of(cache), "a") as file:
        file.write("[5, 12345")


def lose_the_first_batch(cache: Path) -> None:
    """As a power cut may, which keeps what was written last."""
    size = data_of(cache).stat().st_size - 30 * 27
    with open(data_of(cache), "r+b") as file:
        content = file.read()
        first = content.index(bytes(colour(0, 0)[:1]) * 9)
        assert 0 < first <= size
        file.seek(first)
        file.write(bytes(9))


def lose_the_data(cache: Path) -> None:
    data_of(cache).unlink()


def nothing(cache: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("damage", "done"),
    [
        (nothing, 20),
        (end_in_the_middle_of_a_line, 20),
        (lose_the_first_batch, 16),
        (lose_the_data, 0),
    ],
)
def test_a_killed_conversion_goes_on(
    damage: Callable[[Path], None], done: int, listing: Listing, cache: Path
) -> None:
    killed(listing, "class4/2.png")
    assert not list(cache.glob("*.safetensors")), "half of a store has its name"
    damage(cache)
    reads = Counted()
    store = converted("mine", listing, HOW, read=reads)
    assert_whole(store.images)
    assert len(reads.read) == 30 - done
    assert [name for name in files_of(cache) if name.startswith(".")] == []
    assert store.identity == converted("other", listing, HOW).identity


def killed_at_its_end(listing: Listing) -> None:
    """Convert in a process that is killed when all images are at their last place."""

    def end(descriptor: int, length: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        os.truncate = end  # type: ignore[assignment]
        converted("mine", listing, HOW, skip_unreadable=True)

    process = get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_a_conversion_that_is_killed_while_it_closes_the_gaps_goes_on(
    listing: Listing, cache: Path
) -> None:
    listing = spoil(listing, 0, 13)
    killed_at_its_end(listing)
    assert not list(cache.glob("*.safetensors"))
    reads = Counted()
    store = converted("mine", listing, HOW, skip_unreadable=True, read=reads)
    assert 0 < len(reads.read) <= 30
    other = converted("other", listing, HOW, skip_unreadable=True)
    assert store.identity == other.identity and torch.equal(store.images, other.images)


def test_a_conversion_of_other_pictures_does_not_go_on(
    listing: Listing, cache: Path, tmp_path: Path
) -> None:
    killed(listing, "class4/2.png")
    os.utime(tmp_path / "data" / "class0" / "0.png", ns=(10**18, 10**18))
    reads = Counted()
    assert_whole(converted("mine", list_pictures(tmp_path / "data"), HOW, read=reads).images)
    assert len(reads.read) == 30


def full(*given: Any) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_later(write: Callable[..., int] = os.pwrite) -> Callable[..., int]:
    calls = iter(range(3))

    def pwrite(*given: Any) -> int:
        return write(*given) if next(calls, None) is not None else full()

    return pwrite


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_told_and_keeps_nothing(
    call: str, workers: int, listing: Listing, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FEW", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda who: set(range(workers)))
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full if call == "posix_fallocate" else full_later())
        with pytest.raises(DataError, match=r"No space left.*METARUN_CACHE=<folder>"):
            converted("mine", listing, HOW)
    assert files_of(cache) == []
    assert_whole(converted("mine", listing, HOW).images)


def test_a_cache_that_cannot_be_written_is_told(
    listing: Listing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match="cannot write the converted pictures to"):
        converted("mine", listing, HOW)


def test_a_worker_that_dies_leaves_its_work(
    listing: Listing, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FEW", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda who: {0, 1})
    with pytest.raises(DataError, match="a process that converts pictures has died"):
        converted("mine", listing, HOW, read=Counted("class5/4.png"))
    reads = Counted()
    monkeypatch.setattr(os, "sched_getaffinity", lambda who: {0})
    assert_whole(converted("mine", listing, HOW, read=reads).images)
    assert 0 < len(reads.read) < 30


def test_an_interrupted_conversion_says_that_it_goes_on(
    listing: Listing, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    def interrupted(picture: Picture, how: Preprocessing) -> Pixels:
        if picture.file.endswith("class2/0.png"):
            raise KeyboardInterrupt
        return read_pixels(picture, how)

    with pytest.raises(KeyboardInterrupt):
        converted("mine", listing, HOW, read=interrupted)
    assert "what is converted is kept" in caplog.text
    assert_whole(converted("mine", listing, HOW).images)
    assert "8 of 30 pictures are done" in caplog.text


def spoil(listing: Listing, *rows: int) -> Listing:
    for row in rows:
        Path(listing.pictures[row].file).write_bytes(b"no picture")
    return listing


def test_an_unreadable_picture_is_named(listing: Listing, cache: Path, tmp_path: Path) -> None:
    listing = spoil(listing, 7)
    for _ in range(2):  # the second time it is known
        with pytest.raises(DataError) as caught:
            converted("mine", listing, HOW)
        assert str(tmp_path / "data" / "class1" / "2.png") in str(caught.value)
        assert "no picture of a format" in str(caught.value)
        assert "data.skip_unreadable=true" in str(caught.value)
    assert not list(cache.glob("*.safetensors"))


def test_control_characters_of_what_is_left_out_are_spelled_out(
    cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    draw_classes(tmp_path / "odd", ["a", "b"], count=3)
    (tmp_path / "odd" / "a" / "\x1b[2J.png").write_bytes(b"no picture")
    for told in ("a/\\x1b[2J.png: it is no picture", "left out, unreadable: a/\\x1b[2J.png"):
        caplog.clear()
        converted("odd", class_folders(tmp_path / "odd"), HOW, skip_unreadable=True)
        assert told in caplog.text and "\x1b" not in caplog.text


def test_unreadable_pictures_are_left_out_by_name(
    listing: Listing, caplog: pytest.LogCaptureFixture
) -> None:
    listing = spoil(listing, 0, 7, 8, 29)
    store = converted("mine", listing, HOW, skip_unreadable=True)
    keeps = [row for row in range(30) if row not in (0, 7, 8, 29)]
    assert (store.images[:, :, 0, 0] == wanted()[keeps]).all()
    assert store.sizes.tolist() == [4, 3, 5, 5, 5, 4]
    gone = ["class0/0.png", "class1/2.png", "class1/3.png", "class5/4.png"]
    assert skipped_names(store) == gone and not {*gone} & {*picture_names(store)}
    assert all(f"left out {listing.root}/{name}: it is no picture" in caplog.text for name in gone)
    caplog.clear()
    converted("mine", listing, HOW, skip_unreadable=True)
    assert f"left out, unreadable: {', '.join(gone)}" in caplog.text, "a later run says it, too"
    with pytest.raises(DataError, match=r"cannot read the picture class0/0\.png"):
        converted("mine", listing, HOW)
    for row in (0, 7, 8, 29):
        Path(listing.pictures[row].file).unlink()
    without = converted("without", list_pictures(listing.root), HOW)
    assert without.identity == store.identity


def test_a_class_must_keep_a_picture(listing: Listing) -> None:
    with pytest.raises(DataError, match="no picture of class 'class2' can be read"):
        converted("mine", spoil(listing, *range(10, 15)), HOW, skip_unreadable=True)


def test_what_the_disk_does_not_return_has_no_name(
    listing: Listing, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite

    def forgetful(descriptor: int, content: bytes, place: int) -> int:
        return real(descriptor, bytes(len(content)), place)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", forgetful)
        with pytest.raises(DataError, match="the disk does not return what was written"):
            converted("mine", listing, HOW)
    assert not list(cache.glob("*.safetensors"))
    assert_whole(converted("mine", listing, HOW).images)


def zipped(listing: Listing, archive: Path) -> Listing:
    """The same pictures in a zip."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for picture in listing.pictures:
            file.write(picture.file, Path(picture.file).relative_to(listing.root))
    members = iter(zipfile.ZipFile(archive).namelist())
    classes = {name: [Picture(str(archive), next(members)) for _ in range(COUNT)] for name in NAMES}
    return listed(archive.parent, "a zip", classes)


def test_pictures_in_a_zip(
    listing: Listing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FEW", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda who: {0, 1, 2})
    there = zipped(listing, tmp_path / "all.zip")
    store = converted("zip", there, HOW)
    assert_whole(store.images)
    assert picture_names(store)[0] == "all.zip/class0/0.png"
    whole = (tmp_path / "all.zip").read_bytes()
    (tmp_path / "all.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"all\.zip \(class0/0\.png\): the archive is damaged"):
        converted("zip", there, HOW)


def test_what_is_no_file_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for name, why in {
        "loop.png": "symbolic links",
        "pipe.png": "no regular file",
        "folder.png": "Is a directory",
        "nowhere.png": "No such file",
    }.items():
        with pytest.raises(UnreadableError, match=why):
            read_pixels(Picture(str(tmp_path / name)), HOW)


def test_the_pixels_are_those_of_decode(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    from PIL import Image

    for name in "abc":
        (tmp_path / name).mkdir()
        Image.fromarray(noise).save(tmp_path / name / "0.jpg")
    how = Preprocessing(8, "pad", filter="lanczos", color="grey")
    store = converted("mine", list_pictures(tmp_path), how)
    expected = decode((tmp_path / "a" / "0.jpg").read_bytes(), how)
    assert (store.images.numpy() == expected).all()
    assert content((1, 2, 3))  # what is drawn by these tests is a picture
