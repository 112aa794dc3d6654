"""The command line: `fastmoco COMMAND`, with one function per command.

An error is one line on stderr and an exit code, with a traceback only under --debug. Help and argument errors are
instant: modules that parse arguments do not import torch, torchvision or matplotlib, which take seconds to load.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import version

from fastmoco.commands.train_arguments import train_arguments
from fastmoco.config import RunConfig
from fastmoco.config.arguments import suggestion
from fastmoco.config.flags import HELP
from fastmoco.distributed.launch import is_launched, launch, report_to_torchrun
from fastmoco.errors import AlreadyReportedError, ConfigError, ExitCode, exit_code
from fastmoco.model.architectures import check_installed
from fastmoco.output import Form, announce, end_output, output_form, output_in, say_error, take_form, write_event
from fastmoco.recipes import check_data
from fastmoco.run.preemption import StopFlag

USAGE = """usage: fastmoco COMMAND [--quiet | --json] [--debug]

  train [RECIPE] [DATA]    pretrain a backbone; by default on a generated data set
  recipes [NAME]           list recipes with their expected accuracy, or show one
  sweep RECIPE --vary ...  train once for each value of a flag: a table, a plot
  scan DATA                check every image, measure mean and std; faster starts
  views DATA               draw the augmented views of a data set
  watch RUN                follow a run from another terminal, or list all runs
  eval RUN                 evaluate features: kNN, probes, fine-tuning, plots
  report RUN [RUN ...]     one HTML page on a run; on several, a comparison
  export RUN --to LIBRARY  the backbone for torchvision, timm, detectron2, ONNX, ...
  embed DATA --backbone RUN -o FILE
                           features of every image; neighbours, near-duplicates
  doctor                   try all that this machine has; how to install the rest
  completion SHELL         complete what is typed in bash, zsh or fish

