"""Help, lists and invalid arguments are instant: no slow module is imported."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from fastmoco.backbones.formats import Format, format_of
from fastmoco.commands.views_options import ViewsOptions
from fastmoco.config import Aug
from fastmoco.errors import ConfigError, ExitCode, RankLostError, error_named, exit_code
from fastmoco.model.resnet import SHAPES
from fastmoco.registry import ARCHITECTURES, EXPORT_TARGETS
from pipelines.augment.presets import AUGMENTATIONS
from pipelines.data.named import LOADERS
from pipelines.data.names import ARRAYS

ROOT = Path(__file__).parents[2]
SLOW = ["torch", "torchvision", "matplotlib", "sklearn", "tensorboard", "numpy"]  # to import; torch alone takes seconds
MAX_CPU_S = 1.5  # of a whole process; it takes 0.1 to 0.3 s, and several seconds with torch

DONE, CONFIG, DATA = ExitCode.DONE, ExitCode.CONFIG, ExitCode.DATA
CASES: dict[str, tuple[ExitCode, str]] = {
    "": (CONFIG, "usage: fastmoco COMMAND"),
    "--help": (DONE, "usage: fastmoco COMMAND"),
    "trian": (CONFIG, "unknown command 'trian'; did you mean train?"),
    "recipes": (DONE, "cifar10-demo-symmetric"),
    "recipes imagenet-v2": (DONE, "fastmoco train imagenet-v2"),
    "recipes --help": (DONE, "usage: fastmoco recipes [NAME]"),
    "recipes a b": (CONFIG, "takes at most one name"),
    "recipes mnits": (CONFIG, "unknown recipe 'mnits'; did you mean 'mnist'"),
    "train --help": (DONE, "--batch-size"),
    "train shapes -h": (DONE, "--batch-size"),
    "train shapse": (CONFIG, "unknown recipe, data set or folder 'shapse'; did you mean 'shapes'"),
    "train imagenet-v2": (DATA, "there is no ./imagenet, which recipe imagenet-v2 trains on: ImageNet-1k"),
    "train --batch-sise 8": (CONFIG, "unknown argument '--batch-sise'; did you mean --batch-size?"),
    "train --batch-size": (CONFIG, "--batch-size"),
    "train --batch-size many": (CONFIG, "many"),
    "train --batch-size 1": (CONFIG, "--batch-size is 1, expected 2 or more"),
    "train --arch resnet19": (CONFIG, "resnet19"),
    "train --width 0.3": (CONFIG, "--width is 0.3, expected a multiple of 0.125"),
    "train --cos --schedule 1": (CONFIG, "--cos and --schedule both define the learning rate"),
    "train --resume --overwrite": (CONFIG, "--resume continues a run and --overwrite deletes it"),
    "train --config": (CONFIG, "--config needs a value"),
    "train --help --batch-sise": (DONE, "--batch-size"),
    "--version": (DONE, "fastmoco "),
    "train -a resnet19": (CONFIG, "--arch is 'resnet19', expected one of resnet18, resnet34, resnet50, resnet101"),
    "train -x 3": (CONFIG, "unknown argument '-x'; see fastmoco train --help"),
    "train --device mps": (CONFIG, "--device mps: Apple's MPS is not used"),
    "views shapes --aug-plus --count 0": (CONFIG, "--count is 0, expected 1 to 256"),
    "export run extra --to timm -o b.pth": (CONFIG, "unexpected argument 'extra': see fastmoco export --help"),
    "recipes --names": (CONFIG, "unknown argument '--names'"),
    "train --config nowhere.json": (CONFIG, "--config nowhere.json cannot be read"),
    "sweep --help": (DONE, "--vary"),
    "sweep": (CONFIG, "nothing to vary"),
    "sweep shapse": (CONFIG, "unknown recipe, data set or folder 'shapse'; did you mean 'shapes'"),
    "sweep shapes --vary momo-k=8,16": (CONFIG, "did you mean 'moco_k'"),
    "sweep shapes --vary moco-m=0,0.9,7": (CONFIG, "--moco-m is 7.0, expected a number from 0 to 1"),
    "sweep ablation-queue --batch-sise 8": (CONFIG, "unknown argument '--batch-sise'; did you mean --batch-size?"),
    "sweep imagenet-v2 --vary moco-m=0,0.9": (DATA, "there is no ./imagenet"),
    "export --help": (DONE, "--to"),
    "export": (CONFIG, "--to"),
    "export run": (CONFIG, "--to"),
    "train --arch timm/": (CONFIG, "--arch is 'timm/', expected one of"),
    "train --arch timm/resnet18 --stem cifar": (CONFIG, "use --stem auto"),
    "export run --to tensorflow -o b.pb": (CONFIG, "tensorflow"),
    "export run --to timm -o b.pkl": (CONFIG, "expected a name that ends with .pth or .safetensors for --to timm"),
    "export run --to timm -o b.pth --overwrit": (CONFIG, "did you mean --overwrite?"),
    "scan --help": (DONE, "--bad-images"),
    "scan": (CONFIG, "DATA"),
    "scan images --workers -1": (CONFIG, "--workers is -1, expected 0 or more"),
    "scan images --wrokers 1": (CONFIG, "did you mean --workers?"),
    "eval --help": (DONE, "--probes"),
    "eval": (CONFIG, "RUN_OR_CHECKPOINT"),
    "eval run --prober knn": (CONFIG, "did you mean --probes?"),
    "eval run --probes kmm": (CONFIG, "did you mean knn?"),
    "eval run --labels 0%": (CONFIG, "--labels has '0%'"),
    "eval run --probes knn --labels 1%": (CONFIG, "--labels is for the few-label probe"),
    "eval run --arch resnet19": (CONFIG, "unknown architecture 'resnet19'; did you mean resnet1"),
    "eval run --crop-size 4": (CONFIG, "--crop-size is 4, expected 8 pixels or more"),
    "embed --help": (DONE, "--neighbours"),
    "embed": (CONFIG, "--backbone"),
    "embed photos --backbone run -o f.txt": (CONFIG, "expected a name that ends with .parquet, .npz or .npy"),
    "embed photos --backbone run --out f.npz --neighbors 3": (CONFIG, "did you mean --neighbours?"),
    "watch --help": (DONE, "--once"),
    "watch --interval 0": (CONFIG, "--interval is 0.0, expected 0.1 to 3600 seconds"),
    "views --help": (DONE, "--compare"),
    "views": (CONFIG, "DATA"),
    "views shapes --piepline torch": (CONFIG, "did you mean --pipeline?"),
    "views shapes --compare torch": (CONFIG, "--compare is 'torch', expected two pipelines"),
    "views shapes --compare torch,resdent": (CONFIG, "--compare is 'resdent', expected one of"),
    "views shapes --crop-size 4": (CONFIG, "--crop-size is 4, expected 8 pixels or more"),
    "views shapes --out v.jpg": (CONFIG, "expected the name of a .png file"),
    "report --help": (DONE, "one HTML page"),
    "report": (CONFIG, "RUN"),
    "report run --uot page.html": (CONFIG, "did you mean --out?"),
    "report run -o page.pdf": (CONFIG, "--out is 'page.pdf', expected the name of a .html"),
    "doctor --help": (DONE, "--json"),
    "doctor --jsno": (CONFIG, "did you mean --json?"),
    "doctor --only kernel": (CONFIG, "kernel"),
    "doctor --data nowhere": (CONFIG, "--data is 'nowhere', expected an existing folder"),
}

# Runs the command lines one after the other: exit code, output and slow modules imported.
SCRIPT = """
import contextlib, io, json, sys
from fastmoco.cli import main

