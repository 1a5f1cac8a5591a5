"""The command line: picks the subcommand and hands the rest to Hydra.

Imports torch nowhere: `--help` and `--cfg job` must answer at once.
"""

import importlib
import io
import logging
import os
import re
import sys
import traceback
import warnings

from metarun import __version__
from metarun.cli import report
from metarun.config.plugins import import_plugins
from metarun.errors import ConfigError, did_you_mean, explain, first_line
from metarun.system.lifetime import imports_not_collected

COMMANDS = {
    "train": "meta-train, validate, test; resumes an unfinished run",
    "eval": "evaluate a checkpoint on fresh tasks",
    "predict": "label your own pictures by a few examples of each class",
    "explain": "draw one task: examples, queries, predictions after each inner step",
    "export": "a run as one file for torch or ONNX, which labels pictures without metarun",
    "sensitivity": "one checkpoint under several evaluation protocols, on the same tasks",
    "report": "compare runs: tables and plots",
    "reproduce": "run experiments with a published figure, and say how near ours is",
    "data": "list data sets, make them ready, look into them",
    "completion": "print what makes bash, zsh or fish complete commands",
}

MULTIRUN = {"-m", "--multirun", "hydra.mode=MULTIRUN"}

USAGE = """\
metarun {version}: few-shot meta-learning experiments

usage: metarun <command> [group=option …] [key=value …]

commands:
{commands}

examples:
  metarun train                                       # MAML on glyphs, which need no files
  metarun train algo=maml data=omniglot               # real handwriting
  metarun train experiment=omniglot_5w1s_quick        # a ready-made experiment
  metarun train algo=anil algo.order=1 task.shot=5    # first-order ANIL, 5-shot
  metarun train -m seed=0,1,2                         # one run for each seed
  metarun train hydra.run.dir=outputs/train/my_run    # again with the same folder: resume
  metarun eval ckpt=outputs/train/my_run episodes=1000
  metarun predict ckpt=outputs/train/my_run support=examples query=new_pictures
  metarun export ckpt=outputs/train/my_run out=model.onnx   # a file for other programs
  metarun sensitivity ckpt=outputs/train/my_run       # what the evaluation's protocol changes
  metarun report outputs/train                        # compare runs: tables and plots
  metarun reproduce --list                            # published figures, and ours
  metarun data list                                   # which data sets are there
  tensorboard --logdir outputs/train
  eval "$(metarun completion bash)"                   # TAB then completes all of this

metarun <command> --help lists a command's settings; --cfg job prints its config.
METARUN_DATA names the folder of data sets; METARUN_DEBUG=1 shows tracebacks.
"""


def main() -> int:
    """Run the command line of this process and return its exit code.

    0: done, 1: the run failed, 2: the command or config was wrong, 130: interrupted.
    """
    arguments = sys.argv[1:]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # no "±" may end a run on an ASCII terminal
    error: BaseException | None = None
    try:
        if arguments[:1] == ["help"]:
            arguments = [*arguments[1:], "--help"]
        if not arguments or arguments[0] in ("-h", "--help"):
            _print_help()
            return 0 if arguments else 2
        if arguments[0] in ("-V", "--version"):
            print(f"metarun {__version__}")
            return 0
        command, rest = arguments[0], arguments[1:]
        if command not in COMMANDS:
            raise ConfigError(_unknown_command(command))
        _run(command, rest)
        sys.stdout.flush()  # here, where a closed pipe is no surprise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as caught:
        error = caught
    return _end(error)


def _run(command: str, arguments: list[str]) -> None:
    if command == "report":  # it has directories for arguments and no config
        report.main(arguments)
        return
    if command == "data":  # what it does is named by words, not by settings
        from metarun.cli import data

        if os.environ.get("METARUN_DATA") == "":
            del os.environ["METARUN_DATA"]
        with imports_not_collected():
            data.main(_with_plugins(arguments))
        return
    if command == "reproduce":  # its rows are named without a key
        from metarun.cli import reproduce

        with imports_not_collected():
            reproduce.main(arguments)
        return
    if command == "completion":  # of the other commands; likewise
        from metarun.cli import completion

        completion.main(arguments, COMMANDS)
        return
    with imports_not_collected():
        _run_job(command, arguments)


def _run_job(command: str, arguments: list[str]) -> None:
    import yaml

    from metarun.config import compose, launchers
    from metarun.config._hydra import get_args_parser
    from metarun.config.own_yaml import unreadable
    from metarun.sweeps import job

    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise ConfigError("the current folder was deleted: cd to one that exists") from error
    if os.environ.get("METARUN_DATA") == "":
        del os.environ["METARUN_DATA"]  # set to nothing means not set, not the current folder
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    arguments = prepared(command, _with_ranks(command, arguments))
    # Without this Hydra prints its own errors and exits with 1 whatever the cause.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    module = importlib.import_module(f"metarun.cli.{command}")
    sys.argv = [f"{_program()} {command}", *arguments]
    options = get_args_parser().parse_args(arguments)
    if options.multirun and command not in ("train", "eval"):
        raise ConfigError(f"metarun {command} has no sweeps: leave out -m")
    if options.multirun and (options.cfg or options.info):
        raise ConfigError("--cfg and --info are for a single run: leave out -m and name one value")
    if options.resolve and not (options.cfg or options.help):
        raise ConfigError("--resolve goes with --cfg job: it prints the config with its values")
    if options.package is not None and not options.cfg:  # it would swallow the setting behind it
        raise ConfigError("-p, --package goes with --cfg job: it prints one part of the config")
    overrides = options.overrides
    compose.refuse_signs(command, overrides)
    job.refuse_chdir(any(re.match(r"\+*hydra\.job\.chdir=(?i:true)$", o) for o in overrides))
    launchers.check_installed(overrides)
    try:
        if "--help" in arguments or "-h" in arguments:
            from metarun.cli.help import command_help

            config = compose.composed(command, overrides)
            print(command_help(command, COMMANDS[command], config))
            return
        module.main()
        job.raise_failure()
    except compose.COMPOSITION_ERRORS as error:
        raise compose.explain(error, command, overrides) from error
    except yaml.MarkedYAMLError as error:
        raise unreadable(error) from error
    except Exception as error:  # Hydra leaves some mistakes to whatever they provoke in there
        if not compose.was_composing(error):
            raise
        reason = first_line(error) if str(error) else "look at its settings of hydra"
        raise ConfigError(f"this command cannot be read: {reason}") from error