--quiet leaves warnings and the result in one line; --json writes one JSON object
a line, and text to standard error.
Flags of a command: fastmoco COMMAND --help, all: --help-all; fastmoco --version
Exit codes: 0 done, 2 configuration, 3 data, 4 checkpoint, 5 diverged, 6 device,
75 stopped and resumable"""


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return end_output(_run(argv), is_log=argv[:1] in (["train"], ["sweep"]))


def _run(argv: list[str]) -> int:
    debug = "--debug" in argv
    form, argv = take_form([argument for argument in argv if argument != "--debug"])
    with output_in(form):
        return _run_command(argv, debug)


def _run_command(argv: list[str], debug: bool) -> int:
    try:
        if argv[:1] == ["help"] and argv[1:] in ([command] for command in COMMANDS):
            argv = [argv[1], "--help"]
        if not argv or argv[0] in (*HELP, "help"):
            print(USAGE)
            return ExitCode.DONE if argv else ExitCode.CONFIG
        if argv[0] in ("-V", "--version"):
            print(f"fastmoco {version('fastmoco')}")
            return ExitCode.DONE
        if argv[0] not in COMMANDS:
            raise ConfigError(f"unknown command {argv[0]!r}; {suggestion(argv[0], [*COMMANDS, '--help', '--version'])}")
        with StopFlag(launched=is_launched()):
            COMMANDS[argv[0]](argv[1:])
    except SystemExit:  # after --help
        return ExitCode.DONE
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
        return ExitCode.DONE
    except AlreadyReportedError as error:
        return error.code
    except Exception as error:
        code = exit_code(error)
        report_to_torchrun(error, code or 1)
        if debug or code is None:
            raise
        message = str(error)
        if isinstance(error, OSError):
            message = f"cannot write {error.filename or 'the output'} ({error.strerror}): free space"
        stopped, line = code == ExitCode.PREEMPTED, " ".join(message.split())
        say_error(("stopped: " * (not line.startswith("stopped")) if stopped else "error: ") + line)
        if output_form() == Form.JSON:
            write_event("stopped" if stopped else "error", {"exit_code": int(code), "message": line})
        return code
    return ExitCode.DONE


def _train(argv: list[str]) -> None:
    given = train_arguments(argv)
    config = given.config
    check_installed(config.model.arch)
    if given.recipe is not None:
        check_data(given.recipe, config)
    if given.repeats_a_run:
        config, argv = _repeated(config, argv)
    announce(f"training on {', '.join(config.data.data)}", is_log=True)
    if (config.scale.gpus or 1) > 1 and not is_launched():
        launch(config.scale.gpus or 1, ["train", *argv, *filter(None, [output_form().value])])
        return
    from fastmoco.console import make_console
    from fastmoco.trainer import train

    train(config, make_console(is_log=True), given.from_recipe)


def _repeated(config: RunConfig, argv: list[str]) -> tuple[RunConfig, list[str]]:
    """Settings from the config.json of a run, and the arguments, with a folder of their own if that run has it."""
    from fastmoco.run.folder_names import folder_of, unused_folder

    taken = folder_of(config)
    if not (taken / "config.json").is_file():
        return config, argv
    folder = str(unused_folder(config))
    print(f"the run in {taken} stays as it is: its settings again in {folder}")
    return config.replace(out=folder), [*argv, "--out", folder]


def _recipes(argv: list[str]) -> None:
    from fastmoco.commands.recipes import recipes_command

    recipes_command(argv)


def _sweep(argv: list[str]) -> None:
    from fastmoco.commands.sweep import sweep_command

    sweep_command(argv)


def _export(argv: list[str]) -> None:
    from fastmoco.backbones.options import parse_export

    options = parse_export(argv)
    announce(f"exporting {options.run}")
    from fastmoco.commands.export import export_command

    export_command(options)


def _scan(argv: list[str]) -> None:
    from fastmoco.commands.scan_options import parse_scan

    options = parse_scan(argv)
    announce(f"scanning {', '.join(options.data)}")
    from fastmoco.commands.scan import scan_command

    scan_command(options)


def _views(argv: list[str]) -> None:
    from fastmoco.commands.views_options import parse_views

    options = parse_views(argv)
    announce(f"drawing views of {', '.join(options.data)}")
    from fastmoco.commands.views import views_command

    views_command(options)


def _eval(argv: list[str]) -> None:
    from fastmoco.evaluation.options import parse_eval

    options = parse_eval(argv)
    announce(f"evaluating {options.run}")
    from fastmoco.commands.eval import eval_command

    eval_command(options)


def _report(argv: list[str]) -> None:
    from fastmoco.commands.report_options import parse_report

    options = parse_report(argv)
    announce(f"reading {', '.join(map(str, options.runs))}")
    from fastmoco.commands.report import report_command

    report_command(options)


def _embed(argv: list[str]) -> None:
    from fastmoco.evaluation.embed_options import parse_embed

    options = parse_embed(argv)
    announce(f"embedding {', '.join(options.data)}")
    from fastmoco.commands.embed import embed_command

    embed_command(options)


def _watch(argv: list[str]) -> None:
    from fastmoco.commands.watch_options import parse_watch

    options = parse_watch(argv)
    from fastmoco.commands.watch import watch_command

    watch_command(options)


def _doctor(argv: list[str]) -> None:
    from fastmoco.commands.doctor_options import parse_doctor

    options = parse_doctor(argv)
    announce("trying what this machine has")
    from fastmoco.commands.doctor import doctor_command

    code = doctor_command(options)
    if code != ExitCode.DONE:
        raise AlreadyReportedError(code)


def _completion(argv: list[str]) -> None:
    from fastmoco.commands.completion import completion_command

    completion_command(argv)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": _train,
    "recipes": _recipes,
    "sweep": _sweep,
    "export": _export,
    "scan": _scan,
    "views": _views,
    "eval": _eval,
    "report": _report,
    "embed": _embed,
    "watch": _watch,
    "doctor": _doctor,
    "completion": _completion,
}


if __name__ == "__main__":
    sys.exit(main())
