"""Meta-Baseline against easyfsl's cosines to prototypes."""

import pytest
import torch
import torch.nn.functional as F
from easyfsl.methods import SimpleShot
from torch import Tensor, nn

from metarun.components.algo.base import OBJECTIVES, InnerLoop, Problem
from metarun.components.algo.meta_baseline import meta_baseline
from metarun.components.backbone.conv4 import Conv4
from metarun.components.backbone.mlp import MLP
from metarun.errors import ConfigError
from metarun.unroll import sgd
from tests.setups import IMAGES, setup_of, task_of


@pytest.mark.parametrize("shot", [1, 3])
def test_its_scores_and_their_gradient_are_those_of_easyfsl(shot: int) -> None:
    """Means of features that are not scaled before; a mean of directions is another class."""
    setup = setup_of(*IMAGES, "algo=meta_baseline", f"task.shot={shot}")
    meta = {name: value.requires_grad_() for name, value in setup.algorithm.init().items()}
    task = task_of(setup, split="train")
    model = Conv4((1, 28, 28), 3, width=3).double()
    model.load_state_dict({k: v.detach() for k, v in meta.items()}, strict=False)
    temperature = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
    other = SimpleShot(model)
    model.forward = model.features  # type: ignore[method-assign]
    other.process_support_set(task.support_x, task.support_y)
    expected = temperature * other(task.query_x)
    assert setup.algorithm.adapt is not None
    scores = setup.algorithm.adapt(meta, task.support_x, task.support_y, 3)(task.query_x)
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-12)
    names = [name for name in meta if name != "algo.temperature"]
    ours = torch.autograd.grad(
        setup.algorithm.loss(meta, task)[0], [meta["algo.temperature"], *(meta[n] for n in names)]
    )
    loss = F.cross_entropy(expected, task.query_y)
    theirs = torch.autograd.grad(loss, [temperature, *(model.get_parameter(n) for n in names)])
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-12)
    assert set(setup.algorithm.init()) == {*names, "algo.temperature"}


def problem(model: nn.Module, ways: tuple[int, int] | None = (2, 2)) -> Problem:
    kind = "regression" if ways is None else "classification"
    return Problem(model, OBJECTIVES[kind], InnerLoop(sgd(0.1), (), "global", {}), 2, None, ways)


def test_features_of_zero_have_a_finite_gradient() -> None:
    model = MLP((2,), 2, [3]).double()
    algorithm = meta_baseline(problem(model))
    meta = {name: (0 * v).requires_grad_() for name, v in algorithm.init().items()}
    x = torch.ones(2, 2, dtype=torch.float64)
    assert algorithm.adapt is not None
    outputs: Tensor = algorithm.adapt(meta, x, torch.tensor([0, 1]), 2)(x)
    assert not outputs.detach().any()
    loss = F.cross_entropy(outputs, torch.tensor([0, 1]))
    grads = torch.autograd.grad(loss, list(meta.values()), materialize_grads=True)
    assert all(bool(grad.isfinite().all()) for grad in grads)


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="algo=meta_baseline tells classes apart"):
        meta_baseline(problem(MLP((2,), 2, [3]), None))
    with pytest.raises(ValueError, match="algo=meta_baseline needs the features"):
        meta_baseline(problem(nn.Linear(2, 2)))
    with pytest.raises(ConfigError, match=r"algo\.temperature=0\.0: must be above 0"):
        meta_baseline(problem(MLP((2,), 2, [3])), temperature=0.0)
