"""Random curves: each task is what its formula says, and drawn as often as it should be."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import solve_triangular
from torch import Tensor

from metarun.components.data._curves import Curves
from metarun.components.data.gp_curves import GpCurvesConfig, gp_curves
from metarun.components.data.harmonic import HarmonicConfig, harmonic
from metarun.components.data.sinusoid_line import SinusoidLineConfig, sinusoid_line
from metarun.config.run import TaskConfig
from metarun.episodes.rng import normal
from metarun.episodes.source import Episodes
from metarun.errors import ConfigError

CPU = torch.device("cpu")
TASKS = 2000
OURS = {
    "sinusoid_line": (sinusoid_line, SinusoidLineConfig),
    "harmonic": (harmonic, HarmonicConfig),
    "gp_curves": (gp_curves, GpCurvesConfig),
}


def source(name: str, shot: int = 10, query: int = 6, **own: float) -> Curves:
    build, config = OURS[name]
    made: Curves = build(TaskConfig(1, shot, query), 0, CPU, torch.float64, config(**own))
    return made


def points(episodes: Episodes) -> tuple[Tensor, Tensor]:
    """Support and query as one: x and y of shape (tasks, points)."""
    x = torch.cat([episodes.support_x, episodes.query_x], dim=1)
    y = torch.cat([episodes.support_y, episodes.query_y], dim=1)
    return x[:, :, 0], y[:, :, 0]


def left(basis: Tensor, y: Tensor) -> Tensor:
    """How far y is from the nearest sum of basis functions, (tasks,): the largest distance."""
    solution = torch.linalg.lstsq(basis, y[:, :, None]).solution
    return (basis @ solution - y[:, :, None]).abs().amax(dim=(1, 2))


def test_normal_numbers_are_normal() -> None:
    numbers = normal(7, torch.arange(400_000))
    assert numbers.shape == (200_000,)
    sorted_numbers, levels = numbers.sort().values, (torch.arange(200_000) + 0.5) / 200_000
    distance = (torch.special.ndtr(sorted_numbers) - levels).abs().max()
    assert distance < 1.63 / math.sqrt(200_000)  # Kolmogorov and Smirnov, at 1 %
    assert abs((numbers[1:] * numbers[:-1]).mean()) < 4 / math.sqrt(200_000)


def test_half_of_the_tasks_are_sinusoids_and_half_are_lines() -> None:
    x, y = points(source("sinusoid_line", noise=0.0).sample("train", 0, TASKS))
    line = left(torch.stack([x, torch.ones_like(x)], dim=2), y) < 1e-9
    sine = left(torch.stack([x.sin(), x.cos()], dim=2), y) < 1e-9
    assert (line ^ sine).all()
    assert abs(line.double().mean() - 0.5) < 4 * 0.5 / math.sqrt(TASKS)
    slope = torch.linalg.lstsq(torch.stack([x, torch.ones_like(x)], 2), y[:, :, None]).solution
    of_lines = slope[line][:, :, 0]
    assert of_lines.abs().max() <= 3 and (of_lines.abs().amax(dim=0) > 2.95).all()
    assert x.abs().max() <= 5


def test_harmonics_have_two_waves_one_twice_as_fast() -> None:
    x, y = points(source("harmonic").sample("train", 0, 200))
    found = torch.full((200,), math.inf, dtype=torch.float64)
    for frequency in torch.linspace(5, 7, 401, dtype=torch.float64):
        waves = [f(k * frequency * x) for k in (1, 2) for f in (torch.sin, torch.cos)]
        found = torch.minimum(found, left(torch.stack(waves, dim=2), y))
    assert found.max() < 0.1  # the nearest of these frequencies is 0.0025 off
    wrong = [f(k * 9.0 * x) for k in (1, 2) for f in (torch.sin, torch.cos)]
    assert left(torch.stack(wrong, dim=2), y).median() > 0.3
    assert abs(y.var() - 1) < 0.2  # E[a₁²]/2 + E[a₂²]/2
    assert abs(x.var(dim=1).mean() - 1) < 0.1
    assert x.mean(dim=1).abs().max() < 4 + 2


def test_curves_of_a_gaussian_process_have_its_covariance() -> None:
    own = {"length_scale": 0.7, "scale": 1.5, "noise": 0.1}
    x, y = (part.numpy() for part in points(source("gp_curves", **own).sample("train", 0, TASKS)))
    distance = x[:, :, None] - x[:, None, :]
    kernel = 1.5**2 * np.exp(-(distance**2) / (2 * 0.7**2)) + 0.1**2 * np.eye(x.shape[1])
    white = np.stack(
        [
            solve_triangular(np.linalg.cholesky(k), v, lower=True)
            for k, v in zip(kernel, y, strict=True)
        ]
    )  # standard normal and independent, if the kernel is right
    covariance = white.T @ white / TASKS
    np.testing.assert_allclose(covariance, np.eye(x.shape[1]), atol=5 / math.sqrt(TASKS) * 1.42)
    assert abs(x).max() <= 2


@pytest.mark.parametrize("name", ["sinusoid_line", "harmonic", "gp_curves"])
def test_noise_is_added_to_targets_alone(name: str) -> None:
    quiet, noisy = (source(name, noise=noise).sample("val", 0, TASKS) for noise in (0.0, 0.5))
    assert torch.equal(quiet.support_x, noisy.support_x)
    if name != "gp_curves":  # its noise is a part of the kernel
        added = noisy.query_y - quiet.query_y
        assert abs(added.std() - 0.5) < 0.02 and abs(added.mean()) < 0.02


@pytest.mark.parametrize("name", ["sinusoid_line", "harmonic", "gp_curves"])
def test_what_changes_the_curves_changes_their_identity(name: str) -> None:
    assert source(name).identity == source(name).identity
    assert source(name).identity != source(name, noise=0.7).identity


@pytest.mark.parametrize(
    ("name", "own", "reason"),
    [
        ("harmonic", {"noise": -1.0}, "data.noise=-1.0: must be 0 or more"),
        ("sinusoid_line", {"noise": math.inf}, "data.noise=inf: must be a finite number"),
        ("gp_curves", {"length_scale": 0.0}, "data.length_scale=0.0: must be above 0"),
        ("gp_curves", {"scale": -1.0}, "data.scale=-1.0: must be above 0"),
    ],
)
def test_impossible_curves_are_refused(name: str, own: dict[str, float], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        source(name, **own)
