"""What a run is put together from: algorithms, networks, data sets, optimizers."""

from metarun.components.build import register

__all__ = ["register"]
