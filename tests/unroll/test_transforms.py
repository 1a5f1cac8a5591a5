"""Clipping against torch, preconditioners against learn2learn, and their derivatives."""

from collections.abc import Callable

import learn2learn as l2l
import pytest
import torch
from torch import Tensor

from metarun.unroll import (
    KRONECKER,
    KRONECKER_PSD,
    META_CURVATURE,
    InnerOptimizer,
    Params,
    Preconditioner,
    adam,
    clip_norm,
    clip_value,
    group_hyper,
    mixed,
    newton,
    partition,
    precondition,
    sgd,
    unroll,
)
from tests.unroll.optim_cases import assert_same, loss_of, start

F64 = torch.float64
CLIPS = {
    "norm": (clip_norm, torch.nn.utils.clip_grad_norm_, "max_norm"),
    "value": (clip_value, torch.nn.utils.clip_grad_value_, "clip_value"),
}
LIMITS = [1e-3, 0.1, 100.0]  # of which the last never binds


def after(optimizer: InnerOptimizer, params: Params, steps: int = 5, **hyper: object) -> Params:
    given = {**optimizer.hyper, **hyper}
    return unroll(lambda p, step: loss_of(p), params, optimizer, steps, hyper=given).params


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("kind", CLIPS)
def test_clipped_steps_are_those_of_torch(kind: str, limit: float) -> None:
    clip, clip_in_torch, name = CLIPS[kind]
    theirs = {name: p.requires_grad_() for name, p in start().items()}
    optimizer = torch.optim.SGD(theirs.values(), lr=0.5, momentum=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(theirs).backward()
        clip_in_torch(list(theirs.values()), limit)
        optimizer.step()
    ours = clip(sgd(0.5, momentum=0.5), limit)
    assert ours.hyper[name] == limit
    assert_same(after(ours, start()), theirs)


@pytest.mark.parametrize("kind", CLIPS)
def test_clipping_is_differentiable_by_start_limit_and_lr(kind: str) -> None:
    clip, _, name = CLIPS[kind]

    def of(lr: Tensor, limit: Tensor, *values: Tensor) -> Tensor:
        optimizer = clip(adam(0.1, eps=0.1), 1.0)
        params = dict(zip(start(), values, strict=True))
        return loss_of(after(optimizer, params, 3, lr=lr, **{name: limit}))

    inputs = [torch.tensor(v, dtype=F64) for v in (0.1, 0.09)] + list(start().values())
    for x in inputs:
        x.requires_grad_()
    assert torch.autograd.gradcheck(of, inputs)
    assert all((g != 0).any() for g in torch.autograd.grad(of(*inputs), inputs))


@pytest.mark.parametrize("kind", CLIPS)
def test_meta_gradients_are_finite_where_all_gradients_are_zero(kind: str) -> None:
    clip, _, name = CLIPS[kind]
    optimizer = clip(sgd(0.1), 1.0)
    x = torch.zeros(3, dtype=F64, requires_grad=True)
    limit = torch.tensor(0.5, dtype=F64, requires_grad=True)

    def of(x: Tensor) -> Tensor:
        hyper = {**optimizer.hyper, name: limit}
        loss = lambda p, step: p["x"].square().sum()  # noqa: E731
        return unroll(loss, {"x": x}, optimizer, 2, hyper=hyper).params["x"].sum()

    gradients = torch.autograd.grad(of(x), [x, limit], materialize_grads=True)
    torch.testing.assert_close(gradients[0], torch.full((3,), 0.8**2, dtype=F64))
    assert gradients[1] == 0
    assert torch.autograd.gradcheck(of, [x])


@pytest.mark.parametrize("kind", CLIPS)
def test_clipping_under_vmap_is_a_loop(kind: str) -> None:
    optimizer = CLIPS[kind][0](sgd(0.5), 0.1)
    batch = {name: torch.stack([p, -2 * p]) for name, p in start().items()}
    together = torch.func.vmap(lambda p: after(optimizer, p))(batch)
    for i in range(2):
        alone = after(optimizer, {name: p[i] for name, p in batch.items()})
        assert_same({name: p[i] for name, p in together.items()}, alone)


def test_the_norm_is_that_of_the_part_and_limits_can_be_grouped() -> None:
    parts = partition([(["w", "b"], clip_norm(sgd(1.0), 0.1)), (["k", "s"], sgd(1.0))])
    moved = after(parts, start(), 1)
    step = torch.cat([(moved[k] - start()[k]).flatten() for k in ("w", "b")])
    torch.testing.assert_close(step.norm(), torch.tensor(0.1, dtype=F64), rtol=1e-4, atol=0)
    optimizer = clip_value(sgd(1.0), 100.0)
    hyper = group_hyper(optimizer.hyper, {"w": {"clip_value": 1e-3}}, list(start()))
    moved = after(optimizer, start(), 1, **hyper)
    assert (moved["w"] - start()["w"]).abs().max() <= 1e-3 + 1e-15
    assert (moved["b"] - start()["b"]).abs().max() > 1e-2


def test_wrong_limits_are_refused() -> None:
    with pytest.raises(ValueError, match="max_norm must be above 0, not 0"):
        clip_norm(sgd(), 0)
    with pytest.raises(ValueError, match="clip_value must be above 0, not -1"):
        clip_value(sgd(), -1)
    with pytest.raises(ValueError, match="the optimizer has max_norm already"):
        clip_norm(clip_norm(sgd(), 1.0), 2.0)


@pytest.mark.parametrize("optimizer", [newton(), mixed([("*", sgd())])], ids=["newton", "mixed"])
def test_optimizers_that_need_more_than_the_gradient_cannot_be_wrapped(optimizer) -> None:
    wraps = {
        "max_norm": lambda: clip_norm(optimizer, 1.0),
        "clip_value": lambda: clip_value(optimizer, 1.0),
        "kronecker_left, kronecker_right": lambda: precondition(optimizer, KRONECKER, weights()),
    }
    for name, wrap in wraps.items():
        with pytest.raises(ValueError, match=rf"^{name}: .*wrap the .* parts .*mixed\("):
            wrap()
    with pytest.raises(ValueError, match=r"part 1 takes more .* use mixed in place of partition"):
        partition([("w", sgd()), ("*", optimizer)])
    both = mixed([("w", clip_norm(sgd(1.0), 0.1)), (["b", "k", "s"], newton())])
    moved = unroll(lambda p, _: loss_of(p), start(), both, 1).params
    step = (moved["w"] - start()["w"]).norm()
    torch.testing.assert_close(step, torch.tensor(0.1, dtype=F64), rtol=1e-4, atol=0)


def weights() -> Params:
    """A convolution, a linear layer and a bias."""
    generator = torch.Generator().manual_seed(4)
    shapes = {"conv": (4, 3, 2, 5), "linear": (3, 2), "bias": (3,)}
    return {k: torch.randn(s, dtype=F64, generator=generator) for k, s in shapes.items()}


def random_factors(preconditioner: Preconditioner) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return {
        key: {
            name: factor + 0.3 * torch.randn(factor.shape, dtype=F64, generator=generator)
            for name, factor in of.items()
        }
        for key, of in preconditioner.factors(weights()).items()
    }


def meta_curvature_of_learn2learn(name: str, grad: Tensor, factors: dict) -> Tensor:
    oracle = l2l.optim.transforms.MetaCurvatureTransform(grad)
    own = {key: of[name] for key, of in factors.items() if name in of}
    if grad.dim() == 1:
        oracle.mc.data = own["curvature_out"]
    else:  # it calls the first dimension "in", and multiplies by the transpose on the right
        oracle.mc_in.data = own["curvature_out"]
        oracle.mc_out.data = own["curvature_in"].T
    if grad.dim() == 4:
        oracle.mc_f.data = own["curvature_filter"]
    return oracle(grad)


def kronecker_of_learn2learn(psd: bool) -> Callable[[str, Tensor, dict], Tensor]:
    def transformed(name: str, grad: Tensor, factors: dict) -> Tensor:
        make = l2l.optim.transforms.KroneckerTransform(l2l.nn.KroneckerLinear, psd=psd)
        oracle = make(grad)
        oracle.transform.left.data = factors["kronecker_left"][name]
        oracle.transform.right.data = factors["kronecker_right"][name]
        return oracle(grad)

    return transformed


PRECONDITIONERS = {
    "meta_curvature": (META_CURVATURE, meta_curvature_of_learn2learn),
    "kronecker": (KRONECKER, kronecker_of_learn2learn(psd=False)),
    "kronecker_psd": (KRONECKER_PSD, kronecker_of_learn2learn(psd=True)),
}


@pytest.mark.parametrize("kind", PRECONDITIONERS)
def test_preconditioned_gradients_are_those_of_learn2learn(kind: str) -> None:
    preconditioner, oracle = PRECONDITIONERS[kind]
    params, grads = weights(), {name: p.sin() for name, p in weights().items()}
    factors = random_factors(preconditioner)
    optimizer = precondition(sgd(1.0), preconditioner, params)
    hyper = {**optimizer.hyper, **factors}
    moved, _ = optimizer.update(grads, optimizer.init(params), params, hyper)
    for name, p in params.items():
        expected = p - oracle(name, grads[name], factors).detach()
        torch.testing.assert_close(moved[name], expected, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(moved[name], p - grads[name], rtol=1e-2)


@pytest.mark.parametrize("kind", PRECONDITIONERS)
def test_initial_factors_change_nothing(kind: str) -> None:
    """For shapes of any number of dimensions, also without elements."""
    shapes = {
        "number": (),
        "vector": (3,),
        "matrix": (2, 3),
        "1d": (4, 3, 2),
        "3d": (2, 3, 2, 1, 2),
        **{f"none of {shape}": shape for shape in ((0,), (0, 3), (3, 0), (0, 3, 2), (3, 2, 0))},
    }
    torch.manual_seed(0)
    params = {name: torch.randn(shape, dtype=F64) for name, shape in shapes.items()}
    optimizer = precondition(sgd(1.0), PRECONDITIONERS[kind][0], params)
    moved, _ = optimizer.update(params, optimizer.init(params), params, optimizer.hyper)
    assert_same(moved, {name: torch.zeros_like(p) for name, p in params.items()})


@pytest.mark.parametrize("kind", PRECONDITIONERS)
def test_factors_can_be_learned(kind: str) -> None:
    preconditioner, _ = PRECONDITIONERS[kind]
    params = {"w": weights()["linear"], "k": weights()["conv"][:2, :2, 0, :2]}
    params["b"] = torch.ones(2, dtype=F64)
    optimizer = precondition(adam(0.1, eps=0.1), preconditioner, params)
    initial = preconditioner.factors(params)
    places = [(key, name) for key, of in initial.items() for name in of]

    def loss(p: Params, step: int) -> Tensor:
        return (p["w"].sin() * p["b"]).sum() + (p["k"] * p["b"]).cos().sum() + p["b"].pow(3).sum()

    def of(*values: Tensor) -> Tensor:
        hyper: dict = dict(optimizer.hyper)
        for (key, name), value in zip(places, values, strict=True):
            hyper[key] = {**hyper[key], name: value}
        return loss(unroll(loss, params, optimizer, 2, hyper=hyper).params, 2)

    inputs = [(initial[key][name] * 1.1).requires_grad_() for key, name in places]
    assert torch.autograd.gradcheck(of, inputs)
    assert all((g != 0).any() for g in torch.autograd.grad(of(*inputs), inputs))


def test_parameters_without_factors_keep_their_gradient() -> None:
    params = weights()
    optimizer = precondition(sgd(1.0), META_CURVATURE, {"linear": params["linear"]})
    doubled = {"curvature_out": {"linear": 2 * torch.eye(3, dtype=F64)}}
    hyper = {**optimizer.hyper, **doubled}
    moved, _ = optimizer.update(params, optimizer.init(params), params, hyper)
    assert_same(
        moved, {"conv": params["conv"] * 0, "linear": -params["linear"], "bias": params["bias"] * 0}
    )


def test_factors_are_refused_unless_they_are_given_by_parameter() -> None:
    params = weights()
    optimizer = precondition(sgd(1.0), KRONECKER, params)
    with pytest.raises(ValueError, match="kronecker_left needs a tensor for each parameter"):
        optimizer.update(
            params, optimizer.init(params), params, {**optimizer.hyper, "kronecker_left": 1.0}
        )
    with pytest.raises(ValueError, match="has kronecker_left, kronecker_right already"):
        precondition(optimizer, KRONECKER_PSD, params)


def test_a_gradient_that_is_nan_clips_none_unclipped() -> None:
    """The norm is NaN, so every step is, as in torch."""
    grads = {"a": torch.tensor([float("nan")]), "b": torch.tensor([1000.0])}
    params = {name: torch.zeros(1) for name in grads}
    optimizer = clip_norm(sgd(0.1), 1.0)
    moved, _ = optimizer.update(grads, optimizer.init(params), params, optimizer.hyper)
    assert moved["a"].isnan() and moved["b"].isnan()


@pytest.mark.parametrize("small", [torch.float32, torch.complex64])
def test_clipping_keeps_the_type_of_each_parameter(small: torch.dtype) -> None:
    params = {"a": torch.tensor(3.0, dtype=small), "b": torch.ones(2, dtype=F64)}
    optimizer = clip_norm(sgd(0.1), 1.0)
    moved, _ = optimizer.update(params, optimizer.init(params), params, optimizer.hyper)
    assert {name: p.dtype for name, p in moved.items()} == {"a": small, "b": F64}
