"""Several checkpoints of a run as one predictor: the mean of their outputs.

So is the test of MAML++ (Antoniou, Edwards and Storkey 2019), whose code averages the logits of
the five best networks by validation. It serves every method: their outputs are scores of classes,
or the values of a regression.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metarun.components.algo.base import Objective, Trace
from metarun.errors import ConfigError
from metarun.training.programs import Traces
from metarun.training.setup import Setup
from metarun.unroll import Meta
from metarun.unroll._torch import pytree


def ensemble_trace(
    setup: Setup, contents: Sequence[dict[str, Any]], metas: Sequence[Meta]
) -> Traces:
    """The evaluation of a batch of tasks by several checkpoints together.

    Each adapts to a task by itself. After each inner step, the score is that of the mean of their
    outputs for the queries.

    Args:
        setup: what they are evaluated with.
        contents: the checkpoints.
        metas: the meta-parameters of each.

    Returns:
        `(meta, tasks) -> trace`; it has the meta-parameters already, and needs none.

    Raises:
        ConfigError: the algorithm gives no outputs; at the first tasks, if its `trace` scores
            others.
    """
    name = setup.config.algo.name
    if setup.outputs is None:
        raise ConfigError(
            f"ensemble={len(contents)}: algo={name} does not give its outputs for queries "
            "(Algorithm.outputs), which would be averaged; at_once and by_steps do"
        )
    program, device, compared = setup.outputs, setup.device, False

    def outputs_of(content: dict[str, Any], meta: Meta, tasks: Any) -> Tensor:
        setup.network.put(
            {key: value.to(device) for key, value in content["buffers"].items()},
            {key: value.to(device) for key, value in content["frozen"].items()},
        )
        found: Tensor = program(meta, tasks)
        return found

    def trace(meta: Meta, tasks: Any) -> Trace:
        nonlocal compared
        if not compared:
            compared = True
            _compare(setup, outputs_of(contents[0], metas[0], first := _first(tasks)), first, metas)
        total = torch.stack(
            [outputs_of(*member, tasks) for member in zip(contents, metas, strict=True)]
        )
        return scored(setup.objective, total.mean(0), tasks.query_y)

    return trace


def scored(objective: Objective, outputs: Tensor, targets: Tensor) -> Trace:
    """The loss and the score of outputs.

    Args:
        objective: gives both.
        outputs: (tasks, inner steps + 1, queries, outputs).
        targets: (tasks, queries, …).
    """

    def each(one: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return objective.loss(one, y), objective.score(one, y)

    over_steps = torch.func.vmap(each, in_dims=(0, None))
    return Trace(*torch.func.vmap(over_steps)(outputs, targets))


def _first(tasks: Any) -> Any:
    return pytree.tree_map(lambda x: x[:1], tasks)


def _compare(setup: Setup, outputs: Tensor, task: Any, metas: Sequence[Meta]) -> None:
    """Refuse an algorithm whose outputs are not those that its `trace` scores: a plugin's, say."""
    alone, here = setup.trace(metas[0], task), scored(setup.objective, outputs, task.query_y)
    if not torch.allclose(here.query_loss, alone.query_loss, rtol=1e-3, atol=1e-5, equal_nan=True):
        raise ConfigError(
            f"ensemble: Algorithm.outputs of algo={setup.config.algo.name} has other losses than "
            "its Algorithm.trace: give both, or outputs=None"
        )
