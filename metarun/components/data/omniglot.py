"""Omniglot: 1623 handwritten characters of 50 alphabets, each drawn by 20 people.

References:
    Lake, Salakhutdinov and Tenenbaum 2015, Human-level concept learning through probabilistic
    program induction (the drawings).
    Vinyals et al. 2016, Matching networks for one shot learning (28x28, rotations, a split).
"""

import io
import zipfile
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import torch
from PIL import Image, ImageChops
from tqdm import tqdm

from metarun.components.data._data_root import home
from metarun.components.data._omniglot_files import (
    Drawing,
    check_complete,
    damaged,
    download_missing,
    find,
    fingerprint,
    list_drawings,
    missing,
)
from metarun.components.data._omniglot_small import CHARACTERS as SMALL
from metarun.components.data._omniglot_small import check_small, find_small
from metarun.components.data.images import image_episodes
from metarun.components.data.splits import (
    omniglot_background,
    omniglot_names,
    omniglot_random,
    omniglot_vinyals,
)
from metarun.config.checks import absolute
from metarun.config.component import as_keywords, builds, finds, settings
from metarun.config.run import TaskConfig
from metarun.episodes.cache import cached
from metarun.episodes.source import ImageEpisodes
from metarun.episodes.store import ClassStore, from_sizes, select_classes, with_rotations
from metarun.errors import DataError
from metarun.pictures.decode import Preprocessing
from metarun.pictures.inputs import Inputs, reads
from metarun.system.files import cache_dir

SIDE = 28  # pixels, of the 105 of the originals
MOST_SIDE = 1000  # pixels of a drawing that is read
MOST_BYTES = 10**6  # of its file; the largest of the originals has 522
SPLITS = ("random", "vinyals", "background", *SMALL)


@settings
class OmniglotFilesConfig:
    """Where Omniglot is."""

    name: str = "???"
    root: str | None = None  # folder of data sets; null: a cache folder of the user
    download: bool = True  # fetch the files if they are not there

    def __post_init__(self) -> None:
        self.root = absolute(self.root)


SplitName = Literal["random", "vinyals", "background", "background_small1", "background_small2"]


@settings
class OmniglotConfig(OmniglotFilesConfig):
    """Omniglot (Lake et al. 2015): 1623 characters, 20 drawings each."""

    split: SplitName = "random"  # of characters; the last three: Lake's
    split_seed: int = 0  # of the random split, and of the validation alphabets of Lake's
    rotations: bool = True  # each character turned by 90, 180, 270 degrees is a class too


@builds(OmniglotConfig)
def omniglot(
    task: TaskConfig, seed: int, device: torch.device, dtype: torch.dtype, own: OmniglotConfig
) -> ImageEpisodes:
    """Episodes of the characters: `image_episodes` of `load`."""
    return image_episodes(load)(task, seed, device, dtype, **as_keywords(own))


@finds(OmniglotConfig)
def found(own: OmniglotConfig) -> str:
    """Where the images are."""
    root = home(own.root)
    source = find(root)
    if not source:
        raise missing(root)
    if own.split in SMALL:
        source = (find_small(root, own.split), *source)
    return " and ".join(map(str, source))


@reads(OmniglotConfig)
def inputs(own: OmniglotConfig) -> Inputs:
    """What a network gets of a picture: of a square one the same as `shrink` gives."""
    return Inputs(Preprocessing(SIDE, "pad", filter="lanczos", color="grey"), inverted=True)


def load(
    root: str | Path | None = OmniglotConfig.root,
    *,
    download: bool = OmniglotConfig.download,
    split: str = OmniglotConfig.split,
    rotations: bool = OmniglotConfig.rotations,
    split_seed: int = OmniglotConfig.split_seed,
) -> dict[str, ClassStore]:
    """The characters of each split, 28x28 and ink = 255.

    Args:
        root: the data folder; None is a folder in the user's cache.
        download: fetch the images (14 MB) into `root` where they are missing.
        split: 'random', 1100/100/423 characters by `split_seed`; 'vinyals', 1028/172/423 by
            alphabet; 'background', 25, 5 and 20 alphabets, those of Lake et al. for the test; or
            'background_small1' and 'background_small2', 4, 1 and 20.
        rotations: each character turned by 0, 90, 180 and 270 degrees is four classes.
        split_seed: of the random split, and of the alphabets that validate in those of Lake.

    Returns:
        Stores 'train', 'val' and 'test'; images (classes * 20, 1, 28, 28).

    Raises:
        ValueError: there is no split of that name.
        DataError: the images are missing, incomplete or damaged.
    """
    if split not in SPLITS:
        raise ValueError(f"omniglot has no split {split!r}; it has {', '.join(SPLITS)}")
    store = characters(root, download=download)
    names = store.class_names
    if split == "random":
        parts = omniglot_random(names, split_seed)
    elif split == "vinyals":
        parts = omniglot_vinyals(names)
    else:
        parts = omniglot_background(names, split_seed)
    stores = {part: named_classes(store, members) for part, members in parts.items()}
    if split in SMALL:
        small = small_background(root, split)
        for part, members in omniglot_background(small.class_names, split_seed).items():
            if part != "test":
                stores[part] = named_classes(small, members)
    return {part: with_rotations(s) if rotations else s for part, s in stores.items()}


