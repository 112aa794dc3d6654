"""Shell completion: what is offered, and that bash, zsh and fish offer it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastmoco.cli import COMMANDS, main
from fastmoco.commands.completion import SCRIPTS, candidates
from fastmoco.errors import ExitCode
from fastmoco.recipes import RECIPES
from fastmoco.registry import COMMAND_OPTIONS
from pipelines.registry import BACKENDS

ROOT = Path(__file__).parents[2]
BASH = """
eval "$(fastmoco completion bash)"
COMP_WORDS=(fastmoco "$@"); COMP_CWORD=$#
_fastmoco
printf '%s\\n' "${COMPREPLY[@]}"
"""
ZSH = """
autoload -Uz compinit; compinit -u -d ./zcompdump
source <(fastmoco completion zsh)
_describe() { print -rl -- "${(@)${(P)2}%%:*}" }
_files() { print -rl -- $words[CURRENT]*(N) }
words=(fastmoco "$@"); CURRENT=$#words
_fastmoco
"""
FISH = """
fastmoco completion fish | source
complete -C "fastmoco $argv" | string split -f 1 \\t
"""


def names(*words: str) -> list[str]:
    return [value for value, _ in candidates(words)]


def test_every_command_is_known_to_completion() -> None:
    assert COMMAND_OPTIONS.keys() == COMMANDS.keys(), "enter a new command in fastmoco.registry.COMMAND_OPTIONS"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tr"], ["train"]),
        ([""], list(COMMAND_OPTIONS)),
        (["train", "--batch"], ["--batch-size"]),
        (["train", "--no-ml"], ["--no-mlp"]),
        (["train", "--conf"], ["--config"]),
        (["train", "--config", "c"], [":paths"]),
        (["train", "--pipeline", ""], ["auto", *BACKENDS]),
        (["train", "--pipeline", "=", "re"], ["resident"]),  # as bash divides --pipeline=re
        (["train", "--pipeline", "="], ["auto", *BACKENDS]),
        (["train", "--pipeline=re"], ["--pipeline=resident"]),
        (["train", "--epochs", ""], []),
        (["train", "--data", "cifar1"], ["cifar10", "cifar100", ":paths"]),
        (["train", "--mlp", "shap"], ["shapes", "shapes", ":paths"]),  # the recipe and the data set
        (["train", "--out", ""], [":paths"]),
        (["sweep", "--var"], ["--vary"]),
        (["recipes", ""], list(RECIPES)),
        (["eval", "runs/"], [":paths"]),
        (["export", "run", "-o", ""], [":paths"]),
        (["export", "run", "--to", "t"], ["torchvision", "timm"]),
        (["completion", ""], list(SCRIPTS)),
        (["trian", "--ba"], []),
    ],
    ids=lambda words: " ".join(words) or "nothing",
)
def test_candidates(words: list[str], expected: list[str]) -> None:
    assert names(*words) == expected


def test_explanations() -> None:
    assert candidates(["train", "--wd"]) == [("--wd", "Weight decay")]
    assert dict(candidates(["recipes", "byol"]))["byol-aug"]


def test_errors(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, message in (([], "got none"), (["bsh"], "did you mean bash?"), (["bash", "zsh"], "got 'bash zsh'")):
        assert main(["completion", *argv]) == ExitCode.CONFIG
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with `photos of mine`, and a command `fastmoco` in bin/."""
    (tmp_path / "photos of mine").mkdir()
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "fastmoco"
    command.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m fastmoco "$@"\n')
    command.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    ("shell", "flags", "script"), [("bash", ["--norc"], BASH), ("zsh", ["-f"], ZSH), ("fish", ["-N"], FISH)]
)
def test_shells(shell: str, flags: list[str], script: str, folder: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    environment = {**os.environ, "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "HOME": str(folder)}

    def complete(*words: str) -> set[str]:
        command = [shell, *flags, "-c", script, *([] if shell == "fish" else [shell]), *words]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.stderr == ""
        return {line.rstrip("/") for line in done.stdout.splitlines() if line}

    assert complete("tr") == {"train"}
    assert complete("train", "--ba") == {"--bad-images", "--bank-m", "--batch-size"}
    assert complete("train", "--pipeline", "") == {"auto", *BACKENDS}
    assert complete("train", "cifar10-demo-") == {"cifar10-demo-symmetric"}
    assert complete("train", "photo") in ({"photos of mine"}, {"photos\\ of\\ mine"})
