"""One picture of any format and mode: the pixels it becomes, and what cannot be read."""

import io
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from metarun.pictures.decode import (
    FILTERS,
    Preprocessing,
    UnreadableError,
    decode,
    extensions,
    open_picture,
    to_pixels,
)

SMALL = Preprocessing(size=4)
COLOUR = (200, 100, 50)
GREY = 124  # of that colour: (299·200 + 587·100 + 114·50) / 1000
ON_WHITE = (227, 177, 152)  # half of it, and half white


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(
    width: int, height: int, bits: int, kind: int, row: bytes = b"", clear: bytes = b""
) -> bytes:
    """A PNG by hand, whose rows are the same; `clear` is what its chunk tRNS has."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    content = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    if clear:
        content += chunk(b"tRNS", clear)
    if row:
        content += chunk(b"IDAT", zlib.compress((b"\0" + row) * height))
    return b"\x89PNG\r\n\x1a\n" + content + chunk(b"IEND", b"")


def photograph(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A picture whose every pixel matters."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(noise).convert(mode)


@pytest.mark.parametrize(
    ("mode", "kind", "expected"),
    [
        ("RGB", "PNG", COLOUR), ("RGB", "JPEG", COLOUR), ("RGB", "WEBP", COLOUR),
        ("RGB", "BMP", COLOUR), ("RGB", "TIFF", COLOUR), ("RGB", "PPM", COLOUR),
        ("P", "GIF", COLOUR), ("P", "PNG", COLOUR), ("CMYK", "JPEG", COLOUR),
        ("CMYK", "TIFF", COLOUR), ("YCbCr", "TIFF", COLOUR), ("L", "PNG", (GREY,) * 3),
        ("L", "JPEG", (GREY,) * 3), ("RGBA", "PNG", ON_WHITE), ("RGBA", "WEBP", ON_WHITE),
        ("LA", "PNG", ((GREY + 255) // 2,) * 3), ("RGBA", "TIFF", ON_WHITE),
    ],
)  # fmt: skip
def test_each_mode_and_format_gives_its_colours(
    mode: str, kind: str, expected: tuple[int, ...]
) -> None:
    see_through = mode in ("RGBA", "LA")
    image = Image.new("RGBA", (9, 5), (*COLOUR, 128 if see_through else 255))
    image = image if see_through else image.convert("RGB")
    image = image.convert(mode, palette=Image.Palette.ADAPTIVE)
    pixels = decode(saved(image, kind), SMALL)
    assert pixels.shape == (3, 4, 4) and pixels.dtype == np.uint8
    assert np.abs(pixels - np.array(expected)[:, None, None].astype(int)).max() <= 3
    grey = decode(saved(image, kind), SMALL._replace(color="grey"))
    assert grey.shape == (1, 4, 4)


def test_a_transparent_colour_is_white() -> None:
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    for content in (
        saved(palette, "PNG", transparency=1),
        saved(Image.new("RGB", (4, 4), COLOUR), "PNG", transparency=COLOUR),
    ):
        assert (decode(content, SMALL) == 255).all()


def test_sixteen_bits_are_scaled_and_not_cut() -> None:
    deep = np.array([[0, 257, 32896, 65535]], np.uint16).repeat(4, 0)
    raw = deep.astype(">u2").tobytes()
    for content in (
        saved(Image.fromarray(deep), "PNG"),
        saved(Image.fromarray(deep), "TIFF"),
        b"P5 4 4 65535\n" + raw,
    ):
        assert decode(content, SMALL)[0, 0].tolist() == [0, 1, 128, 255]


def test_of_sixteen_bits_only_the_transparent_value_is_white() -> None:
    deep = np.array([[0, 257, 32896, 65535]], np.uint16).repeat(4, 0)
    content = saved(Image.fromarray(deep), "PNG", transparency=257)
    for color in ("rgb", "grey"):
        found = decode(content, SMALL._replace(color=color))
        assert found[:, 0].tolist() == len(found) * [[0, 255, 128, 255]]
    eight = saved(Image.fromarray((deep / 257).astype(np.uint8)), "PNG", transparency=1)
    assert (decode(eight, SMALL) == decode(content, SMALL)).all()


def test_of_colours_of_sixteen_bits_only_the_transparent_one_is_white() -> None:
    """0x34 is the lower half of the transparent value, and no part of it that counts."""
    row = np.array([0x1234, 0x3400, 0, 0xFFFF], ">u2").repeat(3)
    content = png(4, 4, 16, 2, row.tobytes(), struct.pack(">HHH", 0x1234, 0x1234, 0x1234))
    assert decode(content, SMALL)[:, 0].tolist() == 3 * [[255, 0x34, 0, 255]]


def test_bilevel_edges_are_smoothed() -> None:
    half = Image.new("1", (9, 9))
    half.paste(1, (0, 0, 3, 9))
    found = decode(saved(half, "PNG"), SMALL._replace(color="grey"))
    assert set(found.flatten().tolist()) - {0, 255}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(("orientation", "corner"), [(1, 0), (2, 1), (3, 3), (6, 1), (8, 2)])
def test_a_picture_is_turned_upright(kind: str, orientation: int, corner: int) -> None:
    """`corner`: where the dark upper left one goes: 0 and 1 are above, 2 and 3 below."""
    image = Image.new("L", (16, 16), 255)
    image.paste(0, (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decode(saved(image, kind, exif=exif), Preprocessing(size=2, color="grey"))
    assert pixels.flatten().argmin() == corner


def test_crop_and_stretch_and_pad() -> None:
    wide = Image.new("RGB", (30, 10), "blue")
    wide.paste((255, 0, 0), (10, 0, 20, 10))  # the middle third
    ways = {how: Preprocessing(6, how, filter="nearest") for how in ("crop", "stretch", "pad")}
    small = {how: to_pixels(wide, what) for how, what in ways.items()}
    assert (small["crop"][0] == 255).all() and (small["crop"][2] == 0).all()
    assert small["stretch"][0, 0].tolist() == [0, 0, 255, 255, 0, 0]
    assert (small["pad"][:, [0, 1, 4, 5]] == 255).all()
    assert small["pad"][0, 2].tolist() == [0, 0, 255, 255, 0, 0]


def test_crop_is_what_torchvision_does() -> None:
    """Where it rounds nowhere: of 168×126, the middle 126×126, to 84×84."""
    image = photograph(168, 126)
    theirs = Compose([Resize(84, InterpolationMode.BILINEAR), CenterCrop(84)])(image)
    ours = to_pixels(image, Preprocessing(84, "crop", filter="bilinear"))
    assert np.array_equal(ours, np.asarray(theirs).transpose(2, 0, 1))


def test_the_kept_part_of_the_middle() -> None:
    """Resize to 12, crop 8 of it: the middle two thirds."""
    image = photograph(48, 36)
    theirs = Compose([Resize(12), CenterCrop(8)])(image)
    ours = to_pixels(image, Preprocessing(8, "crop", crop=2 / 3))
    assert np.array_equal(ours, np.asarray(theirs).transpose(2, 0, 1))


@pytest.mark.parametrize("name", FILTERS)
def test_each_filter_is_pillows(name: str) -> None:
    image = photograph(20, 20)
    theirs = np.asarray(image.resize((7, 7), FILTERS[name])).transpose(2, 0, 1)
    for how in ("crop", "stretch", "pad"):
        assert np.array_equal(to_pixels(image, Preprocessing(7, how, filter=name)), theirs)


def test_a_large_photograph_is_decoded_at_a_part_of_its_size() -> None:
    """A quarter of this JPEG's side is enough; the pixels are those of all of it, nearly."""
    smooth = photograph(40, 30).resize((1200, 900), Image.Resampling.BICUBIC)
    content = saved(smooth, "JPEG", quality=95)
    how = Preprocessing(size=60)
    assert open_picture(content, 3 * 60).size == (300, 225)
    assert open_picture(content, 3 * 60 + 50).size == (600, 450), "less than enough"
    whole = to_pixels(open_picture(content), how).astype(int)
    differ = np.abs(decode(content, how) - whole)
    assert differ.max() <= 4 and differ.mean() < 0.5 and whole.std() > 30


