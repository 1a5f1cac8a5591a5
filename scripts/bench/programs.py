"""One step of an implementation, ready to be called again and again in this process."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bench import peers, problem, sampling
from metarun.training import loop as trainer
from metarun.training import setup
from metarun.training import state as training_state
from metarun.training.device import choose_device

Gradient = dict[str, Tensor]


class Program(NamedTuple):
    """What is measured.

    Attributes:
        step: one meta-step, with the outer optimizer's; or the sampling of one meta-batch.
        gradient: the meta-gradient of the last step by name.
    """

    step: Callable[[], None]
    gradient: Callable[[], Gradient]


def program(name: str, kind: str, overrides: Sequence[str], device: str) -> Program:
    """The program of an implementation.

    Args:
        name: of `peers.NAMES`, or anything else for metarun.
        kind: "meta-step" or "sampling".
        overrides: the settings of `metarun train`.
    """
    warnings.simplefilter("ignore")  # old peers use what torch has deprecated
    config = problem.config_of(overrides)
    if kind == "sampling":
        sample = sampling.learn2learn if name == "learn2learn" else sampling.metarun
        return Program(sample(config, torch.device(device)), dict)
    if name in peers.NAMES:
        torch.backends.cudnn.allow_tf32 = False  # as in metarun
        return _of_peer(problem.build(config, torch.device(device)), name)
    built = setup.build(config, choose_device(device))
    state = training_state.fresh(built)
    return Program(lambda: trainer.meta_step(built, state), lambda: _gradients(state.meta))


def _of_peer(given: problem.Problem, name: str) -> Program:
    meta_gradient = peers.meta_gradient(name, given)
    turn = 0

    def step() -> None:
        nonlocal turn
        given.outer.zero_grad()
        meta_gradient(given.batches[turn % len(given.batches)])
        given.outer.step()
        turn += 1

    return Program(step, lambda: _gradients(given.parameters))


def _gradients(leaves: Mapping[str, Tensor]) -> Gradient:
    found = {}
    for name, leaf in leaves.items():
        grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        found[name] = grad.detach().cpu().clone()
    return found
