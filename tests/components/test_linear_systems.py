"""Solving without a look at values has the derivatives of `torch.linalg.solve`, of every order."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from metarun.components.algo.linear_systems import solve, solve_unchecked


def drawn(*batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((*batch, 4, 4), (*batch, 4, 3))
    made = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return tuple(x.requires_grad_() for x in made)  # type: ignore[return-value]


def test_its_first_and_second_derivatives_are_those_of_finite_differences() -> None:
    assert gradcheck(solve_unchecked, drawn())
    assert gradgradcheck(solve_unchecked, drawn())


@pytest.mark.parametrize("order", [0, 1, 2])
def test_under_vmap_it_is_what_torch_computes(order: int) -> None:
    def total(f: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda a, b: f(a, b).sin().sum()

    found = []
    for f in (solve_unchecked, torch.linalg.solve):
        g: Callable[..., Tensor] = total(f)
        for _ in range(order):
            g = torch.func.grad(lambda a, b, g=g: g(a, b).sin().sum())
        found.append(torch.func.vmap(g)(*(x.detach() for x in drawn(5))))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_a_singular_matrix_is_refused_on_a_cpu_and_shows_elsewhere() -> None:
    singular, right = torch.zeros(2, 2), torch.ones(2, 1)
    with pytest.raises(RuntimeError, match="singular"):
        solve(singular, right)
    assert not solve_unchecked(singular, right).isfinite().any()
