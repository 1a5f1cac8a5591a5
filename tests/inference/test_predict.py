"""`metarun predict`: the labels of an evaluation, for pictures in files."""

import csv
import io
import re
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from metarun.cli.predict import run
from metarun.components.data.folder import FolderConfig, load
from metarun.components.data.omniglot import OmniglotConfig, shrink
from metarun.config.catalogue import schemas
from metarun.config.trained import PredictConfig
from metarun.errors import ConfigError
from metarun.inference.classifier import FewShotClassifier
from metarun.inference.predict import Predictions, batches_of, inputs_of_run, label_pictures
from metarun.inference.support import list_queries, list_support, read_support
from metarun.inference.table import to_csv
from metarun.inference.trained import load as load_run
from metarun.pictures.inputs import inputs_of
from metarun.pictures.listing import Picture
from tests.components.test_every_algorithm import FEW_STEPS, TASKS, of_algorithm
from tests.conftest import Metarun
from tests.inference.runs import GLYPHS, TASK, draw, save, weights_of, write_run, write_task
from tests.setups import setup_of, task_of

COMMAND = ("predict", "ckpt=run", "support=support", "query=query")


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


@pytest.mark.parametrize(
    "settings",
    [
        ("algo=protonet",),
        ("algo=protonet", "backbone.norm=running"),
        ("algo=maml", "algo.eval_inner_steps=2", "backbone.norm=support"),
        ("algo=baseline", "algo.eval_inner_steps=3"),
    ],
    ids=" ".join,
)
def test_a_task_in_files_has_the_scores_of_its_evaluation(
    metarun: Metarun, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    setup = write_run(tmp_path / "run", *GLYPHS, *settings)
    write_task(tmp_path, task_of(setup, 3, "test"))
    done = metarun(*COMMAND, "sheet=sheet.png")
    trace = setup.trace(weights_of(tmp_path / "run"), setup.source.sample("test", 3, 1))
    rows = table(tmp_path / "predictions.csv")
    truth = [Path(row["path"]).name.partition("-")[0] for row in rows]
    right = [row["label"] == name for row, name in zip(rows, truth, strict=True)]
    losses = [
        -torch.tensor(float(row[c])).double().log() for row, c in zip(rows, truth, strict=True)
    ]
    assert sum(right) / len(right) == float(trace.query_score[0, -1])
    assert float(sum(losses)) / 6 == pytest.approx(float(trace.query_loss[0, -1]), abs=1e-6)
    assert all(float(row["probability"]) == float(row[row["label"]]) for row in rows)
    assert "ink inverted" in done.stdout and setup.batch_norm in done.stdout
    together = "norm" not in "".join(settings)
    assert ("depends on the other pictures" in done.stdout) == together
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert min(sheet.size) > 100


def test_labels_stay_with_their_pictures_whatever_the_batch(tmp_path: Path) -> None:
    setup = write_run(tmp_path / "run", *GLYPHS, "algo=protonet", "backbone.norm=support")
    write_task(tmp_path, task_of(setup, 3, "test"))
    trained = load_run(tmp_path / "run")
    inputs = inputs_of_run(trained)
    support = read_support(list_support(tmp_path / "support"), inputs)
    paths = list_queries(str(tmp_path / "query"))
    whole = label_pictures(trained, support, paths)
    pieces = label_pictures(trained, support, paths, batch=2, shown=3)
    assert pieces.paths == whole.paths == paths
    torch.testing.assert_close(pieces.probabilities, whole.probabilities)
    for path, pixels in zip(paths, pieces.pixels, strict=False):
        with Image.open(path) as picture:
            assert pixels.flatten().tolist() == list(picture.tobytes())
    assert len(pieces.pixels) == 3


CLASSIFIERS = [name for name in TASKS if name != "cnp"]


@pytest.mark.parametrize("algo", CLASSIFIERS)
def test_classes_may_have_any_number_of_examples_in_any_order(tmp_path: Path, algo: str) -> None:
    """A method that took the examples for equal rows of each class would mix them up."""
    mlp = ["backbone=mlp", "backbone.hidden=[8]", *FEW_STEPS.get(algo, ())]
    if hasattr(schemas("algo")[algo], "inner_batch"):
        mlp.append("algo.inner_batch=null")  # its batches are drawn by place
    write_run(tmp_path, *TASK, f"algo={algo}", *mlp)
    trained = load_run(tmp_path)
    x = torch.rand(7, 1, 28, 28, dtype=torch.float64)
    y = torch.tensor([0, 0, 0, 0, 1, 2, 2])
    order = torch.tensor([4, 0, 6, 2, 1, 5, 3])
    queries = torch.rand(5, 1, 28, 28, dtype=torch.float64)
    found = trained.adapt(x, y, 3)(queries)
    assert found.shape == (5, 3) and not found.isnan().any()
    torch.testing.assert_close(trained.adapt(x[order], y[order], 3)(queries), found)


X, Y = torch.rand(6, 1, 28, 28, dtype=torch.float64), torch.arange(6) % 3


WRONG = [
    (X, Y + 1, "labels are from 0 to 2 in a task of 3 classes, and here is 3"),
    (X, Y - 1, "and here is -1"),
    (X, Y.double(), r"labels are torch.float64 of the shape \(6,\): give int64"),
    (X, Y[:, None], r"of the shape \(6, 1\): give int64 \(examples,\)"),
    (X, Y.numpy(), "labels are a ndarray: give a tensor"),
    (X, Y[:5], "there are 6 examples and 5 labels"),
    (X, Y.clamp(max=1), "class 2 of 3 has no example"),
    (X[:0], Y[:0], "class 0 of 3 has no example"),
    (X.numpy(), Y, "examples is a ndarray: give a tensor"),
    (X[..., :20], Y, r"has the shape \(6, 1, 28, 20\): .* takes \(examples, 1, 28, 28\)"),
    (X[:, 0], Y, r"examples has the shape \(6, 28, 28\)"),
    (X.float(), Y, "examples is torch.float32: make it torch.float64"),
    (X.to(torch.uint8), Y, "of pixels by trained.to_inputs"),
]
"""Examples and labels that are no task of three classes, and what is told of them."""


@pytest.mark.parametrize("algo", ["protonet", "maml"])
def test_examples_that_are_no_task_are_refused(tmp_path: Path, algo: str) -> None:
    write_run(tmp_path, *GLYPHS, f"algo={algo}")
    trained = load_run(tmp_path)
    for x, y, told in WRONG:
        with pytest.raises(ValueError, match=told):
            trained.adapt(x, y, 3)
    with pytest.raises(ValueError, match=r"queries has the shape \(6, 28, 28\)"):
        trained.adapt(X, Y, 3)(X[:, 0])


def test_a_run_of_uneven_tasks_takes_padding_and_lacking_classes(tmp_path: Path) -> None:
    write_run(tmp_path, *GLYPHS, "algo=protonet", "backbone.norm=support", "task.min_way=2")
    trained = load_run(tmp_path)
    few = trained.adapt(X[:4], Y[:4].clamp(max=1), 3)(X)
    padded = torch.cat([Y[:4].clamp(max=1), torch.full((2,), -1)])
    torch.testing.assert_close(trained.adapt(X, padded, 3)(X), few)
    assert few[:, 2].isinf().all() and few[:, :2].isfinite().all()
    with pytest.raises(ValueError, match="and here is -2"):
        trained.adapt(X, Y - 2, 3)
    with pytest.raises(ValueError, match="has no example"):
        trained.adapt(X, torch.full((6,), -1), 3)


def test_another_number_of_classes_is_for_methods_without_a_head(tmp_path: Path) -> None:
    for algo in ("protonet", "maml"):
        write_run(tmp_path / algo, *GLYPHS, f"algo={algo}")
    assert load_run(tmp_path / "protonet", way=5).config.task.way == 5
    with pytest.raises(ConfigError, match="there are 5 classes, but the run's network tells 3"):
        load_run(tmp_path / "maml", way=5)
    write_run(tmp_path / "baseline", *GLYPHS, "algo=baseline")
    with pytest.raises(ConfigError, match=r"5000 classes, more than the \d+ that algo=baseline"):
        load_run(tmp_path / "baseline", way=5000)


def test_pictures_become_what_they_were_in_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))
    for number in range(3):
        draw(tmp_path / "data" / f"c{number}" / "1.png", (40 + number, 71), number)
    own: Any = FolderConfig(root=str(tmp_path / "data"), size=20, resize="pad", color="grey")
    inputs = inputs_of(own)
    assert inputs is not None and inputs.shape == (1, 20, 20)
    for store in load(own).values():
        picture = Picture(str(tmp_path / "data" / store.class_names[0] / "1.png"))
        (image,) = store.images[store.starts[0] : store.starts[0] + 1]
        assert inputs.of_file(picture).tolist() == image.tolist()


