"""A run with --init begins from the weights of the file: features, statistics, both encoders, and a head that fits."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from fastmoco import load_backbone
from fastmoco.backbones.read import read_init
from fastmoco.cli import main
from fastmoco.commands.train_arguments import parse_train
from fastmoco.config import RunConfig
from fastmoco.errors import ConfigError, ExitCode
from fastmoco.model.encoder import Encoder, build_encoder
from fastmoco.run.start import run_context
from fastmoco.run.state import TrainState, build_state
from tests.ranks import start

ONE = ["--limit", "16", "--batch-size", "8", "--moco-k", "8", "--epochs", "1", "--crop-size", "16", "--amp", "fp32"]
ONE += ["--knn-every", "0", "--no-tensorboard", "--device", "cpu", "--pipeline", "resident", "--workers", "1"]
ONE += ["--aug", "v2", "--moco-dim", "16", "--cpu-threads", "1", "--tune", "off", "--checkpoint-every", "1"]


def encoder(seed: int, stem: str = "cifar", head: tuple[int, ...] = (64,)) -> Encoder:
    """Of width 1/8, with random statistics of batch norm."""
    torch.manual_seed(seed)
    made = build_encoder("resnet18", width=0.125, stem=stem, head=head, dim=16)
    for name, tensor in made.state_dict().items():
        if "running" in name:
            tensor.uniform_(0.5, 1.5)
    return made


def moco_file(path: Path, query: Encoder, key: Encoder) -> Path:
    """As main_moco.py writes it: one layer of the head is fc, and two are fc.0 and fc.2."""
    state: dict[str, Tensor] = {}
    for which, made in (("encoder_q", query), ("encoder_k", key)):
        one_layer = len(made.head) == 1
        for name, tensor in made.state_dict().items():
            bare = name.replace("head.0." if one_layer else "head.", "fc.").replace("backbone.", "")
            state[f"module.{which}.{bare}"] = tensor
    torch.save({"epoch": 200, "arch": "resnet18", "state_dict": state}, path)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return moco_file(tmp_path_factory.mktemp("weights") / "moco.pth.tar", encoder(1), encoder(2))


@contextmanager
def state_of(*flags: str) -> Iterator[TrainState]:
    """Before the first step."""
    with run_context(parse_train([*ONE, *flags]), Console(quiet=True), read_init) as context:
        yield build_state(context.config, context.world, context.dataset.train, context.init)


@torch.no_grad()
def features(module: torch.nn.Module) -> Tensor:
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    return module.eval()(images)


def assert_head(state: TrainState, expected: Encoder | None) -> None:
    """That of `expected` in both encoders, or a random one, which is the same in both."""
    query, key = (dict(made.head.state_dict()) for made in (state.model.query, state.model.key))
    other = query if expected is None else dict(expected.head.state_dict())
    assert query.keys() == key.keys() == other.keys()
    assert all(torch.equal(query[name], key[name]) and torch.equal(query[name], other[name]) for name in query)


@pytest.mark.parametrize("mechanism", ["queue", "end-to-end", "memory-bank"])
def test_both_encoders_begin_as_the_query_encoder_of_the_file(tmp_path: Path, file: Path, mechanism: str) -> None:
    module, _ = load_backbone(file)
    flags = ["--mlp", "--bn-splits", "2", "--mechanism", mechanism, "--init", str(file)]
    with state_of(*flags, "--out", str(tmp_path / "run")) as state:
        model = state.config.model
        assert (model.arch, model.stem, model.width) == ("resnet18", "cifar", 0.125)
        expected = dict(module.state_dict())
        for made in (state.model.query, state.model.key):
            actual = made.backbone.state_dict()
            assert actual.keys() == expected.keys()
            assert all(torch.equal(actual[name], expected[name]) for name in expected)
        torch.testing.assert_close(features(state.model.query.backbone), features(module), rtol=1e-5, atol=1e-5)
        assert_head(state, encoder(1))


@pytest.mark.parametrize(("head", "flags"), [((), []), ((24,), ["--head", "24"]), ((64,), ["--mlp"])])
def test_a_head_that_fits_is_taken(tmp_path: Path, head: tuple[int, ...], flags: list[str]) -> None:
    made = encoder(1, head=head)
    file = moco_file(tmp_path / "moco.pth.tar", made, encoder(2, head=head))
    with state_of(*flags, "--init", str(file), "--out", str(tmp_path / "run")) as state:
        assert_head(state, made)


@pytest.mark.parametrize("flags", [[], ["--head", "63"], ["--mlp", "--moco-dim", "8"], ["--head", "64", "64"]])
def test_a_head_that_does_not_fit_stays_random(tmp_path: Path, file: Path, flags: list[str]) -> None:
    with state_of(*flags, "--init", str(file), "--out", str(tmp_path / "a")) as state:
        assert_head(state, None)
        loaded = state.model.query.head.state_dict()
    with state_of(*flags, "--arch", "resnet18", "--width", "0.125", "--out", str(tmp_path / "b")) as state:
        assert_head(state, None)
        random = state.model.query.head.state_dict()
    assert all(torch.equal(loaded[name], random[name]) for name in random)


def test_a_classifier_is_no_head(tmp_path: Path) -> None:
    made = encoder(1, head=())
    state = {n.replace("backbone.", "").replace("head.0", "fc"): t for n, t in made.state_dict().items()}
    torch.save(state, tmp_path / "classifier.pth")
    with state_of("--init", str(tmp_path / "classifier.pth"), "--out", str(tmp_path / "run")) as run:
        assert not torch.equal(run.model.query.head.state_dict()["0.weight"], made.head.state_dict()["0.weight"])


def test_the_other_encoder_by_its_prefix(tmp_path: Path, file: Path) -> None:
    flags = ["--mlp", "--init", str(file), "--init-prefix", "encoder_k"]
    with state_of(*flags, "--out", str(tmp_path / "run")) as state:
        assert torch.equal(state.model.query.backbone.conv1.weight, encoder(2).backbone.conv1.weight)
        assert_head(state, encoder(2))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--arch", "resnet50"], "--arch is resnet50, and --init {} has the arch resnet18: use --arch resnet18, or"),
        (["--stem", "imagenet"], "--stem is imagenet, and --init {} has the stem cifar: use --stem cifar, or another"),
        (["--width", "2"], "--width is 2, and --init {} has the width 0.125: use --width 0.125, or another file"),
        (["--init-sha256", "0" * 64], "and --init-sha256 is 000000000000…: use the file it was recorded for"),
        (["--init-prefix", "teacher"], "has no backbone below 'teacher', but below state_dict.module.encoder_q and"),
        (["--init", "absent.pth"], "there is no file or folder absent.pth"),
        (["--init", ""], "--init is '', expected a path or a name"),
        (["--init-sha256", "abc"], "--init-sha256 is 'abc', expected 64 hex digits"),
    ],
)
def test_what_contradicts_is_one_line_and_no_folder(
    tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    code = main(["train", *ONE, "--init", str(file), *flags, "--out", str(tmp_path / "run")])
    assert code in (ExitCode.CONFIG, ExitCode.CHECKPOINT)
    (line,) = capsys.readouterr().err.splitlines()
    assert said.format(file) in line
    assert not (tmp_path / "run").exists()


def test_options_of_init_need_it() -> None:
    for name, value in (("init_prefix", "encoder_k"), ("init_sha256", "0" * 64)):
        with pytest.raises(ConfigError, match=r"about the weights of --init, which is not given"):
            RunConfig().replace(**{name: value})


def test_a_run_says_what_it_began_from_and_goes_on_without_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = moco_file(tmp_path / "moco.pth.tar", encoder(1), encoder(2))
    command = ["train", *ONE, "--init", str(file), "--knn-every", "1", "--out", str(tmp_path / "run")]
    assert main(command) == ExitCode.DONE
    output = " ".join(capsys.readouterr().out.split())
    assert f"init resnet18 from {file} (state_dict.module.encoder_q, not state_dict.module.encoder_k), 120" in output
    assert "tensors; head fresh" in output
    assert "before training: kNN" in output
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())["model"]
    assert recorded["init_sha256"] == read_init(str(file)).sha256
    other = moco_file(tmp_path / "other.pth.tar", encoder(3), encoder(4))
    moved = file.rename(tmp_path / "moved.pth.tar")
    for init in ([], ["--init", str(file)], ["--init", str(moved)]):
        assert main(["train", *ONE, *init, "--resume", "--out", str(tmp_path / "run")]) == ExitCode.DONE
        assert "is not read again" in capsys.readouterr().out
    assert main(["train", *ONE, "--init", str(other), "--resume", "--out", str(tmp_path / "run")]) == ExitCode.CONFIG
    assert "is not what the run in" in capsys.readouterr().err


def test_a_run_begins_from_another_run(tmp_path: Path) -> None:
    flags = ["--mlp", "--arch", "resnet18", "--width", "0.125", "--lr", "0.3"]
    assert main(["train", *ONE, *flags, "--out", str(tmp_path / "first")]) == ExitCode.DONE
    module, _ = load_backbone(tmp_path / "first")
    with state_of("--mlp", "--init", str(tmp_path / "first"), "--out", str(tmp_path / "second")) as state:
        torch.testing.assert_close(features(state.model.query.backbone), features(module), rtol=1e-5, atol=1e-5)
        head = read_init(str(tmp_path / "first")).head
        assert all(torch.equal(state.model.query.head.state_dict()[name], head[name]) for name in head)
        assert head


def test_a_sweep_begins_every_run_from_the_weights(tmp_path: Path, file: Path) -> None:
    command = ["sweep", "shapes", "--vary", "moco-t=0.1,0.2", *ONE, "--init", str(file), "--width", "0.125"]
    command += ["--out", str(tmp_path / "s")]
    assert main(command) == ExitCode.DONE
    records = [json.loads(path.read_text())["model"] for path in (tmp_path / "s").glob("*/config.json")]
    assert [record["init_sha256"] for record in records] == [read_init(str(file)).sha256] * 2
    assert main(command) == ExitCode.DONE
    copy = tmp_path / "copy.pth.tar"
    copy.write_bytes(file.read_bytes())
    assert main([*command, "--init", str(copy)]) == ExitCode.CONFIG


def first_tensors(file: str, out: str) -> dict[str, list[float]]:
    """The first value of every tensor of both encoders on this rank. The file is there for rank 0 only."""
    init = file if os.environ["RANK"] == "0" else file + ".absent"
    with state_of("--mlp", "--bn-splits", "2", "--init", init, "--out", out) as state:
        return {name: tensor.flatten()[:2].tolist() for name, tensor in state.model.state_dict().items()}


@pytest.mark.slow
def test_all_ranks_have_the_weights_that_rank_0_has_read(tmp_path: Path, file: Path) -> None:
    one, two = start(2, first_tensors, str(file), str(tmp_path / "run"))
    assert isinstance(one, dict), one
    assert one == two
    expected = {name: tensor.flatten()[:2].tolist() for name, tensor in encoder(1).state_dict().items()}
    assert {name: one[f"query.{name}"] for name in expected} == expected
