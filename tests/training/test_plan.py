"""How meta-gradients are computed is chosen by network, device and the length of the run."""

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from metarun.config.run import EngineConfig
from metarun.training import plan
from metarun.training.loop import meta_step
from metarun.training.plan import Plan, choose_batching, make_plan, with_gradient
from metarun.training.setup import build
from metarun.training.state import fresh
from tests.setups import config_of

pytestmark = pytest.mark.usefixtures("two_blocks")
CPU, GPU = torch.device("cpu"), torch.device("cuda")
CONV = nn.Sequential(nn.Conv2d(1, 1, 1))


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(plan, "has_compiler", lambda: True)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def planned(model: nn.Module, device: torch.device, *overrides: str) -> Plan:
    return make_plan(config_of("data=sinusoid", *overrides), model, device)


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        ({}, ("loop", None)),
        ({"chunk": 4}, ("vmap", 4)),
        ({"batching": "vmap"}, ("vmap", 8)),
        ({"batching": "loop"}, ("loop", None)),
    ],
)
def test_convolutions_on_a_cpu_are_looped_over_unless_told_otherwise(
    engine: dict[str, Any], expected: tuple[str, int | None]
) -> None:
    assert choose_batching(EngineConfig(**engine), CONV, CPU) == expected
    small = (engine.get("batching", "vmap"), engine.get("chunk"))
    assert choose_batching(EngineConfig(**engine), nn.Linear(1, 1), CPU) == small
    assert choose_batching(EngineConfig(**engine), CONV, GPU) == small


@pytest.mark.parametrize("gradient", ["checkpoint", "mixed"])
def test_what_saves_memory_is_looped_over_a_task_at_a_time(gradient: str) -> None:
    config = EngineConfig(gradient=gradient)
    assert choose_batching(config, nn.Linear(1, 1), CPU) == ("loop", None)
    explicit = EngineConfig(gradient=gradient, batching="vmap")
    assert choose_batching(explicit, nn.Linear(1, 1), CPU) == ("vmap", None)
    assert planned(CONV, CPU, f"engine.gradient={gradient}").threads == 1


def test_tasks_of_convolutions_run_in_threads_on_a_cpu_if_they_are_recorded() -> None:
    assert planned(CONV, CPU, "trainer.steps=100") == Plan(
        "loop", None, "auto", "auto", True, 2, fused_norm="but_large_twice"
    )
    assert planned(CONV, CPU, "trainer.steps=9") == Plan(
        "loop", None, "none", "auto", True, 1, fused_norm="but_large_twice"
    )
    assert planned(CONV, CPU, "engine.compile=none").threads == 1
    assert planned(CONV, CPU, "engine.compile=replay", "trainer.steps=1").threads == 2
    assert planned(CONV, CPU, "engine.batching=vmap") == Plan("vmap", 8, "auto inductor")
    short = planned(CONV, CPU, "engine.batching=vmap", "trainer.steps=100")
    assert short[2:4] == ("none", "none"), "a replay of grouped convolutions is slow"
    assert planned(CONV, GPU, "trainer.steps=100") == Plan("vmap", graphs=True)
    assert planned(CONV, GPU, "trainer.steps=100", "engine.cuda_graphs=false") == Plan("vmap")
    assert not planned(CONV, CPU).graphs
    assert planned(nn.Linear(1, 1), CPU, "trainer.steps=100") == Plan("vmap")


def test_long_runs_are_compiled() -> None:
    for model, long in ((CONV, plan.LONG_RUN_OF_CONVOLUTIONS), (nn.Linear(1, 1), plan.LONG_RUN)):
        for steps, choice in ((long, "auto inductor"), (long - 1, "auto")):
            assert planned(model, CPU, f"trainer.steps={steps}").compile == choice
        given = ("engine.gradient=checkpoint", f"trainer.steps={long}")
        assert planned(model, CPU, *given)[2:4] == ("none", "none"), "a recording takes memory"


def test_long_loops_through_convolutions_are_recorded_step_by_step() -> None:
    model = nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 2, 3), head=nn.Linear(2, 2)))

    def gradient(*overrides: str, device: torch.device = CPU, model: nn.Module = model) -> str:
        given = [f"algo.inner_steps={plan.LONG_LOOP + 1}", *overrides]
        return str(with_gradient(config_of(*given), model, device).engine.gradient)

    assert gradient() == "checkpoint"
    assert gradient("algo.adapt=[conv.*]") == "checkpoint"
    for other in (
        f"algo.inner_steps={plan.LONG_LOOP}", "algo.order=1", "algo=anil", "inner_opt=newton",
        "engine.compile=replay", "engine.batching=vmap", "algo.adapt=[head.*,conv.bias]",
        "trainer.steps=18",
    ):  # fmt: skip
        assert gradient(other) == "auto", other
    assert gradient("engine.gradient=mixed") == "mixed"
    assert gradient(device=GPU) == gradient(model=nn.Linear(1, 1)) == "auto"
    other = nn.Bilinear(2, 3, 4)  # its weight has three dimensions, too
    assert gradient(model=other) == "auto"


