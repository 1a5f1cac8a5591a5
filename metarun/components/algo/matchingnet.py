"""Matching networks (Vinyals et al. 2016): attention over the examples of a task."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.components.algo.adapting import Predictor, Support, at_once, one_hot
from metarun.components.algo.base import Algorithm, Problem
from metarun.components.algo.comparing import directions, refuse_regression
from metarun.components.algo.embedding import embedding, width_of
from metarun.config.checks import MOST_STEPS, between, positive
from metarun.config.component import builds, settings
from metarun.errors import ConfigError
from metarun.unroll import Meta

SUPPORT, QUERY = "context.support.", "context.query."
"""Begin the names of the two LSTMs; what follows are torch's own names."""


@settings
class MatchingnetConfig:
    """Matching networks (Vinyals et al. 2016): attention over the examples of a task."""

    of_training: ClassVar[tuple[str, ...]] = ("full_context",)

    full_context: bool = False  # LSTMs see all examples of a task to embed each (FCE)
    reads: int | None = None  # with full_context: steps of a query's LSTM; null: one an example
    scale: float = 1.0  # factor of the cosines; the code of Chen et al. 2019: 100
    relu: bool = False  # negative cosines count as 0; the code of Chen et al. 2019: true

    def __post_init__(self) -> None:
        positive("algo.scale", self.scale)
        if self.reads is not None:
            between("algo.reads", self.reads, 1, MOST_STEPS)
            if not self.full_context:
                raise ConfigError(
                    f"algo.reads={self.reads}: it is for algo.full_context=true; leave it out"
                )


@builds(MatchingnetConfig)
def matchingnet(problem: Problem, own: MatchingnetConfig) -> Algorithm:
    """Learn features in which a query resembles the examples of its class.

    The probability of class k is Σ a(q, x_i) over the support examples x_i of the class, where the
    attention a is the softmax of scale·cos(f(q), g(x_i)) over all of them (equation 1 and section
    2.1.1). The outputs are the logarithms of the probabilities. Tasks may have any number of
    classes.

    Without `full_context`, f and g are the features. With it, g adds the states of a bidirectional
    LSTM that reads the features of the support set in its order, class by class, and f is an LSTM
    that looks at the support set by attention before each step (appendices A.1 and A.2). What it
    reads is an input of the cell. The paper appends it to the hidden state, which is the same sum.
    The paper leaves open how many steps there are, and how they begin. As in the code of Chen et
    al. 2019, there is one for each support example, the hidden state is first that of the features,
    and the memory is zero.

    That code multiplies cosines by 100, without negative ones, since the probabilities of the
    paper's attention cannot be far apart: `scale=100 relu=true`. It also adds 1e-6 to
    probabilities, which here need no such limit.

    Args:
        problem: a classification; of the model, the features.
        own: the settings.

    Raises:
        ValueError: a regression, or a model without features.
    """
    refuse_regression(problem, "matchingnet")
    start, embed = embedding(problem.model, "matchingnet")
    if own.full_context:
        width = width_of(problem, embed, start)
        start = start | _initial(width, like=next(problem.model.parameters()))

    def adapt(meta: Meta, support: Support) -> Predictor:
        examples = in_order(meta, support.x) if own.full_context else support.x
        keys, members = directions(examples), one_hot(support).T > 0
        if support.known is not None:  # any probability but 0 for absent classes: it is left out
            members = members | ~members.any(1, keepdim=True)
        reads = own.reads or examples.shape[0]

        def predict(x: Tensor) -> Tensor:
            queries = reading(meta, x, examples, reads) if own.full_context else x
            cosines = directions(queries) @ keys.T
            scores = own.scale * (cosines.relu() if own.relu else cosines)
            if support.known is not None:
                scores = scores.masked_fill(~support.known, -torch.inf)
            attention = scores.log_softmax(-1)
            of_class = torch.where(members, attention[:, None], -torch.inf)
            return of_class.logsumexp(-1)

        return predict

    made = at_once(
        problem,
        lambda: dict(start),
        adapt,
        encode=embed,
        uneven=not own.full_context,  # whose LSTMs read all examples, padding as well
    )
    return made._replace(uneven_with="algo.full_context=false")


def _initial(width: int, like: Tensor) -> dict[str, Tensor]:
    """The parameters of both LSTMs, as torch begins with."""
    own = {
        SUPPORT: torch.nn.LSTM(width, width, bidirectional=True),
        QUERY: torch.nn.LSTMCell(2 * width, width),
    }
    return {
        prefix + name: value.detach().to(like)
        for prefix, module in own.items()
        for name, value in module.named_parameters()
    }


def in_order(meta: Meta, x: Tensor) -> Tensor:
    """g: features plus the states of an LSTM that reads them forwards, and one backwards.

    Written out, since torch's LSTM cannot be mapped over tasks by vmap.

    Args:
        meta: the parameters.
        x: (examples, features).

    Returns:
        (examples, features).
    """
    given, recurrent = [], []
    for suffix, inputs in (("", x), ("_reverse", x.flip(0))):
        w = {k: meta[f"{SUPPORT}{k}_l0{suffix}"] for k in ("weight_ih", "bias_ih", "bias_hh")}
        given.append(F.linear(inputs, w["weight_ih"], w["bias_ih"] + w["bias_hh"]))
        recurrent.append(meta[f"{SUPPORT}weight_hh_l0{suffix}"])
    weights = torch.stack(recurrent)
    hidden = memory = x.new_zeros(2, x.shape[1], 1)
    states = []
    for both in torch.stack(given, 1).unbind():
        hidden, memory = _cell(both[:, :, None] + weights @ hidden, memory, dim=1)
        states.append(hidden[:, :, 0])
    forwards, backwards = torch.stack(states, 1).unbind()
    return x + forwards + backwards.flip(0)


def reading(meta: Meta, x: Tensor, examples: Tensor, reads: int) -> Tensor:
    """f: features of queries after an LSTM has read the support set several times.

    Args:
        meta: the parameters.
        x: (queries, features).
        examples: g of the support set, (examples, features).
        reads: steps.

    Returns:
        (queries, features).
    """
    of_x, of_read = meta[f"{QUERY}weight_ih"].chunk(2, dim=1)
    fixed = F.linear(x, of_x, meta[f"{QUERY}bias_ih"] + meta[f"{QUERY}bias_hh"])
    hidden, memory = x, torch.zeros_like(x)
    for _ in range(reads):
        read = (hidden @ examples.T).softmax(-1) @ examples
        gates = fixed + F.linear(read, of_read) + F.linear(hidden, meta[f"{QUERY}weight_hh"])
        hidden, memory = _cell(gates, memory, dim=1)
        hidden = hidden + x
    return hidden


def _cell(gates: Tensor, memory: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The next state and memory of an LSTM: the gates are in torch's order, along `dim`."""
    enters, stays, new, leaves = gates.chunk(4, dim)
    memory = stays.sigmoid() * memory + enters.sigmoid() * new.tanh()
    return leaves.sigmoid() * memory.tanh(), memory
