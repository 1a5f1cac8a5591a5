"""Small pictures, drawn for the tests: of one colour, which tells which it is, or of noise."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 6


def colour(kind: int, number: int) -> tuple[int, int, int]:
    """The colour of a picture of a class."""
    return 10 * kind + 5, number + 1, 200


def content(color: tuple[int, int, int], suffix: str = ".png") -> bytes:
    """The file of a picture of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), color).save(file, Image.registered_extensions()[suffix])
    return file.getvalue()


def draw(path: Path, color: tuple[int, int, int]) -> Path:
    """Write a picture; gives its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content(color, path.suffix))
    return path


def draw_classes(root: Path, names: list[str], count: int = 3, first: int = 0) -> Path:
    """`root/<class>/<n>.png`; the class with number k has the colours `colour(first + k, n)`."""
    for kind, name in enumerate(names):
        for number in range(count):
            draw(root / name / f"{number}.png", colour(first + kind, number))
    return root


def draw_noise(root: Path, names: list[str], count: int = 4, seed: int = 0) -> Path:
    """`root/<class>/<n>.png`, grey: no two pictures are equal, of a seed or of two."""
    generator = np.random.default_rng(seed)
    for name in names:
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 256, (28, 28), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root
