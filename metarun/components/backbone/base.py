"""What the settings of all backbones have in common."""

from dataclasses import field

from metarun.config.component import settings
from metarun.config.run import Norm
from metarun.errors import ConfigError


@settings
class BackboneConfig:
    """What every backbone has: where its first weights come from, and what of it is learned."""

    name: str = "???"
    weights: str | None = None  # file of first weights (safetensors, .pt, .pth), or a run directory
    frozen: list[str] = field(default_factory=list)  # patterns: parameters that are not learned

    def __post_init__(self) -> None:
        if self.weights is not None and not self.weights.strip():
            raise ConfigError("backbone.weights is empty: name a file, or leave it out")


@settings
class NormalisedConfig(BackboneConfig):
    """What every backbone with batch normalisation has."""

    norm: Norm = "transductive"  # whose moments normalise the queries of a task
