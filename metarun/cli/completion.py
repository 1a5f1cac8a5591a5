"""`metarun completion bash|zsh|fish`: what could be typed next.

The scripts of the three shells, in `metarun/cli/completions`, ask `metarun completion candidates`
with the line typed so far. The answers come from the schemas, composed with the options already
on that line, so the keys are those that this very command would take; Hydra's own completion
answers for what is below `hydra`. Imports no torch: an answer must not be waited for.
"""

import os
import re
import shlex
from collections.abc import Callable, Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.plugins.completion_plugin import DefaultCompletionPlugin

from metarun.cli.help import Setting, as_typed, options, settings
from metarun.config import compose
from metarun.config._hydra import get_args_parser
from metarun.config.typed import with_more
from metarun.errors import ConfigError

HELP = """\
metarun completion: print what makes a shell complete metarun's commands

usage: metarun completion bash|zsh|fish

  eval "$(metarun completion bash)"        in ~/.bashrc
  eval "$(metarun completion zsh)"         in ~/.zshrc
  metarun completion fish | source         in ~/.config/fish/config.fish

TAB then completes commands, groups and their options, settings and their values, and the paths
of runs and checkpoints; the settings are those of the options already on the line.
"""
SHELLS = ("bash", "zsh", "fish")
FOLDERS = ("data.root", "support", "query", "hydra.run.dir", "hydra.sweep.dir")
HYDRA_KEYS = {
    "hydra.run.dir=": "the run directory; the same one again resumes the run",
    "hydra.sweep.dir=": "the directory of a sweep; the same one again resumes it",
}


class Candidate(NamedTuple):
    """A word that could stand where the cursor is, and what it means."""

    word: str
    meaning: str = ""

    @property
    def finished(self) -> bool:
        """Whether a space may follow: no value, key or file name is still to come."""
        return not self.word.endswith(("=", ".", "/", "[", ","))


def main(arguments: list[str], commands: dict[str, str]) -> None:
    """Print a shell's script, or (for the scripts) the candidates for a line.

    Args:
        arguments: a shell; or "candidates", a shell, the line up to the cursor and, from bash,
            the part of its last word that the shell is going to replace.
        commands: the subcommands, each with one line on it.

    Raises:
        ConfigError: anything else.
    """
    if "--help" in arguments or "-h" in arguments:
        print(HELP, end="")
    elif [*arguments[:2], len(arguments)] in _ASKED:
        compose.register_schemas()
        shell, line, *replaced = arguments[1:]
        for candidate in candidates(line, commands):
            print(_FORMATS[shell](candidate, line, *replaced))
    elif len(arguments) == 1 and arguments[0] in SHELLS:
        script = files("metarun.cli.completions").joinpath(f"metarun.{arguments[0]}")
        print(script.read_text(encoding="utf-8"), end="")
    else:
        given = f"not {' '.join(arguments)!r}" if arguments else "e.g. metarun completion bash"
        raise ConfigError(f"completion is for one of {', '.join(SHELLS)}, {given}")


def candidates(line: str, commands: dict[str, str]) -> list[Candidate]:
    """What could stand in place of the last word of a command line.

    Args:
        line: the command line up to the cursor, as typed.
        commands: the subcommands, each with one line on it.
    """
    words, _ = _split(line)
    while len(words) > 1 and re.match(r"\w+=", words[0]):
        words = words[1:]  # METARUN_DATA=… metarun …
    if len(words) < 2:
        return []
    *before, word = words[1:]
    if not before or before == ["help"]:
        found = _described(commands)
    elif before[0] == "completion":
        found = [Candidate(shell) for shell in SHELLS] if len(before) == 1 else []
    elif before[0] not in commands:
        found = []
    elif before[0] == "report":
        out = [Candidate("out=", "where the report goes")]
        found = _paths(word[4:], "out=") if word.startswith("out=") else [*_paths(word), *out]
    elif before[0] == "data":
        found = _complete_data_command(before[1:], word)
    elif len(before) > 1 and before[-1] in (choices := _option_values()):
        found = _described(dict.fromkeys(choices[before[-1]], ""))
    elif word.startswith("-"):
        found = _described(_options())
    else:
        found = _complete_hydra_command(before[0], before[1:], word)
    return [candidate for candidate in found if candidate.word.startswith(word)]


def _complete_data_command(before: list[str], word: str) -> list[Candidate]:
    if not before:
        return [Candidate(action) for action in ("list", "check", "prepare")]
    if before == ["list"]:
        return _paths(word[10:], "data.root=") if word.startswith("data.root=") else []
    if len(before) == 1:
        return _described(options()["data"])
    return _complete_hydra_command("train", [f"data={before[1]}", *before[2:]], word)


def _complete_hydra_command(command: str, before: list[str], word: str) -> list[Candidate]:
    key, equals, value = word.partition("=")
    known = options(command)
    chosen = [o.partition(",")[0] for o in before if o.partition("=")[0] in known]
    if word.startswith("hydra.") and not equals:
        return _complete_by_hydra(command, chosen, word)
    if equals and (key == "ckpt" or key in FOLDERS or re.match(r"[.~/]", value)):
        return _paths(value, f"{key}=", suffix=".safetensors" if key == "ckpt" else None)
    if equals and key in known:
        return _listed(f"{key}=", value, known[key])
    here = {setting.key: setting for setting in _settings(command, chosen)}
    if not equals:
        return _keys(word, known, here.values())
    if key in here:
        return _listed(f"{key}=", value, _values(here[key]))
    return _complete_by_hydra(command, chosen, word) if key.startswith("hydra") else []


