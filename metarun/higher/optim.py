"""See `metarun.unroll.higher.optim`."""

from metarun.unroll.higher.optim import *  # noqa: F403
