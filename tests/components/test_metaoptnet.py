"""MetaOptNet: its machine and its ridge regression against solvers of others."""

import warnings
from typing import Any

import cvxpy
import learn2learn as l2l
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge
from sklearn.svm import LinearSVC
from torch import Tensor

from metarun.components.algo.base import OBJECTIVES, InnerLoop, Problem
from metarun.components.algo.metaoptnet import metaoptnet, smoothed_loss
from metarun.components.algo.svm import Solved, crammer_singer
from metarun.components.backbone.mlp import MLP
from metarun.episodes.source import Episodes
from metarun.errors import ConfigError
from metarun.training.setup import Setup
from metarun.unroll import sgd
from tests.setups import IMAGES, SINE, setup_of, stirred, task_of

F64 = torch.float64


def examples(way: int, shot: int, width: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Features of classes that overlap, in no order."""
    generator = torch.Generator().manual_seed(way + shot + width)
    y = torch.arange(way).repeat_interleave(shot)[torch.randperm(way * shot, generator=generator)]
    noise = torch.randn(way * shot, width, generator=generator, dtype=F64)
    means = torch.randn(way, width, generator=generator, dtype=F64)
    return scale * (noise + 0.7 * means[y]), y


def fitted(x: Tensor, y: Tensor, way: int, cost: float = 0.1, iterations: int = 15) -> Solved:
    return crammer_singer(x @ x.T, F.one_hot(y, way).to(x), cost, iterations)


def by_cvxpy(x: Tensor, y: Tensor, way: int, cost: float, more: float = 0.0) -> np.ndarray:
    """The coefficients that minimise the dual as the paper writes it, with more on the Gram."""
    labels = F.one_hot(y, way).numpy().astype(float)
    alpha = cvxpy.Variable(labels.shape)
    squares = cvxpy.sum_squares(x.numpy().T @ alpha) + more * cvxpy.sum_squares(alpha)
    dual = 0.5 * squares - cvxpy.sum(cvxpy.multiply(labels, alpha))
    bounds = [alpha <= cost * labels, cvxpy.sum(alpha, axis=1) == 0]
    exact = {f"tol_{what}": 1e-14 for what in ("gap_abs", "gap_rel", "feas")}
    cvxpy.Problem(cvxpy.Minimize(dual), bounds).solve(solver=cvxpy.CLARABEL, **exact)
    return np.asarray(alpha.value)


@pytest.mark.parametrize(
    ("way", "shot", "width", "scale"),
    [(5, 1, 16, 1), (3, 5, 16, 1), (4, 5, 3, 1), (5, 5, 40, 3), (2, 3, 6, 0.05)],
)
def test_the_machine_is_the_minimum_of_the_dual(
    way: int, shot: int, width: int, scale: float
) -> None:
    """With fewer features than examples too, where the coefficients are not unique."""
    x, y = examples(way, shot, width, scale)
    solved = fitted(x, y, way)
    right = torch.from_numpy(by_cvxpy(x, y, way, 0.1)).T
    torch.testing.assert_close(solved.alpha @ x @ x.T, right @ x @ x.T, rtol=1e-6, atol=1e-7)
    assert float(solved.alpha.sum(0).abs().max()) < 1e-12
    assert bool((solved.alpha <= 0.1 * F.one_hot(y, way).T + 1e-15).all())
    assert 0 <= float(solved.gap) < 1e-10


def derivative_of_the_held_bounds(
    x: Tensor, y: Tensor, way: int, towards: Tensor
) -> tuple[float, Tensor]:
    """By numpy: where the bounds that hold go on holding, the rest of α solves linear equations.

    Returns:
        how far from 0 the larger of each bound's slack and multiplier is, and the derivative by x
        of the sum of `towards` and the weights, (way, features), for a Gram with 1 more.
    """
    examples, _ = x.shape
    labels = F.one_hot(y, way).numpy().T.astype(float)
    alpha = by_cvxpy(x, y, way, 0.1, more=1.0).T
    gram = (x @ x.T).numpy() + np.eye(examples)
    slack = 0.1 * labels - alpha
    slope = alpha @ gram - labels
    multipliers = slope.max(0) - slope  # of each example, one class at least is not at its bound
    free = slack > 0.1 * multipliers
    least = float(np.maximum(slack, multipliers).min())
    sums = np.tile(np.eye(examples), way)[:, free.ravel()]
    sums = sums[np.abs(sums).sum(1) > 0]
    block = np.kron(np.eye(way), gram)[free.ravel()][:, free.ravel()]
    kkt = np.block([[block, sums.T], [sums, np.zeros((len(sums), len(sums)))]])
    # The adjoint: weights are α·x, so the derivative by α of what is summed is towards·xᵀ.
    right = np.zeros(len(kkt))
    right[: len(block)] = (towards.numpy() @ x.numpy().T)[free]
    adjoint = np.zeros(labels.shape)
    adjoint[free] = np.linalg.solve(kkt, right)[: len(block)]
    by_gram = -adjoint.T @ alpha
    change = alpha.T @ towards.numpy() + (by_gram + by_gram.T) @ x.numpy()
    return least, torch.from_numpy(change)


def test_derivatives_are_right_where_a_bound_almost_holds() -> None:
    """Bounds that hold and bounds that do not are told apart where both sides are almost 0."""
    least = []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(10, 12, generator=generator, dtype=F64)
        y = torch.arange(5).repeat(2)
        towards = torch.randn(5, 12, generator=generator, dtype=F64)
        closest, right = derivative_of_the_held_bounds(x, y, 5, towards)
        moved = x.clone().requires_grad_()
        kernel = moved @ moved.T + torch.eye(10, dtype=F64)
        alpha = crammer_singer(kernel, F.one_hot(y, 5).double(), 0.1, 15).alpha
        ((alpha @ moved) * towards).sum().backward()
        assert moved.grad is not None
        if closest > 1e-6:  # cvxpy's own digits
            torch.testing.assert_close(moved.grad, right, rtol=1e-6, atol=1e-6)
            least.append(closest)
    assert len(least) > 50 and min(least) < 1e-4, "no bound almost holds"


def test_the_machine_is_that_of_scikit_learn() -> None:
    """Its decision values, to what LIBLINEAR's coordinate descent reaches."""
    x, y = examples(4, 5, 12)
    theirs = LinearSVC(
        multi_class="crammer_singer", C=0.1, fit_intercept=False, tol=1e-10, max_iter=10**6
    )
    theirs.fit(x.numpy(), y.numpy())
    ours = (fitted(x, y, 4).alpha @ x) @ x.T
    right = torch.from_numpy(theirs.decision_function(x.numpy())).T
    torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head", ["svm", "ridge"])
def test_variant_code_is_the_reference_codes_head(head: str) -> None:
    """learn2learn has its machine, in float32; its ridge is twice scikit-learn's coefficients."""
    x, y = examples(3, 4, 8)
    queries, _ = examples(3, 5, 8)
    ours = scores(x, y, queries, 3, head=head, variant="code")
    if head == "ridge":
        assert torch.allclose(ours, 2 * scores(x, y, queries, 3, head=head))
        return
    more = torch.from_numpy(by_cvxpy(x, y, 3, 0.1, more=1.0))
    torch.testing.assert_close(ours, queries @ x.T @ more, rtol=1e-6, atol=1e-7)
    assert float((ours - scores(x, y, queries, 3, head=head)).abs().max()) > 0.01
    pytest.importorskip("qpth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of qpth
        classifier = l2l.nn.SVClassifier(x.float(), y, ways=3, max_iters=20)
    right = classifier(queries.float()).double()
    torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [4, 30])
def test_the_ridge_regression_is_that_of_scikit_learn(width: int) -> None:
    x, y = examples(3, 4, width)
    queries, _ = examples(3, 5, width)
    theirs = Ridge(alpha=50.0, fit_intercept=False, solver="cholesky")
    theirs.fit(x.numpy(), F.one_hot(y, 3).double().numpy())
    right = torch.from_numpy(theirs.predict(queries.numpy()))
    ours = scores(x, y, queries, 3, head="ridge")
    torch.testing.assert_close(ours, right, rtol=1e-10, atol=1e-13)


def scores(x: Tensor, y: Tensor, queries: Tensor, way: int, **own: Any) -> Tensor:
    """The algorithm's, with features that are the examples."""
    model = MLP((x.shape[1],), way, hidden=()).double()
    inner = InnerLoop(sgd(0.1), (), "global", {})
    objective = OBJECTIVES["classification"]
    algorithm = metaoptnet(Problem(model, objective, inner, way, None, (way, way)), **own)
    assert algorithm.adapt is not None
    return algorithm.adapt({"algo.scale": torch.ones((), dtype=F64)}, x, y, way)(queries)


def test_it_has_a_recording_of_one_operation_that_inductor_can_take() -> None:
    """Its shapes and strides are announced as they are, by vmap too; labels may come transposed."""
    k, y = torch.eye(6, dtype=F64), F.one_hot(torch.arange(6) % 3, 3).double().T
    for given in ((k, y), (k.expand(2, 6, 6), y.expand(2, 3, 6))):
        torch.library.opcheck(
            torch.ops.metarun.crammer_singer.default, (*given, 0.1, 3),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip
    mapped = torch.func.vmap(lambda kernel: crammer_singer(kernel, y.T, 0.1, 15).alpha)
    kernels = torch.stack([k, 3 * k + 1])
    alone = torch.stack([crammer_singer(kernel, y.T, 0.1, 15).alpha for kernel in kernels])
    torch.testing.assert_close(mapped(kernels), alone)


def test_one_class_and_equal_examples_of_two_have_finite_gradients() -> None:
    for y in (torch.zeros(2, dtype=torch.int64), torch.tensor([0, 1])):
        x = torch.ones(2, 3, dtype=F64, requires_grad=True)
        alpha, gap = fitted(x, y, int(y.max()) + 1)
        (grad,) = torch.autograd.grad((alpha @ x).square().sum(), x)
        assert bool(grad.isfinite().all()) and float(gap) < 1e-9
        assert float((alpha @ x).detach().abs().max()) < 1e-9


# ---------------------------------------------------------------- as an algorithm


def differences(setup: Setup, meta: dict[str, Tensor], task: Episodes) -> list[tuple[float, float]]:
    """The slope along each parameter's own gradient, by ours and by finite differences."""
    loss = setup.algorithm.loss
    grads = torch.autograd.grad(loss(meta, task)[0], list(meta.values()))
    found = []
    fixed = {name: value.detach() for name, value in meta.items()}
    for name, grad in zip(meta, grads, strict=True):
        h = 1e-6 / float(grad.norm())
        ends = [
            float(loss(fixed | {name: fixed[name] + sign * h * grad}, task)[0]) for sign in (1, -1)
        ]
        found.append((float(grad.square().sum()), (ends[0] - ends[1]) / (2 * h)))
    return found


@pytest.mark.parametrize(
    "own",
    [
        ("algo.cost=5", "algo.label_smoothing=0.3"),
        ("algo.variant=code", "algo.scale=3"),
        ("algo.head=ridge", "algo.ridge=0.5", "algo.variant=code"),
    ],
)
def test_the_gradient_of_each_parameter_is_that_of_finite_differences(own: tuple[str, ...]) -> None:
    setup = setup_of("algo=metaoptnet", *IMAGES, "task.shot=3", *own)
    for ours, slope in differences(setup, stirred(setup), task_of(setup)):
        assert ours == pytest.approx(slope, rel=1e-5)


def test_a_machine_that_is_not_solved_is_seen() -> None:
    own = ("algo.cost=10", "algo.iterations=2", "algo.eval_iterations=1")
    setup = setup_of("algo=metaoptnet", *IMAGES, "task.shot=3", *own)
    meta, task = stirred(setup), task_of(setup)
    value, extra = setup.algorithm.loss(meta, task)
    trace = setup.algorithm.trace(meta, task)
    assert bool(value.isnan()) and bool(trace.query_loss.isnan().all())
    assert bool(trace.query_score.isnan().all())
    assert float(extra["metrics"]["svm_error"]) > 0.01
    lenient = setup_of("algo=metaoptnet", *IMAGES, "task.shot=3", *own, "algo.tolerance=1e6")
    value, extra = lenient.algorithm.loss(meta, task)
    assert bool(value.isfinite()) and float(extra["metrics"]["svm_error"]) > 0.01
    solved = setup_of("algo=metaoptnet", *IMAGES, "task.shot=3", "algo.cost=10")
    value, extra = solved.algorithm.loss(meta, task)
    assert bool(value.isfinite()) and float(extra["metrics"]["svm_error"]) < 1e-3


def test_the_error_is_a_bound_of_how_far_scores_are_off() -> None:
    x, y = examples(4, 5, 6)
    right = (fitted(x, y, 4, 5.0, 40).alpha @ x) @ x.T
    for iterations in (1, 3, 6, 9):
        alpha, gap = fitted(x, y, 4, 5.0, iterations)
        bound = float((2 * gap * x.square().sum(1).max()).sqrt())
        assert 0 < float((alpha @ x @ x.T - right).norm(dim=0).max()) < bound + 1e-9


def test_iterations_are_those_of_training_or_of_evaluation() -> None:
    few = ("algo.cost=10", "algo.tolerance=1e6")
    whole = setup_of("algo=metaoptnet", *IMAGES, "task.shot=3", *few)
    meta, task = stirred(whole), task_of(whole)
    for key, same in (("iterations", "trace"), ("eval_iterations", "loss")):
        setup = setup_of("algo=metaoptnet", *IMAGES, "task.shot=3", *few, f"algo.{key}=2")
        equal = {
            "loss": bool(
                setup.algorithm.loss(meta, task)[0] == whole.algorithm.loss(meta, task)[0]
            ),
            "trace": torch.equal(*(s.algorithm.trace(meta, task)[0] for s in (setup, whole))),
        }
        assert equal == {"loss": same == "loss", "trace": same == "trace"}


def test_label_smoothing_leaves_nothing_of_it_on_the_true_class() -> None:
    """As the reference code: torch's own takes ε·way/(way − 1) for the same targets."""
    outputs, labels = torch.randn(6, 4, dtype=F64), torch.tensor([0, 1, 2, 3, 0, 0])
    ours = smoothed_loss(0.1, outputs, labels)
    right = F.cross_entropy(outputs, labels, label_smoothing=0.1 * 4 / 3)
    torch.testing.assert_close(ours, right)
    torch.testing.assert_close(
        smoothed_loss(0.0, outputs, labels), F.cross_entropy(outputs, labels)
    )


def test_label_smoothing_is_of_training_alone() -> None:
    plain, smooth = (
        setup_of("algo=metaoptnet", *IMAGES, f"algo.label_smoothing={e}") for e in (0, 0.2)
    )
    meta, task = stirred(plain), task_of(plain)
    assert torch.equal(*(s.algorithm.trace(meta, task)[0] for s in (plain, smooth)))
    assert not torch.equal(*(s.algorithm.loss(meta, task)[0] for s in (plain, smooth)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (SINE, r"algo=metaoptnet tells classes apart: choose data that have classes"),
        ((*IMAGES, "algo.ridge=3"), r"algo\.ridge=3\.0: it is for algo\.head=ridge; leave it out"),
        (
            (*IMAGES, "algo.head=ridge", "algo.tolerance=1"),
            r"algo\.tolerance=1\.0: it is for algo\.head=svm; leave it out",
        ),
        ((*IMAGES, "algo.cost=0"), r"algo\.cost=0\.0: must be above 0"),
        ((*IMAGES, "algo.iterations=0"), r"algo\.iterations=0: must be from 1"),
        ((*IMAGES, "algo.label_smoothing=2"), r"algo\.label_smoothing=2\.0: must be from 0 to 1"),
    ],
)
def test_what_it_cannot_do_is_refused(settings: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        setup_of("algo=metaoptnet", *settings)
