"""Newton steps: against closed forms, in every degenerate case, and as steps of an unroll."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.unroll import learn_hyper, newton, sgd, unroll
from metarun.unroll.gradients.derivatives import derivatives_of
from metarun.unroll.optim.newton import LARGEST, _lowest_eigenvalue

F64 = torch.float64


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def definite(*batch: int, dim: int, seed: int = 1) -> Tensor:
    """Random positive definite matrices."""
    factor = randn(*batch, dim, dim, seed=seed)
    return factor @ factor.mT + 0.5 * torch.eye(dim, dtype=F64)


def quadratic(mode: Tensor, hessian: Tensor):
    def loss(params: dict[str, Tensor]) -> Tensor:
        d = params["x"] - mode
        return 0.5 * (d[..., None, :] @ hessian @ d[..., None]).sum()

    return loss


def steps(loss, x: Tensor, count: int = 1, hyper=None, **options) -> Tensor:
    optimizer = newton(**options)
    result = unroll(lambda p, _: loss(p), {"x": x}, optimizer, count, hyper=hyper)
    return result.params["x"]


# ------------------------------------------------------------------ what a step is


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("dim", [1, 2, 3, 6])
def test_one_step_solves_a_quadratic(dim: int, joint: bool) -> None:
    mode, x = randn(7, dim), randn(7, dim, seed=2)
    loss = quadratic(mode, definite(7, dim=dim))
    torch.testing.assert_close(steps(loss, x, joint=joint), mode, rtol=0, atol=1e-6)


def test_a_joint_step_solves_linear_regression_with_weight_and_bias() -> None:
    features, targets = randn(20, 4), randn(20, 2, seed=1)

    def loss(params: dict[str, Tensor], _: int) -> Tensor:
        return (F.linear(features, params["weight"], params["bias"]) - targets).pow(2).mean()

    start = {"weight": randn(2, 4, seed=2), "bias": randn(2, seed=3)}
    solved = unroll(loss, start, newton(joint=True), 1).params
    design = torch.cat([features, torch.ones(20, 1, dtype=F64)], dim=1)
    expected = torch.linalg.lstsq(design, targets).solution
    torch.testing.assert_close(solved["weight"], expected[:4].T)
    torch.testing.assert_close(solved["bias"], expected[4])


def test_a_joint_step_trains_a_softmax_head_and_independent_rows_would_not() -> None:
    """The rows' blocks add up to zero, so independent rows see no curvature at all."""
    features, labels = randn(15, 8), torch.arange(5).repeat(3)

    def loss(params: dict[str, Tensor], _: int) -> Tensor:
        return F.cross_entropy(features @ params["weight"].T, labels)

    start = {"weight": torch.zeros(5, 8, dtype=F64)}
    joint = unroll(loss, start, newton(5.0, joint=True), 6).losses
    assert (joint.diff() < 0).all() and joint[-1] < 0.1 * joint[0]
    rows = unroll(loss, start, newton(), 1).params
    assert loss(rows, 0) > 100 * joint[0]


def test_damping_minimises_the_damped_model() -> None:
    mode, x, hessian = randn(4, 3), randn(4, 3, seed=2), definite(4, dim=3)
    moved = steps(quadratic(mode, hessian), x, damping=0.7)
    gradient = (hessian @ (x - mode)[..., None])[..., 0]
    residual = gradient + (hessian @ (moved - x)[..., None])[..., 0] + 0.7 * (moved - x)
    assert residual.abs().max() < 1e-12


