"""The manifest of a `.beton` file, `NAME.beton.json`: what the file holds, with digests of it and of itself.

The `.beton` format does not mark a file as complete: FFCV returns black images from a file whose writer died, and other
wrong pixels from a truncated one. So a file without its manifest is refused.

N images
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields
from typing import Any

from pipelines.data.beton_format import REMEDY
from pipelines.data.decode import printable
from pipelines.errors import DataError

FORMAT = "fastmoco beton 2"
EARLIER_FORMAT = "fastmoco beton 1"  # of fastmoco 0.1.0: a digest of the whole file in place of those of its images
_SEAL = "manifest_sha256"
_NOT_IN = {FORMAT: "file_sha256", EARLIER_FORMAT: "image_digests"}  # the field that a format does not have

_KINDS: dict[str, type] = {
    "dataset": str,
    "bytes": int,
    "images": int,
    "tables_sha256": str,
    "image_digests": str,
    "file_sha256": str,
    "class_names": list,
    "names": list,
}


@dataclass(frozen=True, kw_only=True)
class BetonManifest:
    """The manifest of a complete file.

    bytes, images  of the file
    tables_sha256  of header, field table, sample table and allocation table, concatenated
    image_digests  of every image's bytes (`record_digests.RecordDigests.text`); "" in EARLIER_FORMAT
    file_sha256    in EARLIER_FORMAT only: of the whole file, or "" if it is longer than `beton.HASHED_BYTES`
    names          N names, relative to the source; undecodable bytes as surrogate escapes
    class_names    of labels 0, 1, ...; empty without labels
    stored         number of images copied unchanged, re-encoded as JPEG, or stored as raw pixels
    settings       of the conversion
    quarantine     (name, reason) of the images left out
    versions       of the programs that wrote it
    """

    format: str = FORMAT
    dataset: str
    bytes: int
    images: int
    tables_sha256: str
    image_digests: str = ""
    file_sha256: str = ""
    class_names: list[str]
    names: list[str]
    stored: dict[str, int]
    settings: dict[str, Any]
    quarantine: list[list[str]]
    versions: dict[str, str]

    def to_json(self) -> str:
        """In the present format, with a SHA-256 of itself."""
        assert self.format == FORMAT
        values = asdict(self)
        del values["file_sha256"]
        return json.dumps(sealed_manifest(values), indent=1)

    @classmethod
    def from_json(cls, text: str) -> BetonManifest:
        """Raises ValueError with the reason if the text is not a manifest, or not as it was written."""
        values = json.loads(text)
        if not isinstance(values, dict) or values.get("format") not in (FORMAT, EARLIER_FORMAT):
            raise ValueError(f"its format is not '{FORMAT}'")
        if values["format"] == FORMAT and values.pop(_SEAL, None) != sealed_manifest(values)[_SEAL]:
            raise ValueError("it has changed since it was written (its SHA-256 differs)")
        expected = [field.name for field in fields(cls) if field.name != _NOT_IN[values["format"]]]
        for name in expected:
            if name not in values:
                raise ValueError(f"it has no '{name}'")
            if not isinstance(values[name], _KINDS.get(name, object)):
                raise ValueError(f"its '{name}' is not of type {_KINDS[name].__name__}")
        if unknown := values.keys() - set(expected):
            raise ValueError(f"it has an unknown '{printable(min(unknown))}'")
        if not all(isinstance(name, str) for name in values["names"] + values["class_names"]):
            raise ValueError("a name in it is not text")
        if len(values["names"]) != values["images"]:
            raise ValueError(f"it has {len(values['names']):,} names for {values['images']:,} images")
        return cls(**values)


def manifest_path(path: str) -> str:
    return path + ".json"


def read_manifest(path: str) -> BetonManifest:
    """The manifest of the `.beton` file at `path`. Raises DataError if it is missing or damaged, and OSError."""
    manifest = manifest_path(path)
    try:
        with open(manifest, encoding="utf-8") as file:
            return BetonManifest.from_json(file.read())
    except FileNotFoundError as error:
        raise DataError(
            f"{printable(path)} has no manifest {printable(os.path.basename(manifest))}: its conversion did not finish "
            f"or was not by tools/make_ffcv.py; convert again"
        ) from error
    except (ValueError, RecursionError) as error:
        reason = printable(" ".join(str(error).split()))
        raise DataError(f"{printable(manifest)} is not a usable manifest: {reason}; {REMEDY}") from error


def sealed_manifest(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a manifest with a SHA-256 of them, in whatever way their JSON is laid out."""
    content = {name: value for name, value in values.items() if name != _SEAL}
    return content | {_SEAL: hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}
