"""`import metarun.higher as higher`: see `metarun.unroll.higher`."""

from metarun.higher import optim, patch, utils
from metarun.unroll.higher import (
    create_diff_optim,
    get_diff_optim,
    innerloop_ctx,
    monkeypatch,
    register_optim,
)

__all__ = [
    "create_diff_optim",
    "get_diff_optim",
    "innerloop_ctx",
    "monkeypatch",
    "optim",
    "patch",
    "register_optim",
    "utils",
]
