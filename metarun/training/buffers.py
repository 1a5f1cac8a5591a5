"""What a run does about buffers that its network changes.

Buffers are constants of a run, unless the network changes them in its forward pass. Whether it does
is seen from a look at one task, before the run begins. A run whose network changes buffers in
training computes its tasks one after the other, in their order and by the network's own code, in a
single process. The buffers then have one value after each meta-step, which checkpoints hold and a
resumed run goes on from. Evaluation never changes a buffer: each task begins with the same ones.
"""

import logging
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metarun.components.algo.base import Algorithm, Trace
from metarun.components.build import build_algorithm, training_tasks
from metarun.components.inner import build_inner_optimizer
from metarun.components.network import Network, kept, untouched
from metarun.config.run import EngineConfig, TrainConfig
from metarun.episodes.source import EpisodeSource, an_episode
from metarun.errors import ConfigError
from metarun.system.ranks import Ranks
from metarun.training.plan import ONCE, choose_batching
from metarun.unroll import LossOptimizer, Meta
from metarun.unroll._torch import pytree

log = logging.getLogger(__name__)

IN_PLACE = "would mutate a captured Tensor"
"""What torch says where a transform cannot follow a change in place."""


class Changes(NamedTuple):
    """Names of the buffers that a network changes."""

    training: tuple[str, ...] = ()
    evaluation: tuple[str, ...] = ()


def settle(
    config: TrainConfig,
    network: Network,
    model: nn.Module,
    source: EpisodeSource,
    device: torch.device,
    ranks: Ranks,
    trains: bool,
) -> tuple[Changes, EngineConfig]:
    """Look at what the model does to its buffers, and choose the engine's settings by it.

    Args:
        network: the model's buffers; told here which of them training changes.
        trains: whether a run is trained, and not only evaluated.

    Raises:
        ConfigError: as `look`, `refuse_graphs` and `engine_for`; or one model is trained whose
            steps ahead would change buffers.
    """
    if not network.buffered:
        return Changes(), config.engine
    choose_batching(config.engine, model, device)  # refuses running statistics
    algorithm = build_algorithm(config, model, source, compares=False)
    changes = look(model, algorithm, source)
    engine = engine_for(config, changes, trains, ranks)
    one = algorithm.one_model
    if trains and changes.training and one is not None and one.advance is not None:
        raise ConfigError(
            f"the backbone changes its buffer {changes.training[0]} when it is called, and the "
            f"steps ahead of algo={config.algo.name} are none that the model takes: choose a "
            "backbone without such a buffer"
        )
    refuse_graphs(model, algorithm, source, changes.training if trains else ())
    network.changing = changes.training
    return changes, engine


def look(model: nn.Module, algorithm: Algorithm, source: EpisodeSource) -> Changes:
    """What of its buffers a network changes in the loss and in the trace of one training task.

    The network, its buffers and the random state are afterwards what they were.

    Raises:
        ConfigError: it changes buffers in a way that derivatives cannot follow.
    """
    network, found = Network(model), []
    for compute in (algorithm.loss, algorithm.trace):
        with untouched(model):
            try:
                learns = compute is algorithm.loss
                tasks: Any = (
                    training_tasks(algorithm, source).sample(0, 1) if learns else an_episode(source)
                )
                if learns or algorithm.one_model is None:  # which is evaluated by a batch
                    tasks = pytree.tree_map(lambda x: x[0], tasks)
                with torch.no_grad():
                    compute(algorithm.init(), tasks)
            except Exception as error:  # of any type; where it matters, the run meets it as well
                if IN_PLACE in str(error):
                    raise ConfigError(
                        "the backbone changes a tensor in place when it is called, most likely a "
                        "buffer, which derivatives of the inner loop cannot follow: assign a new "
                        "value instead (self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0), "
                        "not self.mean.mul_(0.9)), or change it in no inner loop"
                    ) from error
                log.debug("a look at the buffers fails: %s", error)
            found.append(network.changed())
    return Changes(*found)


def refuse_graphs(
    model: nn.Module, algorithm: Algorithm, source: EpisodeSource, changing: tuple[str, ...]
) -> None:
    """Refuse a network that puts results with their graph into its buffers.

    Raises:
        ConfigError: names the buffers, and what to write.
    """
    if not changing:
        return
    network = Network(model)
    with untouched(model):
        task = pytree.tree_map(lambda x: x[0], training_tasks(algorithm, source).sample(0, 1))
        leaves = {name: value.requires_grad_() for name, value in algorithm.init().items()}
        try:
            algorithm.loss(leaves, task)
        except Exception as error:  # as above
            log.debug("a look at the buffers fails: %s", error)
        graphs = network.with_graph()
    if graphs:
        raise ConfigError(
            f"the backbone puts into its buffer {graphs[0]} what still has its graph, which the "
            "next task cannot follow: change buffers by detached values (x.detach(), or within "
            "torch.no_grad())"
        )


def engine_for(config: TrainConfig, changes: Changes, trains: bool, ranks: Ranks) -> EngineConfig:
    """The engine's settings for a network that changes buffers, in place of "auto".

    Args:
        trains: whether a run is trained with them, and not only evaluated.

    Raises:
        ConfigError: a setting insists on what the changes rule out, the inner optimizer takes
            more than one gradient a step, or there are several ranks.
    """
    engine = config.engine
    named = changes.training if trains else changes.evaluation
    if named:
        what = f"the backbone changes its buffer {named[0]} when it is called"
        if engine.batching == "vmap":
            raise ConfigError(
                f"engine.batching=vmap: {what}, which tasks computed together cannot share; use "
                "engine.batching=loop"
            )
        if engine.compile in ("replay", "inductor"):
            raise ConfigError(
                f"engine.compile={engine.compile}: {what}, which a recording would not do; use "
                "engine.compile=none"
            )
        if trains and engine.gradient not in ONCE:
            raise ConfigError(
                f"engine.gradient={engine.gradient}: {what}, and this mode calls it more often "
                "than there are inner steps; use engine.gradient=reverse or first_order"
            )
        if trains and isinstance(build_inner_optimizer(config), LossOptimizer):
            raise ConfigError(
                f"inner_opt={config.inner_opt.name}: {what}, and this optimizer calls it more "
                "often than there are inner steps; use inner_opt=sgd or another that takes the "
                "gradient alone"
            )
        if trains and ranks.count > 1:
            raise ConfigError(
                f"{what}, and each of {ranks.count} processes would have another one: start one "
                "process, or a backbone without such a buffer"
            )
    if not (changes.training or changes.evaluation):
        return engine
    compile_ = "none" if engine.compile == "auto" else engine.compile
    batching = "loop" if engine.batching == "auto" else engine.batching
    return replace(engine, compile=compile_, batching=batching)


def with_kept_buffers(model: nn.Module, algorithm: Algorithm) -> Algorithm:
    """The algorithm, with an evaluation that leaves the buffers as they were."""

    def trace(meta: Meta, task: object) -> Trace:
        with kept(model):
            return algorithm.trace(meta, task)

    def outputs(meta: Meta, task: object) -> Tensor:
        assert algorithm.outputs is not None
        with kept(model):
            return algorithm.outputs(meta, task)

    return algorithm._replace(trace=trace, outputs=outputs if algorithm.outputs else None)
