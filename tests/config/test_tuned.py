"""Settings for pairs of options (`conf/_tuned`, `conf/_usual`) belong to options that there are."""

import pytest
import torch

from metarun.config.catalogue import schemas
from metarun.config.compose import composed, register_schemas
from metarun.training.evaluation import evaluate_split
from metarun.training.setup import build
from metarun.training.state import fresh
from tests.conftest import REPO


@pytest.mark.parametrize(("folder", "group"), [("_tuned", "data"), ("_usual", "algo")])
def test_each_file_is_of_two_options(folder: str, group: str) -> None:
    names = [path.stem for path in (REPO / "conf" / folder).iterdir()]
    pairs = {f"{one}_{other}" for one in schemas(group) for other in schemas("inner_opt")}
    assert names and set(names) <= pairs


ALL_OF_A_NETWORK = [name for name in schemas("inner_opt") if name not in ("muon", "newton")]
"""Inner optimizers that take every parameter of a network: muon takes matrices, newton few."""


@pytest.mark.parametrize("data", ["sinusoid", "sinusoid_line", "harmonic", "gp_curves"])
@pytest.mark.parametrize("inner_opt", ALL_OF_A_NETWORK)
def test_curves_have_a_rate_with_which_they_are_learned(data: str, inner_opt: str) -> None:
    """That of images, 0.4, makes their inner losses infinite."""
    register_schemas()
    given = [f"data={data}", f"inner_opt={inner_opt}", "backbone=mlp", "engine.compile=none"]
    setup = build(composed("train", given), torch.device("cpu"))
    found = evaluate_split(
        setup, setup.trace, fresh(setup).meta, "val", 20, lambda done: None
    )  # fmt: skip
    before, *_, after = found.losses.mean(0).tolist()
    assert after < 10 * before, f"{before} before the inner steps, {after} after them"