def test_steps_count_for_whether_a_step_is_compiled() -> None:
    given = ("engine.gradient=checkpoint", "algo.inner_steps=20")
    assert planned(CONV, CPU, "trainer.steps=25", *given).inner_step == "auto inductor"
    assert planned(CONV, CPU, "trainer.steps=24", *given).inner_step == "auto"
    assert planned(CONV, CPU, "trainer.steps=10", *given).inner_step == "auto"
    assert planned(CONV, CPU, "trainer.steps=9", *given).inner_step == "none"
    for choice in ("none", "replay", "inductor"):
        found = planned(CONV, CPU, "trainer.steps=25", *given, f"engine.compile={choice}")
        assert (found.compile, found.evaluate, found.inner_step) == ("none", "none", choice)
    for whole in ("engine.block=2", "inner_opt=newton", "engine.batching=vmap"):
        found = planned(CONV, CPU, "trainer.steps=25", *given, "engine.compile=replay", whole)
        assert (found.compile, found.inner_step) == ("replay", "none"), whole
    assert planned(CONV, CPU, "trainer.steps=25", "engine.gradient=mixed").inner_step == "none"


GLYPHS = (
    "data=glyphs", "backbone=conv4", "backbone.width=4", "task.query=2", "trainer.meta_batch=5",
    "trainer.steps=10", "outer_opt=sgd",
)  # fmt: skip


def trained(*overrides: str) -> dict[str, torch.Tensor]:
    setup = build(config_of(*GLYPHS, *overrides), CPU)
    state = fresh(setup)
    for _ in range(4):
        meta_step(setup, state)
    assert torch.get_num_threads() in (1, 2)
    return {name: value.detach().clone() for name, value in state.meta.items()}


def test_tasks_in_threads_train_as_one_after_the_other() -> None:
    """And with the same bits, since each task has as many threads either way: one."""
    threaded = trained()
    torch.set_num_threads(1)
    alone = trained()
    assert all(torch.equal(value, alone[name]) for name, value in threaded.items())
    plain = trained("engine.compile=none", "engine.batching=vmap")
    torch.testing.assert_close(threaded, plain, rtol=1e-3, atol=1e-4)


WAYS = {
    ("backbone=conv4", "algo.inner_steps=2"): [
        ("engine.batching=vmap", "engine.compile=none"),
        ("engine.batching=vmap", "engine.chunk=2", "engine.compile=replay"),
        ("engine.batching=loop", "engine.compile=replay"),
        ("engine.gradient=checkpoint", "trainer.steps=100"),
        ("engine.gradient=checkpoint", "trainer.steps=1000"),
    ],
    ("backbone=conv4", "algo.inner_steps=1"): [  # a compilation takes as long as the loop is
        ("engine.batching=loop", "engine.compile=none"),
        ("engine.batching=loop", "engine.compile=inductor"),
    ],
    ("backbone=mlp", "algo.inner_steps=2"): [
        ("engine.batching=loop", "engine.compile=none"),
        ("engine.batching=vmap", "engine.compile=replay"),
    ],  # compiled: test_recording.py
}


@pytest.mark.parametrize("what", WAYS, ids=" ".join)
def test_all_ways_train_alike_in_float64(what: tuple[str, str]) -> None:
    """Mapped, looped over, in threads, replayed or compiled: the same up to rounding."""
    data = GLYPHS if "backbone=conv4" in what else ("data=sinusoid", "trainer.meta_batch=5")
    common = (*data, *what, "engine.precision=float64", "outer_opt=sgd")
    expected = None
    for way in WAYS[what]:
        setup = build(config_of(*common, *way), CPU)
        state = fresh(setup)
        for _ in range(3):
            meta_step(setup, state)
        found = {name: value.detach() for name, value in state.meta.items()}
        expected = expected or found
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        start = setup.algorithm.init()
        assert not all(torch.equal(value, start[name]) for name, value in found.items())


def test_evaluation_in_threads_gives_the_same_figures() -> None:
    found = []
    for threads in (2, 1):
        torch.set_num_threads(threads)
        setup = build(config_of(*GLYPHS), CPU)
        meta, tasks = setup.algorithm.init(), setup.source.sample("test", 0, 6)
        found.append(setup.trace(meta, tasks))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    setup = build(config_of(*GLYPHS, "engine.compile=none"), CPU)
    torch.testing.assert_close(setup.trace(meta, tasks), found[0])


def test_a_network_with_dropout_has_all_threads_for_each_task(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It cannot be recorded; its random numbers come in the order of the tasks."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Conv2d(1, 2, 3, stride=4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(98, 5)
            )
            self.seen: list[int] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.append(torch.get_num_threads())
            result: torch.Tensor = self.net(x)
            return result

    models: list[Noisy] = []

    def made(*args: Any, **options: Any) -> Noisy:
        torch.manual_seed(0)
        models.append(Noisy())
        return models[-1]

    monkeypatch.setattr("metarun.training.setup.build_model", made)
    ours = trained()
    assert models[0].seen[-1] == 2
    plain = trained("engine.compile=none")
    assert all(torch.equal(value, plain[name]) for name, value in ours.items())
