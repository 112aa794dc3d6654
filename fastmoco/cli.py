"""The command line: `fastmoco COMMAND`, with one function per command.

An error is one line on stderr and an exit code, with a traceback only under --debug. Help and argument errors are
instant: modules that parse arguments do not import torch, torchvision or matplotlib, which take seconds to load.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fastmoco.config import RunConfig
from fastmoco.config.arguments import parse, suggestion
from fastmoco.distributed.launch import is_launched, launch, report_to_torchrun
from fastmoco.errors import AlreadyReportedError, ConfigError, ExitCode, exit_code
from fastmoco.recipes import check_data, recipe
from fastmoco.run.preemption import StopFlag
from pipelines.files import is_full
from pipelines.platforms import silence

USAGE = """usage: fastmoco COMMAND [--debug]

  train [RECIPE] [FLAGS]   pretrain a backbone; by default on a generated data set
  recipes [NAME]           list the recipes and their expected accuracy, or show one in full
  sweep RECIPE --vary ...  train once for each value of a flag; write a table and a plot
  export RUN --to LIBRARY  export the backbone to torchvision, timm, detectron2, main_lincls.py or ONNX
  scan DATA                check every image: unreadable files, duplicates, mean and std; makes later starts fast
  eval RUN_OR_CHECKPOINT   evaluate features: kNN, linear probe, few labels, fine-tuning, collapse, plots
  views DATA               draw the augmented views of a data set
  doctor                   try all that this machine has: kernels, pipelines, graph, compile, NCCL; what is missing

Flags of a command: fastmoco COMMAND --help
Exit codes: 0 done, 2 configuration, 3 data, 4 checkpoint, 5 diverged, 6 device, 75 stopped and resumable"""


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return _end_output(_run(argv), is_log=argv[:1] in (["train"], ["sweep"]))


def _run(argv: list[str]) -> int:
    debug = "--debug" in argv
    argv = [argument for argument in argv if argument != "--debug"]
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return ExitCode.DONE if argv else ExitCode.CONFIG
    try:
        if argv[0] not in COMMANDS:
            raise ConfigError(f"unknown command {argv[0]!r}; {suggestion(argv[0], COMMANDS)}")
        with StopFlag(repeats=is_launched()):
            COMMANDS[argv[0]](argv[1:])
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
        label = "stopped" if code == ExitCode.PREEMPTED else "error"
        _say(f"{label}: {' '.join(message.split())}")
        return code
    return ExitCode.DONE


def _say(line: str) -> None:
    with suppress(OSError):  # a log on a full disk must not change the exit code
        print(f"fastmoco: {line}", file=sys.stderr)


def _end_output(code: int, *, is_log: bool) -> int:
    """Write what was printed, and return the exit code: 4 if a full disk does not take the result of a command.

    What cannot be written is thrown away: Python would try again when it ends, and exit with 120.

    is_log  whether the result is in files, so that the code stays
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError as error:  # or BrokenPipeError: whoever read it, such as `head`, has seen enough
            with suppress(OSError, ValueError):  # a stream without a descriptor
                silence(stream.fileno())
            if is_full(error) and code == ExitCode.DONE and not is_log:
                code = ExitCode.CHECKPOINT
                _say(f"error: cannot write the output ({error.strerror}): free space")
    return code


def _train(argv: list[str]) -> None:
    config = parse_train(argv)
    if argv and not argv[0].startswith("-"):
        check_data(argv[0], config)
    if (config.scale.gpus or 1) > 1 and not is_launched():
        launch(config.scale.gpus or 1, ["train", *argv])
        return
    from fastmoco.console import make_console
    from fastmoco.train import train

    train(config, make_console(is_log=True))


def _recipes(argv: list[str]) -> None:
    from fastmoco.commands.recipes import recipes_command

    recipes_command(argv)


def _sweep(argv: list[str]) -> None:
    from fastmoco.commands.sweep import sweep_command

    sweep_command(argv, parse_train)


def _export(argv: list[str]) -> None:
    from fastmoco.export.options import parse_export

    options = parse_export(argv)
    from fastmoco.commands.export import export_command

    export_command(options)


def _scan(argv: list[str]) -> None:
    from fastmoco.commands.scan_options import parse_scan

    options = parse_scan(argv)
    from fastmoco.commands.scan import scan_command

    scan_command(options)


def _views(argv: list[str]) -> None:
    from fastmoco.commands.views_options import parse_views

    options = parse_views(argv)
    from fastmoco.commands.views import views_command

    views_command(options)


def _eval(argv: list[str]) -> None:
    from fastmoco.evaluation.options import parse_eval

    options = parse_eval(argv)
    from fastmoco.commands.eval import eval_command

    eval_command(options)


def _doctor(argv: list[str]) -> None:
    from fastmoco.commands.doctor_options import parse_doctor

    options = parse_doctor(argv)
    from fastmoco.commands.doctor import doctor_command

    code = doctor_command(options)
    if code != ExitCode.DONE:
        raise AlreadyReportedError(code)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": _train,
    "recipes": _recipes,
    "sweep": _sweep,
    "export": _export,
    "scan": _scan,
    "views": _views,
    "eval": _eval,
    "doctor": _doctor,
}


def parse_train(argv: list[str]) -> RunConfig:
    """Parse `[RECIPE] [--config FILE] [FLAGS]`.

    Fields without a flag are those of FILE, else with --resume of the run's config.json, else of RECIPE, else the
    defaults. Raises ConfigError; exits for --help.
    """
    default = RunConfig()
    if argv and not argv[0].startswith("-"):
        default, argv = recipe(argv[0]), argv[1:]
    argv, file = _take_value(argv, "--config")
    _, out = _take_value(argv, "--out")
    if file is not None:
        default = _read(Path(file))
    elif "--resume" in argv and out is not None and (Path(out) / "config.json").is_file():
        default = _read(Path(out) / "config.json")
    return parse(
        RunConfig,
        argv,
        command="train",
        description="Pretrain a backbone with momentum contrast (MoCo). RECIPE (see fastmoco recipes) or --config FILE "
        "sets the defaults; flags override them. Values that are None are set to suit the data, most of them as in the "
        "closest of the recipes shapes, cifar10-demo and imagenet-v1.",
        flags=[*("--" + name.replace("_", "-") for name in default.flat()), "--config"],
        default=default.replace(resume=False, overwrite=False, allow_changed=(), allow_changed_data=False),
    )


def _read(path: Path) -> RunConfig:
    try:
        return RunConfig.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--config {path} cannot be read ({error}): expected the JSON of a run's config.json"
        ) from error


def _take_value(argv: list[str], flag: str) -> tuple[list[str], str | None]:
    """Remove `flag VALUE` or `flag=VALUE`; return the remaining arguments and the value."""
    for i, argument in enumerate(argv):
        if argument == flag:
            if i + 1 == len(argv):
                raise ConfigError(f"{flag} needs a value")
            return argv[:i] + argv[i + 2 :], argv[i + 1]
        if argument.startswith(flag + "="):
            return argv[:i] + argv[i + 1 :], argument.removeprefix(flag + "=")
    return argv, None


if __name__ == "__main__":
    sys.exit(main())
