"""Images for a network of other data."""

import numpy as np
import pytest
import torch
from PIL import Image

from metarun.episodes.fitting import fitted
from metarun.episodes.source import ImageEpisodes
from metarun.episodes.store import ClassStore, from_equal_classes, select_classes


def random_store(channels: int, side: int) -> ClassStore:
    generator = torch.Generator().manual_seed(0)
    shape = (3, 4, channels, side, side)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return from_equal_classes(images, ["a", "b", "c"])


def test_colours_become_grey_as_pillow_makes_them() -> None:
    store = random_store(3, 5)
    grey = fitted(store, (1, 5, 5))
    for own, found in zip(store.images, grey.images, strict=True):
        wanted = np.asarray(Image.fromarray(own.permute(1, 2, 0).numpy()).convert("L"))
        assert np.abs(wanted.astype(int) - found[0].numpy().astype(int)).max() <= 1
    assert grey.class_names == store.class_names and torch.equal(grey.sizes, store.sizes)


def test_the_size_changes_as_pillow_changes_it() -> None:
    store = random_store(1, 12)
    small = fitted(store, (1, 7, 7))
    for own, found in zip(store.images, small.images, strict=True):
        wanted = np.asarray(
            Image.fromarray(own[0].numpy()).resize((7, 7), Image.Resampling.BILINEAR)
        )
        assert np.abs(wanted.astype(int) - found[0].numpy().astype(int)).max() <= 1


def test_grey_becomes_three_equal_channels_and_dark_becomes_light() -> None:
    store = random_store(1, 4)
    three = fitted(store, (3, 4, 4), invert=True)
    assert torch.equal(three.images, (255 - store.images).expand(-1, 3, -1, -1))
    assert len({store.identity, three.identity, fitted(store, (3, 4, 4)).identity}) == 3


def test_a_view_of_some_classes_keeps_these() -> None:
    store = random_store(1, 4)
    part = fitted(select_classes(store, [2, 0]), (1, 4, 4))
    assert torch.equal(part.images, torch.cat([store.images[8:], store.images[:4]]))


def test_what_cannot_be_brought_to_a_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="images of 1 channels cannot be brought to 2"):
        fitted(random_store(1, 4), (2, 4, 4))
    features = from_equal_classes(torch.zeros(2, 3, 1, 1, 1, dtype=torch.uint8), ["a", "b"])
    features = ClassStore(torch.zeros(6, 5), features.starts, features.sizes, ("a", "b"))
    with pytest.raises(ValueError, match="only images can be brought"):
        fitted(features, (1, 4, 4))


def test_the_same_examples_are_drawn_from_images_of_another_shape() -> None:
    cpu = torch.device("cpu")
    stores = {"test": random_store(1, 4)}
    source = ImageEpisodes(stores, way=2, shot=1, query=1, seed=0, device=cpu)
    other = source.fitted((3, 4, 4))
    assert other.input_shape == (3, 4, 4) and other.identity != source.identity
    before, after = (one.sample("test", 0, 3).query_x for one in (source, other))
    assert torch.equal(after, before.expand(-1, -1, 3, -1, -1))
