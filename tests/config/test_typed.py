"""What is typed: paths with odd letters, and mistakes in YAML files of one's own."""

import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from metarun.config.typed import as_argument, as_path, expanded, with_paths
from metarun.errors import ConfigError
from tests.cli.test_cli import SHORT
from tests.conftest import Metarun

NASTY = (
    "a b", "a'b", 'a"b', "a\\b", "a\\", "a\\'b", "a=b", "a#b", "größe", "日本", "a${b}", "a\\${b}",
    "a,b", "[a]", "{a}", "{a:1}", "a;b&c", "a!b", "a\tb", "x'", "'a'", '"a"', "a$b", "$HOME", "~",
    "~a", "~/a", "null", "true", "007", "1e3", "-a", " x", "x ", "a(b)", "choice(a,b)", "range(3)",
    "a:b", "a*b?", "a\\,b", "a\\ b", "int(3)", "a|b", "a%b", "@a", "+a", ".", "..", "a\nb",
)  # fmt: skip


def value_of(argument: str) -> object:
    """What a run gets to see of an argument."""
    value = OverridesParser.create().parse_override(argument).value()
    return OmegaConf.create({"value": value, "b": "wrong"}).value


@pytest.mark.parametrize("path", NASTY)
def test_a_path_is_printed_so_that_its_paste_is_read_as_the_path(path: str) -> None:
    (pasted,) = shlex.split(as_argument("ckpt", path))
    (argument,) = with_paths([pasted], multirun=False)
    assert str(value_of(argument)) == as_path(path)
    assert Path(as_path(path)) == Path(path)


def test_a_path_is_read_as_it_stands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir(tmp_path)

    def read(argument: str, multirun: bool = False) -> object:
        return value_of(with_paths([argument], multirun)[0])

    for key in ("hydra.run.dir", "hydra.sweep.dir", "ckpt", "data.root"):
        for typed in ("~/x", "'~/x'", '"~/x"'):
            assert read(f"{key}={typed}") == "/home/me/x"
        assert read(f"{key}=~") == "/home/me"
        assert read(f"{key}=a/~/b=c") == "a/~/b=c"
        assert read(f"{key}=./~x") == "./~x"
        for typed in NASTY:
            hydras = typed in ("null", "{a:1}") or {",", "$", "\\", "("} & set(typed)
            if not hydras and typed.strip("'\" ") == typed and not typed.startswith("~"):
                assert read(f"{key}={typed}") == typed
    for key in ("hydra.run.dir", "hydra.sweep.dir"):
        for typed in ("a,b", "choice(a,b)", "a(b),c"):
            assert read(f"{key}={typed}", multirun=True) == typed
    assert read("+hydra.run.dir=~/x") == "/home/me/x"
    assert with_paths(["seed=0,1", "x=~y", "ckpt=a"], False) == ["seed=0,1", "x=~y", "ckpt=a"]
    several = with_paths(["ckpt=~/a,b(c)"], multirun=True)[0]
    parsed = OverridesParser.create().parse_override(several)
    paths = [value_of(f"ckpt={path}") for path in parsed.sweep_string_iterator()]
    assert paths == ["/home/me/a", "b(c)"]
    (tmp_path / "a,b").mkdir()
    assert read("ckpt=a,b") == "a,b", "it is there, so it is meant"
    with pytest.raises(ConfigError, match=r"x=~no_such_user/a: there is no user 'no_such_user'"):
        expanded("x", "~no_such_user/a")


def test_what_is_printed_next_works_when_it_is_pasted(metarun: Metarun, tmp_path: Path) -> None:
    names = ("a=b (c)#d, größe 'x' & \"y\"", "~")
    short = ("trainer.steps=1", "trainer.eval_episodes=2", "trainer.test_episodes=2")
    for name in names:
        metarun("train", *SHORT, *short, f"hydra.run.dir=./{name}")
        done = metarun("train", *SHORT, *short, f"hydra.run.dir=./{name}")
        assert "finished: nothing to do" in done.stderr and (tmp_path / name).is_dir()
        (line,) = (line for line in done.stdout.splitlines() if line.startswith("next: "))
        program, *pasted = shlex.split(line.removeprefix("next: "))
        assert program == "metarun"
        assert "test mse" in metarun(*pasted, "episodes=2").stdout
        metarun("report", f"./{name}", "out=report")
    home = {"HOME": str(tmp_path / "home")}
    metarun("train", *SHORT, *short, "hydra.run.dir=~/run", **home)
    assert (tmp_path / "home" / "run" / "result.json").exists()
    assert "test mse" in metarun("eval", "ckpt=~/run", "episodes=2", **home).stdout
    metarun("report", "~/run", "out=~/report", **home)
    assert (tmp_path / "home" / "report" / "report.html").exists()
    sweep = ("hydra.sweep.dir=s (1),2", "seed=0,1", "task.shot=0")
    failed = metarun("train", "-m", *SHORT, *short, *sweep, code=2)
    assert "task.shot=0: must be from 1" in failed.stderr


