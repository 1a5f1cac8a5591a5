"""Each picture of a batch changes as torchvision changes it alone."""

import itertools

import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from metarun.config.augment import COLOURS
from metarun.episodes.transforms import recolour, warp, window

SIZES = ((3, 8, 11), (1, 9, 7), (3, 12, 12))
COUNT = 24  # as many as there are orders of four changes of colour


def pictures(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(COUNT, *shape, generator=generator, dtype=torch.float64)


def numbers(least: float, largest: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(COUNT, generator=generator, dtype=torch.float64)
    return least + (largest - least) * drawn


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("fill", [0.0, 0.7])
def test_windows_and_flips_move_pixels_and_change_none(shape: tuple[int, ...], fill: float) -> None:
    images, border = pictures(shape), 3
    down, right = numbers(0, 7, 1).long(), numbers(0, 7, 2).long()
    mirrored, upside_down = numbers(0, 1, 3) < 0.5, numbers(0, 1, 4) < 0.5
    assert {*down.tolist(), *right.tolist()} >= {0, 6}, "the ends are tried"
    found = window(images, down, right, mirrored, upside_down, border=border, fill=fill)
    for place, own in enumerate(images):
        padded = tv.pad(own, [border], fill=fill)
        wanted = tv.crop(padded, int(down[place]), int(right[place]), *shape[1:])
        wanted = tv.horizontal_flip(wanted) if mirrored[place] else wanted
        wanted = tv.vertical_flip(wanted) if upside_down[place] else wanted
        assert torch.equal(found[place], wanted)


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("fill", [0.0, 0.7])
def test_warps_are_those_of_torchvision(shape: tuple[int, ...], fill: float) -> None:
    images = pictures(shape)
    angle, scale, shear = numbers(-180, 180, 1), numbers(0.5, 1.6, 2), numbers(-40, 40, 3)
    right, down = numbers(-3, 3, 4).round(), numbers(-3, 3, 5).round()
    found = warp(images, angle, right, down, scale, shear, fill=fill)
    for place, own in enumerate(images):
        wanted = tv.affine(
            own - fill,  # what torchvision takes from outside is 0, if it gets no `fill`
            float(angle[place]),
            [float(right[place]), float(down[place])],
            float(scale[place]),
            [float(shear[place]), 0.0],
            interpolation=tv.InterpolationMode.BILINEAR,
        )
        torch.testing.assert_close(found[place], wanted + fill, rtol=0, atol=1e-12)


def test_a_warp_that_changes_nothing_returns_the_picture() -> None:
    images, none = pictures((3, 8, 11)), torch.zeros(COUNT, dtype=torch.float64)
    found = warp(images, none, none, none, none + 1, none, fill=0)
    torch.testing.assert_close(found, images, rtol=0, atol=1e-14)


ADJUST = {
    "brightness": tv.adjust_brightness,
    "contrast": tv.adjust_contrast,
    "saturation": tv.adjust_saturation,
    "hue": tv.adjust_hue,
}
SETS = [
    own for size in (1, 2, 3, 4) for own in itertools.combinations(COLOURS, size)
]  # of what changes


@pytest.mark.parametrize("kinds", SETS, ids="-".join)
def test_colours_change_as_those_of_torchvision_in_every_order(kinds: tuple[str, ...]) -> None:
    images = pictures((3, 5, 6))
    images[0] = images[0].round()  # pure colours, black and white
    images[1] = images[1, :1]  # grey
    images[2, 1] = images[2, 0]  # two channels are the largest, or the least
    amounts = torch.stack(
        [numbers(*((-0.5, 0.5) if kind == "hue" else (0, 2.5)), 7 + i) for i, kind in
         enumerate(kinds)], 1,
    )  # fmt: skip
    orders = [*itertools.permutations(range(len(kinds)))]
    order = torch.tensor([orders[place % len(orders)] for place in range(COUNT)])
    found = recolour(images, kinds, amounts, order)  # type: ignore[arg-type]
    # torchvision turns the hue in float32, whatever it gets.
    tolerance = 3e-6 if "hue" in kinds else 1e-12
    for place, own in enumerate(images):
        for number in order[place].tolist():
            own = ADJUST[kinds[number]](own, float(amounts[place, number]))
        torch.testing.assert_close(found[place], own, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kinds", [("brightness", "contrast"), ("contrast",)])
def test_grey_pictures_become_lighter_and_darker(kinds: tuple[str, ...]) -> None:
    images = pictures((1, 5, 6))
    amounts = torch.stack([numbers(0, 2.5, 7 + i) for i in range(len(kinds))], 1)
    order = torch.arange(len(kinds)).expand(COUNT, -1)
    found = recolour(images, kinds, amounts, order)  # type: ignore[arg-type]
    for place, own in enumerate(images):
        for number, kind in enumerate(kinds):
            own = ADJUST[kind](own, float(amounts[place, number]))
        torch.testing.assert_close(found[place], own, rtol=0, atol=1e-12)


@pytest.mark.gpu
def test_a_gpu_computes_the_same() -> None:
    images, place = pictures((3, 8, 11)), numbers(0, 7, 1).long()
    angle, scale = numbers(-180, 180, 1), numbers(0.5, 1.6, 2)
    flips = numbers(0, 1, 3) < 0.5
    amounts = torch.stack([numbers(-0.5, 0.5, 4 + i) + (kind != "hue") for i, kind in
                           enumerate(COLOURS)], 1)  # fmt: skip
    order = torch.rand(COUNT, 4, generator=torch.Generator().manual_seed(0)).argsort(1)
    ends = []
    for device in ("cpu", "cuda"):
        x, p, a, s, f, c, o = (
            v.to(device) for v in (images, place, angle, scale, flips, amounts, order)
        )
        x = warp(window(x, p, p, f, f, border=3, fill=0), a, s, s, s, s, fill=0)
        ends.append(recolour(x, COLOURS, c, o).cpu())
    torch.testing.assert_close(*ends, rtol=0, atol=1e-9)
