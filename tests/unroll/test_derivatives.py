"""Gradients and Hessians on demand, against torch.autograd.functional."""

import pytest
import torch
from torch import Tensor

from metarun.unroll.gradients.derivatives import derivatives_of, derivatives_of_value

A = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def loss_of(params: dict[str, Tensor]) -> Tensor:
    mixed = (params["w"].sin() @ A).pow(3).sum() * params["b"].exp().sum()
    return mixed + params["c"].pow(3) * params["b"].prod()


def start() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"w": (2, 3), "b": (2,), "c": ()}
    return {
        name: torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        for name, shape in shapes.items()
    }


def oracle(params: dict[str, Tensor], names: list[str]) -> Tensor:
    """(N, N) over the elements of the named parameters."""
    sizes = [params[name].numel() for name in names]

    def of_flat(flat: Tensor) -> Tensor:
        pieces = zip(names, flat.split(sizes), strict=True)
        return loss_of(params | {n: piece.reshape(params[n].shape) for n, piece in pieces})

    flat = torch.cat([params[name].detach().flatten() for name in names])
    return torch.autograd.functional.hessian(of_flat, flat)


def both(params: dict[str, Tensor]) -> list:
    return [derivatives_of(loss_of, params), derivatives_of_value(loss_of(params), params)]


@pytest.mark.parametrize("names", [["w"], ["b"], ["c"], ["w", "c"], ["c", "b", "w"]], ids=str)
def test_a_joint_hessian_has_all_second_derivatives(names: list[str]) -> None:
    for derivatives in both(start()):
        torch.testing.assert_close(derivatives.joint_hessian(names), oracle(start(), names))


def test_loss_and_gradient() -> None:
    params = start()
    expected = torch.autograd.grad(loss_of(params), list(params.values()))
    for derivatives in both(params):
        torch.testing.assert_close(derivatives.loss, loss_of(params))
        for name, gradient in zip(params, expected, strict=True):
            torch.testing.assert_close(derivatives.gradient()[name], gradient)


def test_a_hessian_has_one_block_for_each_variable_of_a_batch() -> None:
    """Of shape (2, 3, 4): six independent variables of dimension 4."""
    x = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x.requires_grad_()
    weight = torch.arange(1.0, 7.0, dtype=torch.float64).reshape(2, 3, 1)

    def loss(params: dict[str, Tensor]) -> Tensor:
        return (weight * params["x"].cos().cumsum(-1).pow(2)).sum()

    whole = derivatives_of(loss, {"x": x}).joint_hessian(["x"]).reshape(6, 4, 6, 4)
    blocks = torch.stack([whole[i, :, i] for i in range(6)]).reshape(2, 3, 4, 4)
    assert all(whole[i, :, j].abs().max() == 0 for i in range(6) for j in range(6) if i != j)
    torch.testing.assert_close(derivatives_of(loss, {"x": x}).hessian("x"), blocks)
    torch.testing.assert_close(derivatives_of_value(loss({"x": x}), {"x": x}).hessian("x"), blocks)


def test_a_scalar_is_a_variable_of_dimension_one() -> None:
    for derivatives in both(start()):
        assert derivatives.hessian("c").shape == (1, 1)
        torch.testing.assert_close(derivatives.hessian("c"), oracle(start(), ["c"]))


def test_the_rows_of_a_softmax_head_are_not_independent_variables() -> None:
    """Adding the same to all rows changes no probability: each row of blocks sums to zero."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(10, 4, dtype=torch.float64, generator=generator)
    labels = torch.arange(5).repeat(2)
    params = {"weight": torch.randn(5, 4, dtype=torch.float64, generator=generator)}

    def loss(params: dict[str, Tensor]) -> Tensor:
        return torch.nn.functional.cross_entropy(features @ params["weight"].T, labels)

    derivatives = derivatives_of(loss, params)
    assert derivatives.hessian("weight").abs().max() < 1e-15
    assert torch.linalg.matrix_rank(derivatives.joint_hessian(["weight"])) == 4 * 4


def test_a_linear_loss_has_a_zero_hessian() -> None:
    params = {"x": torch.ones(2, 3, requires_grad=True), "y": torch.ones(2, requires_grad=True)}

    def loss(params: dict[str, Tensor]) -> Tensor:
        return params["x"].sum() + params["y"].pow(2).sum()

    for derivatives in (derivatives_of(loss, params), derivatives_of_value(loss(params), params)):
        assert torch.equal(derivatives.hessian("x"), torch.zeros(2, 3, 3))
        assert torch.equal(
            derivatives.joint_hessian(["x", "y"]), torch.diag(torch.tensor([0.0] * 6 + [2.0] * 2))
        )


def test_derivatives_can_be_differentiated() -> None:
    def of_value(w: Tensor, b: Tensor) -> Tensor:
        params = {"w": w, "b": b, "c": start()["c"]}
        derivatives = derivatives_of_value(loss_of(params), params)
        return derivatives.joint_hessian(["w", "b"])

    def of_function(w: Tensor, b: Tensor) -> Tensor:
        derivatives = derivatives_of(loss_of, {"w": w, "b": b, "c": start()["c"]})
        return derivatives.joint_hessian(["w", "b"])

    inputs = [start()["w"], start()["b"]]
    assert torch.autograd.gradcheck(of_value, inputs)
    assert torch.autograd.gradcheck(of_function, inputs)


def test_constant_derivatives_keep_no_graph_and_are_constants_under_func_transforms() -> None:
    derivatives = derivatives_of(loss_of, start(), constant=True)
    tensors = [derivatives.loss, derivatives.hessian("w"), derivatives.joint_hessian(["w", "b"])]
    assert not any(t.requires_grad for t in [*tensors, *derivatives.gradient().values()])
    torch.testing.assert_close(tensors[2], oracle(start(), ["w", "b"]))

    def hessian_sum(params: dict[str, Tensor], constant: bool) -> Tensor:
        return derivatives_of(loss_of, params, constant=constant).joint_hessian(["w"]).sum()

    assert torch.func.grad(hessian_sum)(start(), True)["w"].abs().max() == 0
    assert torch.func.grad(hessian_sum)(start(), False)["w"].abs().max() > 0


def test_a_loss_that_cannot_be_differentiated_is_refused() -> None:
    params = start()
    with pytest.raises(ValueError, match=r"scalar, not of shape \(2,\)"):
        derivatives_of_value(params["b"] * 2, params)
    with pytest.raises(ValueError, match="does not depend on w, c"):
        derivatives_of_value(params["b"].sum(), params)
    with pytest.raises(ValueError, match="does not depend on b"):
        derivatives_of_value(torch.zeros(()), {"b": params["b"]})
    with pytest.raises(ValueError, match=r"^c: must require gradients"):
        constant = params | {"c": torch.ones((), dtype=torch.float64)}
        derivatives_of_value(loss_of(params), constant)
