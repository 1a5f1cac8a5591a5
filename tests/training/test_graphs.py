"""Recordings that a device launches as one graph: simulated, and refused where there is none."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, fx

from metarun.unroll import CaptureError, ChangedFunction, launched_together, recorded
from metarun.unroll.recording import graphs
from metarun.unroll.recording.comparison import undone
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


COMPARED = 3
"""Of five calls of a recording after the first, in which it is compared with its function."""


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
    assert len(captures) == 2, "a comparison gives the memory of a graph back"
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
    assert found[0] == found[1] and len(captures) == 1 + COMPARED


def test_what_a_graph_changes_unseen_is_put_back() -> None:
    count = torch.zeros(3)
    with undone([count], unseen=True):
        count.data.add_(1)  # as a device does: no version is counted
    assert count.tolist() == [0.0] * 3


def test_a_value_that_a_graph_keeps_is_found_when_it_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a graph keeps numbers of the CPU: those of its capture."""
    scale = torch.tensor(2.0)

    def capture(device: torch.device, run: graphs.Operations) -> object:
        (written,), kept = run(), scale.clone()
        graph = next(c.cell_contents for c in run.__closure__ if hasattr(c.cell_contents, "read"))
        return [written], lambda: written.copy_(graph.read[0] * kept)

    monkeypatch.setitem(graphs.CAPTURES, "cpu", capture)
    scaled = recorded(lambda x: x * scale, launching=launched_together)
    assert [float(scaled(torch.tensor(3.0))) for _ in range(3)] == [6.0] * 3
    scale.fill_(5.0)
    assert float(scaled(torch.tensor(3.0))) == 6.0  # not compared at this call
    scaled.recheck()
    with pytest.raises(ChangedFunction) as found:
        scaled(torch.tensor(3.0))
    assert float(found.value.outcome[0]) == 15.0


def test_what_operations_close_over_lives_as_long_as_the_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(graphs.CAPTURES, "cpu", lambda device, run: (run(), lambda: None))
    weight = torch.ones(2)
    alive = weakref.ref(weight)
    launched = launched_together(lambda x, weight=weight: [x * weight], [torch.ones(2)])
    del weight
    gc.collect()
    assert alive() is not None
    del launched
    gc.collect()
    assert alive() is None


def test_threads_take_turns(captures: list[str]) -> None:
    double = launched_together(lambda x: [2 * x], [torch.zeros(1000)])
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: double(torch.full((1000,), float(i)))[0], range(200)))
    assert all(bool((x == 2 * i).all()) for i, x in enumerate(found))


def test_tensors_of_the_cpu_that_take_part_are_refused(captures: list[str]) -> None:
    for constant, refused in ((torch.ones(2, device="meta"), True), (torch.tensor(2.0), False)):
        graph = fx.Graph()
        x = graph.placeholder("x")
        graph.get_attr("constant")
        graph.output([x])
        recording = fx.GraphModule({"constant": constant}, graph)
        if refused:
            with pytest.raises(CaptureError, match="tensors of the CPU take part"):
                launched_together(lambda x: [x + 1], [torch.ones(2)], recording)
        else:
            launched_together(lambda x: [x + 1], [torch.ones(2)], recording)


def test_recordings_that_are_forgotten_are_made_again(captures: list[str]) -> None:
    double = recorded(lambda x: 2 * x, launching=launched_together)
    double(torch.ones(1))
    double.forget()
    assert float(double(torch.ones(1))) == 2.0 and len(captures) == 2


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ([torch.ones(2)], "cpu has no graphs"),
        ([], "it has no inputs"),
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


def test_the_first_failure_of_a_capture_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(device: torch.device, run: graphs.Operations) -> object:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate …")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setitem(graphs.CAPTURES, "cpu", capture)
    with pytest.raises(CaptureError, match=r"^OutOfMemoryError: CUDA out of memory\.$"):
        launched_together(lambda x: [x + 1], [torch.ones(2)])
