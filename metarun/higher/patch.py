"""See `metarun.unroll.higher.patch`."""

from metarun.unroll.higher.patch import *  # noqa: F403
