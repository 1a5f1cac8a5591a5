"""glyphs: about a thousand handwritten-looking characters, drawn by the program from a seed.

It has Omniglot's form (alphabets of characters, each drawn once by each of twenty people,
28 x 28 pixels) and needs no download. See `_strokes` for how a character comes about.
"""

import numpy as np
import torch
from torch import Tensor

from metarun.components.data._strokes import (
    MOST_STROKES,
    STEPS,
    Alphabet,
    Character,
    Floats,
    invent_alphabet,
    invent_character,
    meet_hands,
    write,
)
from metarun.components.data.images import image_episodes
from metarun.config.checks import between
from metarun.config.component import builds, settings
from metarun.config.run import TaskConfig
from metarun.episodes.cache import cached
from metarun.episodes.source import ImageEpisodes
from metarun.episodes.store import ClassStore, from_equal_classes, select_classes
from metarun.pictures.decode import Preprocessing
from metarun.pictures.inputs import Inputs, reads
from metarun.system.files import cache_dir


@settings
class GlyphsConfig:
    """Handwriting-like characters that the program draws from a seed; needs no files."""

    seed: int = 0  # of the drawings, not of the episodes

    def __post_init__(self) -> None:
        between("data.seed", self.seed, 0, 2**63 - 1)


@builds(GlyphsConfig)
def glyphs(
    task: TaskConfig, seed: int, device: torch.device, dtype: torch.dtype, own: GlyphsConfig
) -> ImageEpisodes:
    """Episodes of the characters: `image_episodes` of `load`."""
    return image_episodes(load)(task, seed, device, dtype, seed=own.seed)


@reads(GlyphsConfig)
def inputs(own: GlyphsConfig) -> Inputs:
    """What a network gets of a picture: dark ink on white, as ink = 255 on 28 x 28 pixels."""
    return Inputs(Preprocessing(SIDE, "pad", filter="lanczos", color="grey"), inverted=True)


VERSION = 2  # raise when the same seed gives other drawings: it names the cache file
DRAWINGS = 20
SIDE = 28  # pixels
UNIT = 9.5  # pixels in a character's unit, which is half its extent
MARGIN = 1.5  # pixels that the pen's path keeps from the frame

# Whole alphabets, numbered from 1: characters for the test come from alphabets never seen.
SPLITS = {"train": range(1, 33), "val": range(33, 41), "test": range(41, 51)}
ALPHABETS = 50
CHARACTERS = (15, 26)  # of an alphabet, the second bound excluded
CANDIDATES = 4  # characters invented for each one kept
BROAD_PEN = 1.5  # half its width in pixels; in broad lines, what is alike overlaps


def draw(seed: int = 0) -> tuple[Tensor, tuple[str, ...]]:
    """Draw the whole dataset.

    Returns:
        images: uint8, (characters, 20, 1, 28, 28); 0 is background, 255 full ink. Drawing d of
            every character of an alphabet is by the same person.
        names: one a character, such as "alphabet07/character13"; alphabets follow each other.
    """
    rng = np.random.default_rng(seed)
    images: list[Tensor] = []
    names: list[str] = []
    for number in range(1, ALPHABETS + 1):
        alphabet = invent_alphabet(rng)
        hands = meet_hands(DRAWINGS, rng)
        characters = _distinct_characters(alphabet, int(rng.integers(*CHARACTERS)), rng)
        for index, character in enumerate(characters, start=1):
            images.append(_render(write(character, alphabet, hands, rng), hands.pen))
            names.append(f"alphabet{number:02}/character{index:02}")
    return torch.stack(images)[:, :, None], tuple(names)


def split_of(class_name: str) -> str:
    """The split that a character such as "alphabet07/character13" belongs to."""
    number = int(class_name.removeprefix("alphabet").partition("/")[0])
    return next(split for split, alphabets in SPLITS.items() if number in alphabets)


def characters(seed: int = 0) -> ClassStore:
    """All characters, drawn at the first call and cached from then on."""
    path = cache_dir() / f"glyphs-v{VERSION}-seed{seed}.safetensors"
    return cached(path, lambda: from_equal_classes(*draw(seed)))


