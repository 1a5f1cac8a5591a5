"""`metarun export`: files that label as `metarun predict` does, in processes without metarun."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from metarun.errors import ConfigError, RunError
from metarun.inference import export, export_file
from metarun.inference.judgement import judge
from metarun.inference.trained import load
from tests.components.test_every_algorithm import TASKS
from tests.conftest import REPO, Metarun
from tests.inference.runs import GLYPHS, TASK, write_run, write_task
from tests.setups import task_of

SINGLE = (*GLYPHS, "engine.precision=float32")
SUPPORT = ("algo=protonet", "backbone.norm=support")
WITHOUT_STEPS = {
    "dkt", "feat", "matchingnet", "meta_baseline", "metaoptnet", "protonet", "r2d2", "relationnet",
    "simpleshot",
}  # fmt: skip

FRESH = """
import json, sys
from pathlib import Path
import numpy as np
from PIL import Image

sys.modules["metarun"] = None  # importing it fails
support = sorted(Path("support").glob("*/*.png"))
queries = sorted(Path("query").glob("*.png"))
labels = np.array([int(path.parent.name.removeprefix("class")) for path in support])
def pixels(paths):
    assert about["picture"]["size"] == 28 and about["picture"]["color"] == "grey"
    seen = np.stack([np.asarray(Image.open(path)) for path in paths])[:, None]
    return 255 - seen if about["picture"]["inverted"] else seen
if sys.argv[1].endswith(".onnx"):
    import onnxruntime
    session = onnxruntime.InferenceSession(sys.argv[1])
    about = json.loads(session.get_modelmeta().custom_metadata_map["metarun.json"])
    fed = {"support": pixels(support), "labels": labels, "queries": pixels(queries)}
    scores, probabilities = session.run(["scores", "probabilities"], fed)
    assert "torch" not in sys.modules
else:
    import torch
    told = {"metarun.json": ""}
    program = torch.export.load(sys.argv[1], extra_files=told).module()
    about = json.loads(told["metarun.json"])
    given = (pixels(support), labels, pixels(queries))
    _, probabilities = program(*map(torch.from_numpy, given))
