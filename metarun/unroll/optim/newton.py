"""Newton's method within a trust region, as a differentiable inner optimizer."""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from metarun.unroll.optim.base import (
    Derivatives,
    Hyper,
    HyperValue,
    LossOptimizer,
    Params,
    refuse_complex,
    safe_sqrt,
)

LARGEST = 2048
"""Elements of the largest variable: its Hessian takes the square of that in memory, and the
cube in time."""

_LEAST_CURVATURE = 1e-8  # without a trust radius, of an indefinite Hessian


def newton(
    trust_radius: HyperValue | None = None, joint: bool = False, damping: HyperValue = 0.0
) -> LossOptimizer:
    """Newton's method, safeguarded by a multiple of the identity (Levenberg 1944).

    With gradient g and Hessian H, to which `damping` has been added, each variable moves by
    −(H + μI)⁻¹g. Let λ be the smallest eigenvalue of H.

    - With a trust radius r, μ = max(0, ‖g‖/r − λ). The smallest curvature is then at least
      ‖g‖/r, so the step is no longer than r and descends, whatever H (Nocedal and Wright 2006,
      section 4.3, with a bound in place of the exact multiplier).
    - Without one, μ = 0 if H is positive definite: one step solves a quadratic. Otherwise
      μ = 2|λ|, so that the most negative curvature counts by its magnitude, as in the
      saddle-free method (Dauphin et al. 2014), and the step descends. Where H is nearly
      singular, steps and derivatives are very large: give a trust radius or damping.

    What *a variable* is cannot be seen from the shapes:

    - `joint=False`: each parameter of shape (..., D) is a batch of independent variables. That
      is right only where the loss is a sum of terms each of which contains one of them, as for
      latent variables of many data points.
    - `joint=True`: all parameters together are one variable, of at most `LARGEST` elements. A
      linear head needs this. The rows of its weight share the softmax; taken as independent,
      each would get the sum of its row of blocks of the whole Hessian, and that is exactly zero
      for softmax regression, because adding the same to all rows changes no probability.

    A variable whose gradient or Hessian is not finite (or nearly not), or both zero, stays where it
    is and its step is a constant; the rest of its batch moves. Zero gradients and repeated
    eigenvalues have finite derivatives.

    Args:
        trust_radius: the longest step, above 0; None is no bound. A mapping may leave out
            parameters, which have none then. A tensor must broadcast against the parameter and
            counts by its magnitude. Where it differs between the elements of a variable, the
            region is the ellipsoid with these semi-axes.
        joint: see above.
        damping: added to the curvature, 0 or more: the step then minimises the quadratic model
            plus damping/2 · ‖step‖². Likewise a number, a tensor or a mapping.

    Returns:
        A `LossOptimizer` with the hyperparameters trust_radius and damping, and without a state.

    Raises:
        ValueError: a constant out of range. From `init`: a trust radius for a parameter that is
            not there, a complex parameter, or a variable that is too large. From `update`: a
            joint step in which only some parameters have a trust radius.

    Example:
        >>> import torch
        >>> from metarun.unroll import newton, unroll
        >>> loss = lambda p, step: (p["w"] - 3).square().sum()
        >>> unroll(loss, {"w": torch.zeros(2)}, newton(), steps=1).params["w"]
        tensor([3., 3.])
        >>> unroll(loss, {"w": torch.zeros(2)}, newton(trust_radius=1.0), 1).params["w"].norm()
        tensor(1.0000)

    References:
        Levenberg 1944, A method for the solution of certain non-linear problems in least squares.
        Nocedal and Wright 2006, Numerical optimization, section 4.3.
        Dauphin et al. 2014, Identifying and attacking the saddle point problem in
        high-dimensional non-convex optimization.
    """
    radii: HyperValue = math.inf if trust_radius is None else trust_radius
    for value in _constants(radii):
        _check_radius(value)
    for value in _constants(damping):
        if not 0 <= value < math.inf:
            raise ValueError(f"damping={value}: must be 0 or more")

    def init(params: Params) -> tuple[()]:
        if isinstance(radii, Mapping) and (unknown := [n for n in radii if n not in params]):
            raise ValueError(
                f"trust_radius for {', '.join(unknown)}: there are only {', '.join(params)}"
            )
        refuse_complex(params, "newton")
        _check_size(params, joint)
        return ()

    def update(
        derivatives: Derivatives, state: tuple[()], params: Params, hyper: Hyper
    ) -> tuple[Params, tuple[()]]:
        refuse_complex(params, "newton")
        gradient = derivatives.gradient()
        given = params
        params = {name: p for name, p in given.items() if p.numel()}
        if not params:  # an empty parameter has no curvature
            return given, state
        axes = {name: semi_axes(_radius_of(hyper, name), p) for name, p in params.items()}
        damps = {name: _damping(hyper, name, p) for name, p in params.items()}
        if joint:
            flat = _flat({name: gradient[name] for name in params})
            hessian = derivatives.joint_hessian(list(params)) + torch.diag(_flat(damps))
            step, _ = newton_direction(flat, hessian, _joined(axes))
            pieces = torch.split(step, [p.numel() for p in params.values()])
            steps = dict(zip(params, pieces, strict=True))
        else:
            steps = {}
            for name in params:
                hessian = derivatives.hessian(name) + torch.diag_embed(damps[name])
                g = gradient[name].reshape(damps[name].shape)
                steps[name], _ = newton_direction(g, hessian, axes[name])
        moved = {name: p + steps[name].reshape(p.shape) for name, p in params.items()}
        return {name: moved.get(name, p) for name, p in given.items()}, state

    return LossOptimizer(init, update, {"trust_radius": radii, "damping": damping})