@pytest.mark.parametrize("radius", [0.01, 0.3, 10.0])
@pytest.mark.parametrize("dim", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_no_step_is_longer_than_the_trust_radius(dtype, dim: int, radius: float) -> None:
    hessian = randn(200, dim, dim)
    hessian = (hessian + hessian.mT).to(dtype)  # indefinite
    mode, x = randn(200, dim).to(dtype), randn(200, dim, seed=2).to(dtype)
    step = steps(quadratic(mode, hessian), x, trust_radius=radius) - x
    slack = 1e-8 if dtype == F64 else 1e-5 * radius**2
    assert (step.square().sum(-1) <= radius**2 + slack).all()
    assert step.abs().sum(-1).min() > 0


@pytest.mark.parametrize("radius", [None, 0.5])
@pytest.mark.parametrize("dim", [1, 2, 3, 5])
def test_every_step_descends_whatever_the_curvature(dim: int, radius: float | None) -> None:
    hessian = randn(200, dim, dim)
    hessian = hessian + hessian.mT
    mode, x = randn(200, dim), randn(200, dim, seed=2)
    gradient = (hessian @ (x - mode)[..., None])[..., 0]
    step = steps(quadratic(mode, hessian), x, trust_radius=radius) - x
    assert ((gradient * step).sum(-1) < 0).all()


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("dim", [1, 2, 4])
def test_without_a_radius_the_shift_is_twice_the_most_negative_curvature(
    dim: int, joint: bool
) -> None:
    """Of an indefinite Hessian, as the docstring says; none of a definite one."""
    definite = 0
    for seed in range(12):
        hessian = randn(dim, dim, seed=seed)
        hessian = hessian + hessian.mT + 2 * (seed % 3) * torch.eye(dim, dtype=F64)
        mode, x = randn(1, dim, seed=seed + 50), randn(1, dim, seed=seed + 99)
        lowest = torch.linalg.eigvalsh(hessian)[0]
        definite += bool(lowest > 0)
        shift = 2 * lowest.abs() if lowest < 0 else torch.zeros(())
        gradient = hessian @ (x - mode)[0]
        expected = -torch.linalg.inv(hessian + shift * torch.eye(dim, dtype=F64)) @ gradient
        step = steps(quadratic(mode, hessian[None]), x, joint=joint) - x
        torch.testing.assert_close(step[0], expected, rtol=1e-9, atol=1e-12)
    assert 0 < definite < 12


@pytest.mark.parametrize("radius", [None, 0.5])
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_steps_leave_a_maximum(dim: int, radius: float | None) -> None:
    """Of x⁴/4 − x²/2 in each dimension: at 0, between minima at ±1."""
    x = 0.1 * randn(5, dim)
    moved = steps(
        lambda p: (p["x"].pow(4) / 4 - p["x"].square() / 2).sum(), x, 60, trust_radius=radius
    )
    torch.testing.assert_close(moved.abs(), torch.ones_like(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("radius", [0.1, 1.0])
def test_convergence_on_a_curved_valley(radius: float) -> None:
    """Rosenbrock's function, from several starts at once."""

    def loss(params: dict[str, Tensor]) -> Tensor:
        a, b = params["x"].unbind(-1)
        return ((1 - a) ** 2 + 10 * (b - a**2) ** 2).sum()

    x = torch.tensor([[-1.2, 1.0], [0.0, 0.0], [1.5, -0.5]], dtype=F64)
    torch.testing.assert_close(
        steps(loss, x, 100, trust_radius=radius), torch.ones(3, 2, dtype=F64), rtol=0, atol=1e-4
    )


def test_radii_by_parameter_and_none_for_the_rest() -> None:
    params = {"near": torch.full((3, 2), 9.0, dtype=F64), "far": torch.full((4,), 9.0, dtype=F64)}
    moved = unroll(
        lambda p, _: p["near"].square().sum() + p["far"].square().sum(),
        params,
        newton({"near": 0.5}),
        1,
    ).params
    torch.testing.assert_close((moved["near"] - 9).norm(dim=-1), torch.full((3,), 0.5, dtype=F64))
    assert moved["far"].abs().max() < 1e-6


def test_different_radii_of_a_joint_step_are_the_semi_axes_of_an_ellipsoid() -> None:
    mode = {"a": randn(3), "b": randn(2, seed=1)}
    start = {name: m + 5 for name, m in mode.items()}

    def loss(params: dict[str, Tensor], _: int) -> Tensor:
        d = torch.cat([params[name] - m for name, m in mode.items()])
        return 0.5 * d @ definite(dim=5) @ d

    moved = unroll(loss, start, newton({"a": 0.2, "b": 1.0}, joint=True), 1).params
    step = {name: moved[name] - start[name] for name in mode}
    assert (step["a"] / 0.2).square().sum() + step["b"].square().sum() <= 1 + 1e-12
    assert step["b"].norm() > 0.2
    same = unroll(loss, start, newton({"a": 0.3, "b": 0.3}, joint=True), 1).params
    whole = unroll(loss, start, newton(0.3, joint=True), 1).params
    for name in mode:
        torch.testing.assert_close(same[name], whole[name])


# ------------------------------------------------------------------ derivatives


@pytest.mark.parametrize("radius", [None, 1e3])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("dim", [1, 2, 3, 4])
def test_two_chained_steps_on_a_quadratic_forget_the_start_and_follow_the_mode(
    dim: int, joint: bool, radius: float | None
) -> None:
    mode, x = randn(dim).requires_grad_(), randn(dim, seed=2).requires_grad_()
    loss = quadratic(mode, definite(dim=dim))
    for count in (1, 2):
        moved = steps(loss, x, count, trust_radius=radius, joint=joint)
        by_mode, by_start = (
            torch.stack([torch.autograd.grad(m, wrt, retain_graph=True)[0] for m in moved.unbind()])
            for wrt in (mode, x)
        )
        torch.testing.assert_close(by_mode, torch.eye(dim, dtype=F64), rtol=0, atol=1e-5)
        torch.testing.assert_close(by_start, torch.zeros_like(by_start), rtol=0, atol=1e-5)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("radius", [None, 0.4, 3.0])
@pytest.mark.parametrize("dim", [1, 2, 3, 4])
def test_steps_have_right_derivatives_in_convex_and_concave_regions(
    dim: int, radius: float | None, joint: bool
) -> None:
    inputs = [randn(2, dim), 0.3 * randn(2, dim, seed=2), torch.tensor(0.05, dtype=F64)]
    if radius is not None:
        inputs.append(torch.tensor(radius, dtype=F64))
    coupling = definite(dim=dim, seed=5)

    def after(x: Tensor, mode: Tensor, damping: Tensor, radius: Tensor | None = None) -> Tensor:
        def loss(params: dict[str, Tensor]) -> Tensor:
            d = params["x"] - mode
            return ((d @ coupling) * d).sum() / 4 + 2 * d.cos().sum() + (d.pow(4)).sum() / 9

        return steps(loss, x, 2, trust_radius=radius, damping=damping, joint=joint)

    for wrt in inputs:
        wrt.requires_grad_()
    assert torch.autograd.gradcheck(after, inputs)
    gradients = torch.autograd.grad(after(*inputs).sum(), inputs)
    assert all(gradient.abs().max() > 0 for gradient in gradients), "a derivative is missing"


@pytest.mark.parametrize("radius", [None, 0.5])
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_derivatives_at_a_zero_gradient(dim: int, radius: float | None) -> None:
    """The norm of the gradient has no derivative there; the step has: −H⁻¹ ∂g."""
    mode = randn(2, dim).requires_grad_()
    moved = steps(quadratic(mode, definite(2, dim=dim)), mode.detach(), trust_radius=radius)
    assert torch.equal(moved, mode)
    (by_mode,) = torch.autograd.grad(moved.sum(), mode)
    torch.testing.assert_close(by_mode, torch.ones_like(mode), rtol=0, atol=1e-5)


@pytest.mark.parametrize("radius", [None, 0.5])
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_a_stationary_point_that_is_no_minimum_stays_finite(dim: int, radius) -> None:
    x = torch.zeros(2, dim, dtype=F64, requires_grad=True)
    moved = steps(lambda p: p["x"].cos().sum(), x, 2, trust_radius=radius)
    assert torch.equal(moved, x)
    assert torch.autograd.grad(moved.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("curvature", [2.0, 0.0, -2.0])
@pytest.mark.parametrize("dim", [1, 2, 3, 4])
def test_equal_eigenvalues_within_a_trust_region(dim: int, curvature: float) -> None:
    """The step is r long and goes down the gradient, here that of h/2 ‖x − m‖² + s·x."""
    radius = 0.3
    slope, x = 5 + randn(3, dim), 0.1 * randn(3, dim, seed=2)

    def ours(x: Tensor, slope: Tensor, h: Tensor) -> Tensor:
        return steps(
            lambda p: (h / 2 * p["x"].square() + slope * p["x"]).sum(), x, trust_radius=radius
        )

    def closed_form(x: Tensor, slope: Tensor, h: Tensor) -> Tensor:
        gradient = h * x + slope
        return x - radius * gradient / gradient.norm(dim=-1, keepdim=True)

    inputs = [t.requires_grad_() for t in (x, slope, torch.tensor(curvature, dtype=F64))]
    torch.testing.assert_close(ours(*inputs), closed_form(*inputs))
    for direction in randn(4, 3, dim, seed=7):
        pairs = zip(
            torch.autograd.grad(ours(*inputs), inputs, direction),
            torch.autograd.grad(closed_form(*inputs), inputs, direction),
            strict=True,
        )
        for found, expected in pairs:
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("radius", [None, 0.3])
@pytest.mark.parametrize("dim", [1, 3])
def test_a_variable_without_influence_stays_and_has_no_derivative(dim: int, radius) -> None:
    """As behind a dead ReLU, whose gradient has a derivative all the same."""
    scale = torch.tensor([0.0, 1.0], dtype=F64, requires_grad=True)
    x = randn(2, dim).requires_grad_()
    moved = steps(
        lambda p: ((scale[:, None] * p["x"]).square() + scale[:, None] * p["x"]).sum(),
        x,
        trust_radius=radius,
    )
    assert torch.equal(moved[0], x[0]) and not torch.equal(moved[1], x[1])
    by_x, by_scale = torch.autograd.grad(moved.sum(), [x, scale])
    assert torch.equal(by_x[0], torch.ones(dim, dtype=F64))
    assert by_scale[0] == 0 and by_scale.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("radius", [None, 0.3])
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_a_variable_with_a_bad_hessian_does_not_spoil_the_others(dim, radius, bad: float) -> None:
    hessian = definite(3, dim=dim)
    hessian[1, 0, 0] = bad
    x, mode = randn(3, dim).requires_grad_(), randn(3, dim, seed=2)
    moved = steps(quadratic(mode, hessian), x, 2, trust_radius=radius)
    assert torch.equal(moved[1], x[1])
    good = [0, 2]
    alone = x.detach()[good].requires_grad_()
    expected = steps(quadratic(mode[good], hessian[good]), alone, 2, trust_radius=radius)
    torch.testing.assert_close(moved[good], expected)
    by_x = torch.autograd.grad(moved[good].sum(), x)[0][good]
    torch.testing.assert_close(by_x, torch.autograd.grad(expected.sum(), alone)[0])


def test_float32_at_extreme_scales() -> None:
    x = torch.tensor([[1e25, -1e25], [1e-25, 1e-25], [3.0, 4.0]])
    for radius in (1e24, 1e30):
        moved = steps(lambda p: (0.5 * p["x"].square()).sum(), x, trust_radius=radius)
        assert (moved[1:].abs() < 1e-6).all()
        length = min(radius, 2**0.5 * 1e25)
        assert (moved - x)[0].double().norm().item() == pytest.approx(length, rel=1e-5)
    steep = torch.tensor([[40.0, 1.0]], requires_grad=True)  # the gradient's square overflows
    moved = steps(lambda p: (p["x"].exp() * 1e5).sum(), steep, trust_radius=0.5)
    assert (moved - steep).norm() <= 0.5 + 1e-5
    assert torch.autograd.grad(moved.sum(), steep)[0].isfinite().all()


def test_the_smallest_eigenvalue_of_float32_is_found_in_float64() -> None:
    """In float32 LAPACK fails to converge on some large singular Hessians, and rounds more."""
    basis = torch.linalg.qr(randn(60, 60)).Q
    hessian = (basis @ torch.diag(torch.logspace(0, -4, 60, dtype=F64)) @ basis.T).float()
    hessian = ((hessian + hessian.mT) / 2).requires_grad_()
    lowest, rounding = _lowest_eigenvalue(hessian)
    exact = torch.linalg.eigvalsh(hessian.detach().double())
    assert lowest.dtype == rounding.dtype == torch.float32
    torch.testing.assert_close(lowest.double(), exact[:1], rtol=2e-7, atol=0)
    expected = torch.finfo(torch.float32).eps * 62 * exact[-1:]
    torch.testing.assert_close(rounding.double(), expected, rtol=1e-5, atol=0)
    slope = torch.autograd.grad(lowest.sum(), hessian)[0]
    vector = torch.linalg.eigh(hessian.detach().double()).eigenvectors[:, 0]
    torch.testing.assert_close(slope.double(), torch.outer(vector, vector), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("radius", [None, 0.5])
def test_a_huge_hessian_does_not_end_the_batch(radius: float | None) -> None:
    """As after an inner loop that has diverged for one of the tasks."""
    factors = randn(4, 41, 10).float() * torch.tensor([1.0, 1e12, 1e17, 1.0])[:, None, None]
    hessian = factors @ factors.mT + torch.eye(41)
    hessian[3] = 2e38 * torch.eye(41)  # twice that is infinite
    x, mode = randn(4, 41, seed=2).float(), randn(4, 41, seed=3).float()
    mode[3] = x[3]
    moved = steps(quadratic(mode, hessian), x, trust_radius=radius)
    assert moved.isfinite().all()
    alone = steps(quadratic(mode[:1], hessian[:1]), x[:1], trust_radius=radius)
    torch.testing.assert_close(moved[:1], alone)
    if radius is not None:
        assert ((moved - x).norm(dim=-1) <= radius * 1.0001).all()


def test_a_learned_radius_counts_by_its_magnitude() -> None:
    x = torch.full((1, 2), 9.0, dtype=F64)
    for radius in (0.5, -0.5):
        r = torch.tensor(radius, dtype=F64)
        moved = steps(lambda p: p["x"].square().sum(), x, trust_radius=r)
        torch.testing.assert_close((moved - x).norm(), torch.tensor(0.5, dtype=F64))
    r = torch.zeros((), dtype=F64, requires_grad=True)
    moved = steps(lambda p: p["x"].square().sum(), x, trust_radius=r)
    assert torch.autograd.grad(moved.sum(), r)[0].isfinite()


# ------------------------------------------------------------------ as a step of an unroll


def head_loss(features: Tensor, labels: Tensor):
    return lambda p, _: F.cross_entropy(F.linear(features, p["w"], p["b"]), labels)


def test_an_unroll_has_the_same_derivatives_under_vmap_grad_and_autograd() -> None:
    """Meta-gradients of a softmax head for its start and features, three tasks at a time."""
    features, labels = randn(3, 6, 4), torch.arange(3).repeat(3, 2)
    meta = {"w": randn(3, 4, seed=1), "b": randn(3, seed=2), "r": torch.tensor(0.8, dtype=F64)}

    def query_loss(meta: dict[str, Tensor], features: Tensor, labels: Tensor) -> Tensor:
        start = {name: meta[name] for name in "wb"}
        optimizer = newton(meta["r"], joint=True)
        fast = unroll(head_loss(features, labels), start, optimizer, 2).params
        return head_loss(features.sin(), labels)(fast, 0)

    batched = torch.func.vmap(torch.func.grad(query_loss), in_dims=(None, 0, 0))
    by_vmap = batched(meta, features, labels)
    for task in range(3):
        leaves = {name: value.clone().requires_grad_() for name, value in meta.items()}
        loss = query_loss(leaves, features[task], labels[task])
        for name, grad in zip(leaves, torch.autograd.grad(loss, leaves.values()), strict=True):
            torch.testing.assert_close(by_vmap[name][task], grad)
            assert grad.abs().max() > 0
    assert torch.autograd.gradcheck(
        lambda w, b, r, x: query_loss({"w": w, "b": b, "r": r}, x, labels[0]),
        [t.requires_grad_() for t in (meta["w"], meta["b"], meta["r"], features[0].clone())],
    )


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_forward_mode_agrees_with_reverse_mode() -> None:
    features, labels = randn(6, 4), torch.arange(3).repeat(2)
    w, b = randn(3, 4, seed=1), randn(3, seed=2)

    def moved(w: Tensor) -> Tensor:
        step = unroll(head_loss(features, labels), {"w": w, "b": b}, newton(0.8, joint=True), 1)
        return step.params["w"].sin().sum()

    direction = randn(3, 4, seed=5)
    _, tangent = torch.func.jvp(moved, (w,), (direction,))
    torch.testing.assert_close(tangent, (torch.func.grad(moved)(w) * direction).sum())


def test_first_order_takes_gradient_and_hessian_as_constants() -> None:
    mode, x = randn(3, 2).requires_grad_(), randn(3, 2, seed=2).requires_grad_()
    r = torch.tensor(0.3, dtype=F64, requires_grad=True)
    hessian = definite(3, dim=2)
    loss = quadratic(mode, hessian)
    first, full = (
        unroll(lambda p, _: loss(p), {"x": x}, newton(r), 1, gradient=gradient).params["x"]
        for gradient in ("first_order", "reverse")
    )
    torch.testing.assert_close(first, full)
    by_x, by_r = torch.autograd.grad(first.sum(), [x, r], retain_graph=True)
    assert torch.equal(by_x, torch.ones_like(x))
    torch.testing.assert_close(by_r, torch.autograd.grad(full.sum(), r)[0])
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(first.sum(), mode)


def test_mixed_mode_says_what_would_do_instead() -> None:
    with pytest.raises(ValueError, match="gradient='checkpoint'"):
        unroll(lambda p, _: p["x"].sum(), {"x": randn(2)}, newton(), 1, gradient="mixed")


def test_a_learned_radius_of_a_joint_step() -> None:
    params = {"w": randn(2, 3), "b": randn(2, seed=1)}
    learned = learn_hyper(newton(0.5).hyper, ["trust_radius"], "parameter", params, 1)
    assert set(learned.initial) == {"trust_radius/w", "trust_radius/b"}
    values = {name: value.requires_grad_() for name, value in learned.initial.items()}
    moved = unroll(
        lambda p, _: (p["w"].sum(1) + p["b"] - 9).square().sum() + p["w"].square().sum(),
        params,
        newton(joint=True),
        1,
        hyper=learned.at(values, 0),
    ).params
    gradients = torch.autograd.grad(sum(p.sum() for p in moved.values()), list(values.values()))
    assert all(gradient != 0 for gradient in gradients)


def test_an_infinite_radius_cannot_be_learned() -> None:
    with pytest.raises(ValueError, match="cannot learn 'trust_radius' from inf"):
        learn_hyper(newton().hyper, ["trust_radius"], "global", {"w": randn(2)}, 1)


@pytest.mark.parametrize("granularity", ["global", "parameter", "parameter_step"])
def test_the_radius_is_learned_of_the_parameters_that_have_one(granularity) -> None:
    params = {"a": randn(2), "b": randn(2, seed=1)}
    optimizer = newton({"a": 0.1})
    learned = learn_hyper(optimizer.hyper, ["trust_radius"], granularity, params, 1)

    def loss(p: dict[str, Tensor], _: int) -> Tensor:
        return sum((x - 9).square().sum() for x in p.values())

    moved = unroll(loss, params, optimizer, 1, hyper=learned.at(learned.initial, 0)).params
    assert (moved["a"] - params["a"]).norm() <= 0.1 + 1e-9
    torch.testing.assert_close(moved["b"], torch.full((2,), 9.0, dtype=F64))


# ------------------------------------------------------------------ what is refused


def test_settings_out_of_range_are_refused() -> None:
    for radius in (0.0, -1.0, float("nan"), {"x": 0.0}):
        with pytest.raises(ValueError, match=r"trust_radius=.*: must be above 0"):
            newton(radius)
    for damping in (-1.0, float("inf")):
        with pytest.raises(ValueError, match=r"damping=.*: must be 0 or more"):
            newton(damping=damping)
    with pytest.raises(ValueError, match="trust_radius for y: there are only x"):
        newton({"y": 1.0}).init({"x": randn(2)})
    with pytest.raises(ValueError, match="must be above 0"):
        hyper = {"trust_radius": -1.0, "damping": 0.0}
        steps(lambda p: p["x"].square().sum(), randn(2), hyper=hyper)
    with pytest.raises(ValueError, match="needs a trust_radius for b too, or for none"):
        unroll(
            lambda p, _: sum(x.square().sum() for x in p.values()),
            {"a": randn(2), "b": randn(2)},
            newton({"a": 1.0}, joint=True),
            1,
        )


def test_a_variable_that_is_too_large_is_refused_with_a_way_out() -> None:
    half = LARGEST // 2
    newton().init({"w": torch.zeros(5, LARGEST)})
    newton(joint=True).init({"w": torch.zeros(2, half)})
    newton().init({"none": torch.zeros(0, LARGEST + 1)})  # it has no Hessian
    message = rf"Hessian of {LARGEST + 1} × {LARGEST + 1}.*algo=anil.*inner_opt=partition"
    with pytest.raises(ValueError, match=message):
        newton(joint=True).init({"w": torch.zeros(2, half), "b": torch.zeros(1)})
    with pytest.raises(ValueError, match="for w; it takes"):
        newton().init({"w": torch.zeros(1, LARGEST + 1)})


def test_update_changes_nothing_in_place_and_keeps_the_order_of_names() -> None:
    params = {"b": randn(3), "a": randn(2, 2, seed=1), "c": randn(seed=2)}
    before = {name: p.clone() for name, p in params.items()}
    for joint in (False, True):
        optimizer = newton(1.0, joint=joint)
        derivatives = derivatives_of(lambda p: sum(x.cos().sum() for x in p.values()), params)
        moved, state = optimizer.update(
            derivatives, optimizer.init(params), params, optimizer.hyper
        )
        assert list(moved) == list(params) and state == ()
        assert all(torch.equal(params[name], before[name]) for name in params)
        assert all(moved[name].shape == p.shape for name, p in params.items())


def test_it_can_be_told_from_gradient_descent() -> None:
    """A guard for the tests above: on a quadratic that is not isotropic they differ."""
    mode, x = randn(3), randn(3, seed=2)
    loss = quadratic(mode, definite(dim=3))
    descent = unroll(lambda p, _: loss(p), {"x": x}, sgd(0.1), 1).params["x"]
    assert not torch.allclose(steps(loss, x), descent)
