"""Meta-steps on the simulated accelerator that do on purpose what they must not.

    python -m tests.simulated.faults

Prints a line of JSON for each, `{fault: Outcome}`. Each is a network, of a plugin, that does
something to its input first; the last ones are in the outer loop. Runs without a fault are their
controls.
"""

import json
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from metarun.components.backbone import mlp
from metarun.components.build import register as add_component
from metarun.config.component import builds, settings
from metarun.config.compose import register_schemas
from metarun.training import loop
from metarun.training.setup import build
from metarun.training.state import fresh
from tests.setups import config_of
from tests.simulated.accelerator import register
from tests.simulated.cases import GLYPHS, MLP, ONE_BY_ONE, REPLAY, SINE
from tests.simulated.catalogue import UNCOMPARED, Outcome, run

SINGLE = torch.tensor(1.0)  # without dimensions: torch lets it be anywhere
SEVERAL = torch.tensor([1.0])

FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x + SINGLE,
    "item": lambda x: x * x.detach().sum().item(),
    "branch": lambda x: x if bool((x > 0).any()) else -x,
    "list": lambda x: x * len(x.detach().tolist()),
    "mask": lambda x: x + x[x > 0].sum(),
    "to the CPU": lambda x: x + x.detach().cpu().sum(),
    "from the CPU": lambda x: x * torch.tensor([1.0], device=x.device),
    "numbers of rows on the CPU": lambda x: x[torch.arange(len(x))],
    "checked": lambda x: x @ torch.linalg.inv(torch.eye(x.shape[-1]).to(x)),
    "tensor of the CPU": lambda x: x + SEVERAL,
}

OF_THE_OUTER_LOOP: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "outer loop: item": lambda leaf, grad: grad * grad.sum().item(),
    "outer loop: tensor of the CPU": lambda leaf, grad: grad + torch.ones(leaf.shape),
}
"""In the place of `metarun.training.loop.laid_out_as`."""


@settings
class FaultyConfig:
    """A network with a fault."""

    fault: str = "none"  # of `FAULTS`
    counts: bool = False  # whether it has a buffer that it changes, which is no fault


class Faulty(nn.Module):
    """An MLP whose input goes through a fault; perhaps with a buffer of how often."""

    calls: Tensor

    def __init__(self, network: mlp.MLP, fault: Callable[[Tensor], Tensor], counts: bool) -> None:
        super().__init__()
        self.network, self.fault, self.counts = network, fault, counts
        if counts:
            self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """The outputs."""
        if self.counts:
            self.calls = self.calls + 1
        found: Tensor = self.network(self.fault(x))
        return found


@builds(FaultyConfig)
def faulty(input_shape: tuple[int, ...], outputs: int, own: FaultyConfig) -> nn.Module:
    """The network."""
    return Faulty(mlp.MLP(input_shape, outputs, hidden=[4]), FAULTS[own.fault], own.counts)


def as_on_a_cpu(device: torch.device) -> str | None:
    """What is wrong with the values that meta-steps give; they should be those of a CPU."""
    found = []
    for own in (torch.device("cpu"), device):
        setup = build(config_of(*GLYPHS, *MLP, "algo=r2d2", ONE_BY_ONE), own)
        state = fresh(setup)
        for _ in range(3):
            loop.meta_step(setup, state)
        found.append({name: value.detach().cpu() for name, value in state.meta.items()})
    same = all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    return None if same else "other values than on a CPU"


def main() -> None:
    """Run the faults and print what happened."""
    torch.set_num_threads(1)
    device = register()
    add_component("backbone", "faulty", FaultyConfig, faulty)
    register_schemas()
    of_tasks = [own for own in SINE if not own.startswith("backbone")]
    given = (*of_tasks, "backbone=faulty", "engine.batching=loop")
    found: dict[str, Any] = {}
    found["as on a CPU"] = Outcome([], [], [], as_on_a_cpu(device), 0.0)
    found["a buffer"] = run((*given, ONE_BY_ONE, "backbone.counts=true"), device)
    with UNCOMPARED:
        for fault in FAULTS:
            own = f"backbone.fault='{fault}'"
            found[fault] = run((*given, ONE_BY_ONE, own), device)
            found[f"{fault} recorded"] = run((*given, REPLAY, own), device)
    for fault, changed in OF_THE_OUTER_LOOP.items():
        with patch.object(loop, "laid_out_as", changed):
            found[fault] = run((*SINE, ONE_BY_ONE), device)
    for name, one in found.items():
        print(json.dumps({name: one._asdict()}))


if __name__ == "__main__":
    main()
