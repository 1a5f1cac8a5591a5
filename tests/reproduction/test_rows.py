"""Rows of published figures: their files, their settings, and the experiments written from them."""

import re
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
import yaml
from omegaconf import DictConfig, OmegaConf

from metarun.config.catalogue import GROUPS, schemas
from metarun.config.run import TrainConfig, flat
from metarun.episodes.source import ImageEpisodes
from metarun.episodes.store import ClassStore, from_equal_classes
from metarun.reproduction.rows import (
    BUDGETS,
    CPU,
    FULL,
    Row,
    experiment,
    laid_over,
    read,
    rows,
    rows_of,
)
from metarun.training.inert import without_effect
from metarun.training.setup import build
from tests.conftest import REPO
from tests.setups import config_of

EVERY = [(row, budget) for row in rows().values() for budget in row.budgets]
FEWER = re.compile(r"trainer\.|algo\.multi_step_loss$")
"""What a budget may change: how much is computed, and what follows the number of meta-steps."""

IN_FOUR = "maml fomaml anil meta_sgd maml_pp reptile imaml protonet r2d2 matchingnet"
IN_TWO = (
    "maml fomaml anil boil meta_sgd maml_pp protonet r2d2 metaoptnet baseline baseline_pp "
    "meta_baseline"
)


@cache
def components(chosen: tuple[tuple[str, str], ...]) -> DictConfig:
    """The config of components, without Hydra, which takes a fifth of a second."""
    config = OmegaConf.structured(TrainConfig)
    names = {"inner_opt": "sgd", **dict(chosen)}
    for group in GROUPS:
        OmegaConf.update(config, group, OmegaConf.structured(schemas(group)[names[group]]))
    for group in ("data", "algo"):
        config.merge_with(getattr(schemas(group)[names[group]], "usual", {}))
    return config


def composed(row: Row, budget: str) -> Any:
    config = deepcopy(components(tuple(row.groups.items())))
    config.merge_with(row.settings[budget])
    return OmegaConf.to_object(config)


def test_there_is_a_row_for_each_method_and_shape() -> None:
    shapes = ("5w1s", "5w5s", "20w1s", "20w5s")
    wanted = {f"{method}_omniglot_{shape}" for method in IN_FOUR.split() for shape in shapes}
    for data in ("mini_imagenet", "cifar_fs"):
        wanted |= {f"{m}_{data}_{shape}" for m in IN_TWO.split() for shape in ("5w1s", "5w5s")}
    wanted |= {f"{m}_sinusoid_{shape}" for m in ("maml", "meta_sgd") for shape in ("k5", "k10")}
    wanted |= {f"{m}_emoji_5w1s" for m in ("maml", "protonet", "r2d2", "baseline_pp")}
    assert wanted <= set(rows())


@pytest.mark.parametrize(("row", "budget"), EVERY, ids=lambda x: getattr(x, "name", x))
def test_each_row_is_a_config(row: Row, budget: str) -> None:
    config = composed(row, budget)
    assert (config.algo.name, config.data.name) == (row.groups["algo"], row.data)
    shape = re.fullmatch(r"(?:(\d+)w|k)(\d+)s?", row.setting)
    assert shape is not None
    assert (config.task.way, config.task.shot) == (int(shape[1] or 1), int(shape[2]))
    assert config.trainer.test_episodes == 10000 or budget == CPU


def test_a_budget_changes_how_much_is_computed_and_nothing_else() -> None:
    for row in rows().values():
        if CPU in row.budgets:
            full, cpu = (flat(row.settings[budget]) for budget in BUDGETS)
            changed = {key for key in full.keys() | cpu.keys() if full.get(key) != cpu.get(key)}
            assert [key for key in changed if not FEWER.match(key)] == [], row.name
            assert cpu["trainer.steps"] < full["trainer.steps"], row.name


@pytest.mark.parametrize(
    "name",
    ["maml_omniglot_20w5s", "metaoptnet_cifar_fs_5w1s", "maml_sinusoid_k10", "r2d2_emoji_5w1s"],
)
def test_the_command_line_composes_the_same(name: str) -> None:
    row = rows()[name]
    for budget in row.budgets:
        assert config_of(f"experiment={experiment(row, budget)}") == _with_root(row, budget)