def prepared(command: str, arguments: list[str]) -> list[str]:
    """The arguments of a command as Hydra takes them, with all that reads them prepared.

    Raises:
        ConfigError: an option is unknown, a plugin cannot be imported, or a path is empty.
    """
    from metarun.config import compose
    from metarun.config.renamed import with_todays_names
    from metarun.config.typed import with_more, with_paths

    arguments = _with_plugins(with_todays_names(arguments))
    _check_options(command, arguments)
    arguments = with_paths(_options_first(arguments), bool(MULTIRUN & set(arguments)))
    # What torch asks its own users to report: that vmap loops within some operation.
    warnings.filterwarnings("ignore", message="There is a performance drop because")
    # CUDA's matrix products are not reproducible without it. It is read later than here.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    compose.register_schemas()
    return with_more(arguments) if command == "eval" else arguments


def _with_ranks(command: str, arguments: list[str]) -> list[str]:
    """Meet the other processes of this command if torchrun has started several.

    Only the first one gets a run directory from Hydra, which would make one for each.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1" or "RANK" not in os.environ:
        return arguments
    from metarun.system import ranks

    processes = ranks.join()
    if command not in ("train", "eval"):
        raise ConfigError(f"metarun {command} is one process: start it without torchrun")
    if MULTIRUN & set(arguments):
        raise ConfigError(
            "torchrun starts one run: in a sweep let the launcher start several processes a run "
            "(hydra/launcher=submitit_slurm hydra.launcher.tasks_per_node=…)"
        )
    return arguments if processes.first else [*arguments, "hydra.run.dir=."]


def _program() -> str:
    """How this program is called, as far as its environment tells."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes == "1" or processes != os.environ.get("LOCAL_WORLD_SIZE"):
        return "metarun"  # on several machines it is not so simple
    return f"torchrun --nproc-per-node={processes} -m metarun"


def _with_plugins(arguments: list[str]) -> list[str]:
    """Import the modules of `+plugins=[a,b]`, so that their components can be named.

    Only the command line can do this; a config file or a checkpoint cannot.
    """
    found = []
    for index, argument in enumerate(arguments):
        key, _, value = argument.partition("=")
        if key.lstrip("+") == "plugins":
            arguments = [*arguments[:index], f"plugins={value}", *arguments[index + 1 :]]
            names = (name.strip(" '\"") for name in value.strip("[]").split(","))
            found = [name for name in names if name]
    import_plugins(found)
    return arguments


def _check_options(command: str, arguments: list[str]) -> None:
    from metarun.config._hydra import get_args_parser

    known = [o for action in get_args_parser()._actions for o in action.option_strings]
    for argument in arguments:
        option = argument.partition("=")[0]
        if not option.startswith("-"):
            continue
        if option not in known and not (option[1:2] != "-" and option[:2] in known):
            raise ConfigError(
                f"there is no option {option!r}{did_you_mean(option, known)}. Settings are written "
                f"key=value; `metarun {command} --help` lists them"
            )


def _options_first(arguments: list[str]) -> list[str]:
    """The arguments with options before settings: Hydra's parser takes no others."""
    from metarun.config._hydra import get_args_parser

    actions = {o: action for action in get_args_parser()._actions for o in action.option_strings}
    options: list[str] = []
    settings: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        action = actions.get(argument)
        if not argument.startswith("-"):
            settings.append(argument)
            continue
        options.append(argument)  # with its value, if it is written in one: --cfg=job
        if action is not None and action.nargs == "?":
            follows = bool(rest) and action.choices is not None and rest[0] in action.choices
            options[-1] += f"={rest.pop(0) if follows else action.const}"
        elif action is not None and action.nargs is None and rest:
            options.append(rest.pop(0))
    return [*options, *settings]


def _unknown_command(command: str) -> str:
    hint = did_you_mean(command, COMMANDS)
    if "=" in command or command.startswith("-"):
        hint = f" (did you mean metarun train {command}?)"
    return f"there is no command {command!r}{hint}; choose from {', '.join(COMMANDS)}"


def _print_help() -> None:
    commands = "\n".join(f"  {name:12}{what}" for name, what in COMMANDS.items())
    print(USAGE.format(version=__version__, commands=commands), flush=True)
    import torch  # last, because it takes a second or two

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cuda = f"CUDA {torch.version.cuda}: {', '.join(devices)}" if devices else "no CUDA device"
    print(f"torch {torch.__version__}, {cuda}, {torch.get_num_threads()} CPU threads")


def _end(error: BaseException | None) -> int:
    """Say what ended the command, if something did, and return the exit status."""
    ranks = sys.modules.get("metarun.system.ranks")  # nobody has needed torch if it is not there
    message, code = ("", 0) if error is None else explain(error)
    if error is not None:
        if os.environ.get("METARUN_DEBUG") == "1":
            traceback.print_exception(error)
        if ranks is None or ranks.tell(error, message):
            print(f"metarun: {message}", file=sys.stderr)
    if ranks is not None:
        ranks.leave(error, code)
    return code
