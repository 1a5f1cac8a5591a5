#!/usr/bin/env python3
"""Choose the classes of data=emoji from its packages: writes the list that metarun ships.

A class is a concept, by the name that the sets have in common, which at least 7 of the 9 sets and
5 of the 6 houses have drawn. Left out are skin tones, people, flags, clocks, keycaps, arrows and
families, of which dozens are alike, and a concept that shares a drawing with another. The split by
class is drawn by a hash of the name; that by group follows the groups of Unicode.
"""

import argparse
import hashlib
import re
from collections import defaultdict
from pathlib import Path

from metarun.components.data._emoji_packages import SETS, drawings, find, read_json

LEFT_OUT = {
    "skin", "tone", "flag", "flags", "oclock", "thirty", "keycap", "digit", "arrow", "arrows",
    "family", "families", "couple", "kiss", "man", "men", "woman", "women", "person", "people",
    "boy", "girl", "child", "adult", "baby", "father", "mother", "mr", "mrs", "santa", "he", "she",
    "hair", "haired",
}  # fmt: skip
VAL_GROUPS = ("Travel & Places",)
TEST_GROUPS = ("Food & Drink", "Activities")
PARTS = (0.64, 0.16)  # of the classes, for training and validation


def concepts(root: Path) -> dict[str, dict[str, str]]:
    """The classes, each with its drawings by set."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for name, package in find(root).items():
        for concept, svg in drawings(package).items():
            found[concept][name] = svg
    wide = {
        concept: drawn
        for concept, drawn in found.items()
        if len(drawn) >= 7
        and len({SETS[name].house for name in drawn}) >= 5
        and not LEFT_OUT & set(re.split("-", concept))
    }
    seen: set[tuple[str, str]] = set()
    chosen = {}
    for concept, drawn in sorted(wide.items(), key=lambda item: (-len(item[1]), item[0])):
        if not seen & drawn.items():  # else another name of a class
            seen |= drawn.items()
            chosen[concept] = drawn
    return chosen


def groups(root: Path) -> dict[str, str]:
    """The group of each concept, as the first set that has one says."""
    found: dict[str, str] = {}
    packages = find(root)
    for name in ("noto", "twemoji", "openmoji", "fluent-emoji-flat"):
        for group, members in read_json(packages[name], "metadata.json")["categories"].items():
            for member in members:
                found.setdefault(member, group)
    return found


def table(root: Path) -> str:
    """The list: group, concept, split by class, split by group."""
    group_of = groups(root)
    names = sorted((group_of[name], name) for name in concepts(root) if name in group_of)
    order = sorted(names, key=lambda row: hashlib.sha256(f"emoji:{row[1]}".encode()).hexdigest())
    train, val = (round(sum(PARTS[:n]) * len(order)) for n in (1, 2))
    split = dict.fromkeys(order[:train], "train")
    split |= dict.fromkeys(order[train:val], "val") | dict.fromkeys(order[val:], "test")
    lines = [
        "# Classes of data=emoji, written by scripts/emoji_classes.py: the group of Unicode, the",
        "# concept, its split by class, its split by group. Columns are separated by tabs.",
    ]
    for row in names:
        by_group = {
            **dict.fromkeys(VAL_GROUPS, "val"), **dict.fromkeys(TEST_GROUPS, "test")
        }.get(row[0], "train")  # fmt: skip
        lines.append("\t".join((*row, split[row], by_group)))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the list."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("root", type=Path, help="folder of the packages")
    parser.add_argument("--out", type=Path, default=Path("metarun/components/data/lists/emoji.txt"))
    given = parser.parse_args()
    text = table(given.root)
    given.out.write_text(text, encoding="utf-8")
    digest = hashlib.sha256(text.encode()).hexdigest()
    print(f"{given.out}: {text.count(chr(10)) - 2} classes, sha256 {digest}")


if __name__ == "__main__":
    main()
