"""Omniglot's characters as labelled examples: one classifier learns to tell them apart."""

import torch

from metarun.components.data import omniglot
from metarun.components.data.examples import ExamplesConfig, labelled_examples
from metarun.components.data.omniglot import OmniglotFilesConfig
from metarun.config.component import builds, settings
from metarun.config.run import TaskConfig
from metarun.episodes.examples import LabelledExamples
from metarun.episodes.store import ClassStore


@settings
class OmniglotExamplesConfig(ExamplesConfig, OmniglotFilesConfig):
    """Omniglot's characters as labelled examples, for one classifier."""

    def __post_init__(self) -> None:
        ExamplesConfig.__post_init__(self)
        OmniglotFilesConfig.__post_init__(self)


@builds(OmniglotExamplesConfig)
def omniglot_examples(
    task: TaskConfig,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    own: OmniglotExamplesConfig,
) -> LabelledExamples:
    """Labelled examples of all 1623 characters, not rotated: `labelled_examples`."""

    def load(root: str | None, download: bool) -> ClassStore:
        return omniglot.characters(root, download=download)

    return labelled_examples(load)(task, seed, device, dtype, own)
