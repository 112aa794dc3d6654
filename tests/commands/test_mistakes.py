"""Mistakes on the command line: one line that says what was expected, and the nearest name; exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastmoco.cli import main
from fastmoco.commands.train_arguments import parse_train
from fastmoco.errors import ExitCode

MISTAKES = {
    # names
    "trai": "unknown command 'trai'; did you mean train?",
    "evla run": "unknown command 'evla'; did you mean eval?",
    "--hepl": "unknown command '--hepl'; did you mean --help?",
    "xyzzy": "unknown command 'xyzzy'; see fastmoco --help",
    "train --resme runs/a": "unknown argument '--resme'; did you mean --resume?",
    "train --no-arch": "unknown argument '--no-arch'; did you mean --arch?",
    "train --qwertz 1": "unknown argument '--qwertz'; see fastmoco train --help",
    "train cifar11": "unknown recipe, data set or folder 'cifar11'; did you mean 'cifar10'? (see fastmoco recipes)",
    "train imagenet-v3": "unknown recipe, data set or folder 'imagenet-v3'; did you mean 'imagenet-v2'? (see fastmoco "
    "recipes)",
    "train photoss": "unknown recipe, data set or folder 'photoss'; did you mean 'photos'? (see fastmoco recipes)",
    "train photos shapes": "'shapes' is a recipe and comes first; for a folder of this name use ./shapes",
    "train shapes --data photos photos2": "unknown recipe, data set or folder 'photos2'; did you mean 'photos'? (see "
    "fastmoco recipes)",
    "train photos --data photos": "'photos' and --data both say what to train on: drop one of the two",
    "train --allow-changed moco-kk": "the configuration has no setting 'moco_kk'; did you mean 'moco_k'?",
    "eval run run2": "unexpected argument 'run2': see fastmoco eval --help",
    "doctor extra": "unexpected argument 'extra': see fastmoco doctor --help",
    # choices, in the order of --help
    "train --pipeline residnet": "--pipeline is 'residnet', expected one of auto, resident, torch, dali, ffcv, "
    "dataloader; did you mean resident?",
    "train --amp bf15": "--amp is 'bf15', expected one of auto, bf16, fp16, fp32; did you mean bf16?",
    "train --compile on": "--compile is 'on', expected one of auto, off, default, max-autotune",
    "train --aug v3": "--aug is 'v3', expected one of v1, v2, cifar, byol; did you mean v2?",
    "eval run --map tsnee": "--map is 'tsnee', expected one of tsne, umap; did you mean tsne?",
    "eval run --stem cifr": "--stem is 'cifr', expected one of imagenet, cifar; did you mean cifar?",
    "eval run --probes knn,linar": "--probes has 'linar'; did you mean linear? (known: knn, linear, logistic, "
    "few-label, fine-tune)",
    "export run --to torchvison -o x.pth": "--to is 'torchvison', expected one of torchvision, timm, detectron2, "
    "lincls, safetensors, onnx; did you mean torchvision?",
    "doctor --only kernl": "--only is 'kernl', expected one of machine, device, kernels, loading, step, distributed; "
    "did you mean kernels?",
    # numbers and lists
    "train --epochs 1.5": "--epochs is '1.5', expected a whole number",
    "train --limit x": "--limit is 'x', expected a whole number",
    "train --lr 0,03": "--lr is '0,03', expected a number; did you mean 0.03?",
    "train --lr x": "--lr is 'x', expected a number",
    "train --lr nan": "--lr is nan, expected a finite number",
    "train --head a b": "--head is 'a', expected whole numbers",
    "train --schedule 120,x": "--schedule is 'x', expected whole numbers",
    "train --schedule 160 120": "--schedule is (160, 120), expected epochs above 0 in rising order",
    "train --value-range 5": "--value-range is '5', expected 2 numbers",
    "train --value-range 5 1": "--value-range is (5.0, 1.0), expected two numbers, the first below the second, e.g. 0 "
    "4095",
    "train --mean 0.5 0.5": "--mean is given and --std is not: give both, or neither",
    "train --mean 0 0 --std 1 1": "--mean has 2 numbers: expected one, or three for red, green and blue",
    "views photos --count many": "--count is 'many', expected a whole number",
    "scan photos --workers 1.5": "--workers is '1.5', expected a whole number",
    # ranges
    "train --seed -1": "--seed is -1, expected a number from 0 to 4294967295",
    "train --gpus 0": "--gpus is 0, expected 1 or more",
    "train --moco-m 1.5": "--moco-m is 1.5, expected a number from 0 to 1: the authors use 0.999",
    "train --moco-t 0": "--moco-t is 0.0, expected a temperature above 0: the authors use 0.07, and 0.2 in v2",
    "train --knn-t 0": "--knn-t is 0.0, expected a temperature above 0: the authors use 0.1",
    "train --hflip 50": "--hflip is 50.0, expected a probability from 0 to 1",
    # values that are missing
    "train --lr": "--lr needs a value",
    "train --head": "--head needs a number or several",
    "train --data photos --data": "--data needs a value",
    "eval": "RUN_OR_CHECKPOINT missing; usage: fastmoco eval RUN_OR_CHECKPOINT [FLAGS]",
    "scan": "DATA missing; usage: fastmoco scan DATA [FLAGS]",
    "views --count 3": "DATA missing; usage: fastmoco views DATA [FLAGS]",
    "export run": "--to missing; usage: fastmoco export RUN_OR_CHECKPOINT --to NAME [FLAGS]",
    "export --to timm": "RUN_OR_CHECKPOINT missing; usage: fastmoco export RUN_OR_CHECKPOINT --to NAME [FLAGS]",
    "completion": "fastmoco completion takes a shell, bash, zsh or fish, and got none; see fastmoco completion --help",
    # runs
    "train --resume runs/shpes": "--resume runs/shpes does not exist, expected a run or a checkpoint; did you mean "
    "runs/shapes?",
    "train --resume=nowhere/at/all": "--resume nowhere/at/all does not exist, expected a run or a checkpoint",
    "train --resume-from runs/shapes": "--resume-from runs/shapes has no config.json and checkpoints/: expected a run "
    "of fastmoco or one of its step-….safetensors",
    # sweeps
    "sweep shapes --vary moco-m": "--vary 'moco-m': expected a setting and its values, such as moco-m=0,0.9,0.99",
    "sweep shapes --vary =0,1": "--vary '=0,1': expected a setting and its values, such as moco-m=0,0.9,0.99",
    "sweep shapes --vary moco-mm=0,1": "the configuration has no field 'moco_mm'; did you mean 'moco_m'?",
    "sweep shapes --vary epochs=1.5": "--epochs is '1.5', expected a whole number",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("photos", "runs/shapes"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == ExitCode.CONFIG
    output = capsys.readouterr()
    assert output.err == f"fastmoco: error: {MISTAKES[line]}\n"
    assert output.out == ""


def test_help_of_a_command_by_either_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", "views"]) == ExitCode.DONE
    first = capsys.readouterr().out
    assert main(["views", "--help"]) == ExitCode.DONE
    assert capsys.readouterr().out == first


def test_lists_may_have_commas() -> None:
    assert parse_train(["--schedule", "3,5"]) == parse_train(["--schedule", "3", "5"])
    assert parse_train(["--mean", "0.1,0.2,0.3", "--std", "0.5"]).augment.mean == (0.1, 0.2, 0.3)
    assert parse_train(["--lr", "None"]).optim.lr is None
