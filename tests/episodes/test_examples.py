"""Labelled examples: their parts, their wrong labels, and the batches that are drawn of them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from metarun.episodes.examples import PARTS, ExampleBatches, LabelledExamples, Windows
from metarun.episodes.store import ClassStore, from_equal_classes

CPU = torch.device("cpu")
CLASSES, EACH = 7, 10


def numbered(classes: int = CLASSES, each: int = EACH) -> ClassStore:
    """Images of one pixel, each with a number of its own."""
    images = torch.arange(classes * each, dtype=torch.uint8).view(classes, each, 1, 1, 1)
    return from_equal_classes(images, [f"class{c}" for c in range(classes)])


def examples(store: ClassStore | None = None, **changes: Any) -> LabelledExamples:
    given: dict[str, Any] = {
        "classes": 5, "held_out": 2, "val": 1, "test": 3, "label_noise": 0.0, "seed": 0,
        "device": CPU, "dtype": torch.float64,
    }  # fmt: skip
    return LabelledExamples(store or numbered(), **(given | changes))


def image_numbers(x: Tensor) -> Tensor:
    return (255 * x).round().long().flatten()


def part(of: LabelledExamples, name: str) -> tuple[list[int], list[int]]:
    found = of.sample(name, 0, of.count(name))
    return image_numbers(found.x).tolist(), found.y.tolist()


def test_each_example_is_in_one_part_and_each_class_alike() -> None:
    ours = examples()
    sizes = {"train": 4, "held_out": 2, "val": 1, "test": 3}
    seen: list[int] = []
    for name in PARTS:
        images, labels = part(ours, name)
        assert len(images) == ours.count(name) == 5 * sizes[name]
        assert all(labels.count(label) == sizes[name] for label in range(5))
        assert labels != sorted(labels), "those of a class stand together"
        seen += images
    assert len(set(seen)) == len(seen) == 50
    of_class = {image // EACH: label for image, label in zip(*part(ours, "train"), strict=True)}
    for name in PARTS:
        assert all(of_class[i // EACH] == y for i, y in zip(*part(ours, name), strict=True))
    assert ours.outputs == 5 and ours.input_shape == (1, 1, 1)


def test_another_seed_has_the_same_parts_and_other_batches() -> None:
    """Or an evaluation with another seed would test what was learned from."""
    one, other = examples(), examples(seed=1)
    assert all(part(one, name) == part(other, name) for name in PARTS)
    assert one.identity == other.identity != examples(test=2).identity
    drawn = [of.draw(["train"], torch.arange(3), 8).number for of in (one, one, other)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_classes_of_different_sizes_keep_what_is_left() -> None:
    store = ClassStore(
        torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1),
        torch.tensor([0, 5]),
        torch.tensor([5, 7]),
        ("few", "many"),
    )
    ours = examples(store, classes=None, held_out=1, val=1, test=1)
    images, labels = part(ours, "train")
    assert (labels.count(0), labels.count(1)) == (2, 4)
    assert all((image >= 5) == label for image, label in zip(images, labels, strict=True))


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_so_many_training_labels_are_of_another_class_and_no_others(fraction: float) -> None:
    clean, noisy = examples(), examples(label_noise=fraction)
    differ = [a != b for a, b in zip(part(clean, "train")[1], part(noisy, "train")[1], strict=True)]
    assert sum(differ) == fraction * 20 and differ == noisy.flipped.tolist()
    assert part(clean, "train")[0] == part(noisy, "train")[0]
    for name in PARTS[1:]:
        assert part(clean, name) == part(noisy, name)


def test_each_other_class_is_as_likely_as_a_wrong_label() -> None:
    store = from_equal_classes(torch.zeros(3, 1000, 1, 1, 1, dtype=torch.uint8), ["a", "b", "c"])
    clean, noisy = (examples(store, classes=3, label_noise=n) for n in (0.0, 0.5))
    before, after = (torch.tensor(part(of, "train")[1]) for of in (clean, noisy))
    moved = torch.zeros(3, 3)
    for one, other in zip(before.tolist(), after.tolist(), strict=True):
        moved[one, other] += 1
    assert (moved.diagonal() - 500).abs().max() < 80
    assert (moved - 250 - 250 * torch.eye(3)).abs().max() < 80
    again = examples(store, classes=3, label_noise=0.5)
    assert torch.equal(noisy.flipped, again.flipped)
    other_seed = examples(store, classes=3, label_noise=0.5, seed=1)
    assert not torch.equal(noisy.flipped, other_seed.flipped)


def test_a_batch_is_a_function_of_its_number() -> None:
    ours = examples(label_noise=0.5)
    whole = ours.draw(["train"], torch.arange(6), 8)
    alone = ours.draw(["train"], torch.tensor([4]), 8)
    for one, other in zip(whole, alone, strict=True):
        assert torch.equal(one[4:5], other)
    known = ours.sample("train", 0, ours.count("train"))
    assert torch.equal(whole.x, known.x[whole.number])
    assert torch.equal(whole.y, known.y[whole.number])
    many = ours.draw(["train"], torch.arange(500), 8).number.flatten().bincount(minlength=20)
    assert ((many - 200).abs() < 60).all(), "each example is drawn as often as any other"


def test_batches_of_two_parts_have_examples_of_both() -> None:
    ours = examples()
    batch = ExampleBatches(ours, ("train", "held_out"), 64).sample(3, 1)
    images = set(image_numbers(batch.x).tolist())
    assert images & set(part(ours, "train")[0]) and images & set(part(ours, "held_out")[0])
    assert not images & {*part(ours, "val")[0], *part(ours, "test")[0]}
    assert batch.y.shape == (1, 64)


def test_a_window_has_the_batches_that_come_next_and_one_that_is_held_out() -> None:
    """The first batches of a window are those that the model goes on by."""
    ours = examples()
    windows = Windows(ours, size=6, held_out=5, batches=3, real=2, updates=2)
    found = windows.sample(0, 5)
    assert found.x.shape == (5, 3, 6, 1, 1, 1) and found.held_x.shape == (5, 5, 1, 1, 1)
    batches = ours.draw(["train"], torch.arange(9), 6)
    for step, first in enumerate((0, 0, 2, 2, 4)):
        assert torch.equal(found.number[step], batches.number[first : first + 3])
        assert torch.equal(found.y[step], batches.y[first : first + 3])
    held = set(part(ours, "held_out")[0])
    assert set(image_numbers(found.held_x).tolist()) <= held
    assert not torch.equal(found.held_x[0], found.held_x[1])
    for one, other in zip(windows.sample(3, 1), found, strict=True):
        assert torch.equal(one[0], other[3])


def test_what_cannot_be_divided_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.classes=9: there are 7 classes"):
        examples(classes=9)
    with pytest.raises(ValueError, match=r"held_out \+ data\.val \+ data\.test = 10: class 'class"):
        examples(test=7)
    assert examples(classes=None).outputs == CLASSES
