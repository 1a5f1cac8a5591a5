"""The same meta-gradient in the idiom of each peer.

`meta_gradient(name, problem)` gives a function of a meta-batch that leaves the gradient of the mean
task loss in the parameters' `grad`, which is None before. Peers are imported when they are asked
for.
"""

from collections.abc import Callable, Mapping

from bench.peers import heads, maml, rates
from bench.peers.library import MetaGradient
from bench.problem import Problem

Peers = Mapping[str, Callable[[Problem], MetaGradient]]

BY_ALGORITHM: dict[str, Peers] = {
    "maml": maml.PEERS,
    "anil": maml.PEERS,
    "protonet": heads.PROTONET,
    "r2d2": heads.R2D2,
    "metaoptnet": heads.METAOPTNET,
    "maml_pp": rates.MAML_PP,
    "meta_sgd": rates.META_SGD,
}
"""Who computes an algorithm, by the algorithm's name."""

NAMES = tuple(dict.fromkeys(name for peers in BY_ALGORITHM.values() for name in peers))
"""Every peer's name."""


def meta_gradient(name: str, problem: Problem) -> MetaGradient:
    """The peer's meta-gradient for the algorithm of a problem."""
    return BY_ALGORITHM[problem.algo.name][name](problem)
