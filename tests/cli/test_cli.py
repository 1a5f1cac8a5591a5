"""The command line, through real processes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from metarun.cli.main import _options_first
from metarun.errors import CheckpointError, explain
from metarun.rundir import checkpoint
from metarun.rundir.checkpoint import VERSION
from tests.conftest import IN_CHECKOUT, REPO, Metarun

SHORT = (
    "data=sinusoid",
    "backbone=mlp",
    "trainer.steps=20",
    "trainer.eval_every=10",
    "trainer.checkpoint_every=10",
    "trainer.log_every=5",
    "trainer.eval_episodes=10",
    "trainer.test_episodes=20",
    "inner_opt.lr=0.02",
    "engine.compile=none",  # a recording would take longer
)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_help_shows_commands_examples_and_torch(metarun: Metarun) -> None:
    text = metarun("--help").stdout
    for part in ("train", "eval", "metarun train algo=maml data=omniglot", "METARUN_DATA"):
        assert part in text
    assert f"torch {torch.__version__}" in text and "CUDA" in text
    assert metarun("--version").stdout.startswith("metarun 0.")
    assert "usage" in metarun(code=2).stdout


@pytest.mark.parametrize("command", ["train", "eval"])
def test_help_of_a_command_lists_its_settings(metarun: Metarun, command: str) -> None:
    text = metarun(command, "--help").stdout
    assert "episodes" in text and "query" in text and "hydra-help" in text


def test_cfg_job_shows_the_config(metarun: Metarun) -> None:
    done = metarun("train", "--cfg", "job", "seed=3", "algo=anil")
    assert "seed: 3" in done.stdout and "head.*" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("trian", "no command 'trian' (did you mean train?); choose from train, eval"),
        ("algo=maml", "did you mean metarun train algo=maml?"),
        ("train --multirn", "no option '--multirn' (did you mean --multirun?)"),
        ("train trainer.stepz=3", "'trainer.stepz' (did you mean trainer.steps?)"),
        ("train lr=3", "did you mean inner_opt.lr or outer_opt.lr?"),
        ("train algos=maml", "'algos' (did you mean algo?)"),
        ("train algo=mamll", "did you mean algo=maml?"),
        ("train +foo=1", "no setting 'foo'"),
        ("train +seed=1", "seed is a setting already: write seed=… without the '+'"),
        ("train +inner_opt.lr=1", "inner_opt.lr is a setting already"),
        ("train +algo=maml", "algo is given twice: write algo=… once, without a '+'"),
        ("train ++algo=maml", "algo is given twice: write algo=… once, without a '+'"),
        ("train ~seed", "seed cannot be taken away: leave the argument out for the default"),
        ("train ~inner_opt", "inner_opt cannot be taken away: leave the argument out"),
        ("train ~inner_opt=sgd", "or write inner_opt=adadelta|ada"),
        ("train ~trainer", "trainer cannot be taken away"),
        ("eval ~task ckpt=x", "task cannot be taken away"),
        ("train algo=null", "algo=null: choose algo=anil|"),
        ("train seed=", "seed= is empty: give a value"),
        ("train -m seed=", "seed= is empty: give a value"),
        (
            "train experiment=cpu/maml_emoji_5w1s algo=nearest_neighbour",
            "experiment=cpu/maml_emoji_5w1s sets algo.inner_steps, which does not fit the rest",
        ),
        ("train algo.adapt=head", "algo.adapt=head: it is a list, write 'algo.adapt=[head]'"),
        ("train -m seed=range(3,1)", "seed=range(3,1) has no values: range(first,end) goes"),
        ("train -m seed=range(0)", "seed=range(0) has no values"),
        ("train -m seed=range(0,9,-1)", "seed=range(0,9,-1) has no values"),
        ("train -m seed=range(0,1,0)", "seed=range(0,1,0): range() arg 3 must not be zero"),
        ("train -m algo=glob(no*)", "algo=glob(no*) matches no option"),
        ("train -m seed=choice()", "with -m also key=a,b,c or key=range(0,3)"),
        ("train hydra.job.chdir=true", "a run stays in the folder where its command was typed"),
        ("train seed=a(b", "as text this very value is typed 'seed='\"'\"'a(b'\"'\"''"),
        ("train hydra.run.dir=a${b}", "hydra.run.dir refers to ${b}, and there is no such"),
        ("train hydra.run.dir=~nobody_here/x", "there is no user 'nobody_here'; a folder is ./~"),
        (r"train hydra.run.dir=a\${b}", "a folder with ${ in its name cannot be used for this"),
        ("report out=~nobody_here/x", "there is no user 'nobody_here'"),
        ("report runs=1", "there is no setting 'runs', nor a folder 'runs=1'"),
        ("train +trainer.epochs=1", "no setting 'trainer.epochs'"),
        ("train inner_opt=adam inner_opt.momentum=0.9", "no setting 'inner_opt.momentum'"),
        (
            "train -m inner_opt=sgd,adam inner_opt.momentum=0.9",
            "no setting 'inner_opt.momentum' with inner_opt=adam: sweep over options that have it",
        ),
        (
            "train -m inner_opt=choice(sgd,newton) inner_opt.lr=0.1",
            "no setting 'inner_opt.lr' with inner_opt=newton: sweep over options that have it",
        ),
        (
            "train -m backbone=mlp,conv4 backbone.hidden=[3],[4] data=sinusoid",
            "no setting 'backbone.hidden' with backbone=conv4: sweep over options that have it",
        ),
        (
            "train -m experiment=demo,omniglot_5w1s_quick data.split_seed=3",
            "no setting 'data.split_seed' with experiment=demo",
        ),
        ("train seed=0,1 -m trainer.stepz=3", "'trainer.stepz' (did you mean trainer.steps?)"),
        ("train hydra.run.dir=", "hydra.run.dir= is empty: name a folder"),
        ("train -m seed=0,1 hydra.sweep.dir=''", "hydra.sweep.dir= is empty"),
        ("eval ckpt=", "ckpt= is empty"),
        ("train trainer.steps=many", "trainer.steps: value 'many' of type 'str'"),
        ("train trainer.steps=0", "trainer.steps=0: must be from 1 to"),
        ("train --resolve", "--resolve goes with --cfg job"),
        ("train -p trainer.steps=4", "-p, --package goes with --cfg job"),
        ("train ++engine=${seed}", "engine=0: it is a group of settings, no value"),
        ("eval ckpt=x task=${oc.env:HOME}", "it is a group of settings, no value"),
        ("train -", "no option '-'"),
        ("train hydra.verbose=1", "this command cannot be read: look at its settings of hydra"),
        ("train algo=5", "must be a string or a list. Got int"),
        ("train algo=[1]", "this command cannot be read"),
        ("train algo.order=3", "algo.order=3: choose one of 1, 2"),
        ("train engine.batching=fast", "choose one of auto, vmap, loop"),
        ("train engine.gradient=fast", "choose one of auto, reverse, first_order, truncated"),
        ("train algo=[null]", "this command cannot be read"),
        ("train nner_opt.x=1 --hydra-help algo=[null]", "there is no setting"),
        ("train algo.order=1 engine.gradient=mixed", "algo.order=1 means first_order"),
        ("train engine.gradient=implicit inner_opt.learn=[lr]", "cannot learn lr"),
        ("train engine.sigma=0", "engine.sigma=0.0: must be above 0"),
        ("train inner_opt.learn=lr", "inner_opt.learn"),
        ("train inner_opt.groups=[{lr:0.1}]", "names no parameters"),
        ("train inner_opt.lr=-1", "inner_opt.lr=-1.0: must be 0 or more"),
        ("train inner_opt.lr=nan", "inner_opt.lr=nan: must be a finite number"),
        ("train inner_opt=partition inner_opt.parts=[3]", "inner_opt.parts: cannot assign int to"),
        ("train inner_opt.groups=[3]", "inner_opt.groups: cannot assign int to"),
        ("train inner_opt.groups=[{params:head.*,lr:-1}]", "groups, head.*: lr=-1: must be 0"),
        ("train inner_opt=adam inner_opt.beta1=1", "inner_opt.beta1=1.0: must be from 0"),
        ("train outer_opt.min_lr=5", "outer_opt.min_lr=5.0: must be from 0 to 0.001"),
        ("train seed=-1", "seed=-1: must be from 0"),
        ("train backbone.name=foo", "choose backbone=conv4|identity|l2l|mlp|"),
        ("train seed=0,1", "seed=0,1 has several values: add -m for a run of each"),
        ("train seed=range(3)", "seed=range(3) has several values: add -m"),
        ("train +experiment=demo", "experiment is given twice: write experiment=… once"),
        ("raport", "did you mean report?"),
        ("train foo", "cannot read the argument 'foo': expected key=value"),
        ("train +plugins=[no_such_module]", "cannot import the plugin 'no_such_module'"),
        ("train experiment=nothing", "no such option; `metarun train --help` says which there are"),
        ("train experiment=cpu/maml_emoji_5w2s", "did you mean experiment=cpu/maml_emoji_5w1s?"),
        ("train -m seed=0,1 --cfg job", "--cfg and --info are for a single run"),
        ("eval", "not given: ckpt=<run directory or checkpoint file>"),
        ("eval ckpt=nowhere", "ckpt=nowhere: there is no such run directory"),
        ("eval ckpt=x episodes=0", "episodes=0: must be from 1 to"),
        ("eval ckpt=x split=all", "choose one of train, val, test"),
        ("train device=tpu", "device=tpu: choose one of auto, cpu, cuda, cuda:N"),
        ("train data=sinusoid", "conv4 needs images"),
    ],
)
def test_a_wrong_command_ends_with_one_clear_message(
    metarun: Metarun, tmp_path: Path, arguments: str, message: str
) -> None:
    done = metarun(*arguments.split(), code=2)
    assert message in done.stderr
    assert done.stderr.startswith("metarun: ") and len(done.stderr.splitlines()) == 1
    assert files(tmp_path) == {}
    assert list(tmp_path.glob("outputs/*/*")) == [], "a directory was left behind"


def test_options_may_stand_behind_settings() -> None:
    ordered = _options_first(["seed=0,1", "-m", "algo=anil", "-p", "algo", "--cfg=job", "x=1"])
    assert ordered == ["-m", "-p", "algo", "--cfg=job", "seed=0,1", "algo=anil", "x=1"]
    assert _options_first(["x=1", "--info", "plugins"]) == ["--info=plugins", "x=1"]
    assert _options_first(["-i", "x=1"]) == ["-i=all", "x=1"]


def test_text_from_a_file_cannot_pass_for_a_message_of_its_own() -> None:
    text, code = explain(CheckpointError("algo.name=x\nmetarun: all is well\n\x1b[31m"))
    assert code == 1 and text == "algo.name=x\\nmetarun: all is well\n\\x1b[31m"


def test_debug_shows_the_traceback(environment: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "metarun", "train", "trainer.steps=0"]
    env = environment | {"METARUN_DEBUG": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" in done.stderr


def test_a_run_leaves_what_the_contract_says_and_eval_repeats_its_figure(
    metarun: Metarun, tmp_path: Path
) -> None:
    done = metarun("train", *SHORT, "hydra.run.dir=run")
    run = tmp_path / "run"
    result = json.loads((run / "result.json").read_text())
    assert "test mse" in done.stdout and "95 % CI; 20 tasks" in done.stdout
    assert "next: metarun eval ckpt=run" in done.stdout
    assert "inner steps, batch norm: none" in done.stdout
    assert "step 20/20" in done.stderr, "log lines where there is no terminal"
    for name in ("config.yaml", "provenance.json", "status.json", "metrics.jsonl"):
        assert (run / name).stat().st_size > 0
    names = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert names == [
        "best.safetensors",
        "last.safetensors",
        "step-00000010.safetensors",
        "step-00000020.safetensors",
    ]
    status = json.loads((run / "status.json").read_text())
    assert status["status"] == "completed" and status["attempts"] == 1
    provenance = json.loads((run / "provenance.json").read_text())
    assert provenance["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert {"git", "device", "host", "argv"} <= set(provenance)
    assert (provenance["git"] is not None) == IN_CHECKOUT
    test = result["test"]
    assert test["episodes"] == 20 and len(test["mse_per_inner_step"]) == 4
    assert test["mse"] == test["mse_per_inner_step"][-1]

    again = metarun("eval", "ckpt=run", "hydra.run.dir=eval")
    figures = json.loads((tmp_path / "eval" / "result.json").read_text())["test"]
    assert figures == test
    assert "mse after 0, 1, … inner steps" in again.stdout
    before = files(tmp_path)
    for folder in ("run", "eval"):
        refused = metarun("eval", "ckpt=run", f"hydra.run.dir={folder}", code=2)
        assert "holds results already" in refused.stderr
    assert files(tmp_path) == before
    metarun(
        "eval", "ckpt=run/checkpoints/last.safetensors", "split=val", "episodes=7", "task.shot=3",
        "algo.eval_inner_steps=5", "hydra.run.dir=other", "engine.batching=loop",
    )  # fmt: skip
    other = json.loads((tmp_path / "other" / "result.json").read_text())["val"]
    assert (other["episodes"], other["shot"], other["inner_steps"]) == (7, 3, 5)
    assert len(other["mse_per_inner_step"]) == 6


def test_the_documented_way_to_load_the_weights_of_a_run(
    metarun: Metarun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metarun("train", *SHORT, "hydra.run.dir=outputs/train/mine")
    page = (REPO / "docs" / "reliability.md").read_text()
    code = page.partition("```py\n")[2].partition("```")[0]
    stored = checkpoint.load(tmp_path / "outputs/train/mine/checkpoints/best.safetensors")
    backbone = torch.nn.Module()
    backbone.body = torch.nn.Sequential(
        torch.nn.Linear(1, 40), torch.nn.ReLU(), torch.nn.Linear(40, 40)
    )
    backbone.head = torch.nn.Linear(40, 1)
    monkeypatch.chdir(tmp_path)
    exec(code, {"backbone": backbone})
    assert stored["meta"].keys() == backbone.state_dict().keys()
    assert all(torch.equal(stored["meta"][k], v) for k, v in backbone.state_dict().items())


def test_a_finished_run_is_recalled_and_another_config_refused(
    metarun: Metarun, tmp_path: Path
) -> None:
    first = metarun("train", *SHORT, "hydra.run.dir=run")
    before = files(tmp_path)
    again = metarun("train", *SHORT, "hydra.run.dir=run")
    assert "finished: nothing to do" in again.stderr and again.stdout == first.stdout
    refused = metarun("train", *SHORT, "seed=5", "algo.order=1", "hydra.run.dir=run", code=2)
    assert "holds a run of another config" in refused.stderr
    assert "seed: 0 there, 5 here" in refused.stderr and "algo.order" in refused.stderr
    assert files(tmp_path) == before


def test_same_command_same_bits(metarun: Metarun, tmp_path: Path) -> None:
    for name in ("a", "b"):
        metarun("train", *SHORT, "inner_opt=adam", "inner_opt.learn=[lr]", f"hydra.run.dir={name}")
    metarun("train", *SHORT, "inner_opt=adam", "inner_opt.learn=[lr]", "seed=1", "hydra.run.dir=c")
    a, b, c = (
        checkpoint.load(tmp_path / name / "checkpoints" / "last.safetensors")["meta"]
        for name in "abc"
    )
    assert "inner_opt.lr" in a and a["inner_opt.lr"] != 0.02
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not all(torch.equal(a[k], c[k]) for k in a)


def test_a_sweep_gives_each_run_its_own_directory(metarun: Metarun, tmp_path: Path) -> None:
    done = metarun("train", "-m", *SHORT, "seed=0,1", "hydra.sweep.dir=sweep")
    runs = sorted(p.name for p in (tmp_path / "sweep").iterdir() if p.is_dir())
    assert runs == ["maml-sinusoid-s0", "maml-sinusoid-s1"]
    for seed, name in enumerate(runs):
        result = json.loads((tmp_path / "sweep" / name / "result.json").read_text())
        assert result["test"]["seed"] == seed
    assert done.stdout.count("test mse") == 2


def test_runs_get_directories_of_their_own_by_default(metarun: Metarun, tmp_path: Path) -> None:
    metarun("train", *SHORT)
    metarun("train", *SHORT)
    runs = list((tmp_path / "outputs" / "train").iterdir())
    assert len(runs) == 2 and all(r.name.endswith("_maml-sinusoid-s0") for r in runs)


def test_impossible_tasks_are_refused_with_the_numbers(metarun: Metarun, tmp_path: Path) -> None:
    done = metarun("train", "task.way=999", code=2)
    assert "task.way=999 is more than the" in done.stderr and "split" in done.stderr
    assert "needs 2 classes or more" in metarun("train", "task.way=1", code=2).stderr
    done = metarun("train", "task.shot=10", "task.query=15", code=2)
    assert "10 + 15 = 25 is more than the 20 images of class" in done.stderr
    assert files(tmp_path) == {}


def test_patterns_and_hyperparameters_that_match_nothing_are_refused(metarun: Metarun) -> None:
    base = ("train", "data=sinusoid", "backbone=mlp")
    assert "no parameter matches 'tail" in metarun(*base, "algo.adapt=[tail.*]", code=2).stderr
    assert "cannot learn 'speed'" in metarun(*base, "inner_opt.learn=[speed]", code=2).stderr
    done = metarun(*base, "inner_opt.groups=[{params:tail.*,lr:0.1}]", code=2)
    assert "no parameter matches 'tail.*'" in done.stderr
    by_step = ("inner_opt.learn=[lr]", "inner_opt.granularity=step", "algo.inner_steps=0")
    assert "needs 1 inner step or more" in metarun(*base, *by_step, code=2).stderr
    done = metarun(*base, "inner_opt.nesterov=true", code=2)
    assert "nesterov needs a momentum" in done.stderr


def test_a_missing_data_set_says_where_it_looked_and_what_would_do(metarun: Metarun) -> None:
    done = metarun("train", "data=omniglot", "data.root=nowhere", "data.download=false", code=1)
    for part in ("nowhere", "omniglot-py", "data=glyphs"):
        assert part in done.stderr


def test_a_damaged_archive_is_named(metarun: Metarun, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "omniglot-py"
    folder.mkdir(parents=True)
    for name in ("images_background.zip", "images_evaluation.zip"):
        (folder / name).write_bytes(b"PK\x03\x04 cut short")
    done = metarun("train", "data=omniglot", "data.root=data", "data.download=false", code=1)
    assert "images_background.zip" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_cuda_is_refused(metarun: Metarun, tmp_path: Path) -> None:
    done = metarun("train", *SHORT, "device=cuda", code=2)
    assert "torch sees no CUDA device; use device=auto or device=cpu" in done.stderr
    assert files(tmp_path) == {}


def test_numbers_that_explode_stop_the_run_and_spare_the_checkpoint(
    metarun: Metarun, tmp_path: Path
) -> None:
    done = metarun(
        "train", *SHORT, "outer_opt=sgd", "outer_opt.lr=0.05", "hydra.run.dir=run",
        "trainer.steps=2000", "inner_opt.lr=0.7", "algo.inner_steps=8", code=1,
    )  # fmt: skip
    assert "became NaN or infinite at meta-step" in done.stderr
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["status"] == "failed" and "NaN" in status["error"]
    assert not (tmp_path / "run" / "result.json").exists()
    for path in (tmp_path / "run" / "checkpoints").glob("*.safetensors"):
        meta = checkpoint.load(path)["meta"]
        assert all(value.isfinite().all() for value in meta.values())


def test_an_output_directory_that_cannot_be_written(metarun: Metarun, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = metarun("train", *SHORT, "hydra.run.dir=file/run", code=1)
    assert "file/run" in done.stderr and len(done.stderr.splitlines()) == 1
    assert (tmp_path / "file").read_text() == "in the way"


def test_an_evaluation_does_not_go_into_the_folder_of_a_sweep(
    metarun: Metarun, tmp_path: Path
) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    done = metarun("eval", "ckpt=run", "hydra.run.dir=sweep", code=2)
    assert "sweep is the directory of a sweep: choose another hydra.run.dir" in done.stderr
    assert not (tmp_path / "sweep" / "result.json").exists()


def test_checkpoints_that_cannot_be_used(metarun: Metarun, tmp_path: Path) -> None:
    metarun("train", *SHORT, "hydra.run.dir=run")
    best = tmp_path / "run" / "checkpoints" / "best.safetensors"
    (tmp_path / "cut.safetensors").write_bytes(best.read_bytes()[:500])
    assert "damaged, truncated" in metarun("eval", "ckpt=cut.safetensors", code=1).stderr
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    said = metarun("eval", "ckpt=foreign.pt", code=1).stderr
    assert "not a checkpoint" in said and "scripts/convert_checkpoint.py" in said
    safetensors.torch.save_file({"weight": torch.ones(2)}, tmp_path / "foreign.safetensors")
    assert "not a checkpoint" in metarun("eval", "ckpt=foreign.safetensors", code=1).stderr
    content = checkpoint.load(best)
    (tmp_path / "newer.safetensors").write_bytes(
        checkpoint.to_bytes(content | {"version": VERSION + 1})
    )
    assert "newer metarun" in metarun("eval", "ckpt=newer.safetensors", code=1).stderr
    shutil.copytree(tmp_path / "run", tmp_path / "empty")
    shutil.rmtree(tmp_path / "empty" / "checkpoints")
    done = metarun("eval", "ckpt=empty", code=2)
    assert "no run directory with a checkpoint in it" in done.stderr
    done = metarun("eval", "ckpt=run", "task.way=3", code=2)
    assert "task.way=3" in done.stderr


def test_a_plugin_brings_a_backbone_and_a_checkpoint_cannot(
    metarun: Metarun, tmp_path: Path
) -> None:
    (tmp_path / "my_nets.py").write_text(
        "from dataclasses import dataclass\n"
        "from metarun.components.backbone.mlp import MLP\n"
        "from metarun.components.build import register\n"
        "@dataclass\n"
        "class WideConfig:\n"
        "    name: str = 'wide'\n"
        "    width: int = 64\n"
        "register('backbone', 'wide', WideConfig,\n"
        "         lambda shape, outputs, width: MLP(shape, outputs, hidden=(width,)))\n"
    )
    short = [a for a in SHORT if not a.startswith("backbone")]
    plugin = ("+plugins=[my_nets]", "backbone=wide")
    metarun("train", *short, *plugin, "backbone.width=9", "hydra.run.dir=run")
    assert "no setting" in metarun("train", *short, *plugin, "backbone.with=9", code=2).stderr
    done = metarun("eval", "ckpt=run", "episodes=5", code=1)
    assert "backbone=wide, unknown here: give +plugins=[my_nets]" in done.stderr
    assert "test mse" in metarun("eval", "ckpt=run", "episodes=5", "+plugins=[my_nets]").stdout


NETS = """
from dataclasses import dataclass
from torch import nn
from metarun.components.backbone.mlp import MLP
from metarun.components import register

