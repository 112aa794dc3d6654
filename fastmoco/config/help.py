"""`--help` and `--help-all` of a command: plain text, a column of flags beside a column of explanations.

The words of a default are in the docstring of its field: `(None: ...)` says what None stands for, `(auto: ...)` what
auto does. --help has the start of a docstring, up to the first colon or semicolon, and leaves out the flags that few
need, `RARE`; a new flag is shown by both.
"""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import MISSING
from typing import Any

from fastmoco.config.fields import Option
from fastmoco.config.flags import HELP

MAX_WIDTH = 100
FLAGS_WIDTH = 24
MAX_CHOICES_WIDTH = 60  # of a list in --help
RARE = frozenset(
    {"bank_m", "data_root", "init_prefix", "init_sha256", "limit", "mechanism", "objective", "optimizer", "order"}
    | {"order_buffer", "test_folder", "train_folder", "truncated", "value_range", "width", "stem_format", "kernels"}
    | {"crop_scale_min", "mean", "std", "grayscale", "blur", "solarize", "vflip", "normalization", "aug_plus"}
    | {"moco_m_cos", "bn_splits", "sgd_momentum", "final_lr", "lr_scaling", "exclude_bn_from_wd", "schedule", "head"}
    | {"resume_from", "allow_changed", "allow_changed_data", "cuda_graph", "prefetch", "check", "tune", "compile"}
    | {"checkpoint_activations", "keep_checkpoints", "knn_k", "knn_t", "allow_large_queue", "max_skipped_steps"}
    | {"stem_init", "first_epoch", "knn_on", "linear_momentum", "linear_normalize"}
    | {"tensorboard", "grad_comm", "dist_timeout", "paranoid", "checkpoint_every", "warmup_epochs"}
    | {"label_seeds", "linear_batch_size", "linear_wd", "linear_schedule", "linear_views", "logistic_c"}
    | {"fine_tune_lr", "fine_tune_batch_size", "feature_cache", "prefix", "shard_mib", "min_resolution", "proportion"}
)
"""Fields of all commands that --help leaves to --help-all."""

_START = re.compile(r"(?:[^;:(.]|\([^()]*\)|:(?! )|[.](?! [A-Z]))*")
_MEANING = re.compile(r"\s*\((None|auto): ((?:[^()]|\([^()]*\))*)\)")


def help_text(
    called: str, options: Sequence[Option], description: str, *, everything: bool, usage: str = "", width: int = 0
) -> str:
    """The help of a command.

    called       the command as it is typed, such as `fastmoco train`
    description  paragraphs, of which those that are indented stay as they are
    everything   whether RARE flags and whole docstrings are shown, for --help-all
    usage        arguments after the command; "": its values without a flag, its required flags and [FLAGS]
    width        in columns; 0: that of the terminal, at most MAX_WIDTH; 80 if there is none
    """
    width = width or _columns()
    lines = [usage_of(called, options, usage), ""]
    for paragraph in description.strip().split("\n\n"):
        lines += paragraph.splitlines() if paragraph.startswith(" ") else textwrap.wrap(paragraph, width)
        lines.append("")
    lines.append(flags_help(options, everything=everything, width=width))
    if not everything:
        hidden = sum(_is_hidden(option) for option in options)
        more = f" and {hidden} more {'flag' if hidden == 1 else 'flags'}" if hidden else ""
        lines.append(f"All of each explanation{more}: {called} {HELP[-1]}")
    return "\n".join(lines)


def flags_help(options: Sequence[Option], *, everything: bool, width: int = 0) -> str:
    """The part of `help_text` that explains the flags, group by group."""
    width, lines = width or _columns(), []
    shown = [option for option in options if everything or not _is_hidden(option)]
    for group in dict.fromkeys(option.group for option in shown):
        lines += textwrap.wrap(group.split(": ")[0].removesuffix(".") + ":", width)
        members = [option for option in shown if option.group == group]
        for option in sorted(members, key=lambda option: option.flags != ()):
            lines += _lines(option, width, everything=everything)
        lines.append("")
    return "\n".join([*lines, "[ ] is the default, --no-x the opposite of --x."])


def _columns() -> int:
    return min(shutil.get_terminal_size().columns, MAX_WIDTH)


def _is_hidden(option: Option) -> bool:
    return option.flags != () and option.name in RARE


def default_words(option: Option) -> str:
    """The default of an option as words; empty for a switch that is off and a flag without effect."""
    value = option.default
    if value is MISSING:
        return "required"
    if value is None or value == ():
        return dict(_MEANING.findall(option.text)).get("None", "")
    if not option.metavar:
        return "on" if value else ""
    meaning = dict(_MEANING.findall(option.text)).get(str(value))
    words = " ".join(_word(item) for item in value) if isinstance(value, tuple) else _word(value)
    return f"{words}: {meaning}" if meaning else words


def usage_of(called: str, options: Iterable[Option], arguments: str = "") -> str:
    """`usage: COMMAND ARGUMENTS`, by default with the values without a flag and the required flags."""
    if arguments:
        return f"usage: {called} {arguments}"
    options = list(options)
    words = [option.metavar for option in options if not option.flags]
    required = [option for option in options if option.flags and option.default is MISSING]
    return " ".join(
        [f"usage: {called}", *words, *(f"{option.flags[-1]} {option.metavar}" for option in required), "[FLAGS]"]
    )


def _lines(option: Option, width: int, *, everything: bool) -> list[str]:
    """The flag, and beside it the explanation with the default; below it if the flag is long."""
    left = f"  {_flags(option)}"
    text = _explanation(option, everything=everything)
    indent = " " * (FLAGS_WIDTH + 2)
    wrapped = textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    if len(left) > FLAGS_WIDTH or not wrapped:
        return [left, *wrapped]
    return [left.ljust(len(indent)) + wrapped[0].lstrip(), *wrapped[1:]]


def _flags(option: Option) -> str:
    if not option.flags:
        return option.metavar
    names = ", ".join(option.flags)
    if option.has_opposite and option.default is True:
        names = names.replace("--", "--[no-]")
    return f"{names} {option.metavar}".rstrip()


def _explanation(option: Option, *, everything: bool) -> str:
    """The docstring of an option with its choices and its default, and without the words of the default."""
    default, text = default_words(option), " ".join(option.text.split())
    text = _MEANING.sub(lambda found: "" if found[1] in ("None", str(option.default)) else found[0], text)
    if not everything:
        text = first_statement(text)
        default = default.split(";")[0]
    choices = ", ".join(option.choices)
    if option.metavar == "NAME" and choices and (everything or len(choices) <= MAX_CHOICES_WIDTH):
        text = f"{text.removesuffix('.')}: {choices}"
    text = text.removesuffix(".")
    return f"{text} [{default}]" if default and (option.flags or default != "required") else text


def first_statement(text: str) -> str:
    """The start of a docstring, without the words of the default."""
    found = _START.match(_MEANING.sub("", " ".join(text.split())))
    assert found is not None
    return found[0].strip().removesuffix(".")


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
