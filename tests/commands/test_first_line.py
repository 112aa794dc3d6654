"""A command says what it does before the imports that take seconds, and `--config` of a run repeats that run."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from fastmoco.cli import main
from fastmoco.config import RunConfig
from fastmoco.errors import ExitCode
from fastmoco.output import Form, announce, output_in
from tests.commands.test_cli import TINY

SLOW = ("torch", "numpy", "matplotlib", "fastmoco.commands.doctor")

# Ends the process where a slow module would be imported first, so that what was printed came before.
BEFORE_IMPORTS = """
import sys
class Stop:
    def find_spec(self, name, *_):
        if name in {slow}:
            raise SystemExit(0)
sys.meta_path.insert(0, Stop())
from fastmoco.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("train --data photos", "training on photos"),
        ("sweep shapes --vary moco-m=0,0.9", "2 runs on shapes"),
        ("eval run", "evaluating run"),
        ("scan photos", "scanning photos"),
        ("views photos", "drawing views of photos"),
        ("export run --to timm -o b.pth", "exporting run"),
        ("embed photos --backbone run -o e.npz", "embedding photos"),
        ("report run", "reading run"),
        ("doctor", "trying what this machine has"),
    ],
)
def test_the_first_line_comes_before_slow_imports(line: str, said: str, tmp_path: Path) -> None:
    """On a terminal."""
    outside, inside = pty.openpty()
    command = [sys.executable, "-c", BEFORE_IMPORTS.format(slow=SLOW), *line.split()]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(command, cwd=tmp_path, env=environment, stdout=inside, stderr=inside, check=True, timeout=60)
    shown = os.read(outside, 4096).decode()
    os.close(inside)
    os.close(outside)
    assert shown.startswith("fastmoco 0.")
    assert shown.rstrip().endswith(f": {said}")


def test_programs_are_not_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for form in (Form.JSON, Form.QUIET):
        with output_in(form):
            announce("x", is_log=True)
    announce("x")
    monkeypatch.setenv("RANK", "1")
    announce("x", is_log=True)
    assert capsys.readouterr() == ("", "")
    monkeypatch.delenv("RANK")
    announce("a\x1b[31mname\udc80", is_log=True)
    assert capsys.readouterr().out.endswith(": 'a\\x1b[31mname\\udc80'\n")


def test_a_config_file_of_a_run_repeats_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run stays as it is; --out, --resume and --overwrite mean what they say."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", *TINY]) == ExitCode.DONE
    (first,) = Path("runs").iterdir()
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    config = str(first / "config.json")
    for number in (2, 3):
        capsys.readouterr()
        assert main(["train", "--config", config]) == ExitCode.DONE
        again = first.with_name(f"{first.name}-{number}")
        output = capsys.readouterr().out
        assert f"stays as it is: its settings again in {again}\n" in output
        assert (again / "backbone.safetensors").read_bytes() == before[first / "backbone.safetensors"]
        settings = json.loads((again / "config.json").read_text())
        assert Path(settings["run"].pop("out")).resolve() == again.resolve()
        original = json.loads(before[Path(config)])
        del original["run"]["out"]
        assert settings == original
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before

    assert main(["train", "--config", config, "--out", "elsewhere"]) == ExitCode.DONE
    assert Path("elsewhere/config.json").is_file()
    assert main(["train", "--config", config, "--overwrite"]) == ExitCode.DONE
    assert main(["train", "--config", config, "--resume"]) == ExitCode.DONE
    assert len(list(Path("runs").iterdir())) == 3

    Path("own.json").write_text(RunConfig().replace(out="runs/own").to_json())
    assert main(["train", *TINY, "--config", "own.json"]) == ExitCode.DONE, "its folder is free"
    assert Path("runs/own/config.json").is_file()
