"""Recognises what fastmoco itself has written among images, which must not become data.

Folders of runs, sweeps and evaluations are recognised by the content of their JSON files or by their checkpoints, and
pictures outside of such folders by a note in the PNG.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection

from pipelines.files import json_object
from pipelines.reads import Timed, open_regular, read_file, read_up_to

SOFTWARE = "fastmoco"
"""The text `Software` of a PNG that fastmoco writes."""

_PICTURE = re.compile(r"(views|curves|sweep|retrieval|feature_map|confusion-[a-z-]+)\.png")
_PICTURE_MARK = b"tEXtSoftware\0" + SOFTWARE.encode()
_PICTURE_HEAD_BYTES = 1024
_CHECKPOINT = re.compile(r"step-\d{9,}\.safetensors")
_MAX_JSON_BYTES = 2**26  # of an evaluation with many classes
_FILES = {  # what the JSON in a folder has at its top level, and what the folder then is
    "status.json": ({"state", "exit_code", "step", "versions"}, "run"),
    "config.json": ({"data", "augment", "model", "optim", "run"}, "run"),
    "sweep.json": ({"recipe", "command", "runs"}, "sweep"),
    "eval.json": ({"backbone", "probes", "label_free"}, "evaluation"),
}


def kind_of_folder(folder: str, files: Collection[str], folders: Collection[str]) -> str | None:
    """`run`, `sweep` or `evaluation` if fastmoco wrote this folder, else None.

    files, folders  the names in it
    """
    for name, (keys, kind) in _FILES.items():
        if name in files and keys <= _keys(os.path.join(folder, name)):
            return kind
    if "checkpoints" in folders and _has_checkpoint(os.path.join(folder, "checkpoints")):
        return "run"
    return None


def is_picture_name(name: str) -> bool:
    """Whether pictures that fastmoco writes are named so; of others, not even the beginning is read."""
    return _PICTURE.fullmatch(name) is not None


def is_own_picture(path: str) -> bool:
    """Whether a file has the name of a picture that fastmoco writes, and its note. False if it cannot be read."""
    if not is_picture_name(os.path.basename(path)):
        return False
    try:
        with Timed(path):
            descriptor, _ = open_regular(path)
            try:
                return _PICTURE_MARK in read_up_to(descriptor, _PICTURE_HEAD_BYTES)
            finally:
                os.close(descriptor)
    except OSError:
        return False


def _keys(path: str) -> set[str]:
    try:
        return set(json_object(read_file(path, _MAX_JSON_BYTES)) or ())
    except OSError:
        return set()


def _has_checkpoint(folder: str) -> bool:
    try:
        with Timed(folder):
            return any(_CHECKPOINT.fullmatch(name) for name in os.listdir(folder))
    except OSError:
        return False
