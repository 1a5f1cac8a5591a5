"""See `metarun.unroll.higher.utils`."""

from metarun.unroll.higher.utils import *  # noqa: F403