def test_drawings_become_those_of_omniglot(tmp_path: Path) -> None:
    inputs = inputs_of(OmniglotConfig())
    assert inputs is not None
    rows = (torch.rand(105, 105) > 0.2).numpy()
    Image.fromarray(rows).convert("1").save(tmp_path / "drawing.png")
    content = (tmp_path / "drawing.png").read_bytes()
    assert inputs.of_file(Picture(str(tmp_path / "drawing.png"))).tobytes() == shrink(content)


def test_batches_have_pictures_from_everywhere() -> None:
    found = [list(batch) for batch in batches_of(10, 4)]
    assert sorted(chain(*found)) == list(range(10))
    assert max(map(len, found)) <= 4 and found[0] == [0, 3, 6, 9]


def test_queries_are_found_below_a_folder_by_name_and_by_pattern(tmp_path: Path) -> None:
    for name in ("b/2.png", "a.png", "b/.hidden.png", ".git/x.png", "note.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    everything = [str(tmp_path / "a.png"), str(tmp_path / "b" / "2.png")]
    assert list_queries(str(tmp_path)) == everything
    assert list_queries([f"{tmp_path}/*.png", f"{tmp_path}/b", everything[0]]) == everything


def test_queries_in_linked_folders_are_found_once(tmp_path: Path) -> None:
    """As in training, where a class folder may be a link; and no link leads round in a circle."""
    for name in ("query/a.png", "query/z/1.png", "far/1.png", "far/deep/2.png", "back/3.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    for link, target in {
        "query/far": "far", "query/also_far": "far", "query/b": "query/z", "far/up": "query",
        "far/deep/back": "back", "back/self": "back", "query/.hidden": "back",
    }.items():  # fmt: skip
        (tmp_path / link).symlink_to(tmp_path / target)
    found = [
        Path(path).relative_to(tmp_path / "query") for path in list_queries(f"{tmp_path}/query")
    ]
    assert list(map(str, found)) == [
        "a.png", "z/1.png", "also_far/1.png", "also_far/deep/2.png", "also_far/deep/back/3.png",
    ]  # fmt: skip


def test_no_two_columns_have_the_same_name() -> None:
    names = ("label", "p(label)", "path", "set", "cat")
    found = Predictions(["x.png"], names, torch.eye(5)[:1].double(), torch.empty(0), [])
    header, row = csv.reader(io.StringIO(to_csv(found)))
    assert header[3:] == ["p(p(label))", "p(label)", "p(path)", "set", "cat"]
    assert row == ["x.png", "label", "1.0", "1.0", "0.0", "0.0", "0.0", "0.0"]
    header, _ = csv.reader(io.StringIO(to_csv(replace(found, judged=[["", "", "1"]]))))
    assert header[6:] == ["p(p(label))", "p(label)", "p(path)", "p(set)", "cat"]


@pytest.mark.parametrize("count", [1, 2])
def test_one_picture_is_no_pictures(metarun: Metarun, asked: Path, count: int) -> None:
    if count == 2:
        save(asked / "query" / "2.png", torch.rand(1, 28, 28))
    words = {1: "labelled 1 picture: a", 2: "labelled 2 pictures: a"}
    assert words[count] in metarun(*COMMAND).stdout


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """A run, two classes of three examples, and a query."""
    write_run(tmp_path / "run", *GLYPHS, "algo=protonet")
    for number in range(6):
        ink = torch.rand(1, 28, 28, generator=torch.Generator().manual_seed(number))
        save(tmp_path / "support" / "ab"[number % 2] / f"{number}.png", ink)
    save(tmp_path / "query" / "1 =[x].png", torch.rand(1, 28, 28))
    return tmp_path


REFUSED = {
    "support=nowhere": "support=nowhere: there is no such folder",
    "support=one": "support=one has the class 'a' alone: give two class folders or more",
    "support=query": "support=query has none: give two class folders",
    "query=empty": "query=empty has no pictures",
    "query=nowhere.png": "query=nowhere.png: there is no such folder or picture",
    "query= ": "query= is empty",
    "out=mine.csv": "mine.csv is no table of predictions",
    "out=empty": "out=empty is a folder",
    "sheet=a.jpg": "sheet=a.jpg: must end in .png",
    "ckpt=nowhere": "there is no such run directory",
}


def test_what_cannot_be_labelled_is_refused_in_a_sentence(
    metarun: Metarun, asked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(asked)
    (asked / "empty").mkdir()
    draw(asked / "one" / "a" / "1.png", (5, 5))
    (asked / "mine.csv").write_text("my notes")
    given: dict[str, Any] = {"ckpt": "run", "support": "support", "query": "query"}
    for change, words in REFUSED.items():
        key, _, value = change.partition("=")
        with pytest.raises(ConfigError, match=re.escape(words)):
            run(PredictConfig(**(given | {key: value})), asked)
    with pytest.raises(ConfigError, match="query= is empty"):
        PredictConfig(**(given | {"query": []}))
    with pytest.raises(ConfigError, match="batch=0: must be from 1"):
        PredictConfig(**given, batch=0)
    for arguments, words in (
        ([*COMMAND, "-m"], "metarun predict has no sweeps"),
        (COMMAND[:3], "not given: query=<folder or pictures>"),
        ([*COMMAND[:3], "query=3"], "query=3: there is no such folder or picture"),
        ([*COMMAND, "algo.eval_inner_steps=2"], "algo=protonet has no such setting"),
    ):
        assert words in metarun(*arguments, code=2).stderr
    assert not (asked / "predictions.csv").exists()


def test_a_list_of_pictures_is_read_as_it_is_typed(metarun: Metarun, asked: Path) -> None:
    save(asked / "2.png", torch.rand(1, 28, 28))
    metarun(*COMMAND[:3], "query=['query/1 =[x].png',2.png]")
    rows = table(asked / "predictions.csv")
    assert [row["path"] for row in rows] == ["query/1 =[x].png", "2.png"]
    metarun(*COMMAND[:3], "query=query/*.png")
    assert [row["path"] for row in table(asked / "predictions.csv")] == ["query/1 =[x].png"]


def test_a_regression_and_a_network_of_fixed_way_are_refused(metarun: Metarun, asked: Path) -> None:
    write_run(asked / "sine", "data=sinusoid", "backbone=mlp", "backbone.hidden=[4]")
    write_run(asked / "maml", *GLYPHS, "algo=maml")
    done = metarun("predict", "ckpt=sine", *COMMAND[2:], code=2)
    assert "has learned from data=sinusoid, a regression" in done.stderr
    done = metarun("predict", "ckpt=maml", *COMMAND[2:], code=2)
    assert "there are 2 classes, but the run's network tells 3 apart" in done.stderr


def test_unreadable_pictures_are_named_and_may_be_left_out(metarun: Metarun, asked: Path) -> None:
    (asked / "query" / "broken.png").write_bytes(b"no picture")
    done = metarun(*COMMAND, code=1)
    assert "cannot read the picture query/broken.png" in done.stderr
    assert "data.skip_unreadable=true" in done.stderr
    (asked / "support" / "a" / "empty.png").write_bytes(b"")
    done = metarun(*COMMAND, "data.skip_unreadable=true", "out=new/table.csv")
    assert "left out query/broken.png" in done.stderr
    assert "left out support/a/empty.png: it is empty" in done.stderr
    assert [row["path"] for row in table(asked / "new" / "table.csv")] == ["query/1 =[x].png"]
    metarun(*COMMAND, "data.skip_unreadable=true", "out=new/table.csv")  # over its own
    for name in ("0", "2", "4"):
        (asked / "support" / "a" / f"{name}.png").write_bytes(b"")
    done = metarun(*COMMAND, "data.skip_unreadable=true", code=1)
    assert "class 'a' in support has no picture that can be read" in done.stderr


@pytest.mark.parametrize("algo", ["look_ahead", "supervised"])
def test_one_model_has_no_tasks_to_label(metarun: Metarun, tmp_path: Path, algo: str) -> None:
    write_run(tmp_path / "run", *of_algorithm(algo))
    told = (
        f"the run of algo={algo} trained one classifier of the classes of data=glyphs_examples, "
        "which adapts to no examples of others: `metarun eval` evaluates it"
    )
    own = ("support=support", "query=query")
    write_task(tmp_path, task_of(setup_of(*GLYPHS), 3, "test"))
    for command in (("predict", *own), ("explain",), ("explain", *own), ("export",)):
        assert told in metarun(command[0], "ckpt=run", *command[1:], code=2).stderr
    with pytest.raises(ConfigError, match="adapts to no examples of others"):
        load_run(tmp_path / "run")
    with pytest.raises(ConfigError, match="adapts to no examples of others"):
        FewShotClassifier(tmp_path / "run").fit([tmp_path / "support/class0/0.png"] * 2, [0, 1])
    assert list(tmp_path.glob("*.p*")) == []
