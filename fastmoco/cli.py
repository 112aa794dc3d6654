"""fastmoco train · recipes · sweep · scan · views: the command line.

Errors are one line and an exit code; a traceback only with --debug. Help and wrong arguments are answered at once:
torch, torchvision and matplotlib take seconds to load, and no module that reads arguments imports them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from fastmoco.config import RunConfig
from fastmoco.config.arguments import parse, suggestion
from fastmoco.distributed.launch import is_launched, launch, report_to_torchrun
from fastmoco.errors import AlreadyReportedError, ConfigError, ExitCode, exit_code
from fastmoco.recipes import check_data, recipe

USAGE = """usage: fastmoco COMMAND [--debug]

  train [RECIPE] [FLAGS]   pretrain; without flags, on a generated data set     (fastmoco train --help)
  recipes [NAME]           the named runs, and what to expect of each; or one of them in full
  sweep RECIPE --vary ...  a run for every value of a flag, a table and a plot   (fastmoco sweep --help)
  export RUN --to LIBRARY  the backbone for torchvision, timm, detectron2, main_lincls.py or ONNX
  scan DATA                read every image once: bad files, duplicates, mean and std; training then starts at once
  eval RUN_OR_CHECKPOINT   evaluate the features: kNN, linear probe, few labels, fine-tuning, collapse, pictures
  views DATA               a picture of the views that a seed, an epoch and a pipeline make

Exit codes: 0 done, 2 configuration, 3 data, 4 checkpoint, 5 diverged, 6 device, 75 stopped and resumable."""


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [argument for argument in argv if argument != "--debug"]
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return ExitCode.DONE if argv else ExitCode.CONFIG
    try:
        if argv[0] not in COMMANDS:
            raise ConfigError(f"unknown command {argv[0]!r}; {suggestion(argv[0], COMMANDS)}")
        COMMANDS[argv[0]](argv[1:])
    except KeyboardInterrupt:
        return 130
    except AlreadyReportedError as told:
        return told.code
    except Exception as error:
        code = exit_code(error)
        report_to_torchrun(error, code or 1)
        if debug or code is None:
            raise
        word = "stopped" if code == ExitCode.PREEMPTED else "error"
        print(f"fastmoco: {word}: {' '.join(str(error).split())}", file=sys.stderr)
        return code
    return ExitCode.DONE


def _train(argv: list[str]) -> None:
    config = parse_train(argv)
    if argv and not argv[0].startswith("-"):
        check_data(argv[0], config)
    if (config.scale.gpus or 1) > 1 and not is_launched():
        launch(config.scale.gpus or 1, ["train", *argv])
        return
    from fastmoco.console import make_console
    from fastmoco.train import train

    train(config, make_console())


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


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": _train,
    "recipes": _recipes,
    "sweep": _sweep,
    "export": _export,
    "scan": _scan,
    "views": _views,
    "eval": _eval,
}


def parse_train(argv: list[str]) -> RunConfig:
    """`[RECIPE] [--config FILE] [FLAGS]` to a configuration; later ones win: defaults, recipe, file, flags.

    With --resume, the run's own config.json stands in place of the defaults. Raises ConfigError; exits for --help.
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
        description="Pretrain a backbone by momentum contrast. RECIPE (see fastmoco recipes) or --config FILE set the "
        "defaults; flags win.",
        flags=[*("--" + name.replace("_", "-") for name in default.flat()), "--config"],
        default=default.replace(resume=False, overwrite=False),
    )


def _read(path: Path) -> RunConfig:
    try:
        return RunConfig.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read ({error}): expected a JSON file such as a run's") from error


def _take_value(argv: list[str], flag: str) -> tuple[list[str], str | None]:
    """The arguments without `flag VALUE` or `flag=VALUE`, and the value."""
    for place, argument in enumerate(argv):
        if argument == flag:
            if place + 1 == len(argv):
                raise ConfigError(f"{flag} needs a value")
            return argv[:place] + argv[place + 2 :], argv[place + 1]
        if argument.startswith(flag + "="):
            return argv[:place] + argv[place + 1 :], argument.removeprefix(flag + "=")
    return argv, None


if __name__ == "__main__":
    sys.exit(main())
