"""Small runs, set up and not started: what oracles and differences are asked of."""

from copy import deepcopy
from functools import cache
from typing import Any

import torch
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from metarun.config.catalogue import GROUPS, schemas
from metarun.config.compose import register_schemas
from metarun.episodes.source import Episodes
from metarun.training.setup import Setup, build

SMALL = ("engine.precision=float64", "engine.compile=none", "trainer.meta_batch=2")
SINE = ("data=sinusoid", "backbone=mlp", "backbone.hidden=[6]", *SMALL)
IMAGES = (
    "data=glyphs", "backbone=conv4", "backbone.width=3", "task.way=3", "task.query=2", *SMALL,
)  # fmt: skip

register_schemas()


def config_of(*settings: str) -> Any:
    """The config of `metarun train` with some settings, as `composed` gives it.

    Hydra takes a tenth of a second to compose options. So it composes the same ones once, and the
    values of other settings are put in here as it does that.
    """
    given = [(o.key_or_group, o) for o in OverridesParser.create().parse_overrides([*settings])]
    options = {key: str(o.value()) for key, o in given if key in (*GROUPS, "experiment")}
    kinds = [schemas(group).get(options.get(group, "")) for group in GROUPS]  # of plugins as well
    config = deepcopy(_of_options(tuple(options.items()), tuple(kinds)))
    for key, override in given:
        if key not in options:
            OmegaConf.update(config, key, override.value(), merge=True)
    return OmegaConf.to_object(config)


@cache
def _of_options(options: tuple[tuple[str, str], ...], kinds: tuple[type | None, ...]) -> DictConfig:
    with initialize_config_module(config_module="metarun.conf", version_base="1.3"):
        return compose("train", [f"{group}={name}" for group, name in options])


def setup_of(*settings: str) -> Setup:
    """The set-up of a command line."""
    return build(config_of(*settings), torch.device("cpu"))


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