FILES = {
    "typo": ("# @package _global_\ntrainer:\n  meta_batch: 3\n  stepz: 3\n",
             "typo.yaml, line 4: there is no setting 'trainer.stepz' (did you mean trainer.steps"),
    "top": ("# @package _global_\nlr: 3\n", "top.yaml, line 2: there is no setting 'lr' (did you"),
    "tab": ("# @package _global_\ntrainer:\n\tsteps: 3\n",
            "tab.yaml, line 3: found character '\\t' that cannot start any token; YAML is"),
    "brace": ("# @package _global_\ntrainer: {steps: 3\n", "brace.yaml, line 3: expected ',' or"),
    "twice": ("# @package _global_\nseed: 1\nseed: 2\n", "twice.yaml, line 3: found duplicate key"),
    "bare": ("trainer: {steps: 3}\n", "bare.yaml lacks its first line: write '# @package"),
    "package": ("# @package _globl_\nseed: 3\n", "package.yaml: there is no group '_globl_' for"),
    "kind": ("# @package _global_\ntrainer:\n  steps: many\n",
             "kind.yaml, line 3: trainer.steps: value 'many' of type 'str' could not"),
    "flat": ("# @package _global_\ntrainer: 3\n", "flat.yaml, line 2: trainer: expected groups of"),
    "list": ("# @package _global_\n- seed\n", "list.yaml: expected groups of settings"),
    "twofold": ("# @package _global_\ndefaults:\n  - /algo: maml\n",
                "in a file of your own 'override /algo: …'"),
    "first": ("defaults:\n  - override /data: glyphs\n",
              "experiment/first.yaml: its first line must be '# @package _global_', else the"),
    "gobal": ("# @package _gobal_\ndefaults:\n  - override /algo: anil\n",
              "override of 'algo' in its defaults is looked for below '_gobal_'"),
    "bare_choice": ("# @package _global_\ndefaults:\n  - data: sinusoid\n",
                    "to choose data=sinusoid, write '- override /data: sinusoid' in its defaults"),
    "refers": ("# @package _global_\ntrainer: {steps: '${sede}'}\n",
               "trainer.steps refers to ${sede}, and there is no such setting"),
}  # fmt: skip


def test_a_mistake_in_a_file_of_ones_own_is_named_with_file_line_and_key(
    metarun: Metarun, tmp_path: Path
) -> None:
    for group in ("experiment", "algo"):
        (tmp_path / "own" / group).mkdir(parents=True)
    for name, (text, message) in FILES.items():
        (tmp_path / "own" / "experiment" / f"{name}.yaml").write_text(text)
        done = metarun("train", "--config-dir", "own", f"experiment={name}", code=2)
        assert message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    done = metarun("train", "hydra.searchpath=[own]", "-m", "experiment=demo,typo", code=2)
    assert "own/experiment/typo.yaml, line 4: there is no setting" in done.stderr
    own = tmp_path / "own" / "algo"
    (own / "mine.yaml").write_text("defaults: [maml, _self_]\ninner_stepz: 3\n")
    done = metarun("train", "--config-dir", "own", "algo=mine", code=2)
    assert "mine.yaml, line 2: there is no setting 'algo.inner_stepz'" in done.stderr
    (own / "mine.yaml").write_text("inner_steps: 3\n")
    done = metarun("train", "--config-dir", "own", "algo=mine", code=2)
    assert "does not say which algo it is: begin it with 'defaults: [anil, _self_]'" in done.stderr
    (own / "mine.yaml").write_text("name: anil\ninner_steps: 3\n")
    done = metarun("train", "--config-dir", "own", "algo=mine", code=2)
    assert "begin it with 'defaults: [anil, _self_]' (there are anil," in done.stderr
    (own / "mine.yaml").write_text("defaults: [maml, _self_]\ninner_steps: 3\n")
    done = metarun("train", "--config-dir", "own", "--cfg", "job", "algo=mine")
    assert "inner_steps: 3" in done.stdout
    assert list(tmp_path.glob("outputs/*/*")) == []


def test_a_search_that_some_option_cannot_take_part_in_is_refused_before_any_trial(
    metarun: Metarun, tmp_path: Path
) -> None:
    pytest.importorskip("optuna")
    search = ("train", "-m", "hydra/sweeper=optuna", "hydra.sweep.dir=search", *SHORT[:-1])
    lr = "inner_opt.lr=interval(0.1,0.2)"
    done = metarun(*search, lr, "inner_opt=sgd,adam,newton", code=2)
    assert "no setting 'inner_opt.lr' with inner_opt=newton" in done.stderr
    assert list(tmp_path.iterdir()) == []
