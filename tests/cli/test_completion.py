"""Completion, asked for by real shells: what a user types, TAB, and the line that results."""

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from metarun.cli.completion import SHELLS, candidates, main
from metarun.cli.help import options, settings
from metarun.cli.main import COMMANDS
from metarun.config.catalogue import GROUPS, schemas
from metarun.errors import ConfigError
from tests.conftest import Metarun
from tests.setups import config_of

TAB = "\t"
TYPED = {
    f"metarun tr{TAB}": ["metarun", "train"],
    f"metarun train algo=an{TAB}": ["metarun", "train", "algo=anil"],
    f"metarun train algo=an{TAB} trainer.st{TAB}5": [
        "metarun", "train", "algo=anil", "trainer.steps=5",
    ],
    f"metarun train -m algo=maml,an{TAB}": ["metarun", "train", "-m", "algo=maml,anil"],
    f"metarun train engine.gr{TAB}impl{TAB}": ["metarun", "train", "engine.gradient=implicit"],
    f"metarun train inner_opt=adam inner_opt.am{TAB}t{TAB}": [
        "metarun", "train", "inner_opt=adam", "inner_opt.amsgrad=true",
    ],
    f"metarun train hydra/la{TAB}j{TAB}": ["metarun", "train", "hydra/launcher=joblib"],
    f"metarun train algo.ad{TAB}{TAB}": ["metarun", "train", "algo.adapt=[*]"],
    f"metarun eval ckpt=my{TAB}che{TAB}la{TAB}": [
        "metarun", "eval", "ckpt=my run/checkpoints/last.safetensors",
    ],
    f'metarun train "algo=an{TAB} seed=1': ["metarun", "train", "algo=anil", "seed=1"],
    f"METARUN_DATA=x metarun comp{TAB}z{TAB}": ["METARUN_DATA=x", "metarun", "completion", "zsh"],
}  # fmt: skip
"""Keys -> the words that the shell has then."""


def words(line: str) -> set[str]:
    return {candidate.word for candidate in candidates(line, COMMANDS)}


def typed_into(
    shell: list[str], environment: dict[str, str], cwd: Path, lines: list[str]
) -> list[str]:
    """What an interactive shell on a terminal of its own answers to each line of keys."""
    terminal, of_shell = pty.openpty()
    process = subprocess.Popen(
        shell, stdin=of_shell, stdout=of_shell, stderr=of_shell, env=environment, cwd=cwd,
        start_new_session=True,
    )  # fmt: skip
    os.close(of_shell)
    answers = []
    try:
        for line in lines:
            # The terminal shows the keys too, but with quotes in them: only output has "END".
            os.write(terminal, f"{line}; echo E''ND\n".encode())
            deadline, shown = time.monotonic() + 60, ""
            while "END\r\n" not in shown:
                ready, _, _ = select.select([terminal], [], [], max(0, deadline - time.monotonic()))
                assert ready, f"no answer to {line!r}: {shown!r}"
                shown += os.read(terminal, 65536).decode(errors="replace")
            answers.append(shown)
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    return answers


