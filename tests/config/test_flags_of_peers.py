"""Flags of other trainers: every entry of the table is understood or answered, and whole command lines of theirs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fastmoco.backbones.options import ExportOptions
from fastmoco.cli import COMMANDS, main
from fastmoco.commands.doctor_options import DoctorOptions
from fastmoco.commands.scan_options import ScanOptions
from fastmoco.commands.train_arguments import parse_train
from fastmoco.commands.views_options import ViewsOptions, parse_views
from fastmoco.commands.watch_options import WatchOptions
from fastmoco.config import RunConfig
from fastmoco.config.arguments import read, written
from fastmoco.config.flags import Takes, flags_of
from fastmoco.config.peers import INSTEAD, POSITIONAL, SAME, Instead, Same, translate
from fastmoco.errors import ConfigError, ExitCode
from fastmoco.evaluation.embed_options import EmbedOptions
from fastmoco.evaluation.options import EvalOptions, parse_eval

FLAGS = {
    "train": flags_of(RunConfig).and_value("--config"),
    "sweep": flags_of(RunConfig).and_value("--vary"),
    "views": flags_of(ViewsOptions),
    "eval": flags_of(EvalOptions),
    "embed": flags_of(EmbedOptions),
    "watch": flags_of(WatchOptions),
    "scan": flags_of(ScanOptions),
    "export": flags_of(ExportOptions),
    "doctor": flags_of(DoctorOptions),
}
KNOWN = {flag for flags in FLAGS.values() for flag in flags.takes} | {"--init"}


def names(entry: Same | Instead) -> list[str]:
    return entry.names.split()


@pytest.mark.parametrize("entry", SAME, ids=lambda entry: names(entry)[0])
def test_the_same_meaning_is_understood(entry: Same) -> None:
    for ours in entry.ours.split():
        assert ours == POSITIONAL or ours in KNOWN
    for command, flags in FLAGS.items():
        for name in names(entry):
            assert re.fullmatch(r"--?[a-z][a-z0-9.-]*", name), "as after the change of _ to -"
            meaning = translate(name, flags, command)
            if name in flags.takes or not isinstance(meaning, tuple):
                continue
            assert meaning[0] == POSITIONAL or meaning[0] in flags.takes
            valued = meaning[0] == POSITIONAL or flags.takes[meaning[0]] != Takes.NOTHING
            (argument,) = read([name, *(["7"] * (valued and not meaning[1]))], flags, command)
            assert argument.flag == (meaning[0] if meaning[0] != POSITIONAL else "")
            assert argument.values == (meaning[1] or ["7"] * valued)


@pytest.mark.parametrize("entry", INSTEAD, ids=lambda entry: names(entry)[0])
def test_the_others_are_answered_in_one_line_with_flags_that_exist(entry: Instead) -> None:
    assert set(entry.commands.split()) <= COMMANDS.keys()
    for flag in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", entry.answer):
        assert flag in KNOWN | {"-m"}, flag
    assert len(entry.answer) < 160
    answered = set()
    for command, flags in FLAGS.items():
        for name in names(entry):
            assert name not in flags.takes
            meaning = translate(name, flags, command)
            if not isinstance(meaning, str):
                continue  # understood by this command, or not for it
            answered |= {name} if meaning == entry.answer else set()
            spellings = {name, name[:2] + name[2:].replace("-", "_")}
            for text in [[spelling, "x"] for spelling in spellings] + [[f"{name}=x"]]:
                with pytest.raises(ConfigError, match=re.escape(meaning)) as caught:
                    read(text, flags, command)
                assert str(caught.value).startswith(f"{text[0].removesuffix('=x')}: ")
                assert "\n" not in str(caught.value)
    assert answered == {*names(entry)}


def test_no_flag_has_two_meanings_in_a_command() -> None:
    for command, flags in FLAGS.items():
        for name in {name for entry in SAME for name in names(entry)}:
            of_command = [
                [ours for ours in same.ours.split() if ours in flags.takes] for same in SAME if name in names(same)
            ]
            own = [ours[0] for ours in of_command if ours]
            assert len({*own}) <= 1, (command, name, own)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the folders photos and mnist."""
    for name in ("photos", "mnist", "photos/val"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("line", "ours"),
    [
        (
            "photos -a resnet18 -j 3 -b 128 --lr 0.015 -p 10",
            "--data photos --arch resnet18 --workers 3 --batch-size 128",
        ),
        ("-a resnet18 -b128 -j3 --learning-rate 0.015 --print-freq 10 photos", "--data photos --arch resnet18 -b 128"),
        ("photos --schedule 120 160 --epochs 200 --momentum 0.9", "--data photos --schedule 120 160 --epochs 200"),
        ("--epochs 200 --schedule 120 160 photos", "--data photos --schedule 120 160 --epochs 200"),
        ("--mlp --moco-t 0.2 --aug-plus --cos photos", "--data photos --mlp --moco-t 0.2 --aug-plus --cos"),
        ("--weight_decay 1e-3 --bn-splits 8 --results-dir out", "--wd 0.001 --bn-splits 8 --out out"),
        (
            "data=photos out=o model=resnet18 epochs=3 batch_size=64",
            "--data photos --out o --arch resnet18 --epochs 3 -b 64",
        ),
        (
            "input_dir=photos trainer.max_epochs=3 loader.batch_size=64 overwrite=true",
            "--data photos --epochs 3 -b 64 --overwrite",
        ),
        ("++optimizer.lr=0.3 +max_epochs=9 symmetric=False", "--lr 0.3 --epochs 9 --no-symmetric"),
        (
            "--data_path photos --output_dir o --momentum_teacher 0.99 --use_fp16 true",
            "--data photos --out o --moco-m 0.99 --amp fp16",
        ),
        (
            "--data-dir photos --model resnet18 --opt sgd --img-size 32 --log-interval 5",
            "--data photos --arch resnet18 --crop-size 32",
        ),
        (
            "--work-dir o --no-flip --no-color-jitter --grayscale-prob 0",
            "--out o --hflip 0 --color-jitter 0 --grayscale 0",
        ),
        ("--mean 0.5 0.4 0.3 --std 0.2 0.2 0.2 photos", "--data photos --mean 0.5 0.4 0.3 --std 0.2 0.2 0.2"),
        ("--temperature 0.1 --queue_size 4096 --feature-dim 64", "--moco-t 0.1 --moco-k 4096 --moco-dim 64"),
        ("--cos=True --mlp false photos/val", "--cos --no-mlp --data photos/val"),
        ("cifar10", "--data cifar10"),
        ("./mnist", "--data ./mnist"),
        ("mnist ./mnist", "mnist --data ./mnist"),
        ("cifar10-demo photos --seed 3", "cifar10-demo --seed 3 --data photos"),
        ("--seed 3 cifar10-demo ~/nowhere", "cifar10-demo --data ~/nowhere --seed 3"),
    ],
)
def test_command_lines_of_others(here: Path, line: str, ours: str) -> None:
    """Read as the flags that we would give; flags that `ours` leaves out are compared by the table above."""
    config, expected = parse_train(line.split()), parse_train(ours.split())
    assert config.data.data == expected.data.data
    named = {argument.flag for argument in read(ours.split(), FLAGS["train"], "train")}
    for flag in named - {""}:
        field = flag.removeprefix("--no-").removeprefix("--").replace("-", "_")
        assert config.flat()[field] == expected.flat()[field] != RunConfig().flat()[field] or flag in (
            *("--no-symmetric", "--no-mlp", "--bn-splits"),
        ), field
    if ours.split()[0] in ("mnist", "cifar10-demo"):
        assert (config.model.moco_k, config.optim.epochs) == (expected.model.moco_k, expected.optim.epochs)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train fotos", "unknown recipe, data set or folder 'fotos'; did you mean 'photos'?"),
        ("train cifar10-dema", "unknown recipe, data set or folder 'cifar10-dema'; did you mean 'cifar10-demo'?"),
        ("train shapes stl11", "unknown recipe, data set or folder 'stl11'; did you mean 'stl10'?"),
        ("train photos shapes", "'shapes' is a recipe and comes first; for a folder of this name use ./shapes"),
        ("train photos --data photos", "'photos' and --data both say what to train on: drop one of the two"),
        ("train photos --gpu 1", "--gpu: choose the GPU with CUDA_VISIBLE_DEVICES=N, or use --gpus N for several"),
        ("train photos --dist-url tcp://localhost:1", "--dist-url: use --gpus N for N GPUs of this machine"),
        ("train photos --multiprocessing-distributed", "for several machines, start with torchrun -m fastmoco"),
        ("train photos --start-epoch 3", "--start-epoch: a resumed run knows its epoch: use --resume with --out RUN"),
        ("train photos --device cuda:1", "--device cuda:1: use CUDA_VISIBLE_DEVICES=1 and --device cuda"),
        ("eval run --device mps", "--device mps: Apple's MPS is not used, since it has no float64: use --device cpu"),
        ("doctor --device gpu", "--device gpu: use --device cuda"),
        ("eval --pretrained x.pth", "--pretrained: name the file without a flag: fastmoco eval FILE"),
        ("train photos --cos maybe", "unknown recipe, data set or folder 'maybe'"),
        ("train photos --mlp=maybe", "--mlp is 'maybe', expected true or false"),
        ("train photos -z 3", "unknown argument '-z'; see fastmoco train --help"),
        ("train photos --momentun 0.9", "unknown argument '--momentun'; did you mean --sgd-momentum?"),
        ("train photos --fp16=false", "--fp16 is 'false': leave it out"),
        ("views photos --jitter 1", "unknown argument '--jitter'; did you mean --color-jitter?"),
        ("scan photos --epochs 1", "unknown argument '--epochs'"),
        ("train photos --workers", "--workers needs a value"),
        ("train photos --schedule", "--schedule needs a number or several"),
        ("train photos --arch vit_small", "--arch is 'vit_small', expected one of resnet18, resnet34, resnet50"),
        ("views photos --aug v9", "--aug is 'v9', expected one of v1, v2, cifar, byol"),
        ("export run --to tensorflow -o x.pb", "--to is 'tensorflow', expected one of torchvision, timm"),
    ],
)
def test_what_is_not_understood_is_answered_in_one_line(here: Path, capsys, line: str, message: str) -> None:
    assert main(line.split()) == ExitCode.CONFIG
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_commands_have_their_own_meaning_of_a_flag() -> None:
    line = "run -b 64 --lr 3 --epochs 5 --weight_decay 0.1 --temperature 0.2 --nb-knn 20"
    options = parse_eval(shlex.split(line))
    assert (options.linear_batch_size, options.linear_lr, options.linear_epochs) == (64, 3.0, 5)
    assert (options.linear_wd, options.knn_t, options.knn_k) == (0.1, 0.2, 20)
    views = parse_views(["--data", "shapes", "-n", "3", "--aug-plus", "--no-flip"])
    assert (views.data, views.count, views.config.augment.hflip) == (("shapes",), 3, 0.0)


