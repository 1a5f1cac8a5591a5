"""Settings for pairs of options (`conf/_tuned`, `conf/_usual`) belong to options that there are."""

import pytest

from metarun.config.catalogue import schemas
from metarun.config.compose import composed, register_schemas
from tests.conftest import REPO


@pytest.mark.parametrize(("folder", "group"), [("_tuned", "data"), ("_usual", "algo")])
def test_each_file_is_of_two_options(folder: str, group: str) -> None:
    names = [path.stem for path in (REPO / "conf" / folder).iterdir()]
    pairs = {f"{one}_{other}" for one in schemas(group) for other in schemas("inner_opt")}
    assert names and set(names) <= pairs


@pytest.mark.parametrize("data", ["sinusoid", "sinusoid_line", "harmonic", "gp_curves"])
def test_curves_have_a_rate_with_which_they_are_learned(data: str) -> None:
    """That of images, 0.4, makes their inner losses infinite."""
    register_schemas()
    assert composed("train", [f"data={data}", "backbone=mlp"]).inner_opt.lr == 0.01
    body, _ = composed("train", ["data=sinusoid", "inner_opt=partition"]).inner_opt.parts
    assert body["lr"] == 0.01