def newton_direction(
    gradient: Tensor, hessian: Tensor, semi_axes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The step of `newton` for a batch of variables.

    Args:
        gradient: (..., D).
        hessian: (..., D, D).
        semi_axes: of the trust region, (..., D), above 0; or None.

    Returns:
        The step, (..., D), and the positive definite matrix that took the Hessian's place,
        (..., D, D), which is NaN where a variable stays for lack of usable derivatives.
    """
    flat = torch.cat([gradient[..., None], hessian], dim=-1).flatten(-2)
    within = flat.abs() < torch.finfo(flat.dtype).max / 1e4  # room for sums; false for NaN
    usable = (within.all(-1) & (flat != 0).any(-1))[..., None]
    eye = torch.eye(gradient.shape[-1], dtype=gradient.dtype, device=gradient.device)
    # Replaced before anything is computed of them: LAPACK refuses a whole batch for one NaN,
    # and a NaN that is only masked afterwards returns in the derivative.
    gradient = torch.where(usable, gradient, 0.0)
    hessian = torch.where(usable[..., None], (hessian + hessian.mT) / 2, eye)
    matrix = hessian + torch.diag_embed(_shift(gradient, hessian, semi_axes))
    step = -torch.linalg.solve_ex(matrix, gradient[..., None]).result[..., 0]
    return step, torch.where(usable[..., None], matrix, torch.nan)


def semi_axes(trust_radius: float | Tensor, x: Tensor) -> Tensor | None:
    """The trust region of each variable in the form that `newton_direction` wants.

    Raises:
        ValueError: a constant radius that is not above 0.
    """
    _check_radius(trust_radius)
    if isinstance(trust_radius, Tensor):
        # A learned radius may cross zero; it comes back, instead of turning the region off.
        magnitude = trust_radius.to(x.dtype).abs().clamp(min=1e-8)
        return _at_least_1d(magnitude.expand(x.shape))
    return None if math.isinf(trust_radius) else _at_least_1d(torch.full_like(x, trust_radius))


def _shift(gradient: Tensor, hessian: Tensor, semi_axes: Tensor | None) -> Tensor:
    """(..., D): what to add to the diagonal of the Hessian."""
    if semi_axes is None:
        lowest, rounding = _lowest_eigenvalue(hessian)
        least = torch.maximum(lowest.abs(), rounding.clamp(min=_LEAST_CURVATURE))
        return (torch.maximum(lowest, least) - lowest).expand(gradient.shape)
    # Stretched by its semi-axes the region is a ball, of any radius that suits the numbers.
    radius = semi_axes.detach().amax(-1, keepdim=True)
    stretch = semi_axes / radius
    lowest, rounding = _lowest_eigenvalue(stretch[..., :, None] * hessian * stretch[..., None, :])
    # The gradient may be zero where the Hessian is singular, and a shift is only as exact as
    # what it is added to: hence `rounding`.
    least = _norm(stretch * gradient) / radius + rounding
    return (torch.maximum(lowest, least) - lowest) / stretch.square()


def _lowest_eigenvalue(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(..., 1) the smallest eigenvalue, and how far from zero it can be told."""
    # Eigenvalues alone: unlike eigenvectors they have a finite derivative where some coincide.
    # LAPACK fails on entries whose squares overflow, and one failure ends the whole batch. In
    # float32 it does not converge for some matrices of many dimensions: hence float64.
    double = matrix.double()
    unit = double.detach().abs().amax((-2, -1)).clamp(min=torch.finfo(double.dtype).tiny)[..., None]
    eigenvalues = (unit * torch.linalg.eigvalsh(double / unit[..., None])).to(matrix.dtype)
    scale = eigenvalues.abs().amax(-1, keepdim=True)
    numbers = torch.finfo(matrix.dtype)
    rounding = numbers.eps * (matrix.shape[-1] + 2) * scale
    return eigenvalues[..., :1], rounding.clamp(min=numbers.tiny)


def _norm(x: Tensor) -> Tensor:
    """(..., 1) the length of vectors: zero derivative at zero, and no overflow of the squares."""
    scale = x.detach().abs().amax(-1, keepdim=True)
    scale = torch.where(scale > 0, scale, 1.0)
    return scale * safe_sqrt((x / scale).square().sum(-1, keepdim=True))


def _constants(value: HyperValue) -> Iterator[float]:
    values = value.values() if isinstance(value, Mapping) else [value]
    return (v for v in values if not isinstance(v, Tensor))


def _check_size(params: Params, joint: bool) -> None:
    sizes = {name: p.shape[-1] if p.dim() else 1 for name, p in params.items() if p.numel()}
    if joint:
        sizes = {"all parameters together": sum(p.numel() for p in params.values())}
    for what, size in sizes.items():
        if size > LARGEST:
            raise ValueError(
                f"newton needs a Hessian of {size} × {size} for {what}; it takes {LARGEST} at "
                "most: adapt less, such as the head alone (algo=anil), or leave the rest to "
                "another optimizer (inner_opt=partition)"
            )


def _radius_of(hyper: Hyper, name: str) -> float | Tensor:
    radii = hyper["trust_radius"]
    return radii.get(name, math.inf) if isinstance(radii, Mapping) else radii


def _check_radius(radius: float | Tensor) -> None:
    if not isinstance(radius, Tensor) and not radius > 0:
        raise ValueError(f"trust_radius={radius}: must be above 0")


def _damping(hyper: Hyper, name: str, p: Tensor) -> Tensor:
    damping = hyper["damping"]
    damping = damping.get(name, 0.0) if isinstance(damping, Mapping) else damping
    if isinstance(damping, Tensor):
        return _at_least_1d(damping.to(p.dtype).expand(p.shape))
    return _at_least_1d(torch.full_like(p, damping))


def _joined(axes: Mapping[str, Tensor | None]) -> Tensor | None:
    given = {name: a for name, a in axes.items() if a is not None}
    if given and len(given) < len(axes):
        without = ", ".join(name for name in axes if name not in given)
        raise ValueError(f"a joint step needs a trust_radius for {without} too, or for none")
    return _flat(given) if given else None


def _flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors.values()])


def _at_least_1d(p: Tensor) -> Tensor:
    return p.reshape(1) if p.dim() == 0 else p
