"""Recordings that a device launches as one graph: simulated, and refused where there is none."""

import pytest
import torch
from torch import Tensor

from metarun.unroll import CaptureError, launched_together, recorded
from metarun.unroll.recording import graphs
from tests.training.test_simulated_accelerator import outcomes


def test_runs_launched_as_graphs_have_the_same_bits(environment: dict[str, str]) -> None:
    from tests.simulated.graphs import recorded_cases

    found = outcomes("graphs", environment)
    assert set(found) == set(recorded_cases())
    assert [case for case, one in found.items() if not one["same"]] == []
    # An inner step that is recorded by itself is replayed, and newton looks at eigenvalues.
    without = {case for case, one in found.items() if not one["captures"]}
    assert without == {"steps recorded", "more: newton"}
    assert all(one["launches"] > one["captures"] for one in found.values() if one["captures"])
    told = {case: one["said"] for case, one in found.items() if one["said"]}
    assert set(told) == {"more: newton"}
    assert told["more: newton"][0].startswith("meta-steps are not launched as one CUDA graph: ")


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Graphs of the CPU, whose launches do everything again; its list has each capture."""
    made: list[str] = []

    def capture(device: torch.device, run: graphs.Operations) -> object:
        written = run()
        made.append(str(device))

        def launch() -> None:
            for old, new in zip(written, run(), strict=True):
                graphs._copy([old], [new])

        return written, launch

    monkeypatch.setitem(graphs.CAPTURES, "cpu", capture)
    return made


def test_results_of_a_call_outlive_the_next_one(captures: list[str]) -> None:
    double = recorded(lambda x: {"twice": 2 * x}, launching=launched_together)
    one, two = double(torch.ones(3)), double(torch.zeros(3))
    assert captures == ["cpu"]
    assert (one["twice"].tolist(), two["twice"].tolist()) == ([2.0] * 3, [0.0] * 3)


@pytest.mark.parametrize(
    "given",
    [
        torch.arange(6.0).view(2, 3).t(),
        torch.arange(3.0).expand(4, 3),
        torch.arange(12.0).view(3, 4)[:, 1:3],
        torch.arange(16.0).view(1, 2, 2, 4).to(memory_format=torch.channels_last),
        torch.tensor(2.0).expand(3, 1, 2),
        torch.ones(0, 3),
    ],
    ids=["transposed", "expanded", "sliced", "channels last", "a number, expanded", "empty"],
)
def test_inputs_and_results_keep_their_strides(captures: list[str], given: Tensor) -> None:
    seen: list[tuple[int, ...]] = []

    def same(x: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(x.stride())
        return x.detach(), x + 1

    launched = launched_together(same, [given])
    found, more = launched(given + 0 if given.is_contiguous() else given)
    assert set(seen) == {given.stride()} and found.stride() == given.stride()
    assert torch.equal(found, given) and torch.equal(more, given + 1)


def test_constants_that_operations_change_are_as_in_a_replay(captures: list[str]) -> None:
    found = []
    for launching in (None, launched_together):
        count = torch.zeros(())

        def counted(x: Tensor, count: Tensor = count) -> Tensor:
            count.add_(1)
            return x + count

        counting = recorded(counted, launching=launching)
        found.append([float(counting(torch.zeros(()))) for _ in range(5)])
    assert found[0] == found[1] and captures == ["cpu"]


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ([torch.ones(2)], "cpu has no graphs"),
        ([], "its inputs are on "),
        ([torch.ones(2), torch.ones(2, device="meta")], "its inputs are on cpu and meta"),
    ],
)
def test_what_is_elsewhere_is_refused(inputs: list[Tensor], reason: str) -> None:
    with pytest.raises(CaptureError, match=reason):
        launched_together(lambda *x: list(x), inputs)


def test_a_graph_that_gives_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(device: torch.device, run: graphs.Operations) -> object:
        return run(), lambda: None  # what was captured is not computed again

    monkeypatch.setitem(graphs.CAPTURES, "cpu", capture)
    inputs = [torch.ones(2)]
    launched_together(lambda x: [x + 1], inputs)  # right for the inputs of the capture
    monkeypatch.setitem(graphs.CAPTURES, "cpu", lambda device, run: ([run()[0] * 2], lambda: None))
    with pytest.raises(CaptureError, match="something else"):
        launched_together(lambda x: [x + 1], inputs)


def test_a_device_without_memory_for_it_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(device: torch.device, run: graphs.Operations) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate …")

    monkeypatch.setitem(graphs.CAPTURES, "cpu", capture)
    with pytest.raises(CaptureError, match=r"^OutOfMemoryError: CUDA out of memory\.$"):
        launched_together(lambda x: [x + 1], [torch.ones(2)])
