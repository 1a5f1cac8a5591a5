"""Labelled examples of some classes, in parts: what one classifier is trained and tested on."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metarun.episodes.rng import random_bits, stream_key, uniform
from metarun.episodes.source import Batch
from metarun.episodes.store import ClassStore, derived
from metarun.errors import ConfigError
from metarun.system.memory import machine_memory

PARTS = ("train", "held_out", "val", "test")


class Part(NamedTuple):
    """Some of the examples.

    Attributes:
        images: int64 (examples,), numbers of images of the store.
        labels: int64 (examples,), from 0 to the number of classes − 1.
    """

    images: Tensor
    labels: Tensor


class Drawn(NamedTuple):
    """Random batches; each tensor has the batches as its first dimension.

    Attributes:
        x: (batches, examples, *features).
        y: int64 (batches, examples), labels.
        number: int64 (batches, examples), the examples' numbers within their part.
    """

    x: Tensor
    y: Tensor
    number: Tensor


class LabelledExamples:
    """Examples of some classes, each in one of four parts.

    "train" is what a model learns from, "held_out" what a meta-loss is taken of, "val" chooses a
    model and "test" gives its figure. Each class has as many examples of "held_out", "val" and
    "test" as any other; the rest is "train". Which classes these are, and which example is in which
    part, is the same for every seed of a run: another seed must not put into the test what was
    learned from. Random batches and wrong labels depend on the seed.

    Attributes:
        input_shape: of one example.
        outputs: how many classes there are.
        device: where the examples are.
        flipped: bool (training examples,), whose label is wrong.
        identity: a text that other examples, or other parts of them, would not have.
    """

    kind = "classification"

    def __init__(
        self,
        store: ClassStore,
        *,
        classes: int | None,
        held_out: int,
        val: int,
        test: int,
        label_noise: float,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Choose the classes, divide their examples, and move the images to `device`.

        Args:
            classes: how many; None: all of the store.
            held_out, val, test: examples of each class in these parts.
            label_noise: fraction of the training labels that become another class, each as likely.

        Raises:
            ValueError: there are fewer classes, or a class has no example left to learn from.
        """
        count = len(store.class_names)
        wanted = count if classes is None else classes
        if wanted > count:
            raise ValueError(f"data.classes={classes}: there are {count} classes")
        ranks = random_bits(stream_key("classes"), torch.arange(count))
        chosen = ranks.topk(wanted).indices.sort().values.tolist()
        fewest = min(chosen, key=lambda c: int(store.sizes[c]))
        if held_out + val + test >= int(store.sizes[fewest]):
            raise ValueError(
                f"data.held_out + data.val + data.test = {held_out + val + test}: class "
                f"{store.class_names[fewest]!r} has {int(store.sizes[fewest])} examples, which "
                "leaves none to learn from"
            )
        parts = _divided(store, chosen, {"test": test, "val": val, "held_out": held_out})
        self.flipped = _flipped(len(parts["train"].labels), label_noise, seed)
        labels = _wrong_where(self.flipped, parts["train"].labels, wanted, seed)
        parts["train"] = parts["train"]._replace(labels=labels)
        self._parts = {
            name: Part(*(value.to(device) for value in part)) for name, part in parts.items()
        }
        self._images = store.images.to(device)
        self.seed, self.device, self.dtype, self.outputs = seed, device, dtype, wanted
        self.input_shape = tuple(store.images.shape[1:])
        self.identity = derived(store, "examples", wanted, held_out, val, test)

    def count(self, part: str) -> int:
        """How many examples a part has."""
        return len(self._parts[part].labels)

    def pictures(self, part: str) -> Tensor:
        """The images of a part, as they are stored."""
        return self._images[self._parts[part].images]

    def described(self) -> str:
        """How many examples there are, and what for."""
        wrong = int(self.flipped.sum())
        labels = f", {wrong} with a wrong label" if wrong else ""
        numbers = {name: self.count(name) for name in PARTS}
        return (
            f"{self.outputs} classes; {numbers['train']} examples to learn from{labels}, "
            f"{numbers['held_out']} held out, {numbers['val']} for validation, {numbers['test']} "
            "for the test"
        )

    def sample(self, split: str, start: int, count: int) -> Batch:
        """Examples `start` … `start + count - 1` of a part, in an order that is always the same.

        Returns:
            x (count, *features) and y (count,).
        """
        part = self._parts[split]
        own = slice(start, start + count)
        return Batch(self._seen(part.images[own]), part.labels[own])

    def draw(self, parts: Sequence[str], numbers: Tensor, size: int) -> Drawn:
        """Random batches of one part, or of several together.

        Batch `i` depends on `(seed, parts, i)` alone. Its examples are drawn with replacement, each
        as often as any other.

        Args:
            parts: of `PARTS`.
            numbers: int64 (batches,), which batches; on the device of the examples.
            size: examples in a batch.
        """
        images = torch.cat([self._parts[name].images for name in parts])
        labels = torch.cat([self._parts[name].labels for name in parts])
        keys = random_bits(stream_key("batches", self.seed, *parts), numbers)[:, None]
        places = torch.arange(size, device=images.device)
        number = (uniform(keys, places) * len(images)).long()
        return Drawn(self._seen(images[number]), labels[number], number)

    def _seen(self, images: Tensor) -> Tensor:
        """Images as a network gets them: floats in [0, 1]."""
        return self._images[images].to(self.dtype).div_(255.0)


