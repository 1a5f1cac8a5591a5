"""The characters of `glyphs` as labelled examples: one classifier learns to tell them apart."""

from typing import ClassVar

import torch

from metarun.components.data.examples import ExamplesConfig, labelled_examples
from metarun.components.data.glyphs import characters
from metarun.config.checks import between
from metarun.config.component import builds, settings
from metarun.config.run import TaskConfig
from metarun.episodes.examples import LabelledExamples


@settings
class GlyphsExamplesConfig(ExamplesConfig):
    """The characters of glyphs as labelled examples, for one classifier; needs no files."""

    of_run: ClassVar[tuple[str, ...]] = (*ExamplesConfig.of_run, "seed")

    seed: int = 0  # of the drawings, not of the run

    def __post_init__(self) -> None:
        super().__post_init__()
        between("data.seed", self.seed, 0, 2**63 - 1)


@builds(GlyphsExamplesConfig)
def glyphs_examples(
    task: TaskConfig, seed: int, device: torch.device, dtype: torch.dtype, own: GlyphsExamplesConfig
) -> LabelledExamples:
    """Labelled examples of all characters, of whichever split: `labelled_examples`."""
    return labelled_examples(characters)(task, seed, device, dtype, own)
