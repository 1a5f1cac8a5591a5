"""Minibatches of the support set, for inner steps that take a few examples each."""

import random

import torch
from torch import Tensor


def minibatches(examples: int, size: int | None, steps: int, device: torch.device) -> Tensor | None:
    """Which examples each step takes: a shuffled deck of all, dealt again when it runs out.

    The order of labels and shots is the same for all tasks. Which class has which label, and which
    of its examples is which shot, is drawn at random for each.

    Args:
        examples: of a support set.
        size: examples that a step takes.
        steps: inner steps.
        device: of the examples: one copy to it for all steps, since the host waits for each.

    Returns:
        int64 (steps, size); None where each step takes all examples.
    """
    if size is None or size >= examples:
        return None
    order: list[int] = []
    shuffler = random.Random(0)  # not torch's, so that it can be recorded
    while len(order) < steps * size:
        deck = list(range(examples))
        shuffler.shuffle(deck)
        order += deck
    return torch.tensor(order[: steps * size], device=device).view(steps, size)
