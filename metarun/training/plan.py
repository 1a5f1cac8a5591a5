"""How a run computes its meta-gradients: decided once, from config, network and device."""

import os
import shutil
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from metarun.components.algo.descent import DescentConfig
from metarun.components.algo.one_model import OneModelConfig
from metarun.components.backbone.norm import BatchNorm, Fused
from metarun.components.inner import build_inner_optimizer
from metarun.config.run import EngineConfig, TrainConfig
from metarun.errors import ConfigError
from metarun.unroll import Batching, InnerOptimizer
from metarun.unroll._torch import ConvNd
from metarun.unroll.names import selects
from metarun.unroll.recording.graphs import CAPTURES

ONCE = ("auto", "reverse", "first_order", "truncated")
"""Values of `engine.gradient` that evaluate the inner loss once a step."""
SAVE_MEMORY = ("checkpoint", "mixed")  # in engine.gradient; under inductor or vmap they do not
SHORT_RUN = 10  # meta-steps: below, recording a network of convolutions takes longer than it saves
SHORT_RUN_OF_STEPS = 200  # inner steps, of a loop that is recorded step by step: likewise
LONG_RUN = 5000  # meta-steps of milliseconds, which are worth ten seconds of compiling
LONG_RUN_OF_CONVOLUTIONS = 500  # of tenths of a second, which are worth a minute
LONG_LOOP = 10  # inner steps through convolutions; more are not recorded as a whole
CHUNK_OF_CONVOLUTIONS = 8  # tasks at a time on a CPU


class Plan(NamedTuple):
    """How meta-gradients are computed.

    Attributes:
        batching: "vmap" or "loop".
        chunk: tasks at a time under vmap; None: all. With `engine.chunk=auto` it shrinks where
            memory runs out (`metarun.training.chunking`).
        compile: a value of `engine.compile`, or "auto inductor": compiled if that can be done.
        evaluate: the value of `engine.compile` for evaluation, which "auto" never compiles: figures
            are those of a plain `metarun eval`.
        channels_last: whether images and the weights of convolutions are laid out so.
        threads: tasks computed at the same time.
        inner_step: as `compile`, for the inner step where a meta-step as a whole is not recorded.
        fused_norm: when layers of batch normalisation use torch's fused operation.
        evaluate_chunk: as `chunk`, of the tasks that an evaluation takes together.
        graphs: whether recordings are launched as CUDA graphs.
    """

    batching: Batching
    chunk: int | None = None
    compile: str = "auto"
    evaluate: str = "auto"
    channels_last: bool = False
    threads: int = 1
    inner_step: str = "none"
    fused_norm: Fused = "never"
    evaluate_chunk: int | None = None
    graphs: bool = False


def with_gradient(config: TrainConfig, model: nn.Module, device: torch.device) -> TrainConfig:
    """The config with a gradient mode in the place of "auto" where that matters for speed.

    An inner loop that is too long to be recorded as a whole is recorded step by step if each step
    is recomputed: the same gradient, in less time and memory. On a CPU, where that was measured,
    for networks whose convolutions are adapted, in runs that are long enough to record.
    """
    engine, algo = config.engine, config.algo
    if not isinstance(algo, DescentConfig):
        return config
    names = [name for name, _ in model.named_parameters()]
    weights = {id(module.weight) for module in model.modules() if isinstance(module, ConvNd)}
    convolutions = any(
        parameter.requires_grad
        and id(parameter) in weights
        and any(selects(pattern, name, names) for pattern in getattr(algo, "adapt", ["*"]))
        for name, parameter in model.named_parameters()
    )
    undecided = (engine.gradient, engine.compile, engine.batching) == ("auto", "auto", "auto")
    long = algo.order == 2 and algo.inner_steps > LONG_LOOP
    recorded = long and config.trainer.steps * algo.inner_steps >= SHORT_RUN_OF_STEPS
    chosen = undecided and convolutions and recorded and _by_gradient(config)
    if device.type == "cpu" and chosen:
        return replace(config, engine=replace(engine, gradient="checkpoint"))
    return config


