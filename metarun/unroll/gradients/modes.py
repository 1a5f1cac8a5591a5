"""The ways in which an unroll can be differentiated, and their options."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

Solver = Literal["cg", "neumann", "fixed_point"]
"""How `Implicit` solves its linear system."""


@dataclass(frozen=True)
class Truncated:
    """Exact through the last steps only (truncated back-propagation; Shaban et al. 2019).

    The steps before them are taken without a graph, so memory does not grow with their number.
    Their derivative with respect to the initial parameters is taken to be the identity, as in
    first-order MAML; with respect to everything else it is zero. So `last=steps` is "reverse".

    Args:
        last: steps that are differentiated through, 0 or more.

    Raises:
        ValueError: `last` is below 0.

    Example:
        >>> import torch
        >>> from metarun.unroll import Truncated, sgd, unroll
        >>> w = torch.zeros(1, requires_grad=True)
        >>> loss = lambda p, step: p["w"].square().sum()
        >>> for last in (0, 1, 3):
        ...     end = unroll(loss, {"w": w}, sgd(0.1), steps=3, gradient=Truncated(last))
        ...     torch.autograd.grad(end.params["w"].sum(), w)  # (1 − 2 lr)^last
        (tensor([1.]),)
        (tensor([0.8000]),)
        (tensor([0.5120]),)

    References:
        Shaban et al. 2019, Truncated back-propagation for bilevel optimization.
    """

    last: int  # steps that are differentiated through, 0 or more

    def __post_init__(self) -> None:
        if self.last < 0:
            raise ValueError(f"Truncated(last={self.last}): must be 0 or more")


@dataclass(frozen=True)
class Checkpoint:
    """Exact; keeps the parameters at the start of each block and recomputes the rest.

    Memory for `steps` inner steps falls from O(steps · activations) to O(steps · parameters +
    activations), and with blocks of √steps to O(√steps · (parameters + activations)), for one
    more evaluation of each step (Chen et al. 2016).

    Args:
        block: inner steps in a block, 1 or more; None: the square root of their number.

    Raises:
        ValueError: `block` is below 1.

    Example:
        >>> import torch
        >>> from metarun.unroll import Checkpoint, sgd, unroll
        >>> w = torch.zeros(1, requires_grad=True)
        >>> loss = lambda p, step: p["w"].cos().sum()
        >>> for mode in ("reverse", Checkpoint(block=None)):
        ...     end = unroll(loss, {"w": w}, sgd(0.1), steps=9, gradient=mode)
        ...     torch.autograd.grad(end.params["w"].sum(), w)  # 1.1⁹
        (tensor([2.3579]),)
        (tensor([2.3579]),)

    References:
        Chen et al. 2016, Training deep nets with sublinear memory cost.
    """

    block: int | None = 1  # inner steps in a block; None: the square root of their number

    def __post_init__(self) -> None:
        if self.block is not None and self.block < 1:
            raise ValueError(f"Checkpoint(block={self.block}): must be 1 or more")

    def size(self, steps: int) -> int:
        """Inner steps in a block of an unroll.

        Args:
            steps: inner steps of the unroll.

        Returns:
            `block`, or √steps rounded, 1 or more.
        """
        return self.block or max(1, round(math.sqrt(steps)))


@dataclass(frozen=True)
class Implicit:
    """The implicit function theorem at the end of the unroll (iMAML, Rajeswaran et al. 2019).

    The inner problem becomes min L(θ) + proximal / 2 · ‖θ − θ₀‖², and is differentiated as
    though it had been solved: with H the Hessian of the last step's L, and
    v = (H + proximal · I)⁻¹ · ∂outer/∂θ, the derivative is proximal · v for the initial
    parameters θ₀ and −(∂²L / ∂context ∂θ) · v for the context. It knows nothing of the path: the
    optimizer's hyperparameters have none.

    "cg" takes `solver_steps` conjugate-gradient steps. "neumann" sums that many powers of
    I − solver_lr · (H + proximal · I) after the first term; "fixed_point" iterates
    v ← v − solver_lr · ((H + proximal · I) · v − ∂outer/∂θ) that often from zero, and so
    equals "neumann" with one step less (Lorraine et al. 2020; Grazzi et al. 2020). Both
    converge where solver_lr is below 2 / (largest eigenvalue of H + proximal · I).

    All three need H + proximal · I to be positive definite, as it is where the proximal problem
    has a minimum. Elsewhere "cg" stops at the first direction of negative curvature: if that is
    ∂outer/∂θ itself, the derivative is zero. The other two diverge. A larger proximal helps.

    Args:
        proximal: strength of the proximal term, above 0.
        solver: how the linear system is solved.
        solver_steps: 1 or more.
        solver_lr: step size of "neumann" and "fixed_point", above 0.

    Raises:
        ValueError: an unknown solver, or a number out of range.

    Example:
        >>> import torch
        >>> from metarun.unroll import Implicit, sgd, unroll
        >>> w, target = torch.zeros(1, requires_grad=True), torch.ones(1, requires_grad=True)
        >>> end = unroll(
        ...     lambda p, step, target: (p["w"] - target).square().sum(),  # H = 2
        ...     {"w": w},
        ...     sgd(0.1),
        ...     steps=30,
        ...     context=target,
        ...     gradient=Implicit(proximal=2.0),
        ... )
        >>> torch.autograd.grad(end.params["w"].sum(), (w, target))
        (tensor([0.5000]), tensor([0.5000]))

    References:
        Rajeswaran et al. 2019, Meta-learning with implicit gradients.
        Lorraine, Vicol and Duvenaud 2020, Optimizing millions of hyperparameters by implicit
        differentiation.
        Grazzi et al. 2020, On the iteration complexity of hypergradient computation.
    """

    proximal: float = 2.0
    solver: Solver = "cg"
    solver_steps: int = 5
    solver_lr: float = 0.1  # of neumann and fixed_point

    def __post_init__(self) -> None:
        if self.solver not in get_args(Solver):
            allowed = ", ".join(get_args(Solver))
            raise ValueError(f"unknown solver {self.solver!r}: choose one of {allowed}")
        if not self.proximal > 0:
            raise ValueError(f"Implicit(proximal={self.proximal}): must be above 0")
        if self.solver_steps < 1:
            raise ValueError(f"Implicit(solver_steps={self.solver_steps}): must be 1 or more")
        if not self.solver_lr > 0:
            raise ValueError(f"Implicit(solver_lr={self.solver_lr}): must be above 0")


@dataclass(frozen=True)
class Evolution:
    """Antithetic evolution strategies over the unroll (Salimans et al. 2017; Metz et al. 2019).

    An unbiased estimate of the derivative of the unroll smoothed by a Gaussian of standard
    deviation `sigma` in everything that it is differentiated by; for inner loops that are
    chaotic or have no useful derivative. Its error falls with the square root of `samples`
    and grows with that of the number of parameters. Costs 2 · samples unrolls, no graph.

    With f the unroll as a function of x, and u the derivative of the outer loss with respect to
    f(x), the estimate is the mean over `samples` draws ε ~ N(0, I) of

        u · (f(x + sigma · ε) − f(x − sigma · ε)) / (2 · sigma) · ε

    Args:
        samples: antithetic pairs, 1 or more.
        sigma: above 0, in the units of what is differentiated by.

    Raises:
        ValueError: a number out of range.

    Example:
        >>> import torch
        >>> from metarun.unroll import Evolution, sgd, unroll
        >>> _ = torch.manual_seed(0)
        >>> w = torch.zeros(1, requires_grad=True)
        >>> loss = lambda p, step: p["w"].square().sum()
        >>> end = unroll(loss, {"w": w}, sgd(0.1), steps=3, gradient=Evolution(samples=100))
        >>> torch.autograd.grad(end.params["w"].sum(), w)[0].round(decimals=1)  # 0.8³
        tensor([0.5000])

    References:
        Salimans et al. 2017, Evolution strategies as a scalable alternative to reinforcement
        learning.
        Metz et al. 2019, Understanding and correcting pathologies in the training of learned
        optimizers.
    """

    samples: int = 16  # antithetic pairs
    sigma: float = 0.01

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"Evolution(samples={self.samples}): must be 1 or more")
        if not self.sigma > 0:
            raise ValueError(f"Evolution(sigma={self.sigma}): must be above 0")


GradientName = Literal[
    "reverse", "first_order", "truncated", "checkpoint", "mixed", "implicit", "evolution"
]
Simple = Literal["reverse", "first_order", "mixed"]
Parsed = Simple | Truncated | Checkpoint | Implicit | Evolution
GradientMode = Parsed | Literal["checkpoint", "implicit", "evolution"]
"""A name, or an object where there are options; see `unroll`.

"mixed" falls back to "checkpoint" with a warning where torch has no forward mode for an operation,
which the warning names, and where forward and reverse mode differ."""


def parse_gradient(gradient: GradientMode | str) -> Parsed:
    """The mode with its options: names that have some become objects with the defaults.

    Raises:
        ValueError: an unknown name, or "truncated" without its number of steps.
    """
    if isinstance(gradient, Truncated | Checkpoint | Implicit | Evolution):
        return gradient
    if gradient == "truncated":
        raise ValueError("gradient 'truncated' needs a length: give Truncated(last=…)")
    if not isinstance(gradient, str) or gradient not in get_args(GradientName):
        allowed = ", ".join(get_args(GradientName))
        raise ValueError(f"unknown gradient mode {gradient!r}: choose one of {allowed}")
    modes: dict[str, Parsed] = {
        "reverse": "reverse",
        "first_order": "first_order",
        "mixed": "mixed",
        "checkpoint": Checkpoint(),
        "implicit": Implicit(),
        "evolution": Evolution(),
    }
    return modes[gradient]
