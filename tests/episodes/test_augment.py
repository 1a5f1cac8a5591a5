"""Augmentation is a function of a picture's place, with the distributions of torchvision's."""

from typing import Any

import pytest
import torch

from metarun.config.augment import TRANSFORMS, AugmentConfig
from metarun.episodes import augment
from metarun.episodes.augment import Augmentation, AugmentedEpisodes
from metarun.episodes.source import Batches, ImageEpisodes
from metarun.episodes.store import from_equal_classes
from metarun.errors import ConfigError

EACH: dict[str, Any] = {
    "crop": 2,
    "flip": 0.5,
    "vertical_flip": 0.5,
    "rotation": 30.0,
    "translate": 0.3,
    "scale": [0.7, 1.3],
    "shear": 20.0,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.4,
    "hue": 0.2,
}
ALL = AugmentConfig(**EACH)


def source(dtype: torch.dtype = torch.float64) -> ImageEpisodes:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (3, 6, 8, 3, 7, 9), generator=generator, dtype=torch.uint8)
    stores = {
        split: from_equal_classes(part, [f"{split}{c}" for c in range(6)])
        for split, part in zip(("train", "val", "test"), images, strict=True)
    }
    cpu = torch.device("cpu")
    return ImageEpisodes(stores, way=3, shot=2, query=3, seed=5, device=cpu, dtype=dtype)


def changed(found: Any, plain: Any) -> tuple[bool, bool]:
    halves = ((found.support_x, plain.support_x), (found.query_x, plain.query_x))
    return tuple(not torch.equal(*half) for half in halves)  # type: ignore[return-value]


def test_every_transform_is_tried_here() -> None:
    assert {*EACH} == {*TRANSFORMS} and ALL.on == TRANSFORMS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_episode_is_the_same_with_any_others_beside_it(dtype: torch.dtype) -> None:
    own = AugmentedEpisodes(source(dtype=dtype), ALL, seed=1)
    together = own.sample("train", 0, 12)
    for start, count in ((0, 1), (3, 1), (2, 5), (11, 1), (4, 8)):
        part = own.sample("train", start, count)
        for one, other in zip(part, together, strict=True):
            assert torch.equal(one, other[start : start + count])
    again = AugmentedEpisodes(source(dtype=dtype), ALL, seed=1).sample("train", 0, 12)
    assert changed(again, together) == (False, False)
    other = AugmentedEpisodes(source(dtype=dtype), ALL, seed=2).sample("train", 0, 12)
    assert changed(other, together) == (True, True)
    assert together.support_x.dtype == dtype
    for half in (together.support_x, together.query_x):
        assert half.min() >= 0 and half.max() <= 1


def test_a_picture_is_changed_by_its_place_and_not_by_how_many_there_are() -> None:
    images = source().sample("train", 0, 4).query_x
    own = Augmentation(ALL, "query", 1)
    assert torch.equal(own(images[:, :4], 7), own(images, 7)[:, :4])


def test_a_transform_draws_the_same_whatever_else_is_on() -> None:
    """Crops and flips of a picture stay what they are when its colours change as well."""
    drawn = Augmentation(ALL, "query", 1)._drawn(0, 5, 6, torch.device("cpu"))
    alone = Augmentation(AugmentConfig(crop=2), "query", 1)._drawn(0, 5, 6, torch.device("cpu"))
    assert all(torch.equal(drawn[name], alone[name]) for name in drawn)
    whole = torch.stack([*drawn.values()])
    assert len(whole.unique()) == whole.numel(), "no number is drawn twice"
    support = Augmentation(ALL, "support", 1)._drawn(0, 5, 6, torch.device("cpu"))
    assert not whole.unsqueeze(-1).eq(support["crop_down"]).any()


def test_other_splits_labels_and_halves_stay_as_they_are() -> None:
    plain = source()
    own = AugmentedEpisodes(plain, ALL, seed=1)
    for split in ("val", "test"):
        for one, other in zip(own.sample(split, 3, 4), plain.sample(split, 3, 4), strict=True):
            assert torch.equal(one, other)
    found, wanted = own.sample("train", 3, 4), plain.sample("train", 3, 4)
    assert changed(found, wanted) == (True, True)
    assert torch.equal(found.support_y, wanted.support_y)
    assert torch.equal(found.query_y, wanted.query_y)


@pytest.mark.parametrize(
    ("support", "query", "expected"),
    [
        (None, None, (True, True)),
        ([], None, (False, True)),
        (None, [], (True, False)),
        (["flip"], [], (True, False)),
    ],
)
def test_support_and_queries_are_chosen_each_for_itself(
    support: list[str] | None, query: list[str] | None, expected: tuple[bool, bool]
) -> None:
    config = AugmentConfig(flip=0.5, brightness=0.4, support=support, query=query)
    found = AugmentedEpisodes(source(), config, 1).sample("train", 0, 4)
    assert changed(found, source().sample("train", 0, 4)) == expected
    if support == ["flip"]:
        alone = AugmentedEpisodes(source(), AugmentConfig(flip=0.5), 1).sample("train", 0, 4)
        assert torch.equal(found.support_x, alone.support_x)


def test_plain_batches_are_augmented_by_their_number() -> None:
    plain = Batches(source(), 5)
    own = Batches(source(), 5, Augmentation(ALL, None, 1))
    found, wanted = own.sample(2, 3), plain.sample(2, 3)
    assert torch.equal(found.y, wanted.y) and not torch.equal(found.x, wanted.x)
    assert torch.equal(found.x[1:], own.sample(3, 2).x)
    assert torch.equal(found.x, Augmentation(ALL, None, 1)(wanted.x, 2))