@dataclass
class NoisyConfig:
    name: str = "noisy"

@dataclass
class RunningConfig:
    name: str = "running"

class Noisy(nn.Module):
    def __init__(self, shape, outputs):
        super().__init__()
        self.net, self.drop = MLP(shape, outputs), nn.Dropout(0.5)

    def forward(self, x):
        return self.net(self.drop(x))

register("backbone", "noisy", NoisyConfig, Noisy)
register("backbone", "running", RunningConfig,
         lambda shape, outputs: nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, outputs)))
"""


def test_dropout_does_not_change_a_figure_and_running_statistics_are_refused(
    metarun: Metarun, tmp_path: Path
) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    short = [a for a in SHORT if not a.startswith("backbone")]
    metarun("train", *short, "+plugins=[nets]", "backbone=noisy", "hydra.run.dir=run")
    metarun("eval", "ckpt=run", "+plugins=[nets]", "hydra.run.dir=eval")
    stored, again = (
        json.loads((tmp_path / folder / "result.json").read_text())["test"]
        for folder in ("run", "eval")
    )
    assert stored == again
    done = metarun("train", *short, "+plugins=[nets]", "backbone=running", code=2)
    assert "keeps running statistics" in done.stderr


def test_damaged_records_do_not_block_a_run(metarun: Metarun, tmp_path: Path) -> None:
    metarun("train", *SHORT, "hydra.run.dir=run")
    stored = json.loads((tmp_path / "run" / "result.json").read_text())["test"]
    for name in ("status.json", "provenance.json", "result.json"):
        (tmp_path / "run" / name).write_text("")
    done = metarun("train", *SHORT, "hydra.run.dir=run")
    assert "ignoring the damaged file" in done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["test"] == stored
    (tmp_path / "run" / "config.yaml").write_text("a: [")
    done = metarun("train", *SHORT, "hydra.run.dir=run", code=2)
    assert "config.yaml is damaged" in done.stderr and len(done.stderr.splitlines()) == 1


def test_one_task_has_no_interval(metarun: Metarun, tmp_path: Path) -> None:
    done = metarun("train", *SHORT, "trainer.test_episodes=1", "hydra.run.dir=run")
    assert "± ?" in done.stdout
    text = (tmp_path / "run" / "result.json").read_text()
    assert "NaN" not in text and json.loads(text)["test"]["ci95"] is None


def test_glyphs_and_omniglot_train(metarun: Metarun, tmp_path: Path, real_data: Path) -> None:
    short = (
        "trainer.steps=3", "trainer.meta_batch=2", "backbone.width=8", "trainer.eval_episodes=4",
        "trainer.test_episodes=4", "task.query=2",
    )  # fmt: skip
    assert "test accuracy" in metarun("train", *short).stdout
    root = {"METARUN_DATA": str(real_data)}
    for extra in ((), ("data.split=vinyals", "backbone.pool=max"), ("task.way=20",)):
        done = metarun("train", "data=omniglot", *short, *extra, **root)
        assert "test accuracy" in done.stdout and "batch statistics" in done.stdout


def test_fewer_inner_steps_in_evaluation_than_in_training_are_told(metarun: Metarun) -> None:
    common = ("train", "data=sinusoid", "backbone=mlp", "trainer.steps=1",
              "trainer.eval_episodes=2", "trainer.test_episodes=2")  # fmt: skip
    words = "tasks get 4 inner steps in training, but 3 in validation and test"
    assert words in metarun(*common, "algo.inner_steps=4").stderr
    told = metarun(*common, "algo.inner_steps=4", "algo.eval_inner_steps=4").stderr
    assert "inner steps in training" not in told


def test_hessians_that_are_large_or_of_rows_are_told(metarun: Metarun) -> None:
    common = ("train", "data=sinusoid", "backbone=mlp", "backbone.hidden=[16,16]",
              "inner_opt=newton", "algo.inner_steps=1", "algo.eval_inner_steps=1",
              "trainer.steps=1", "trainer.meta_batch=1", "trainer.eval_episodes=2",
              "trainer.test_episodes=2")  # fmt: skip
    assert "takes a Hessian of 321 x 321 in each inner step" in metarun(*common).stderr
    assert "Hessian" not in metarun(*common, "algo.adapt=[head.*]").stderr
    by_rows = metarun(*common, "inner_opt.joint=false").stderr
    assert "Hessian" not in by_rows and "the steps are not those of Newton's method" in by_rows


def test_the_folder_where_a_command_was_typed_is_never_removed(
    metarun: Metarun, tmp_path: Path
) -> None:
    """Not even if it is empty, the run's own, and the run comes to nothing."""
    done = metarun("train", "data=sinusoid", "hydra.run.dir=.", code=2)
    assert "conv4 needs images" in done.stderr
    assert tmp_path.is_dir()
