"""What is in the splits of a data set, and what should not be: classes and examples in two."""

import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

from tqdm import tqdm

from metarun.episodes.shared import digests
from metarun.episodes.store import ClassStore
from metarun.episodes.store_file import picture_names
from metarun.errors import printable_name


class Example(NamedTuple):
    """One example of a data set."""

    split: str
    class_name: str
    number: int  # within the class, from 1
    file: str  # of the picture; "" where it has none

    def __str__(self) -> str:
        return f"{self.split}: {self.file or f'{self.class_name}, number {self.number}'}"


class Repeats(NamedTuple):
    """Examples with the same content, in pairs, by what they have in common.

    Attributes:
        across: of two splits: what is tested has been trained on.
        between: of two classes of one split: one of them is wrong.
        within: of one class: a query may be a support example as well.
    """

    across: list[tuple[Example, Example]]
    between: list[tuple[Example, Example]]
    within: list[tuple[Example, Example]]


def counts(store: ClassStore) -> str:
    """How many classes and examples a split has."""
    least, most = int(store.sizes.argmin()), int(store.sizes.argmax())
    few, many = int(store.sizes[least]), int(store.sizes[most])
    each = f"{few:,} of each"
    if few != many:
        middle = int(store.sizes.median())
        first, last = (printable_name(store.class_names[place]) for place in (least, most))
        each = (
            f"from {few:,} (class {first}) to {many:,} (class {last}) of each, {middle:,} in the "
            "middle"
        )
    return f"{len(store.class_names):,} classes, {store.count:,} examples, {each}"


def shared_classes(stores: dict[str, ClassStore]) -> list[tuple[str, str, str]]:
    """Classes that are in two splits: their name, and the splits."""
    owner: dict[str, str] = {}
    found = []
    for split, store in stores.items():
        for name in store.class_names:
            first = owner.setdefault(unicodedata.normalize("NFC", name), split)
            if first != split:
                found.append((name, first, split))
    return found


def repeats(stores: dict[str, ClassStore]) -> Repeats:
    """Examples whose content, to the last bit, has been there before."""
    found = Repeats([], [], [])
    seen: dict[bytes, Example] = {}
    total = sum(store.count for store in stores.values())
    with tqdm(total=total, desc="comparing", unit="example", disable=None) as bar:
        for split, store in stores.items():
            for example, content in _examples(split, store):
                first = seen.setdefault(content, example)
                bar.update()
                if first is example:
                    continue
                if first.split != example.split:
                    found.across.append((first, example))
                elif first.class_name != example.class_name:
                    found.between.append((first, example))
                else:
                    found.within.append((first, example))
    return found


def _examples(split: str, store: ClassStore) -> Iterator[tuple[Example, bytes]]:
    """Every example with a digest of its content."""
    files = picture_names(store)
    for name, start, size in zip(
        store.class_names, store.starts.tolist(), store.sizes.tolist(), strict=True
    ):
        for place, digest in enumerate(digests(store.images[start : start + size])):
            file = files[start + place] if files else ""
            yield Example(split, name, place + 1, file), digest
