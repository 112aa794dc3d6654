"""List files as editors and other programs write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.data.lists import read_list
from pipelines.errors import DataError
from tests.oddities import fill


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fill(tmp_path, "a.png", "b c.png", "d,e.png", "photo", "é.jfif")


def listed(path: Path) -> tuple[list[str], list[str | None] | None]:
    files = read_list(str(path))
    names = [path.rsplit("/", 1)[1] for path in files.paths]
    return names, None if files.classes is None else list(files.classes)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_encodings(folder: Path, encoding: str, end: str) -> None:
    mark = "\ufeff" if encoding.startswith("utf-16-") else ""
    text = end.join([f"{mark}a.png\tx", "é.jfif\ty", "photo\tx", ""])
    (folder / "list.txt").write_bytes(text.encode(encoding))
    assert listed(folder / "list.txt") == (["a.png", "é.jfif", "photo"], ["x", "y", "x"])


def test_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    (folder / "lists").mkdir()
    (folder / "lists" / "list.txt").write_text("~/a.png\n../photo\n")
    assert read_list(str(folder / "lists" / "list.txt")).paths[0] == f"{folder}/a.png"


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("l.csv", "path,label\na.png,cat\nb c.png,dog\n", (["a.png", "b c.png"], ["cat", "dog"])),
        ("l.csv", 'a.png,cat\n"d,e.png","a ""b"""\n', (["a.png", "d,e.png"], ["cat", 'a "b"'])),
        ("l.csv", "a.png\nphoto\n", (["a.png", "photo"], None)),
        ("l.csv", "id;Filename;Class\n1;a.png;cat\n2;photo;\n", (["a.png", "photo"], ["cat", None])),
        ("l.txt", "a.png,3\nphoto,4\n", (["a.png", "photo"], ["3", "4"])),
        ("l.txt", "label,image\ncat,a.png\n", (["a.png"], ["cat"])),
        ("l.csv", "cat,a.png\ndog,b c.png\n", (["a.png", "b c.png"], ["cat", "dog"])),
        ("l.tsv", "file_name\tcategory\na.png\tcat\n", (["a.png"], ["cat"])),
        ("l.txt", "a.png 3\nb c.png 4\n", (["a.png", "b c.png"], ["3", "4"])),
        ("l.txt", "d,e.png\na.png\n", (["d,e.png", "a.png"], None)),
        ("l.txt", "a.png\tcat\nphoto\n", (["a.png", "photo"], ["cat", None])),
    ],
)
def test_columns(folder: Path, name: str, text: str, expected: object) -> None:
    (folder / name).write_text(text)
    assert listed(folder / name) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"1,a.png,cat\n", "has 3 columns without names; expected a first line that names them"),
        (b"path,label\n,cat\n", "line 2 of .* has no path"),
        (b"path,label\nnotes.txt,cat\n", r"line 2 of .* is 'notes.txt'; expected the path of an image"),
        (b"\xff\xfea\0.\0p\0n\0g\0", None),
        (b"\xff\xfe\0\xd8x\0", "begins like UTF-16 and is not"),
    ],
)
def test_what_cannot_be_read(folder: Path, text: bytes, message: str | None) -> None:
    (folder / "l.csv").write_bytes(text)
    if message is None:
        assert listed(folder / "l.csv")[0] == ["a.png"]
        return
    with pytest.raises(DataError, match=message):
        read_list(str(folder / "l.csv"))
