"""The configuration: what is refused, what the message says, and that JSON gives back the same tree."""

from __future__ import annotations

import dataclasses
import json

import pytest
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmoco.config import FREE_ON_RESUME, RunConfig, differences
from fastmoco.errors import ConfigError


def test_json_gives_back_the_same_tree() -> None:
    config = RunConfig().replace(
        data="/photos/é\udcff", lr=0.06, wd=0, head=(100, 50), schedule=(120, 160), epochs=200, symmetric=True, seed=7
    )
    again = RunConfig.from_json(config.to_json())
    assert again == config
    assert differences(config, again) == []
    assert again.model.head == (100, 50)


def test_field_names_are_unique_so_that_flags_need_no_prefix() -> None:
    groups = [getattr(RunConfig(), group.name) for group in dataclasses.fields(RunConfig)]
    assert len(RunConfig().flat()) == sum(len(dataclasses.fields(group)) for group in groups)
    assert RunConfig().flat().keys() >= FREE_ON_RESUME


def test_flags_are_those_of_the_authors_code() -> None:
    flags = (
        "--arch resnet50 --lr 0.015 --batch-size 128 --mlp --moco-t 0.2 --moco-k 65536 --moco-m 0.999 --aug-plus --cos"
    )
    config = tyro.cli(RunConfig, args=flags.split(), config=(tyro.conf.OmitArgPrefixes,))
    assert config == RunConfig().replace(
        arch="resnet50",
        lr=0.015,
        batch_size=128,
        mlp=True,
        moco_t=0.2,
        moco_k=65536,
        moco_m=0.999,
        aug_plus=True,
        cos=True,
    )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lr": -0.1}, ["--lr is -0.1", "above 0", "0.03"]),
        ({"lr": float("nan")}, ["--lr is nan", "finite"]),
        ({"lr": "0.1"}, ["--lr is '0.1'", "number"]),
        ({"epochs": 1.5}, ["--epochs is 1.5", "whole number"]),
        ({"epochs": True}, ["--epochs is True", "whole number"]),
        ({"moco_k": 0}, ["--moco-k is 0", "65536"]),
        ({"moco_m": 1.01}, ["--moco-m", "from 0 to 1"]),
        ({"moco_t": 0.0}, ["--moco-t", "0.07"]),
        ({"arch": "resnet5O"}, ["'resnet5O'", "did you mean resnet50?"]),
        ({"pipeline": "residant"}, ["did you mean resident?"]),
        (
            {"batch_size": 100, "bn_splits": 8},
            ["--batch-size 100", "8 equal groups", "--batch-size 96", "--bn-splits 1"],
        ),
        ({"batch_size": 8, "bn_splits": 8}, ["--batch-size 16"]),
        ({"head": (0,)}, ["--head"]),
        ({"mlp": True, "head": (2048,)}, ["--mlp", "--head"]),
        ({"cos": True, "schedule": (120, 160)}, ["--cos", "--schedule"]),
        ({"schedule": (160, 120)}, ["--schedule", "rising"]),
        ({"lr": 0.1, "final_lr": 0.2}, ["--final-lr is 0.2", "--lr, is 0.1"]),
        ({"schedule": (3,), "final_lr": 0.2}, ["--final-lr is 0.2", "--schedule", "--cos"]),
        ({"epochs": 5, "warmup_epochs": 5}, ["--warmup-epochs is 5", "fewer than the 5"]),
        ({"aug_plus": True, "aug": "v1"}, ["--aug-plus", "v1"]),
        ({"resume": True, "overwrite": True}, ["--resume", "--overwrite"]),
        ({"seed": 2**32}, ["--seed", "4294967295"]),
        ({"data": "a\0b"}, ["--data", "'a\\x00b'"]),
        ({"moco_kk": 1}, ["'moco_kk'", "'moco_k'"]),
    ],
)
def test_a_value_that_cannot_be_trained_with_is_refused_in_one_line(values: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig().replace(**values)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"optim": {"lrr": 1}}', ["field 'lrr'", "'lr'"]),
        ('{"optin": {}}', ["group 'optin'", "'optim'"]),
        ('{"optim": {"lr": 1, "lr": 2}}', ["twice"]),
        ('{"optim": {"lr": NaN}}', ["NaN", "finite"]),
        ('{"optim": {"lr": 1e999}}', ["--lr is inf"]),
        ('{"optim": {"lr": "0.1"}}', ["--lr is '0.1'"]),
        ('{"optim": [1]}', ["group 'optim'", "object"]),
        ('{"model": {"head": [1, "x"]}}', ["--head", "whole numbers"]),
        ("[]", ["object"]),
        ("", ["JSON"]),
        ("[" * 100_000, ["JSON"]),
        ('{"run": {"seed": ' + "9" * 4000 + "}}", ["--seed", "4294967295"]),
        ('{"run": {"seed": ' + "9" * 5000 + "}}", ["JSON"]),
    ],
)
def test_a_damaged_or_hostile_file_is_refused_in_one_line(text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_json(text)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300
    assert all(word in message for word in words), message


@settings(max_examples=40)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    )
)
def test_any_json_is_a_configuration_or_a_configuration_error(tree: object) -> None:
    for candidate in (tree, {"optim": tree}, {"optim": {"lr": tree}}, {"model": {"head": tree}}):
        try:
            config = RunConfig.from_json(json.dumps(candidate))
        except ConfigError:
            continue
        assert RunConfig.from_json(config.to_json()) == config


def test_differences_name_the_field_and_both_values() -> None:
    a = RunConfig().replace(moco_k=4096, arch="resnet18")
    b = RunConfig().replace(moco_k=65536, arch="resnet18", lr=0.06)
    assert differences(a, b) == [("moco_k", 4096, 65536), ("lr", None, 0.06)]