def _with_root(row: Row, budget: str) -> Any:
    config = composed(row, budget)
    if hasattr(config.data, "root"):
        config.data.root = config_of(f"data={row.data}").data.root  # of the environment
    return config


def test_experiments_are_those_of_the_rows() -> None:
    folder = REPO / "conf" / "experiment"
    written = {
        str(path.relative_to(folder).with_suffix("")): yaml.safe_load(text)
        for path in folder.rglob("*.yaml")
        if "metarun/reproduction/rows/" in (text := path.read_text(encoding="utf-8"))
    }
    assert written.keys() == {experiment(row, budget) for row, budget in EVERY}
    for row, budget in EVERY:
        content = written[experiment(row, budget)]
        overrides = {key: value for one in content.pop("defaults") for key, value in one.items()}
        assert overrides == {f"override /{group}": name for group, name in row.groups.items()}
        assert content == row.settings[budget]


SIDES = {"omniglot": (1, 28, 28), "cifar_fs": (3, 32, 32)}


@cache
def noise(data: str) -> ClassStore:
    images = torch.randint(0, 256, (60, 20, *SIDES[data]), dtype=torch.uint8)
    return from_equal_classes(images, [f"class{number}" for number in range(60)])


@pytest.mark.parametrize(
    "name",
    [
        *(f"{method}_omniglot_5w1s" for method in ("maml", "maml_pp", "reptile", "imaml", "r2d2")),
        "boil_cifar_fs_5w5s",
        "baseline_pp_cifar_fs_5w1s",
    ],
)
def test_a_row_is_an_algorithm_for_which_no_setting_is_idle(name: str) -> None:
    row = rows()[name]
    config = composed(row, FULL)
    source = ImageEpisodes(
        {part: noise(row.data) for part in ("train", "val", "test")},
        way=config.task.way, shot=config.task.shot, query=config.task.query, seed=0,
        device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    setup = build(config, torch.device("cpu"), source=source)
    assert without_effect(config, source.kind, source.outputs) == []
    assert setup.train_tasks.sample(0, 1)


def test_figures_are_sane() -> None:
    found = {row.name: row.published for row in rows().values() if row.published is not None}
    assert len(found) > 60
    for name, figure in found.items():
        row = rows()[name]
        assert figure.score == "accuracy" and 0.3 < figure.value < 1, name
        assert figure.ci95 is None or 0 < figure.ci95 < 0.02, name
        assert (figure.ci95 is None) or figure.over.startswith("95 %"), name
        assert re.search(r"\b(19|20)\d\d\b", figure.source), name
        assert figure.value > 1.5 / row.settings[FULL]["task"]["way"], name


def test_an_interval_of_another_kind_is_none_of_95_per_cent() -> None:
    boil = rows()["boil_mini_imagenet_5w1s"].published
    assert boil is not None
    assert (boil.value, boil.ci95) == (pytest.approx(0.4961), None)
    assert boil.over == "± 0.16 is the deviation of 5 runs of 1,000 tasks"
    maml = rows()["maml_omniglot_5w1s"].published
    assert maml is not None
    assert (maml.value, maml.ci95) == (pytest.approx(0.987), pytest.approx(0.004))
    error = {"score": "mse", "one": {"5w1s": {"accuracy": None, "mse": 0.5}}}
    table = laid_over(SMALL["first"], error)
    del table["one"]["5w1s"]["accuracy"]
    mse = rows_of({"first": table})["one_first_5w1s"].published
    assert mse is not None
    assert (mse.score, mse.value, mse.ci95, mse.over) == ("mse", 0.5, 1.0, "95 %, tasks")


def test_names_of_experiments() -> None:
    row = rows()["maml_omniglot_5w1s"]
    assert (row.title, row.data, row.setting) == ("MAML", "omniglot", "5w1s")
    assert experiment(row, "full") == "maml_omniglot_5w1s"
    assert experiment(row, "cpu") == "cpu/maml_omniglot_5w1s"
    with pytest.raises(ValueError, match="no budget 'tpu', only full, cpu"):
        experiment(row, "tpu")


SMALL: dict[str, Any] = {
    "first": {
        "title": "First",
        "score": "accuracy",
        "settings": {"trainer": {"steps": 9, "meta_batch": 2}},
        "cpu": {"trainer": {"eval_every": 1}},
        "shapes": {"5w1s": {"way": 5}, "5w5s": {"way": 5}},
        "one": {
            "title": "One",
            "source": "A 2017",
            "read": "in A",
            "over": "95 %, tasks",
            "groups": {"algo": "maml"},
            "settings": {"trainer": {"meta_batch": 3}, "algo": {"order": 2}},
            "cpu": {"trainer": {"steps": 4}},
            "differences": ["a"],
            "5w1s": {"accuracy": 50.0, "interval": 1.0, "settings": {"trainer": {"meta_batch": 4}}},
        },
        "other": {
            "title": "Other",
            "like": "one",
            "settings": {"algo": {"order": 1}},
            "differences": ["b"],
        },
    },
    "second": {
        "title": "Second",
        "score": "accuracy",
        "shapes": {"5w1s": {"way": 5}},
        "one": {"title": "One", "like": "first/other", "groups": {"algo": "anil"}},
    },
}


def test_narrower_settings_win_and_figures_are_not_inherited() -> None:
    found = rows_of(SMALL)
    assert list(found) == [
        "one_first_5w1s", "one_first_5w5s", "other_first_5w1s", "other_first_5w5s",
        "one_second_5w1s",
    ]  # fmt: skip
    one, other, last = (found[f"{n}_5w1s"] for n in ("one_first", "other_first", "one_second"))
    assert one.settings[FULL]["trainer"] == {"steps": 9, "meta_batch": 4}
    assert one.settings[CPU]["trainer"] == {"steps": 4, "meta_batch": 4, "eval_every": 1}
    assert found["one_first_5w5s"].settings[FULL]["trainer"]["meta_batch"] == 3
    assert other.settings[FULL]["algo"] == {"order": 1} and other.differences == ("a", "b")
    assert one.published is not None and other.published is None and last.published is None
    assert last.groups == {"algo": "anil", "data": "second"} and last.budgets == (FULL, CPU)
    assert last.settings[FULL]["trainer"] == {"meta_batch": 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first": {"colour": 3}}, r"first\.toml: unknown key 'colour'"),
        ({"first": {"score": "error"}}, "score is 'error'"),
        ({"first": {"one": {"setings": {}}}}, r"first\.toml, one: unknown key 'setings'"),
        ({"first": {"one": {"20w1s": {}}}}, "unknown key '20w1s'"),
        ({"first": {"one": {"5w1s": {"acuracy": 1.0}}}}, r"one\.5w1s: unknown key 'acuracy'"),
        ({"first": {"one": {"5w5s": {"mse": 1.0}}}}, "must be accuracy, not mse"),
        ({"first": {"one": {"5w5s": {"interval": 1.0}}}}, "an interval without a figure"),
        ({"first": {"one": {"over": ""}}}, "an interval needs its kind"),
        ({"first": {"one": {"source": ""}}}, "a figure needs its source"),
        ({"first": {"one": {"read": ""}}}, "a figure needs its read"),
        ({"first": {"new": {"groups": {}}}}, "title is missing"),
        ({"first": {"new": {"title": "New"}}}, "groups is missing"),
        ({"second": {"one": {"like": "third/one"}}}, "is no other method"),
        ({"first": {"one": {"like": "one"}}}, "is no other method"),
    ],
)
def test_what_a_file_must_not_hold_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rows_of(laid_over(SMALL, change))


def test_reading_changes_no_table() -> None:
    before = deepcopy(SMALL)
    rows_of(SMALL)
    assert before == SMALL
    assert set(read()) == {"cifar_fs", "emoji", "mini_imagenet", "omniglot", "sinusoid"}
