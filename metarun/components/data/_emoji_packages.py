"""Nine sets of colour emoji as the npm packages @iconify-json/<set> have them: found and read."""

import hashlib
import json
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from metarun.errors import DataError
from metarun.system.untrusted import read_regular

MOST_BYTES = 2**28  # of an unpacked icons.json; the largest has 24 MB


class EmojiSet(NamedTuple):
    """Who has drawn a set, and on what terms its drawings may be passed on."""

    house: str
    licence: str


SETS = {
    "noto": EmojiSet("Google", "Apache-2.0"),
    "noto-v1": EmojiSet("Google", "Apache-2.0"),
    "twemoji": EmojiSet("Twitter", "CC-BY-4.0"),
    "emojione": EmojiSet("EmojiOne", "CC-BY-4.0"),
    "emojione-v1": EmojiSet("EmojiOne", "CC-BY-SA-4.0"),
    "fluent-emoji": EmojiSet("Microsoft", "MIT"),
    "fluent-emoji-flat": EmojiSet("Microsoft", "MIT"),
    "openmoji": EmojiSet("OpenMoji", "CC-BY-SA-4.0"),
    "fxemoji": EmojiSet("Mozilla", "Apache-2.0"),
}
"""Of the sets of one house, the first is the one to take where one is taken."""


def find(root: Path) -> dict[str, Path]:
    """The package of each set: an archive as `npm pack` writes it, or a folder.

    Looked for in `root`, `root/emoji` and `root/node_modules/@iconify-json`.

    Raises:
        DataError: says which sets are missing, where they were looked for, and how to get them.
    """
    places = [root, root / "emoji", root / "node_modules" / "@iconify-json"]
    for place in places:
        found = {name: path for name in SETS if (path := _package(place, name)) is not None}
        if len(found) == len(SETS):
            return found
        if found:
            lacking = " ".join(f"@iconify-json/{name}" for name in SETS if name not in found)
            raise DataError(
                f"{place} has {len(found)} of the {len(SETS)} sets of emoji. For the others, in "
                f"that folder: npm pack {lacking}"
            )
    raise DataError(
        f"no emoji in {', '.join(map(str, places))}: nine packages are looked for, such as "
        "iconify-json-noto-1.2.9.tgz or a folder noto with icons.json. They come by: npm pack "
        + " ".join(f"@iconify-json/{name}" for name in SETS)
    )


def _package(place: Path, name: str) -> Path | None:
    """The package of a set in a folder; the newest of several archives."""
    if (place / name / "icons.json").is_file():
        return place / name
    pattern = re.compile(rf"(?:iconify-json-)?{re.escape(name)}-(\d+)\.(\d+)\.(\d+)\.tgz")
    if not place.is_dir():
        return None
    versions = [
        (tuple(map(int, found.groups())), path)
        for path in place.iterdir()
        if (found := pattern.fullmatch(path.name)) and path.is_file()
    ]
    return max(versions)[1] if versions else None


def fingerprint(packages: Mapping[str, Path]) -> str:
    """A name for the state of the packages: other files, sizes or times give another name."""
    state = hashlib.sha256()
    for name, path in packages.items():
        stat = (path / "icons.json" if path.is_dir() else path).stat()
        state.update(f"{name} {path.resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return state.hexdigest()[:16]


def drawings(package: Path) -> dict[str, str]:
    """The drawings of a set: concept -> SVG. A drawing may have several names.

    Raises:
        DataError: the package is damaged, or no such package.
    """
    icons = read_json(package, "icons.json")
    try:
        size = (icons.get("width", 16), icons.get("height", 16))
        found = {name: _svg(icon, size) for name, icon in icons["icons"].items()}
        for name, alias in icons.get("aliases", {}).items():
            if alias.keys() == {"parent"} and alias["parent"] in icons["icons"]:
                found.setdefault(name, found[alias["parent"]])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{package}: its icons.json is not that of an icon set ({error!r})"
        ) from error
    return found


def read_json(package: Path, member: str) -> dict[str, Any]:
    """A JSON file of a package.

    Raises:
        DataError: it is missing, damaged or too large.
    """
    try:
        if package.is_dir():
            text = read_regular(package / member, MOST_BYTES)
        else:
            with tarfile.open(package) as archive:
                info = archive.getmember(f"package/{member}")
                if not info.isfile() or info.size > MOST_BYTES:
                    raise ValueError(f"{member} is no file of a reasonable size")
                file = archive.extractfile(info)
                assert file is not None
                text = file.read()
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
    except (OSError, KeyError, ValueError, EOFError, tarfile.TarError, RecursionError) as error:
        raise DataError(f"{package}: cannot read its {member} ({error})") from error
    return value


def _svg(icon: Mapping[str, Any], size: tuple[int, int]) -> str:
    """An icon as a document of its own.

    Raises:
        ValueError: it shows a picture of another file.
    """
    body = str(icon["body"])
    if "<image" in body:
        raise ValueError("a drawing that refers to another picture")
    left, top = (float(icon.get(key, 0)) for key in ("left", "top"))
    width, height = float(icon.get("width", size[0])), float(icon.get("height", size[1]))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left:g} {top:g} {width:g} {height:g}">{body}</svg>'
    )
