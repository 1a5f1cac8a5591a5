"""The lines about a result."""

import re

import pytest

from metarun.training.result import MOST_SHOWN, per_inner_step


def figures(count: int, **more: object) -> dict[str, object]:
    own = {"score": "mse", "inner_steps": count - 1}
    return own | {"mse_per_inner_step": [float(i) for i in range(count)]} | more


@pytest.mark.parametrize("count", [1, 2, MOST_SHOWN, MOST_SHOWN + 1, 51, 102, 1001])
def test_each_score_stands_at_its_inner_step(count: int) -> None:
    (line,) = per_inner_step(figures(count))
    after, scores = re.fullmatch(r"mse after (.*) inner steps: (.*)", line).groups()  # type: ignore[union-attr]
    values = [int(float(score)) for score in scores.split(", ")]
    steps = after.split(", ")
    if count <= MOST_SHOWN:
        assert (values, steps[-1]) == (list(range(count)), "…")
    else:
        assert values == list(map(int, steps)) and values[0] == 0 and values[-1] == count - 1
        assert len(values) <= MOST_SHOWN


def test_without_an_inner_loop_there_is_no_such_line() -> None:
    assert per_inner_step(figures(1, inner_steps=None)) == []