slow, lines = json.loads(sys.argv[1])
results = [["", 0, "", [name for name in slow if name in sys.modules]]]
for line in lines:
    output, before = io.StringIO(), set(sys.modules)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            code = main(line.split())
        except SystemExit as exited:
            code = exited.code or 0
    results.append([line, code, output.getvalue(), [name for name in slow if name in set(sys.modules) - before]])
print(json.dumps(results))
"""


def python(*arguments: str, cwd: Path) -> str:
    """The standard output of a new process, in which warnings are errors."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    command = [sys.executable, "-W", "error", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Exit code, output and imported slow modules by command line; all from one process, in an empty folder."""
    (_, _, _, by_import), *rows = json.loads(
        python("-c", SCRIPT, json.dumps([SLOW, list(CASES)]), cwd=tmp_path_factory.mktemp("empty"))
    )
    assert by_import == [], "imported by fastmoco.cli"
    return {line: rest for line, *rest in rows}


@pytest.mark.parametrize("line", CASES)
def test_no_slow_module_is_imported(results: dict[str, Any], line: str) -> None:
    code, output, imported = results[line]
    expected, text = CASES[line]
    assert imported == []
    assert code == expected, output
    assert text in output
    if output.startswith("fastmoco: "):
        assert output.count("\n") == 1


def test_the_package_imports_no_slow_module(tmp_path: Path) -> None:
    imported = f"print([name for name in {SLOW} if name in sys.modules])"
    assert python("-c", f"import fastmoco, sys; dir(fastmoco); {imported}", cwd=tmp_path) == "[]\n"


@pytest.mark.parametrize("line", ["--help", "recipes", "train --help", "eval --help"])
def test_cpu_time_of_a_whole_process(line: str, tmp_path: Path) -> None:
    """CPU time, which hardly depends on the load of the machine; the best of three."""

    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        python("-m", "fastmoco", *line.split(), cwd=tmp_path)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(once() for _ in range(3)) < MAX_CPU_S


def test_names_for_validation_match_the_modules_imported_later() -> None:
    assert tuple(LOADERS) == ARRAYS
    assert ARCHITECTURES.keys() == SHAPES.keys()
    assert all(isinstance(format_of(target), Format) for target in EXPORT_TARGETS)
    assert get_args(Aug) == tuple(AUGMENTATIONS)


def test_exit_codes_of_torch_errors() -> None:
    assert exit_code(torch.OutOfMemoryError("no memory")) == ExitCode.DEVICE
    assert isinstance(error_named("OutOfMemoryError", "no memory"), torch.OutOfMemoryError)
    assert isinstance(error_named("KeyError", "x"), RankLostError)
    assert exit_code(KeyError()) is None


def test_compared_pipelines_are_validated() -> None:
    assert ViewsOptions(data=("shapes",), compare="torch, resident").pipelines == ["torch", "resident"]
    assert ViewsOptions(data=("shapes",), pipeline="dali").pipelines == ["dali"]
    with pytest.raises(ConfigError, match=r"--compare is 'resdent', expected one of .* did you mean resident"):
        ViewsOptions(data=("shapes",), compare="torch,resdent")
