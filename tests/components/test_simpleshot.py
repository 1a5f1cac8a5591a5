"""SimpleShot against easyfsl's and the formula; how its centre is kept."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from easyfsl.methods import SimpleShot
from torch import Tensor, nn

from metarun.components.algo.base import OBJECTIVES, InnerLoop, Problem
from metarun.components.algo.simpleshot import simpleshot
from metarun.components.backbone.conv4 import Conv4
from metarun.episodes.source import Batch
from metarun.errors import ConfigError
from metarun.training.setup import Setup
from metarun.unroll import sgd
from tests.components.agreeing import check_gradient, check_mapped
from tests.conftest import Metarun
from tests.setups import IMAGES, setup_of, stirred, task_of

SHOT = ("algo=simpleshot", "algo.batch_size=4")


def features_of(meta: dict[str, Tensor], x: Tensor) -> Tensor:
    model = Conv4((1, 28, 28), 3, width=3).double()
    model.load_state_dict({k: v.detach() for k, v in meta.items()}, strict=False)
    return model.features(x).detach()


def centred(setup: Setup) -> tuple[dict[str, Tensor], Tensor]:
    """Meta-parameters with a centre, and the centre."""
    meta = stirred(setup)
    centre = torch.tensor([0.3, -0.1, 0.2], dtype=torch.float64)
    weight = torch.tensor(0.4, dtype=torch.float64)
    return meta | {"centre.sum": weight * centre, "centre.weight": weight}, centre


@pytest.mark.parametrize("transform", ["none", "l2n", "cl2n"])
@pytest.mark.parametrize("shot", [1, 3])
def test_the_score_of_a_class_is_by_the_distance_to_its_centroid(shot: int, transform: str) -> None:
    setup = setup_of(*IMAGES, *SHOT, f"task.shot={shot}", f"algo.transform={transform}")
    meta, centre = centred(setup)
    task = task_of(setup)
    assert setup.algorithm.adapt is not None
    scores = setup.algorithm.adapt(meta, task.support_x, task.support_y, 3)(task.query_x)
    support, queries = (features_of(meta, x) for x in (task.support_x, task.query_x))
    if transform == "cl2n":
        support, queries = support - centre, queries - centre
    if transform != "none":
        support, queries = (x / torch.linalg.vector_norm(x, dim=1)[:, None]
                            for x in (support, queries))  # fmt: skip
    centroids = torch.stack([support[task.support_y == k].mean(0) for k in range(3)])
    expected = -(torch.cdist(queries, centroids, compute_mode="donot_use_mm_for_euclid_dist") ** 2)
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-12)
    lengths = torch.linalg.vector_norm(centroids, dim=1)
    assert shot == 1 or bool((lengths - 1).abs().max() > 1e-3), "centroids keep their length"


@pytest.mark.parametrize("transform", ["l2n", "cl2n"])
def test_for_one_shot_it_is_that_of_easyfsl(transform: str) -> None:
    """There ‖z − c‖² = 2 − 2 cos; for more shots, theirs scales centroids to length 1."""
    setup = setup_of(*IMAGES, *SHOT, "task.shot=1", f"algo.transform={transform}")
    meta, centre = centred(setup)
    task = task_of(setup)
    other = SimpleShot(
        nn.Identity(),
        feature_centering=centre if transform == "cl2n" else None,
        feature_normalization=2,
    )
    other.process_support_set(features_of(meta, task.support_x), task.support_y)
    assert setup.algorithm.adapt is not None
    scores = setup.algorithm.adapt(meta, task.support_x, task.support_y, 3)(task.query_x)
    expected = 2 * other(features_of(meta, task.query_x)) - 2
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.25, 1.0])
def test_the_centre_is_a_moving_mean_without_a_bias_to_zero(momentum: float) -> None:
    setup = setup_of(*IMAGES, *SHOT, f"algo.momentum={momentum}")
    meta = setup.algorithm.init()
    assert not meta["centre.sum"].any() and not meta["centre.weight"].any()
    task = task_of(setup)
    assert setup.algorithm.adapt is not None
    start = setup.algorithm.adapt(meta, task.support_x, task.support_y, 3)(task.query_x)
    assert bool(start.isfinite().all()), "before training nothing is subtracted"
    means = []
    for i in range(4):
        batch = setup.train_tasks.sample(i, 1)
        kept = setup.algorithm.loss(meta, type(batch)(*(x[0] for x in batch)))[1]["kept"]
        means.append(features_of(meta, batch[0][0]).mean(0))
        meta = meta | kept
    weights = torch.tensor([momentum * (1 - momentum) ** (3 - i) for i in range(4)]).double()
    expected = (weights[:, None] * torch.stack(means)).sum(0) / weights.sum()
    torch.testing.assert_close(meta["centre.sum"] / meta["centre.weight"], expected)


def test_its_loss_is_that_of_the_baseline() -> None:
    found = []
    for algo in ("simpleshot", "baseline"):
        setup = setup_of(*IMAGES, f"algo={algo}", "algo.batch_size=4")
        batch = setup.train_tasks.sample(0, 1)
        meta = setup.algorithm.init()
        found.append(setup.algorithm.loss(meta, type(batch)(*(x[0] for x in batch)))[0])
    assert torch.equal(*found)


def test_running_moments_are_of_the_plain_batches(caplog: pytest.LogCaptureFixture) -> None:
    running = (*IMAGES, *SHOT, "backbone.norm=running")
    setup = setup_of(*running)
    assert len(setup.algorithm.kept) == 2 * 4 + 2
    meta, task = setup.algorithm.init(), task_of(setup)
    batch = setup.train_tasks.sample(0, 1)
    kept = setup.algorithm.loss(meta, type(batch)(*(x[0] for x in batch)))[1]["kept"]
    model = Conv4((1, 28, 28), 3, width=3).double()
    model.load_state_dict(meta, strict=False)
    before = F.conv2d(batch[0][0], model.body[0].conv.weight, model.body[0].conv.bias, 2, 1)  # type: ignore[index, union-attr]
    expected = 0.1 * before.mean((0, 2, 3)).detach()
    torch.testing.assert_close(kept["norm.0.mean"], expected)
    assert setup.algorithm.adapt is not None
    predict = setup.algorithm.adapt(meta | kept, task.support_x, task.support_y, 3)
    torch.testing.assert_close(predict(task.query_x)[:1], predict(task.query_x[:1]))
    check_mapped(caplog, network=running, recorded=False)
    check_gradient(*SHOT, "backbone.norm=running")


def test_one_run_is_evaluated_with_each_transform(metarun: Metarun, tmp_path: Path) -> None:
    small = ("backbone.width=4", "trainer.steps=3", "trainer.meta_batch=2", "task.query=3")
    few = ("trainer.eval_episodes=4", "trainer.test_episodes=8", "data=glyphs")
    metarun("train", "algo=simpleshot", *small, *few, "hydra.run.dir=run")
    for transform in ("none", "l2n"):
        settings = (f"algo.transform={transform}", f"hydra.run.dir={transform}")
        assert "test accuracy" in metarun("eval", "ckpt=run", *settings).stdout
    again = metarun("eval", "ckpt=run", "algo.momentum=0.5", "hydra.run.dir=f", code=2).stderr
    assert "algo.momentum: it is of training alone" in again


def problem() -> Problem:
    inner = InnerLoop(sgd(0.1), (), "global", {})
    model = Conv4((1, 28, 28), 3, width=2)
    return Problem(
        model, OBJECTIVES["classification"], inner, 3, None, (3, 3), (1, 28, 28), classes=5
    )


def test_what_is_kept_has_no_graph() -> None:
    algorithm = simpleshot(problem())
    meta = {name: value.requires_grad_() for name, value in algorithm.init().items()}
    batch = Batch(torch.rand(4, 1, 28, 28), torch.arange(4))
    kept = algorithm.loss(meta, batch)[1]["kept"]
    assert set(kept) == set(algorithm.kept)
    assert not any(value.requires_grad for value in kept.values())


def test_what_it_cannot_do_is_refused(metarun: Metarun) -> None:
    with pytest.raises(ValueError, match="algo=simpleshot learns from plain batches of labelled"):
        simpleshot(problem()._replace(classes=None))
    with pytest.raises(ValueError, match="algo=simpleshot needs the features"):
        simpleshot(problem()._replace(model=nn.Linear(2, 2)))
    for momentum in (0.0, 1.5):
        with pytest.raises(ConfigError, match=r"algo\.momentum="):
            simpleshot(problem(), momentum=momentum)
    small = ("train", "algo=simpleshot", "backbone.width=2", "trainer.steps=1")
    said = metarun(*small, "inner_opt.lr=0.2", code=2).stderr
    assert "inner_opt.lr=0.2: algo=simpleshot has no inner loop" in said
    said = metarun(*small, "task.train.shot=2", code=2).stderr
    assert "algo=simpleshot learns from plain batches, and has no training tasks" in said
