"""The options of a command as `--help` and shell completion show them: one `Option` for each field of its dataclass."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, is_dataclass
from functools import cache
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from fastmoco.config.checks import alternatives, choices_of, flag
from fastmoco.config.flags import REPEATED

PATHS = {
    "data": "DATA",
    "data_root": "FOLDER",
    "init": "FILE|RUN",
    "out": "PATH",
    "resume_from": "FILE|RUN",
    "run": "RUN",
    "test_folder": "FOLDER",
    "train_folder": "FOLDER",
}
"""Fields that hold a path, which a shell completes with files, and what --help calls their value."""

_NUMBERS = {int: "N", float: "X"}


@dataclass(frozen=True)
class Option:
    """An option of a command.

    name     of the field, such as moco_k
    flags    `--moco-k` and its short names; empty for a value without a flag, such as DATA
    metavar  its value in --help; empty for a switch
    text     the docstring of the field
    default  MISSING if the option is required
    choices  the values that it takes, in the order of the type; empty if others are possible
    group    the first line of the docstring of the class that defines it
    """

    name: str
    flags: tuple[str, ...]
    metavar: str
    text: str
    default: Any
    choices: tuple[str, ...]
    group: str
    has_opposite: bool = False

    @property
    def is_path(self) -> bool:
        """Whether the value is a file or a folder."""
        return self.name in PATHS or "folder" in self.metavar.lower() or "file" in self.metavar.lower()


def options_of(kind: type, default: Any = None) -> list[Option]:
    """The options of a dataclass, and of the dataclasses in it.

    default  an instance whose values are the defaults; None: those of the class
    """
    return list(_options(kind, default))


def _options(kind: type, default: Any) -> Iterator[Option]:
    hints = get_type_hints(kind, include_extras=True)
    owners = {name: owner for owner in reversed(kind.__mro__) for name in vars(owner).get("__annotations__", ())}
    for field in sorted(dataclasses.fields(kind), key=lambda field: kind.__mro__.index(owners[field.name])):
        name = field.name
        hint, notes = hints[name], ()
        if get_origin(hint) is Annotated:
            hint, *notes = get_args(hint)
        value = getattr(default, name) if default is not None else _default(field)
        if is_dataclass(hint):
            assert isinstance(hint, type)
            yield from _options(hint, None if value is MISSING else value)
            continue
        text = next(docs[name] for owner in kind.__mro__ if name in (docs := _docs(owner)))
        group = (inspect.getdoc(owners[name]) or "").splitlines()[0]
        yield _option(name, hint, notes, text, value, group)


def _option(name: str, hint: Any, notes: Any, text: str, value: Any, group: str) -> Option:
    import tyro

    aliases = [alias for note in notes for alias in getattr(note, "aliases", None) or ()]
    named = next((note.metavar for note in notes if getattr(note, "metavar", None)), None)
    flags = () if tyro.conf.Positional in notes else (*aliases, flag(name))
    is_switch = hint is bool
    opposite = is_switch and tyro.conf.FlagCreatePairsOff not in notes
    if flags == ():
        named = named or name.upper()
    metavar = "" if is_switch else named or _metavar(name, hint, repeated=REPEATED in notes)
    return Option(name, flags, metavar, text, value, tuple(choices_of(hint)), group, opposite)


def _metavar(name: str, hint: Any, *, repeated: bool) -> str:
    choices = choices_of(hint)
    numbers = [_NUMBERS[option] for option in alternatives(hint) if option in _NUMBERS]
    if choices:
        shown = "|".join([*numbers, *choices])
        return shown if len(shown) <= 20 else "NAME"
    element = next((get_args(option)[0] for option in alternatives(hint) if get_origin(option) is tuple), None)
    if element is not None and not repeated:
        return f"{_NUMBERS.get(element, 'NAME')} ..."
    return PATHS.get(name) or next(iter(numbers), "TEXT")


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


@cache
def _docs(kind: type) -> dict[str, str]:
    """The docstrings of the fields that a class defines, by name."""
    if "__annotations__" not in vars(kind):
        return {}
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = following.value if isinstance(following, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                docs[statement.target.id] = inspect.cleandoc(text.value)
    return docs