@pytest.fixture
def shell_environment(environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """Where `metarun` is the one under test, and nobody's start-up files are read."""
    (tmp_path / "my run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "my run" / "checkpoints" / "last.safetensors").touch()
    (tmp_path / "my run" / "checkpoints" / "notes.txt").touch()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    own = {"PATH": path, "TERM": "dumb", "PS1": "$ ", "HOME": str(tmp_path), "ZDOTDIR": ""}
    return environment | own


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_user_types_and_presses_tab(
    shell: str, shell_environment: dict[str, str], tmp_path: Path
) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    quiet = {"bash": ["bash", "--norc", "--noprofile", "-i"], "zsh": ["zsh", "-f", "-i"]}[shell]
    to_start, to_end = "\x01", "\x05"
    lines = [f"{keys}{to_start}printf '<%s>' {to_end}" for keys in TYPED]
    set_up = f'eval "$(metarun completion {shell})"' + "; bindkey -e" * (shell == "zsh")
    _, *answers = typed_into(quiet, shell_environment, tmp_path, [set_up, *lines])
    for (keys, expected), answer in zip(TYPED.items(), answers, strict=True):
        (printed,) = re.findall(r"((?:<[^<>]*>)+)END\r\n", answer)
        assert re.findall(r"<(.*?)>", printed) == expected, (keys, answer)


def test_fish_offers_words_with_their_meaning(
    shell_environment: dict[str, str], tmp_path: Path
) -> None:
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")

    def offered(line: str) -> list[str]:
        script = "metarun completion fish | source; complete --do-complete $argv[1]"
        done = subprocess.run(
            ["fish", "--no-config", "-c", script, line],
            env=shell_environment, cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0 and done.stderr == "", done.stderr
        return done.stdout.splitlines()

    assert offered("metarun tr") == [f"train\t{COMMANDS['train']}"]
    assert offered("metarun train algo=ma") == ["algo=maml\tMAML (Finn et al. 2017)."]
    assert offered("metarun train seed=1 trainer.st") == ["trainer.steps=\tmeta-steps"]
    assert offered("metarun eval ckpt=my\\ run/che") == ["ckpt=my run/checkpoints/"]
    assert offered("true; metarun completion f") == ["fish"]


def test_scripts_load_without_a_word(shell_environment: dict[str, str], tmp_path: Path) -> None:
    for shell in SHELLS:
        if shutil.which(shell) is None:
            continue
        load = (
            'eval "$(metarun completion $0)"'
            if shell != "fish"
            else "metarun completion fish | source"
        )
        done = subprocess.run(
            [shell, "-c", load, shell], env=shell_environment, cwd=tmp_path, capture_output=True
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b""), shell


def test_everything_that_help_lists_is_completed() -> None:
    assert words("metarun ") == set(COMMANDS)
    for group, described in options().items():
        assert {f"{group}={name}" for name in described} <= words(f"metarun train {group}=")
    for group in GROUPS:
        for name in schemas(group):
            own = [s.key for s in settings(config_of(f"{group}={name}"))]
            offered = words(f"metarun train {group}={name} {group}.")
            assert {f"{key}=" for key in own if key.startswith(f"{group}.")} == offered, name
    for section in ("task", "trainer", "engine"):
        own = [s.key for s in settings(config_of()) if s.key.startswith(section)]
        plain = {f"{key}=" for key in own if key.count(".") == 1}
        below = {key[: key.rindex(".") + 1] for key in own if key.count(".") > 1}
        assert plain | below == words(f"metarun train {section}.")


def test_values_are_those_that_are_allowed() -> None:
    assert words("metarun train engine.solver=") == {
        "engine.solver=cg", "engine.solver=neumann", "engine.solver=fixed_point",
    }  # fmt: skip
    assert words("metarun train inner_opt.nesterov=") == {
        "inner_opt.nesterov=true", "inner_opt.nesterov=false",
    }  # fmt: skip
    assert words("metarun eval split=") == {"split=train", "split=val", "split=test"}
    assert words("metarun train trainer.steps=") == {"trainer.steps=2000"}
    assert words("metarun train -m algo=anil,mam") == {"algo=anil,maml", "algo=anil,maml_pp"}
    assert "algo=anil,anil" not in words("metarun train -m algo=anil,")
    assert words("metarun train --cfg ") == {"job", "hydra", "all"}
    assert "--multirun" in words("metarun train --mu")


def test_keys_are_those_of_the_options_on_the_line() -> None:
    assert "algo." in words("metarun train al")
    assert "algo.adapt=" not in words("metarun train al"), "a section, before its keys"
    assert words("metarun train data=omniglot data.ro") == {"data.root=", "data.rotations="}
    assert words("metarun train data.ro") == set()
    assert words("metarun train -m data=omniglot,glyphs data.ro") == {
        "data.root=",
        "data.rotations=",
    }
    assert words("metarun train algo=nonsense data.se") == {"data.seed="}
    assert "hydra.run.dir=" in words("metarun train hydra.run.")
    assert "hydra.launcher.n_jobs=" in words("metarun train hydra/launcher=joblib hydra.launcher.n")


NOTHING_FITS = [
    "",
    "metarun",
    "metarun nonsense ",
    "metarun train nonsense",
    "metarun train x.y=",
    "metarun train algo.order.",
    "metarun train algo=maml=",
    "metarun train \"'",
    "metarun train =",
    "metarun train 'inner_opt.groups=[{params:head.*,",
    "metarun eval ckpt=nowhere/",
    "metarun report nowhere/",
    "metarun completion bash ",
]


@pytest.mark.parametrize("line", NOTHING_FITS)
def test_where_nothing_fits_nothing_is_offered(line: str) -> None:
    assert words(line) == set()


def test_candidates_come_with_their_meaning(metarun: Metarun) -> None:
    done = metarun("completion", "candidates", "fish", "metarun train algo=an")
    assert done.stdout.startswith("algo=anil\t")


def test_another_shell_is_refused(metarun: Metarun) -> None:
    done = metarun("completion", code=2)
    assert "one of bash, zsh, fish, e.g. metarun completion bash" in done.stderr
    assert "not 'tcsh'" in metarun("completion", "tcsh", code=2).stderr
    for arguments in (["candidates", "ksh", "x"], ["candidates", "bash", "x"]):
        with pytest.raises(ConfigError, match="completion is for one of bash, zsh, fish"):
            main(arguments, COMMANDS)
