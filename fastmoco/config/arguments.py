"""Parsing of flags into a frozen dataclass, with errors of one line."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import MISSING
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin

from fastmoco.config.checks import alternatives, check_types, shorten
from fastmoco.config.fields import Option, options_of
from fastmoco.config.flags import HELP, Argument, Flags, Numbers, Takes, flags_of, is_flag, is_number, take_values
from fastmoco.config.help import help_text, usage_of
from fastmoco.config.peers import POSITIONAL, answer_to_value, translate
from fastmoco.errors import ConfigError
from pipelines.suggest import closest

if TYPE_CHECKING:  # only a command that parses flags imports tyro, which takes a quarter of a second
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

T = TypeVar("T")
_SWITCH = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def parse(
    kind: type[T],
    argv: Sequence[str],
    *,
    command: str,
    description: str,
    default: T | None = None,
    program: str = "fastmoco",
    usage: str = "",
) -> T:
    """Parse the arguments of `fastmoco COMMAND` into an instance of the dataclass `kind`.

    default  values of absent flags (None: the defaults of the class)
    program  what COMMAND belongs to; none for a tool
    usage    what may follow COMMAND, for its help (empty: as `kind` says)

    Raises ConfigError; exits for --help.
    """
    called = f"{program} {command}".strip()
    arguments = read(argv, flags_of(kind), command)
    if requested := next((argument.flag for argument in arguments if argument.flag in HELP), None):
        everything = requested == HELP[-1]
        print(help_text(called, options_of(kind, default), description, everything=everything, usage=usage))
        raise SystemExit(0)
    import tyro

    output = io.StringIO()
    with (
        contextlib.redirect_stderr(output),
        contextlib.redirect_stdout(output),
        warnings.catch_warnings(),
    ):
        # A saved name such as timm/resnet18 is none of the choices, but `check_types` knows it.
        warnings.filterwarnings("ignore", message="The field .* is annotated with type", category=UserWarning)
        try:
            options, unknown = tyro.cli(
                kind,
                prog=called,
                description=description,
                args=written(arguments),
                return_unknown_args=True,
                config=(tyro.conf.OmitArgPrefixes,),  # booleans keep both --x and --no-x
                default=tyro.MISSING_NONPROP if default is None else default,
                registry=_registry(),
            )
        except SystemExit as error:
            missing = _missing(options_of(kind, default), arguments)
            if missing:
                usage = usage_of(called, options_of(kind, default))
                raise ConfigError(f"{' and '.join(missing)} missing; {usage}") from error
            raise ConfigError(_one_line(output.getvalue())) from error
    if unknown:
        raise ConfigError(f"unexpected argument {unknown[0]!r}: see {called} --help")
    return options


def parse_tool(kind: type[T], argv: Sequence[str] | None, name: str) -> T:
    """Parse the arguments of a program of its own, by default those of the process. Raises ConfigError."""
    arguments = sys.argv[1:] if argv is None else argv
    options = parse(kind, arguments, command=name, description=inspect.getdoc(kind) or "", program="")
    check_types(options)
    return options


def read(argv: Sequence[str], flags: Flags, command: str) -> list[Argument]:
    """The arguments of a command by flag, with its own names: `translate` explains those of other trainers.

    `--batch_size 8` and `batch_size=8` are `--batch-size 8`; `--data a --data b` is one argument. Raises ConfigError
    for a flag that is unknown.
    """
    rest, arguments = list(argv), []
    repeated: dict[str, Argument] = {}
    try:
        while rest:
            argument = _next(rest, flags, command)
            if argument.flag in repeated:
                repeated[argument.flag].values += argument.values
                continue
            arguments.append(argument)
            if argument.flag in flags.repeated:
                repeated[argument.flag] = argument
    except ConfigError:
        requested = [text for text in argv if text in HELP]
        if not requested:
            raise
        return [Argument(requested[0])]
    return arguments


def written(arguments: Iterable[Argument]) -> list[str]:
    """The inverse of `read`, with what has no flag in front: a list of values would take it for another."""
    ordered = sorted(arguments, key=lambda argument: argument.flag != "")
    words = []
    for argument in ordered:
        if len(argument.values) == 1 and argument.values[0].startswith("-"):
            words.append(f"{argument.flag}={argument.values[0]}" if argument.flag else argument.values[0])
        else:
            words += [argument.flag, *argument.values] if argument.flag else argument.values
    return words


def suggestion(word: str, known: Iterable[str]) -> str:
    """`did you mean ...?` with the closest name, or a reference to --help if none is close."""
    match = closest(word, known, cutoff=0.5)
    return "see fastmoco --help" if match is None else f"did you mean {match}?"


def _next(rest: list[str], flags: Flags, command: str) -> Argument:
    """Remove the next flag with its values, or the next value without a flag."""
    text = rest.pop(0)
    given, equals, value = text.partition("=")
    if not is_flag(text):
        name = "--" + given.lstrip("+").replace("_", "-")
        known = bool(equals) and not os.path.exists(text)
        if not known or not (name in flags.takes or translate(name, flags, command)):
            return Argument("", text)
        given = name
    name = given.replace("_", "-")
    if name not in flags.takes and re.fullmatch(r"-[a-z]\d+", name) and translate(name[:2], flags, command):
        name, equals, value = name[:2], "=", name[2:]  # -j8
    values = [value] if equals else []
    if name not in flags.takes:
        meaning = translate(name, flags, command)
        if meaning is None:
            raise ConfigError(f"unknown argument {given!r}; {_advice(name, flags, command)}")
        if isinstance(meaning, str):
            raise ConfigError(f"{given}: {meaning}")
        name, own = meaning
        if own and _switched(given, values, rest) != given:
            raise ConfigError(f"{given} is 'false': leave it out")
        values = own or values
    if name == POSITIONAL:
        return Argument("", *(values or take_values(Takes.VALUE, rest)))
    takes = flags.takes[name]
    if takes == Takes.NOTHING:
        return Argument(_switched(name, values, rest))
    values = values or take_values(takes, rest)
    if not values:
        raise ConfigError(f"{name} needs {takes.value}")
    if name in flags.numbers:
        values = _checked_numbers(name, values, flags.numbers[name])
    if len(values) == 1 and (answer := answer_to_value(name, values[0])):
        raise ConfigError(answer)
    return Argument(name, *values)


def _checked_numbers(name: str, values: list[str], numbers: Numbers) -> list[str]:
    """The values of a flag of numbers, of which several may also be joined by commas: `--schedule 120,160`."""
    if values == ["None"]:
        return values
    if numbers.length != 1:
        values = [part for value in values for part in value.split(",") if part]
    for value in values:
        try:
            numbers.kind(value)
        except ValueError:
            point = value.replace(",", ".", 1)
            advice = f"; did you mean {point}?" if numbers.kind is float and is_number(point) else ""
            raise ConfigError(f"{name} is {shorten(value)}, expected {numbers.expected()}{advice}") from None
    if numbers.length not in (None, len(values)):
        raise ConfigError(f"{name} is {shorten(' '.join(values))}, expected {numbers.expected()}")
    return values


def _switched(name: str, values: list[str], rest: list[str]) -> str:
    """`--x true`, `--x=true` and `x=true` are `--x`; with false they are `--no-x`."""
    if not values and rest and rest[0].lower() in ("true", "false") and not os.path.exists(rest[0]):
        values = [rest.pop(0)]
    if not values:
        return name
    if values[0].lower() not in _SWITCH:
        raise ConfigError(f"{name} is {values[0]!r}, expected true or false")
    if _SWITCH[values[0].lower()]:
        return name
    return "--" + name.removeprefix("--no-") if name.startswith("--no-") else "--no-" + name.removeprefix("--")


def _advice(name: str, flags: Flags, command: str) -> str:
    """The closest flag of a command, by what follows the hyphens."""
    names = {known.lstrip("-"): known for known in flags.takes if known.startswith("--")}
    match = closest(name.lstrip("-"), names, cutoff=0.5)
    called = command if command.endswith(".py") else f"fastmoco {command}"
    return f"see {called} --help" if match is None else f"did you mean {names[match]}?"


def _missing(options: Iterable[Option], arguments: Sequence[Argument]) -> list[str]:
    """The names of the required options that are not among the arguments."""
    given = {argument.flag for argument in arguments}
    words = sum(len(argument.values) for argument in arguments if not argument.flag)
    required = [option for option in options if option.default is MISSING]
    positional = [option.metavar for option in required if not option.flags]
    flags = [option.flags[-1] for option in required if option.flags and not given & {*option.flags}]
    return positional[words:] + flags


def _one_line(box: str) -> str:
    """The text of tyro's boxed message, without its frame, heading and help text."""
    content = " ".join(re.sub(r"\x1b\[[0-9;]*m|[─-╿]", " ", box).split())
    sections = [section.strip() for section in re.split(r"-{8,}", content)]
    text = next((section for section in sections[1:] if section), content)
    return re.sub(r"^Error parsing \w+: ", "", text)


# ---- choices ---------------------------------------------------------------------------------------------------------


@cache
def _registry() -> ConstructorRegistry:
    """tyro's rules, with one of ours for choices."""
    from tyro.constructors import ConstructorRegistry

    registry = ConstructorRegistry()
    registry.primitive_rule(_choice)
    return registry


def _choice(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Choices pass as they are: `config.checks.check_types` refuses others, and names them in their order.

    tyro's own rule for a choice or None lists them in the order of a set, which changes from run to run.
    """
    from tyro.constructors import PrimitiveConstructorSpec

    options = [option for option in alternatives(info.type) if option is not str]  # tyro adds it for a saved timm/NAME
    literals = [option for option in options if get_origin(option) is Literal]
    if len(literals) != 1 or any(option not in (literals[0], type(None)) for option in options):
        return None
    optional = len(options) > 1
    names = ["None"] * optional + [str(choice) for choice in get_args(literals[0])]
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{" + ",".join(names) + "}",
        instance_from_str=lambda words: None if optional and words == ["None"] else words[0],
        is_instance=lambda value: isinstance(value, str) or (optional and value is None),
        str_from_instance=lambda value: [str(value)],
    )
