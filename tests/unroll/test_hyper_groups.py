"""Settings by group: which parameters a pattern means."""

import torch

from metarun.unroll import group_hyper, learn_hyper, match_names, partition, sgd

NAMES = ("weights[0]", "weights0", "bias")
PARAMS = {name: torch.zeros(2) for name in NAMES}


def test_a_full_name_means_itself_everywhere() -> None:
    """Brackets are a set of characters in a pattern: weights[0] would match weights0."""
    groups = {"weights[0]": {"lr": 0.5}}
    assert match_names(NAMES, list(groups)) == ["weights[0]"]
    hyper = group_hyper({"lr": 0.1}, groups, NAMES)
    assert hyper["lr"] == {"weights[0]": 0.5, "weights0": 0.1, "bias": 0.1}
    learned = learn_hyper(hyper, ["lr"], "global", PARAMS, 1, groups)
    assert {key: round(float(value), 6) for key, value in learned.initial.items()} == {
        "lr/weights[0]": 0.5,
        "lr": 0.1,
    }
    parts = partition([(["weights[0]"], sgd(0.5)), (["weights0", "bias"], sgd(0.1))])
    grads = {name: torch.ones(2) for name in NAMES}
    moved, _ = parts.update(grads, parts.init(PARAMS), PARAMS, parts.hyper)
    assert [round(float(moved[name][0]), 6) for name in NAMES] == [-0.5, -0.1, -0.1]


def test_a_pattern_that_is_no_name_means_all_that_match() -> None:
    hyper = group_hyper({"lr": 0.1}, {"weights[01]": {"lr": 0.5}}, ("weights0", "weights1"))
    assert hyper["lr"] == {"weights0": 0.5, "weights1": 0.5}