print(json.dumps({path.name: row for path, row in zip(queries, probabilities.tolist())}))
"""


def in_a_fresh_process(folder: Path, file: str) -> dict[str, list[float]]:
    """The probabilities of each query."""
    done = subprocess.run(
        [sys.executable, "-c", FRESH, file], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[float]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("out", "settings"),
    [
        ("model.pt2", SUPPORT),
        ("model.onnx", ("algo=protonet",)),
        ("model.onnx", ("algo=r2d2", "backbone.norm=running", "algo.ridge=0.1")),
    ],
    ids=["torch", "onnx", "a system of equations in onnx"],
)
def test_a_file_labels_as_predict_does(
    metarun: Metarun, tmp_path: Path, out: str, settings: tuple[str, ...]
) -> None:
    setup = write_run(tmp_path / "run", *SINGLE, "task.way=3", *settings)
    write_task(tmp_path, task_of(setup, 3, "test"))
    (tmp_path / "support" / "class1" / "2.png").unlink()  # shots are uneven
    metarun("predict", "ckpt=run", "support=support", "query=query", "batch=100")
    told = metarun("export", "ckpt=run", f"out={out}").stdout
    assert "uint8 (examples, 1, 28, 28)" in told and "ink inverted" in told
    assert ("depends on the other queries" in told) == (settings == ("algo=protonet",))
    found = in_a_fresh_process(tmp_path, out)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "predictions.csv").read_text())))
    assert len(rows) == len(found) == 6
    for row in rows:
        wanted = [float(row[f"class{label}"]) for label in range(3)]
        assert found[Path(row["path"]).name] == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    export_file.refuse_foreign(tmp_path / out)  # its own file may be written again
    assert str(REPO).encode() not in (tmp_path / out).read_bytes()


@pytest.mark.parametrize("algo", TASKS)
def test_methods_without_inner_steps_are_exported(tmp_path: Path, algo: str) -> None:
    if algo == "cnp":  # a regression
        return
    more = ("algo.eval_iterations=2", "algo.tolerance=1e9") if algo == "metaoptnet" else ()
    write_run(tmp_path / "run", *TASK, "backbone=mlp", "backbone.hidden=[6]", f"algo={algo}", *more)
    trained = load(tmp_path / "run")
    if trained.algorithm.has_inner_loop:
        assert algo not in WITHOUT_STEPS
        with pytest.raises(ConfigError, match=f"algo={algo} takes inner steps on each task"):
            export.refuse_unexportable(trained)
        return
    export.refuse_unexportable(trained)
    if algo not in WITHOUT_STEPS:
        with pytest.raises(ConfigError, match=f"makes no program of algo={algo}"):
            export.program_of(trained)
        return
    program = export.program_of(trained)
    assert export.check(trained, 1.0, program.module()) < 1e-12


@pytest.mark.parametrize("algo", ["protonet", "relationnet"])
def test_a_run_with_uneven_tasks_is_exported(tmp_path: Path, algo: str) -> None:
    """Nothing pads the tasks of a program."""
    write_run(tmp_path / "run", *SINGLE, *SUPPORT, f"algo={algo}", "task.way=3", "task.min_way=2")
    trained = load(tmp_path / "run", "cpu", change=export.of_a_program)
    assert trained.config.task.uneven is None
    program = export.program_of(trained)
    assert export.check(trained, 1.0, program.module()) < 1e-5


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, *SINGLE, *SUPPORT)
    return folder


def test_probabilities_are_calibrated(metarun: Metarun, tmp_path: Path, run: Path) -> None:
    asked = ("calibrate=true", "calibration_tasks=5", "task.way=4", "task.shot=1", "out=m.pt2")
    told = metarun("export", f"ckpt={run}", *asked).stdout
    trained = load(run, way=4, with_data=True)
    wanted = judge(trained, [1] * 4, 5, 0.9, 0.05).calibration.temperature
    assert f"temperature {wanted:.3g}, of 5 validation tasks, 4-way 1-shot" in told
    about = {export_file.ABOUT: ""}
    program = torch.export.load(tmp_path / "m.pt2", extra_files=about).module()
    scores, probabilities = program(*export.noise_task(trained, 4, 1, 3))
    torch.testing.assert_close(probabilities, (scores / wanted).softmax(1))
    said = json.loads(about[export_file.ABOUT])
    assert said["temperature"] == wanted != 1
    assert said["calibrated"] == {"temperature": wanted, "tasks": 5, "way": 4, "shot": 1}
    assert said["run"]["algo"] == "protonet" and said["queries_depend_on_each_other"] is None


def test_operations_that_torch_alone_does_not_have_are_refused() -> None:
    @torch.library.custom_op("metarun_tests::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return 2 * x

    @twice.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    class Twice(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return twice(x + 1)

    program = torch.export.export(Twice(), (torch.ones(2),), strict=False)
    with pytest.raises(ConfigError, match=r"needs the operation metarun_tests\.twice"):
        export.refuse_foreign_operations(program, "mine")


@pytest.mark.parametrize("part", [0, 1], ids=["scores", "probabilities"])
def test_a_program_that_computes_otherwise_is_found(run: Path, part: int) -> None:
    trained = load(run)
    right = export.Labeller(trained)

    def wrong(*task: Tensor) -> list[Any]:
        found = list(right(*task))
        if len(task[1]) > 6:  # of larger tasks alone
            found[part] = found[part] * 1.01
        return found

    assert export.check(trained, 1.0, right) < 1e-5
    with pytest.raises(RunError, match=f"has other {('scores', 'probabilities')[part]} than"):
        export.check(trained, 1.0, wrong)


def features(path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([f"class{number}" for number in range(30)], 4)
    np.savez(path, features=rng.normal(size=(120, 8)).astype("float32"), labels=labels)


def test_what_cannot_be_exported_is_refused(
    metarun: Metarun, tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: str) -> str:
        return metarun("export", *arguments, code=2).stderr

    assert "must end in .pt2 or .onnx" in refused(f"ckpt={run}", "out=a.pt")
    assert "task.way=4: it is for calibrate=true" in refused(f"ckpt={run}", "task.way=4")
    assert "add backbone.norm=support" in refused(f"ckpt={run}", "backbone.norm=support_plus_one")
    write_run(tmp_path / "sine", "data=sinusoid", "backbone=mlp", "backbone.hidden=[4]")
    assert "data=sinusoid is a regression" in refused("ckpt=sine")
    no_cholesky = "ONNX has no operation for one that this run needs (aten.linalg_cholesky_ex)"
    quick = ("algo.eval_iterations=2", "algo.tolerance=1e9")
    for algo, more in (("dkt", ()), ("metaoptnet", quick)):
        own = (f"algo={algo}", *more)
        write_run(tmp_path / algo, *TASK, "backbone=mlp", "backbone.hidden=[6]", *own)
        assert no_cholesky in refused(f"ckpt={algo}", "out=a.onnx")
    features(tmp_path / "f.npz")
    own = ("data=features", f"data.root={tmp_path}/f.npz", "task.way=3", "task.query=2")
    write_run(tmp_path / "rows", *own, "backbone=mlp", "backbone.hidden=[4]", "algo=r2d2")
    assert "and this is for pictures" in refused("ckpt=rows", "calibrate=true")
    told = metarun("export", "ckpt=rows", "out=rows.pt2").stdout
    assert "support: float32 (examples, 8)" in told
    for content in ("", "weights"):
        (tmp_path / "model.pt2").write_text(content)
        assert "is no file of metarun export" in refused(f"ckpt={run}")
        assert (tmp_path / "model.pt2").read_text() == content
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"pip install 'metarun\[export\]'"):
        export_file.refuse_without_onnx()
    assert not (tmp_path / "a.onnx").exists()