def test_a_file_with_an_equals_sign_is_a_file(here: Path) -> None:
    (here / "seed=3").mkdir()
    config = parse_train(["seed=3"])
    assert (config.data.data, config.run.seed) == (("seed=3",), 0)
    assert parse_train(["seed=4"]).run.seed == 4


def test_arguments_are_written_so_that_a_list_takes_no_more_than_its_own() -> None:
    arguments = read(["--schedule", "1", "2", "photos", "--lr=-1"], FLAGS["train"], "train")
    assert written(arguments) == ["photos", "--schedule", "1", "2", "--lr=-1"]
    assert read(["--lr", "-1e-3"], FLAGS["train"], "train")[0].values == ["-1e-3"]


def test_the_same_flag_means_the_same_in_every_command() -> None:
    """What augmentation, seed, device and cache are called does not depend on the command."""
    from dataclasses import fields

    from fastmoco.config import AugmentConfig

    own = {"--" + field.name.replace("_", "-") for field in fields(AugmentConfig)}
    assert own <= FLAGS["train"].takes.keys() & FLAGS["sweep"].takes.keys() & FLAGS["views"].takes.keys()
    for flag in own | {"--device", "--seed", "--data-root", "--workers", "--limit", "--bad-images", "--pipeline"}:
        kinds = {flags.takes[flag] for flags in FLAGS.values() if flag in flags.takes}
        assert len(kinds) == 1, flag
