"""Small runs in float64, set up and not started: what oracles and differences are asked of."""

import torch
from torch import Tensor

from metarun.config.compose import composed, register_schemas
from metarun.episodes.source import Episodes
from metarun.training.setup import Setup, build

SMALL = ("engine.precision=float64", "engine.compile=none", "trainer.meta_batch=2")
SINE = ("data=sinusoid", "backbone=mlp", "backbone.hidden=[6]", *SMALL)
IMAGES = (
    "data=glyphs", "backbone=conv4", "backbone.width=3", "task.way=3", "task.query=2", *SMALL,
)  # fmt: skip


def setup_of(*settings: str) -> Setup:
    """The set-up of a command line."""
    register_schemas()
    return build(composed("train", list(settings)), torch.device("cpu"))


def task_of(setup: Setup, index: int = 0, split: str = "val") -> Episodes:
    """One task of its data."""
    return Episodes(*(part[0] for part in setup.source.sample(split, index, 1)))


def stirred(setup: Setup, seed: int = 0) -> dict[str, Tensor]:
    """Meta-parameters that require gradients, and of which none is at its special first value."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (v + 0.1 * torch.randn(v.shape, generator=generator, dtype=v.dtype)).requires_grad_()
        for name, v in setup.algorithm.init().items()
    }