def make_plan(config: TrainConfig, model: nn.Module, device: torch.device) -> Plan:
    """The plan of a training run.

    It depends on the config, the software and the number of threads alone: a run that is resumed
    elsewhere computes the same.

    Raises:
        ConfigError: as `choose_batching`; a compiler is wanted and there is none.
    """
    large = convolves(model) and device.type == "cpu"
    if config.engine.compile == "inductor" and device.type == "cpu" and not has_compiler():
        raise ConfigError(
            "engine.compile=inductor needs a C++ compiler on the CPU, g++ or what CXX names, and "
            "there is none: use engine.compile=replay"
        )
    engine = config.engine
    if isinstance(config.algo, OneModelConfig):  # there are no tasks to compute together
        engine = replace(engine, batching="loop")
    batching, chunk = choose_batching(engine, model, device)
    choice: str = config.engine.compile
    evaluate, inner_step = choice, "none"
    steps = config.trainer.steps
    if _by_steps(config):
        each = steps * (config.algo.inner_steps if isinstance(config.algo, DescentConfig) else 1)
        inner_step = _how(each, model, large, SHORT_RUN_OF_STEPS) if choice == "auto" else choice
        choice = evaluate = "none"
    elif choice == "auto" and saves_memory(config.engine):
        choice = evaluate = "none"  # while a recording is made, all results are in memory
    elif choice == "auto":
        choice = _how(steps, model, large, SHORT_RUN)
        if large and batching == "vmap" and choice == "auto":
            choice = evaluate = "none"  # a replay takes six times what a loop takes
    several = large and batching == "loop" and choice != "none"
    threads = torch.get_num_threads() if several and not saves_memory(config.engine) else 1
    fused: Fused = "never"
    if batching == "loop" and device.type == "cpu" and _is_of_second_order(config):
        compiled = any("inductor" in way for way in (choice, inner_step))
        order = config.algo.order if isinstance(config.algo, DescentConfig) else 1
        twice = order == 2 and config.engine.gradient != "first_order"
        fused = "evaluation" if compiled else "but_large_twice" if twice else "always"
        fused = "never" if "inductor" in evaluate else fused
    return Plan(
        batching=batching,
        chunk=chunk,
        compile=choice,
        evaluate=evaluate,
        channels_last=large and batching == "loop",
        threads=threads,
        inner_step=inner_step,
        fused_norm=fused,
        graphs=engine.cuda_graphs and device.type in CAPTURES,
    )


def _is_of_second_order(config: TrainConfig) -> bool:
    """Whether no derivative beyond the second is taken, and none in forward mode."""
    return config.engine.gradient in (*ONCE, "checkpoint") and _by_gradient(config)


def use_fused_norms(model: nn.Module, when: Fused) -> None:
    """Tell a network's layers of batch normalisation when to use torch's fused operation."""
    for layer in model.modules():
        if isinstance(layer, BatchNorm):
            layer.fused = when


def _by_steps(config: TrainConfig) -> bool:
    """Whether what is recorded is an inner step; see `metarun.unroll.RecordedLoss`."""
    engine = config.engine
    recomputed = engine.gradient == "checkpoint" and engine.block == 1
    return recomputed and engine.batching != "vmap" and _by_gradient(config)


def _by_gradient(config: TrainConfig) -> bool:
    """Whether the inner optimizer takes gradients, and not the loss itself."""
    return isinstance(build_inner_optimizer(config), InnerOptimizer)


def _how(steps: int, model: nn.Module, large: bool, short: int) -> str:
    """What `engine.compile=auto` means for what is computed so often."""
    long = steps >= (LONG_RUN_OF_CONVOLUTIONS if convolves(model) else LONG_RUN)
    if long and has_compiler():
        return "auto inductor"
    return "none" if large and steps < short else "auto"


def choose_batching(
    engine: EngineConfig, model: nn.Module, device: torch.device
) -> tuple[Batching, int | None]:
    """What `engine.batching` and `engine.chunk` mean for a network: the batching and the chunk.

    "auto" is vmap, which a GPU and small networks want. Convolutions on a CPU, which vmap makes
    grouped ones, are an exception: they gain from a loop whose tasks run in threads. So are
    recurrent layers, which vmap cannot map, and gradient modes that are there to save memory:
    `torch.func.grad`, which vmap needs, keeps what their backward passes compute.

    Raises:
        ConfigError: the network keeps running statistics, or vmap cannot map it.
    """
    recurrent = [k for k, module in model.named_modules() if isinstance(module, nn.RNNBase)]
    for module_name, module in model.named_modules():
        if getattr(module, "track_running_stats", False):
            raise ConfigError(
                f"{module_name} of the backbone keeps running statistics, which tasks cannot "
                "share: use metarun.components.backbone.norm.BatchNorm, or "
                "track_running_stats=False"
            )
    if recurrent and engine.batching == "vmap":
        raise ConfigError(
            f"engine.batching=vmap: {recurrent[0]} of the backbone is a recurrent layer, which "
            "vmap cannot map; use engine.batching=loop"
        )
    large = convolves(model) and device.type == "cpu"
    chosen = engine.batching
    if chosen == "auto":
        looped = recurrent or (engine.fixed_chunk is None and (saves_memory(engine) or large))
        chosen = "loop" if looped else "vmap"
    chunk = engine.fixed_chunk
    if chunk is None and large and chosen == "vmap":
        chunk = CHUNK_OF_CONVOLUTIONS
    return ("loop" if chosen == "loop" else "vmap"), chunk


def saves_memory(engine: EngineConfig) -> bool:
    """Whether the gradient mode is there to save memory, which inductor and vmap would undo."""
    return engine.gradient in SAVE_MEMORY


def convolves(model: nn.Module) -> bool:
    """Whether a network has convolutions, and so much to compute for each example."""
    return any(isinstance(module, ConvNd) for module in model.modules())


def has_compiler() -> bool:
    """Whether there is a C++ compiler, which inductor needs on the CPU."""
    return any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++"))