class ExampleBatches:
    """Batches of labelled examples, one for each meta-step.

    Args:
        examples: whose.
        parts: that they are drawn from together.
        size: examples in a batch.
    """

    def __init__(self, examples: LabelledExamples, parts: Sequence[str], size: int) -> None:
        """Raises ConfigError: a batch is larger than the memory of the machine."""
        _check_size(examples, size)
        self._examples, self._parts, self._size = examples, tuple(parts), size

    def sample(self, start: int, count: int) -> Batch:
        """Batches `start` … `start + count - 1`."""
        numbers = torch.arange(start, start + count, device=self._examples.device)
        drawn = self._examples.draw(self._parts, numbers, self._size)
        return Batch(drawn.x, drawn.y)


class Window(NamedTuple):
    """What a meta-step looks at, with the meta-steps as the first dimension of each tensor.

    Attributes:
        x: (meta-steps, batches, examples, *features), the training batches that come next.
        y: int64 (meta-steps, batches, examples).
        number: int64, likewise: the examples' numbers among those of training.
        held_x: (meta-steps, examples, *features), held out.
        held_y: int64 (meta-steps, examples).
    """

    x: Tensor
    y: Tensor
    number: Tensor
    held_x: Tensor
    held_y: Tensor


class Windows:
    """Windows of training batches, each with a batch that is held out.

    Args:
        examples: whose.
        size: examples in a training batch.
        held_out: examples in a batch that is held out.
        batches: training batches in a window.
        real: by how many of them the next window begins later.
        updates: meta-steps that look at the same training batches.
    """

    def __init__(
        self,
        examples: LabelledExamples,
        *,
        size: int,
        held_out: int,
        batches: int,
        real: int,
        updates: int,
    ) -> None:
        """Raises ConfigError: a window is larger than the memory of the machine."""
        _check_size(examples, size * batches + held_out)
        self._examples, self._size, self._held_out = examples, size, held_out
        self._batches, self._real, self._updates = batches, real, updates

    def sample(self, start: int, count: int) -> Window:
        """The windows of meta-steps `start` … `start + count - 1`."""
        device = self._examples.device
        steps = torch.arange(start, start + count, device=device)
        first = steps // self._updates * self._real
        numbers = (first[:, None] + torch.arange(self._batches, device=device)).flatten()
        train = self._examples.draw(["train"], numbers, self._size)
        held = self._examples.draw(["held_out"], steps, self._held_out)
        x, y, number = (part.view(count, self._batches, *part.shape[1:]) for part in train)
        return Window(x, y, number, held.x, held.y)


def _check_size(examples: LabelledExamples, count: int) -> None:
    needed = count * math.prod(examples.input_shape) * 8
    if needed > machine_memory():
        raise ConfigError(
            f"a meta-step reads {count} examples of {needed / 2**30:.0f} GiB in all, more than the "
            "memory of this machine: lower algo.batch_size"
        )


def _divided(store: ClassStore, classes: Sequence[int], sizes: dict[str, int]) -> dict[str, Part]:
    """The examples of each part, mixed; what `sizes` leaves is "train"."""
    images: dict[str, list[Tensor]] = {name: [] for name in PARTS}
    for number in classes:
        first, count = int(store.starts[number]), int(store.sizes[number])
        members = _shuffled(torch.arange(first, first + count), "parts")
        for name, size in sizes.items():
            images[name].append(members[:size])
            members = members[size:]
        images["train"].append(members)
    parts = {}
    for name, own in images.items():
        labels = torch.arange(len(own)).repeat_interleave(torch.tensor([len(part) for part in own]))
        order = _shuffled(torch.arange(len(labels)), "order", name)
        parts[name] = Part(torch.cat(own)[order], labels[order])
    return parts


def _shuffled(values: Tensor, *stream: str) -> Tensor:
    """The values in an order that depends on them and on the stream alone."""
    return values[random_bits(stream_key(*stream), values).argsort()]


def _flipped(examples: int, fraction: float, seed: int) -> Tensor:
    """Which training examples have a wrong label: exactly so many, to the nearest whole number."""
    ranks = random_bits(stream_key("label noise", seed), torch.arange(examples))
    flipped = torch.zeros(examples, dtype=torch.bool)
    flipped[ranks.topk(round(fraction * examples)).indices] = True
    return flipped


def _wrong_where(flipped: Tensor, labels: Tensor, classes: int, seed: int) -> Tensor:
    """The labels, another one where `flipped` says so."""
    places = torch.arange(len(labels))
    by = 1 + (uniform(stream_key("wrong labels", seed), places) * (classes - 1)).long()
    return torch.where(flipped, (labels + by) % classes, labels)
