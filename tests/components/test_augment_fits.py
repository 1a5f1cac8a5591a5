"""What augmentation is for, and what refuses it."""

from typing import Any

import pytest
import torch

from metarun.components.fits import check_pictures
from metarun.config.run import EVEN, differing
from metarun.episodes.source import Episodes
from metarun.errors import ConfigError
from metarun.training.loop import meta_step
from metarun.training.setup import from_plain, to_plain
from metarun.training.state import fresh
from tests.setups import IMAGES, config_of, setup_of

CROPPED = ("augment.crop=4", "augment.flip=0.5")


def trained(*settings: str, steps: int = 2) -> dict[str, torch.Tensor]:
    setup = setup_of(*IMAGES, "task.train.query=2", *settings)
    state = fresh(setup)
    for _ in range(steps):
        meta_step(setup, state)
    return {name: value.detach() for name, value in state.meta.items()}


def test_training_tasks_are_augmented_and_no_others() -> None:
    plain, own = setup_of(*IMAGES), setup_of(*IMAGES, *CROPPED)
    before, after = (setup.train_tasks.sample(3, 2) for setup in (plain, own))
    assert torch.equal(before.query_y, after.query_y)
    for half in ("support_x", "query_x"):
        assert not torch.equal(getattr(before, half), getattr(after, half))
    for split in ("train", "val", "test"):  # what evaluations draw
        found = own.source.sample(split, 3, 2)
        assert torch.equal(found.query_x, plain.source.sample(split, 3, 2).query_x)
    assert own.identity == plain.identity


def test_off_is_as_before_and_on_learns_something_else() -> None:
    off = trained()
    assert all(torch.equal(off[n], v) for n, v in trained("augment.crop=0").items())
    assert any(not torch.equal(off[n], v) for n, v in trained(*CROPPED).items())


@pytest.mark.parametrize("algo", ["baseline", "simpleshot"])
def test_plain_batches_are_augmented(algo: str) -> None:
    settings = (*IMAGES, f"algo={algo}", "algo.batch_size=4")
    plain, own = setup_of(*settings), setup_of(*settings, *CROPPED)
    before, after = (setup.train_tasks.sample(3, 2) for setup in (plain, own))
    assert torch.equal(before.y, after.y) and not torch.equal(before.x, after.x)


def test_several_data_sets_are_augmented() -> None:
    several = ("data=multi", "data.sources=[{name:glyphs},{name:glyphs}]")
    plain, own = setup_of(*IMAGES[1:], *several), setup_of(*IMAGES[1:], *several, *CROPPED)
    before, after = (setup.train_tasks.sample(0, 4).query_x for setup in (plain, own))
    assert before.shape == after.shape
    assert all(not torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("augment.hue=0.1",), "augment.hue: the pictures of data=glyphs are grey"),
        (("augment.crop=28",), "augment.crop=28: the pictures have 28×28 pixels"),
        (("algo=baseline", *CROPPED, "augment.query=[]"), "augment.query: algo=baseline learns"),
        (("algo=scratch", *CROPPED), "augment.crop: algo=scratch meta-learns nothing"),
    ],
)
def test_what_has_no_use_for_it_refuses_it(settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        setup_of(*IMAGES, *settings)


def test_what_has_no_pictures_refuses_it() -> None:
    with pytest.raises(ConfigError, match="data=sinusoid has no pictures to augment"):
        setup_of("data=sinusoid", "backbone=mlp", *CROPPED)
    examples = ("algo=supervised", "data=glyphs_examples", "trainer.meta_batch=1")
    with pytest.raises(ConfigError, match="data=glyphs_examples has labelled examples"):
        setup_of(*examples, *CROPPED)


class Shaped:
    kind, outputs = "classification", 3

    def __init__(self, *shape: int, largest: float = 1.0) -> None:
        self.input_shape, self.largest = shape, largest

    def sample(self, split: str, start: int, count: int) -> Any:
        x, y = torch.ones(count, 3, *self.input_shape), torch.zeros(count, 3, dtype=torch.int64)
        return Episodes(x * self.largest, y, x, y)


def test_pictures_of_other_kinds_are_looked_at_first() -> None:
    check_pictures(config_of("augment.hue=0.1"), Shaped(3, 8, 8))
    check_pictures(config_of("augment.flip=0.5"), Shaped(13, 8, 8))
    check_pictures(config_of(), Shaped(5))
    for source, message in (
        (Shaped(5), "has no pictures"),
        (Shaped(13, 8, 8), "the examples of data=glyphs have 13 channels"),
        (Shaped(3, 8, 8, largest=2.5), "have values from 2.5 to 2.5: augmentation is for pictures"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_pictures(config_of("augment.contrast=0.4"), source)


def test_a_config_from_before_has_no_augmentation_and_even_tasks() -> None:
    plain = to_plain(config_of(*IMAGES))
    older = {key: value for key, value in plain.items() if key != "augment"}
    assert from_plain(older).augment.on == () and differing(older, plain) == []
    even = older | {"task": {k: v for k, v in older["task"].items() if k not in (*EVEN, "within")}}
    assert differing(even, plain) == [] and from_plain(even).task == from_plain(plain).task
    assert differing(even, to_plain(config_of(*IMAGES, "task.within=group"))) == ["task.within"]
    augmented = to_plain(config_of(*IMAGES, *CROPPED, "augment.query=[crop]"))
    assert to_plain(from_plain(augmented)) == augmented
    assert differing(older, augmented) == ["augment.crop", "augment.flip", "augment.query"]
