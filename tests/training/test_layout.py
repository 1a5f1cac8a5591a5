"""Memory layouts and the allocator change how fast a run is, and nothing else."""

import resource
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from metarun.training.layout import channels_last
from metarun.training.loop import laid_out_as


def test_images_and_weights_get_their_channels_last_even_if_there_is_but_one() -> None:
    seen: list[Any] = []

    def fn(meta: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
        seen.extend([meta["conv"].stride(), images.stride(), meta["bias"].stride()])
        return F.conv2d(images, meta["conv"], meta["bias"])

    meta = {"conv": torch.randn(6, 1, 3, 3), "bias": torch.zeros(6)}
    images = torch.randn(2, 1, 8, 8)
    result = channels_last(fn)(meta, images)
    assert seen == [(9, 1, 3, 1), (64, 1, 8, 1), (1,)]
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(result, F.conv2d(images, meta["conv"], meta["bias"]))


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "SGD", "Adagrad"])
def test_the_fused_outer_step_takes_gradients_of_any_layout(kind: str) -> None:
    start = torch.randn(4, 3, 2, 2)
    strange = torch.randn(2, 3, 4, 2).permute(2, 1, 0, 3)
    constant = torch.ones(()).expand(4, 3, 2, 2)
    for grad in (strange, strange.contiguous(), constant):
        ends = []
        for fused in (True, False):
            leaf = start.clone().requires_grad_()
            leaf.grad = laid_out_as(leaf, grad) if fused else grad.contiguous()
            getattr(torch.optim, kind)([leaf], lr=0.1, fused=fused).step()
            ends.append(leaf.detach())
        torch.testing.assert_close(*ends)


ALLOCATIONS = """
import resource, sys, threading, torch
from metarun.training.device import choose_device
torch.set_num_threads(1)
if sys.argv[1] == "kept":
    choose_device("cpu")
def work():
    for _ in range(20):
        torch.ones(20 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(20 << 20)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
work()
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept_for_the_next_tensor() -> None:
    faults = {}
    for how in ("kept", "given back"):
        command = [sys.executable, "-c", ALLOCATIONS, how]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        faults[how] = [int(line) for line in printed.split()]
    # Some of a thread's blocks may still come from further up in the heap, until that has grown.
    assert max(faults["kept"]) < min(faults["given back"]) / 3
    assert min(faults["given back"]) > 5 * (80 * 2**20 // resource.getpagesize())