# ------------------------------------------------------------------------------- distributions


def parameters(monkeypatch: pytest.MonkeyPatch, config: AugmentConfig) -> dict[str, Any]:
    """What the transforms get for 4,000 pictures of 7×9 pixels."""
    got: dict[str, Any] = {}

    def window(images: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        got.update(zip(("down", "right", "flip", "vertical_flip"), args, strict=True), **options)
        return images

    def warp(images: torch.Tensor, *args: Any, fill: float) -> torch.Tensor:
        got.update(zip(("angle", "move_right", "move_down", "scale", "shear"), args, strict=True))
        got["warp_fill"] = fill
        return images

    def recolour(images: torch.Tensor, kinds: Any, amounts: Any, order: Any) -> torch.Tensor:
        got.update(zip(kinds, amounts.T, strict=True), order=order)
        return images

    for name, fake in (("window", window), ("warp", warp), ("recolour", recolour)):
        monkeypatch.setattr(augment, name, fake)
    Augmentation(config, "query", 3)(torch.zeros(40, 100, 3, 7, 9), 0)
    return got


def check_uniform(values: torch.Tensor, least: float, largest: float) -> None:
    """Within the bounds, and near them; mean and deviation within four standard errors."""
    width = largest - least
    assert least <= values.min() <= least + width / 100
    assert largest - width / 100 <= values.max() <= largest
    assert abs(values.mean() - (least + largest) / 2) < 4 * width / (12 * len(values)) ** 0.5
    assert abs(values.std() - width / 12**0.5) < width / 50


def test_parameters_are_distributed_as_torchvision_draws_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    got = parameters(monkeypatch, AugmentConfig(**(EACH | {"flip": 0.25, "brightness": 1.5})))
    for name in ("down", "right"):
        counts = got[name].bincount()
        assert len(counts) == 5, "from 0 to twice the border"
        assert (counts - 800).abs().max() < 4 * (4000 * 0.2 * 0.8) ** 0.5
    assert abs(got["flip"].double().mean() - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    assert abs(got["vertical_flip"].double().mean() - 0.5) < 4 * (0.25 / 4000) ** 0.5
    check_uniform(got["angle"], -30, 30)
    assert got["move_right"].unique().tolist() == [-3, -2, -1, 0, 1, 2, 3]  # of up to 2.7 pixels
    assert got["move_down"].unique().tolist() == [-2, -1, 0, 1, 2]  # of up to 2.1 pixels
    check_uniform(got["scale"], 0.7, 1.3)
    check_uniform(got["shear"], -20, 20)
    check_uniform(got["brightness"], 0, 2.5)  # not below 0
    check_uniform(got["contrast"], 0.6, 1.4)
    check_uniform(got["saturation"], 0.6, 1.4)
    check_uniform(got["hue"], -0.2, 0.2)
    orders, counts = got["order"].unique(dim=0, return_counts=True)
    assert len(orders) == 24
    assert (counts - 4000 / 24).abs().max() < 4 * (4000 / 24) ** 0.5
    numbers = torch.stack(
        [got[name].double() for name in ("down", "right", "flip", "angle", "scale", "contrast")]
    )
    correlations = numbers.corrcoef() - torch.eye(6)
    assert correlations.abs().max() < 4.5 / 4000**0.5, "each is drawn for itself"


def test_the_border_has_the_grey_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    config = AugmentConfig(crop=2, rotation=30.0, fill=0.75)
    got = parameters(monkeypatch, config)
    assert got["border"] == 2 and got["fill"] == got["warp_fill"] == 0.75
    monkeypatch.undo()
    white = Augmentation(AugmentConfig(crop=2, rotation=30.0, fill=1.0), "query", 3)
    images = torch.ones(4, 5, 3, 7, 9)
    torch.testing.assert_close(white(images, 0), images, rtol=0, atol=1e-6)
    assert Augmentation(AugmentConfig(crop=2), "query", 3)(images, 0).min() == 0


# ------------------------------------------------------------------------------------ settings


def test_nothing_is_on_unless_it_is_asked_for() -> None:
    assert AugmentConfig().on == () == AugmentConfig(crop=0, flip=0.0, scale=[1.0, 1.0]).on
    images = torch.rand(2, 3, 3, 4, 4)
    assert Augmentation(AugmentConfig(), None, 0)(images, 0) is images


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop": -1}, r"augment\.crop=-1: must be from 0 to 4096"),
        ({"flip": 1.5}, r"augment\.flip=1\.5: must be from 0 to 1"),
        ({"hue": 0.6}, r"augment\.hue=0\.6: must be from 0 to 0\.5"),
        ({"shear": 90.0}, r"augment\.shear=90\.0: must be from 0 to 80"),
        ({"contrast": -0.1}, r"augment\.contrast=-0\.1: must be 0 or more"),
        ({"brightness": float("nan")}, r"augment\.brightness=nan: must be a finite number"),
        ({"scale": [1.2, 0.8]}, r"augment\.scale=\[1\.2, 0\.8\]: expected e\.g\. \[0\.8,1\.2\]"),
        ({"scale": [0.8]}, r"augment\.scale=\[0\.8\]: expected"),
        ({"scale": [0.0, 1.0]}, r"augment\.scale=0\.0: must be above 0"),
        ({"flip": 0.5, "query": ["flop"]}, r"augment\.query: there is no 'flop' .*did you mean"),
        ({"query": ["flip"]}, r"augment\.query names flip: give augment\.flip, too"),
        ({"flip": 0.5, "support": [], "query": []}, "nothing is left to change"),
    ],
)
def test_settings_that_are_not_allowed_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AugmentConfig(**settings)
