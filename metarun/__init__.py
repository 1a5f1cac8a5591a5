"""metarun: few-shot meta-learning experiments from the command line, and their engine.

    metarun.train("algo=maml", "data=glyphs")     # what `metarun train` does
    metarun.evaluate("outputs/train/mine")        # what `metarun eval` does
    metarun.FewShotClassifier("outputs/train/mine").fit(images, labels).predict(images)
    metarun.load("outputs/train/mine")            # the network, its weights, the algorithm

Importing this imports nothing else: what is used is imported when it is first named.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metarun.cli.functions import evaluate, train
    from metarun.inference.classifier import FewShotClassifier
    from metarun.inference.trained import load

__version__ = "0.2.0"
__all__ = ["FewShotClassifier", "evaluate", "load", "train"]

_PLACES = {
    "FewShotClassifier": "metarun.inference.classifier",
    "evaluate": "metarun.cli.functions",
    "load": "metarun.inference.trained",
    "train": "metarun.cli.functions",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
