"""Groups of classes: alphabets, superclasses, houses; and tasks that stay within one of them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Groups(NamedTuple):
    """The groups of a split's classes, and which of them a task may be of.

    Attributes:
        of_class: int64, (classes,); number of each class's group.
        large: int64, (groups,); the numbers of the groups that have enough classes for a task.
        least: how many classes the smallest of those has.
    """

    of_class: Tensor
    large: Tensor
    least: int

    def to(self, device: torch.device) -> "Groups":
        """The same on a device."""
        return Groups(self.of_class.to(device), self.large.to(device), self.least)


def group_of(class_name: str) -> str:
    """The group of a class: what stands before the last '/' of its name; '' if there is none.

    >>> from metarun.episodes.groups import group_of
    >>> group_of("Greek/character01"), group_of("Greek/rot90/character01"), group_of("cat")
    ('Greek', 'Greek/rot90', '')
    """
    return class_name.rpartition("/")[0]


def groups_for(split: str, class_names: Sequence[str], way: int) -> Groups:
    """The groups of a split, of which tasks with `way` classes are drawn.

    Raises:
        ValueError: the classes have no groups, or none of these has `way` classes.
    """
    if alone := [name for name in class_names if not group_of(name)]:
        raise ValueError(
            f"task.within=group: the classes of these data have no groups ({alone[0]!r} in the "
            f"{split} split is not named group/class); leave it out"
        )
    members: dict[str, list[int]] = {}
    for number, name in enumerate(class_names):
        members.setdefault(group_of(name), []).append(number)
    of_class = torch.empty(len(class_names), dtype=torch.int64)
    for group, own in enumerate(members.values()):
        of_class[own] = group
    large = [group for group, own in enumerate(members.values()) if len(own) >= way]
    if not large:
        largest = max(members, key=lambda name: len(members[name]))
        raise ValueError(
            f"task.within=group: no group of the {split} split has task.way={way} classes; the "
            f"largest, {largest!r}, has {len(members[largest])}"
        )
    sizes = [len(own) for own in members.values()]
    return Groups(of_class, torch.tensor(large), min(sizes[group] for group in large))