def named_classes(store: ClassStore, names: Sequence[str]) -> ClassStore:
    """A view of the classes of these names."""
    index = {name: number for number, name in enumerate(store.class_names)}
    return select_classes(store, [index[name] for name in names])


def small_background(root: str | Path | None, split: str) -> ClassStore:
    """The characters of a small background set, not rotated; converted once and cached.

    Raises:
        DataError: it is not there, not what it should be, or damaged.
    """
    try:
        source = (find_small(home(root), split),)
        path = cache_dir() / f"omniglot-v1-{fingerprint(source)}.safetensors"
    except OSError as error:
        raise DataError(f"cannot read the Omniglot images: {error}") from error

    def build() -> ClassStore:
        drawings = list_drawings(source)
        check_small(drawings, source[0], split)
        return convert(drawings)

    return cached(path, build)


def characters(
    root: str | Path | None, *, download: bool, expected: Sequence[str] | None = None
) -> ClassStore:
    """All characters, sorted by name and not rotated; converted once and cached.

    `expected` are the names that make the data set complete, by default the real 1623.

    Raises:
        DataError: the images are missing, incomplete or damaged.
    """
    root = home(root)
    names = omniglot_names() if expected is None else expected
    try:
        source = find(root)
        if not source and download:
            download_missing(root)
            source = find(root)
        if not source:
            raise missing(root)
        path = cache_dir() / f"omniglot-v1-{fingerprint(source)}.safetensors"
    except OSError as error:
        raise DataError(f"cannot read the Omniglot images: {error}") from error

    def build() -> ClassStore:
        drawings = list_drawings(source)
        check_complete(drawings, source, names)
        return convert(drawings)

    return cached(path, build)


def convert(drawings: Sequence[Drawing]) -> ClassStore:
    """Read and shrink the drawings, which must be sorted by character.

    One thread: the work is many small calls, and several threads only wait for each other.

    Raises:
        DataError: names the file that is damaged.
    """
    pixels = bytearray()
    with ExitStack() as stack:
        zips = {part for _, _, part, _ in drawings if not part.is_dir()}
        archives = {part: stack.enter_context(zipfile.ZipFile(part)) for part in zips}
        for drawing in tqdm(drawings, "converting Omniglot", unit="drawing", disable=None):
            try:
                pixels += shrink(_read(drawing, archives))
            except Exception as error:  # damage has many types in zipfile, zlib and Pillow
                raise damaged(drawing.part, drawing.member, error) from error
    images = torch.frombuffer(pixels, dtype=torch.uint8).view(-1, 1, SIDE, SIDE)
    counts = Counter(drawing.character for drawing in drawings)  # keeps the sorted order
    return from_sizes(images, torch.tensor(list(counts.values())), tuple(counts))


def _read(drawing: Drawing, archives: dict[Path, zipfile.ZipFile]) -> bytes:
    archive, path = archives.get(drawing.part), drawing.part / drawing.member
    size = path.stat().st_size if archive is None else archive.getinfo(drawing.member).file_size
    if size > MOST_BYTES or (archive is None and not path.is_file()):  # a device may have no end
        raise ValueError(f"no drawing of Omniglot: {size} bytes")
    return path.read_bytes() if archive is None else archive.read(drawing.member)


def shrink(png: bytes) -> bytes:
    """A PNG with black ink on white as 28x28 bytes, row by row, ink = 255."""
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        if max(image.size) > MOST_SIDE:  # Pillow has read the header only
            raise ValueError(f"no drawing of Omniglot: {image.width}x{image.height} pixels")
        # To grey levels first, as torchvision does: the originals have 1 bit a pixel, for which
        # Pillow ignores the filter and takes the nearest pixel, with gaps in thin strokes.
        small = image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return ImageChops.invert(small).tobytes()