def bomb(width: int, height: int) -> bytes:
    """A PNG that says how large it is, and has nothing."""
    return png(width, height, 1, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"no picture at all", "no picture of a format that Pillow knows"),
        (saved(photograph(40, 40), "JPEG")[:-400], r"it is damaged \(.*truncated"),
        (saved(photograph(40, 40), "PNG")[:200], r"it is damaged \(.*truncated"),
        (saved(photograph(9, 9), "BMP")[:20], "it is damaged"),
        (bomb(10_000, 10_000), "more than 89,478,485 pixels"),
        (bomb(60_000, 60_000), "more than 89,478,485 pixels"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture"),
        (saved(Image.new("F", (4, 4), 0.5), "TIFF"), "have 32 bits"),
        (saved(Image.new("I", (4, 4), 9), "TIFF"), "have 32 bits"),
    ],
)
def test_what_cannot_be_read_is_told(content: bytes, message: str) -> None:
    with warnings.catch_warnings(), pytest.raises(UnreadableError, match=message):
        warnings.simplefilter("ignore")  # outside of these tests a warning of Pillow's ends nothing
        decode(content, SMALL)


def test_no_file_of_a_program_is_taken_for_a_picture() -> None:
    assert {".jpg", ".png", ".webp", ".tif"} <= extensions()
    assert not {".eps", ".ps", ".pdf", ".h5", ".txt"} & extensions()


def test_the_first_frame_counts() -> None:
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    content = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_picture(content).getpixel((0, 0)) == (255, 0, 0)
