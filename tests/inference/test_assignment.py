"""Queries assigned together, against all ways to do it."""

import json
from itertools import permutations
from pathlib import Path

import pytest
import torch

from metarun.config.trained import EvalConfig
from metarun.errors import ConfigError
from metarun.inference.assignment import assign
from metarun.inference.outcomes import source_of
from metarun.inference.trained import load
from tests.conftest import Metarun
from tests.inference.runs import GLYPHS, write_run


@pytest.mark.parametrize(("way", "each"), [(4, 1), (3, 2), (2, 3)])
def test_it_is_the_best_of_all_assignments(way: int, each: int) -> None:
    generator = torch.Generator().manual_seed(way)
    for _ in range(10):
        scores = torch.randn(way * each, way, generator=generator, dtype=torch.float64)
        logs = scores.log_softmax(1)
        slots = [label for label in range(way) for _ in range(each)]

        def total(labels: tuple[int, ...], logs: torch.Tensor = logs) -> float:
            return float(sum(row[label] for row, label in zip(logs, labels, strict=True)))

        best = max(set(permutations(slots)), key=total)
        assert tuple(assign(scores, each).tolist()) == best


def test_an_evaluation_has_it_beside_its_score(metarun: Metarun, tmp_path: Path) -> None:
    write_run(tmp_path / "run", *GLYPHS, "algo=protonet", "backbone.norm=support")
    asked = ("episodes=20", "assign=true", "task.query=1", "hydra.run.dir=found")
    told = metarun("eval", "ckpt=run", *asked).stdout
    test = json.loads((tmp_path / "found/result.json").read_text())["test"]
    assert test["assigned"]["transductive"] and test["assigned"]["tasks"] == 20
    assert "assigned together, 1 queries to each class (transductive): accuracy" in told
    trained = load(tmp_path / "run", with_data=True)
    source = trained.setup.source
    right = []
    for index in range(20):
        support_x, support_y, query_x, _ = (p[0] for p in source.sample("test", index, 1))
        scores = trained.adapt(support_x, support_y, 3)(query_x[::2])  # the first of each class
        labels = assign(scores, 1)
        assert sorted(labels.tolist()) == [0, 1, 2]
        right.append(float((labels == torch.arange(3)).double().mean()))
    assert test["assigned"]["accuracy"] == pytest.approx(sum(right) / 20)
    assert test["assigned"]["accuracy"] != test["accuracy"]


def test_what_has_no_classes_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path, "data=sinusoid", "algo=maml", "backbone=mlp")
    with pytest.raises(ConfigError, match="assign=true is for data of labelled images"):
        source_of(load(tmp_path, with_data=True).setup, "assign=true")
    with pytest.raises(ConfigError, match="assign=true is for one checkpoint"):
        EvalConfig("run", ensemble=2, assign=True)
