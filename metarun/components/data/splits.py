"""Published class lists of the benchmarks, and splits that a seed alone decides."""

import hashlib
from collections.abc import Iterable

# Number of characters of each alphabet (Lake et al. 2015): 50 alphabets, 1623 characters.
OMNIGLOT_ALPHABETS = {
    "Alphabet_of_the_Magi": 20,
    "Angelic": 20,
    "Anglo-Saxon_Futhorc": 29,
    "Arcadian": 26,
    "Armenian": 41,
    "Asomtavruli_(Georgian)": 40,
    "Atemayar_Qelisayer": 26,
    "Atlantean": 26,
    "Aurek-Besh": 26,
    "Avesta": 26,
    "Balinese": 24,
    "Bengali": 46,
    "Blackfoot_(Canadian_Aboriginal_Syllabics)": 14,
    "Braille": 26,
    "Burmese_(Myanmar)": 34,
    "Cyrillic": 33,
    "Early_Aramaic": 22,
    "Futurama": 26,
    "Ge_ez": 26,
    "Glagolitic": 45,
    "Grantha": 43,
    "Greek": 24,
    "Gujarati": 48,
    "Gurmukhi": 45,
    "Hebrew": 22,
    "Inuktitut_(Canadian_Aboriginal_Syllabics)": 16,
    "Japanese_(hiragana)": 52,
    "Japanese_(katakana)": 47,
    "Kannada": 41,
    "Keble": 26,
    "Korean": 40,
    "Latin": 26,
    "Malay_(Jawi_-_Arabic)": 40,
    "Malayalam": 47,
    "Manipuri": 40,
    "Mkhedruli_(Georgian)": 41,
    "Mongolian": 30,
    "N_Ko": 33,
    "Ojibwe_(Canadian_Aboriginal_Syllabics)": 14,
    "Old_Church_Slavonic_(Cyrillic)": 45,
    "Oriya": 46,
    "Sanskrit": 42,
    "Sylheti": 28,
    "Syriac_(Estrangelo)": 23,
    "Syriac_(Serto)": 23,
    "Tagalog": 17,
    "Tengwar": 25,
    "Tibetan": 42,
    "Tifinagh": 55,
    "ULOG": 26,
}

# Vinyals et al. 2016, as published with Snell et al. 2017: whole alphabets, and the last four
# characters of Gurmukhi, whose others train. Every alphabet not named here is for training.
OMNIGLOT_VINYALS_VAL = (
    "Armenian",
    "Bengali",
    "Early_Aramaic",
    "Hebrew",
    "Mkhedruli_(Georgian)",
)
OMNIGLOT_VINYALS_TEST = (
    "Kannada",
    "Keble",
    "Malayalam",
    "Manipuri",
    "Mongolian",
    "Old_Church_Slavonic_(Cyrillic)",
    "Oriya",
    "Sylheti",
    "Syriac_(Serto)",
    "Tengwar",
    "Tibetan",
    "ULOG",
    "Gurmukhi/character42",
    "Gurmukhi/character43",
    "Gurmukhi/character44",
    "Gurmukhi/character45",
)

# Lake et al. 2015: the alphabets of their evaluation set; the other 30 are the background set.
OMNIGLOT_EVALUATION = (
    "Angelic",
    "Atemayar_Qelisayer",
    "Atlantean",
    "Aurek-Besh",
    "Avesta",
    "Ge_ez",
    "Glagolitic",
    "Gurmukhi",
    "Kannada",
    "Keble",
    "Malayalam",
    "Manipuri",
    "Mongolian",
    "Old_Church_Slavonic_(Cyrillic)",
    "Oriya",
    "Sylheti",
    "Syriac_(Serto)",
    "Tengwar",
    "Tibetan",
    "ULOG",
)
BACKGROUND_VAL = 6  # one alphabet of so many of a background set is for validation


def omniglot_names() -> list[str]:
    """The 1623 characters as 'Alphabet/characterNN', sorted; NN counts from 01."""
    return sorted(
        f"{alphabet}/character{number:02d}"
        for alphabet, characters in OMNIGLOT_ALPHABETS.items()
        for number in range(1, characters + 1)
    )


def omniglot_random(names: Iterable[str], seed: int) -> dict[str, list[str]]:
    """1100 training and 100 validation characters, the rest for test, drawn by `seed`.

    The sizes of Santoro et al. 2016 and Finn et al. 2017, whose own draw is not published.
    The order is by a hash of the name, so that no generator's version can change the split.

    Returns:
        The sorted names of 'train', 'val' and 'test'.
    """
    order = sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).hexdigest())
    parts = {"train": order[:1100], "val": order[1100:1200], "test": order[1200:]}
    return {part: sorted(members) for part, members in parts.items()}


def omniglot_background(names: Iterable[str], seed: int) -> dict[str, list[str]]:
    """The split of Lake et al. 2015: the test has the 20 alphabets of their evaluation set.

    Theirs has no validation. Here five of the 30 background alphabets are for it, the first five by
    a hash of `seed` and the name; the other 25 train. Of the five of a small background set it is
    one.

    Returns:
        The sorted names of 'train', 'val' and 'test'.
    """

    def rank(alphabet: str) -> str:
        return hashlib.sha256(f"{seed}:{alphabet}".encode()).hexdigest()

    names = sorted(names)
    alphabets = {name.split("/")[0] for name in names}
    background = sorted(alphabets.difference(OMNIGLOT_EVALUATION), key=rank)
    held_out = background[: -(-len(background) // BACKGROUND_VAL)]
    parts: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for name in names:
        alphabet = name.split("/")[0]
        part = "val" if alphabet in held_out else "train"
        parts["test" if alphabet in OMNIGLOT_EVALUATION else part].append(name)
    return parts


def omniglot_vinyals(names: Iterable[str]) -> dict[str, list[str]]:
    """The split by alphabet of Vinyals et al. 2016: 1028, 172 and 423 characters.

    Returns:
        The sorted names of 'train', 'val' and 'test'.
    """
    parts: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for name in sorted(names):
        alphabet = name.split("/")[0]
        if alphabet in OMNIGLOT_VINYALS_VAL:
            parts["val"].append(name)
        elif alphabet in OMNIGLOT_VINYALS_TEST or name in OMNIGLOT_VINYALS_TEST:
            parts["test"].append(name)
        else:
            parts["train"].append(name)
    return parts