def _keys(word: str, groups: dict[str, dict[str, str]], here: Iterable[Setting]) -> list[Candidate]:
    """Keys, each up to the first dot after what has been typed: `trainer.`, then its keys."""
    found = {f"{group}=": "|".join(described) for group, described in groups.items()}
    found |= {f"{setting.key}=": setting.meaning for setting in here} | HYDRA_KEYS
    cut: dict[str, str] = {}
    for key, meaning in found.items():
        dot = key.find(".", len(word))
        if key.startswith(word):
            cut[key if dot < 0 else key[: dot + 1]] = meaning if dot < 0 else ""
    return _described(cut)


def _values(setting: Setting) -> dict[str, str]:
    """The values that are allowed, else the one that it has."""
    if isinstance(setting.value, bool):
        return {"true": "", "false": ""}
    if setting.key == "device":
        return {"auto": "", "cpu": "", "cuda": ""}
    allowed = setting.choices or (setting.value,)
    return {as_typed(value): "" for value in allowed}


def _listed(key: str, value: str, known: dict[str, str]) -> list[Candidate]:
    """The values of a key; behind a comma, as sweeps have it, those that are not there yet."""
    if value.startswith(("[", "{")):
        return []
    *given, _ = value.split(",")
    head = key + "".join(f"{item}," for item in given)
    return [Candidate(head + word, text) for word, text in known.items() if word not in given]


def _settings(command: str, chosen: list[str]) -> list[Setting]:
    for overrides in (chosen, []):
        try:
            given = with_more(overrides) if command == "eval" else overrides
            return settings(compose.composed(command, given))
        except (*compose.COMPOSITION_ERRORS, ConfigError):
            continue  # one of them is misspelt, or a plugin's: the keys of the defaults
    return []


def _complete_by_hydra(command: str, chosen: list[str], word: str) -> list[Candidate]:
    with initialize_config_module(config_module="metarun.conf", version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        engine = DefaultCompletionPlugin(hydra.config_loader)
        return [Candidate(found) for found in engine._query(command, " ".join([*chosen, word]))]


def _options() -> dict[str, str]:
    return {
        option: (action.help or "").partition("\n")[0]
        for action in get_args_parser()._actions
        for option in action.option_strings
        if action.dest != "shell_completion"  # Hydra's: this module does it in its place
    }


def _option_values() -> dict[str, Iterable[Any]]:
    return {
        option: action.choices
        for action in get_args_parser()._actions
        for option in action.option_strings
        if action.choices
    }


def _paths(typed: str, prefix: str = "", suffix: str | None = None) -> list[Candidate]:
    """Folders, and files of a suffix, that begin with what has been typed."""
    folder, _, start = typed.rpartition("/")
    folder = f"{folder}/" if "/" in typed else ""
    try:
        entries = sorted(os.scandir(Path(folder or ".").expanduser()), key=lambda e: e.name)
    except OSError:
        return []
    found = []
    for entry in entries:
        if entry.name.startswith(".") and not start.startswith("."):
            continue
        if entry.is_dir():
            found.append(Candidate(f"{prefix}{folder}{entry.name}/"))
        elif suffix is not None and entry.name.endswith(suffix):
            found.append(Candidate(f"{prefix}{folder}{entry.name}"))
    return found


def _described(words: dict[str, str]) -> list[Candidate]:
    return [Candidate(word, meaning) for word, meaning in words.items()]


def _split(line: str) -> tuple[list[str], str]:
    """The words of an unfinished command line as a shell sees them; the last may be empty.

    Returns:
        The words, and the quotation mark that is still open, if one is.
    """
    for quote in ("", '"', "'", "\\"):
        try:
            words = shlex.split(line + quote)
        except ValueError:
            continue
        return ([*words, ""] if not quote and re.search(r"(?<!\\)\s$", line) else words), quote
    return [], ""


def _for_bash(candidate: Candidate, line: str, replaced: str) -> str:
    """Without what precedes the part that is replaced: bash cuts words at "=" and ":"."""
    words, quote = _split(line)
    kept = len(words[-1]) - len((_split(replaced)[0] or [""])[-1])
    rest = candidate.word[kept:]
    if quote in ('"', "'"):
        return rest  # bash closes the quotation by itself
    return re.sub(r"([^\w@%+=:,./~-])", r"\\\1", rest) + (" " if candidate.finished else "")


def _for_zsh(candidate: Candidate, line: str) -> str:
    word = candidate.word.replace("\\", "\\\\").replace(":", "\\:")
    return f"{int(candidate.finished)}\t{word}:{candidate.meaning}"


def _for_fish(candidate: Candidate, line: str) -> str:
    return f"{candidate.word}\t{candidate.meaning}"


_ASKED = (["candidates", "bash", 4], ["candidates", "zsh", 3], ["candidates", "fish", 3])
_FORMATS: dict[str, Callable[..., str]] = {"bash": _for_bash, "zsh": _for_zsh, "fish": _for_fish}
