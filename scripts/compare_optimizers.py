"""Draw how the inner optimizers converge, each with its best learning rate.

    python scripts/compare_optimizers.py --out docs/optimizers.png

Each optimizer takes 200 steps on Rosenbrock's function from (-1.5, 2) in float64, for 60 learning
rates at once (one unroll, mapped over them by vmap), and keeps the one whose values have the
lowest mean logarithm, which is early as well as deep. Newton's method has no learning rate; its
trust radius is searched for instead.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metarun.unroll import (
    adadelta,
    adagrad,
    adam,
    adamax,
    asgd,
    nadam,
    newton,
    radam,
    rmsprop,
    rprop,
    sgd,
    unroll,
)

STEPS = 200
FLOOR = 1e-16  # of the values, where a logarithm is taken
START = (-1.5, 2.0)
OPTIMIZERS: dict[str, tuple[Any, str]] = {
    "SGD": (sgd(), "lr"),
    "SGD, momentum 0.9": (sgd(momentum=0.9), "lr"),
    "SGD, Nesterov 0.9": (sgd(momentum=0.9, nesterov=True), "lr"),
    "Adam": (adam(), "lr"),
    "NAdam": (nadam(), "lr"),
    "RAdam": (radam(), "lr"),
    "Adamax": (adamax(), "lr"),
    "RMSprop": (rmsprop(), "lr"),
    "Adagrad": (adagrad(), "lr"),
    "Adadelta": (adadelta(), "lr"),
    "ASGD": (asgd(), "lr"),
    "Rprop": (rprop(), "lr"),
    "Newton": (newton(trust_radius=1.0), "trust_radius"),
}


def rosenbrock(x: Tensor, y: Tensor) -> Tensor:
    """(1 − x)² + 100 (y − x²)², whose minimum lies at (1, 1)."""
    return (1 - x).pow(2) + 100 * (y - x * x).pow(2)


def best_path(optimizer: Any, setting: str) -> tuple[float, Tensor, Tensor]:
    """The best value of a setting, its path (steps + 1, 2) and the function's values on it."""

    def path(value: Tensor) -> Tensor:
        end = unroll(
            lambda params, step: rosenbrock(*params["xy"]),
            {"xy": torch.tensor(START, dtype=torch.float64)},
            optimizer,
            STEPS,
            hyper={**optimizer.hyper, setting: value},
            observe=lambda params: params["xy"],
        )
        return torch.stack(end.observed)

    values = torch.logspace(-4, 1, 60, dtype=torch.float64)
    with torch.no_grad():
        paths = torch.func.vmap(path)(values)
    losses = rosenbrock(*paths.unbind(-1)).nan_to_num(nan=math.inf)
    best = losses.clamp(min=FLOOR).log10().mean(dim=1).argmin()
    return float(values[best]), paths[best], losses[best]


def main() -> None:
    """Search, print, draw."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/optimizers.png"))
    out: Path = parser.parse_args().out
    figure, (plane, curves) = plt.subplots(1, 2, figsize=(13, 5.2), layout="constrained")
    x, y = torch.linspace(-2, 2, 300), torch.linspace(-1, 3, 300)
    height = rosenbrock(x[None, :], y[:, None]).add(1e-3).log10()
    plane.contour(x, y, height, levels=14, colors="0.8", linewidths=0.7)
    plane.plot(1, 1, "k*", markersize=12, zorder=5)
    colors = plt.get_cmap("tab20").colors
    print(f"{'optimizer':20} {'setting':>22} {'value after ' + str(STEPS) + ' steps':>24}")
    for (name, (optimizer, setting)), color in zip(OPTIMIZERS.items(), colors, strict=False):
        value, path, losses = best_path(optimizer, setting)
        print(f"{name:20} {setting + ' = ' + format(value, '.3g'):>22} {losses[-1].item():24.3g}")
        plane.plot(*path.T, "-", color=color, linewidth=1.4)
        label = f"{name} ({setting.replace('_', ' ')} {value:.2g})"
        curves.plot(losses.clamp(min=FLOOR), color=color, linewidth=1.6, label=label)
    plane.set(xlim=(-2, 2), ylim=(-1, 3), xlabel="x", ylabel="y", title="Rosenbrock's function")
    curves.set(yscale="log", ylim=(FLOOR, None), xlabel="step", ylabel="value", title="Convergence")
    curves.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    curves.grid(alpha=0.3)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