def load(seed: int = 0) -> dict[str, ClassStore]:
    """The characters of the splits "train", "val" and "test"."""
    store = characters(seed)
    splits = [split_of(name) for name in store.class_names]
    return {
        split: select_classes(store, [c for c, own in enumerate(splits) if own == split])
        for split in SPLITS
    }


def _distinct_characters(
    alphabet: Alphabet, count: int, rng: np.random.Generator
) -> list[Character]:
    """Characters of an alphabet that are easy to read and hard to take for one another.

    Of many candidates, leave out the tangled half, then keep one by one that whose ideal
    drawing is least like any of those kept.
    """
    pool = [invent_character(alphabet, rng) for _ in range(CANDIDATES * count)]
    # Repeating a last stroke changes no drawing, and lets all be inked at once.
    padded = [one.ideal[np.arange(MOST_STROKES).clip(max=len(one.ideal) - 1)] for one in pool]
    images = _render(np.stack(padded), np.full(len(pool), BROAD_PEN))
    ink = images.numpy().reshape(len(pool), -1).astype(np.float64)
    # Where strokes run over each other, the pen travels far for the ink that is to be seen.
    travelled = np.array([STEPS * one.scale * sum(s.step for s in one.strokes) for one in pool])
    clear = np.sort(np.argsort(travelled / ink.sum(1), kind="stable")[: len(pool) // 2])
    # Weighing by all of the ink would prefer large characters, by none of it mere lines.
    ink = ink[clear] / np.sqrt(np.linalg.norm(ink[clear], axis=1, keepdims=True))
    kept = [0]
    distance = np.linalg.norm(ink - ink[0], axis=1)
    while len(kept) < count:
        kept.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(ink - ink[kept[-1]], axis=1))
    return [pool[clear[index]] for index in kept]


def _render(paths: Floats, pen: Floats) -> Tensor:
    """Ink the paths of some drawings of one character.

    Args:
        paths: points in units of a character, (drawings, strokes, points, 2).
        pen: half the width of the line in pixels, (drawings,).

    Returns:
        uint8, (drawings, 28, 28): the coverage of each pixel, judged by its centre's distance
        from the path.
    """
    points = torch.from_numpy(_into_frame(paths)).float()
    # Between two points, as many more as leave no gap that could be seen in the thinnest line.
    longest = float(points.diff(dim=2).norm(dim=-1).max())
    pieces = int(np.ceil(longest / (0.8 * pen.min())))
    between = torch.linspace(0, 1, pieces + 1)[1:, None]
    points = points[:, :, :-1, None] + between * points.diff(dim=2)[:, :, :, None]
    points = points.flatten(1, 3).transpose(0, 1)  # (path, drawings, 2)
    centres = torch.arange(SIDE) + 0.5
    from_x = (centres - points[..., :1]).square()[:, :, None, :]
    from_y = (centres - points[..., 1:]).square()[:, :, :, None]
    nearest = torch.full((len(paths), SIDE, SIDE), torch.inf)
    here = torch.empty_like(nearest)
    for x, y in zip(from_x.unbind(), from_y.unbind(), strict=True):  # `here` stays in cache
        torch.add(x, y, out=here)
        torch.minimum(nearest, here, out=nearest)
    half_width = torch.from_numpy(pen).float()[:, None, None]
    ink = (half_width + 0.5 - nearest.sqrt_()).clamp_(0, 1)
    return (255 * ink).round().to(torch.uint8)


def _into_frame(paths: Floats) -> Floats:
    """Paths in pixels; a drawing that would leave the frame is shrunk or moved into it."""
    pixels = paths * UNIT
    low = pixels.min((1, 2), keepdims=True)
    high = pixels.max((1, 2), keepdims=True)
    room = SIDE - 2 * MARGIN
    middle = (low + high) / 2
    shrink = np.minimum(1.0, room / (high - low).max(-1, keepdims=True))
    slack = (room - shrink * (high - low)) / 2
    return np.asarray((pixels - middle) * shrink + middle.clip(-slack, slack) + SIDE / 2)
