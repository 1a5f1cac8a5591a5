"""The lists of classes that metarun ships are the published ones."""

from pathlib import Path

import pytest

from metarun.components.data import cifar_fs, cub, fc100, mini_imagenet, tiered_imagenet
from metarun.components.data._class_lists import class_list
from metarun.errors import DataError

LISTS = {
    "mini_imagenet": (mini_imagenet.SHA256, (64, 16, 20)),
    "tiered_imagenet": (tiered_imagenet.SHA256, (351, 97, 160)),
    "cifar_fs": (cifar_fs.SHA256, (64, 16, 20)),
    "fc100": (fc100.SHA256, (60, 20, 20)),
    "cub_100_50_50": (cub.SHA256["100-50-50"], (100, 50, 50)),
    "cub_140_30_30": (cub.SHA256["140-30-30"], (140, 30, 30)),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_has_the_published_numbers_of_classes_and_none_twice(name: str) -> None:
    sha256, counts = LISTS[name]
    splits = class_list(name, sha256).splits
    assert tuple(len(own) for own in splits.values()) == counts
    assert len({bird for own in splits.values() for bird in own}) == sum(counts)


@pytest.mark.parametrize(
    ("name", "counts"), [("tiered_imagenet", (20, 6, 8)), ("fc100", (12, 4, 4))]
)
def test_no_superclass_is_in_two_splits(name: str, counts: tuple[int, ...]) -> None:
    splits = class_list(name, LISTS[name][0]).splits
    groups = [{one.split("/")[0] for one in own} for own in splits.values()]
    assert tuple(map(len, groups)) == counts
    assert len(set.union(*groups)) == sum(counts)


def test_cifar_fs_and_fc100_are_made_of_the_same_classes() -> None:
    both = [class_list(name, LISTS[name][0]).splits.values() for name in ("cifar_fs", "fc100")]
    one, other = (sorted(name for own in splits for name in own) for splits in both)
    assert one == other and len({name.split("/")[0] for name in one}) == 20


def test_the_words_of_a_split_tell_its_classes_apart() -> None:
    """Tiered-ImageNet's files name classes by words alone: `crane` is a bird and a machine."""
    for name in ("mini_imagenet", "tiered_imagenet"):
        found = class_list(name, LISTS[name][0])
        for own in found.splits.values():
            assert len({found.words[one] for one in own}) == len(own)


def test_a_list_that_was_changed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "fc100.txt").write_text("fish/ray\ttest\n")
    monkeypatch.setattr("metarun.components.data._class_lists.files", lambda package: tmp_path)
    with pytest.raises(DataError, match=r"lists/fc100.txt has been changed"):
        fc100.published()
