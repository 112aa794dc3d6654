"""Settings compared by effect: which changes would give other weights than those of the run so far."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastmoco.config import COMPARED_BY_EFFECT, FREE_ON_RESUME, ResolvedConfig, RunConfig
from fastmoco.config.resume import absolute_data, rescaled
from fastmoco.config.resume_flags import replanned
from fastmoco.run.changes import changed_settings, moved, new_plan
from fastmoco.run.checkpoint_meta import CheckpointMeta
from fastmoco.run.fingerprint import identity, other_images
from fastmoco.run.resolve import resolve
from pipelines.data.index import ImageIndex

STEPS = 10  # an epoch
IMAGES = ImageIndex("x", np.full((320, 2), 32, np.int32), paths=tuple(f"/photos/{i}.png" for i in range(320)))

# Another value of every setting that the weights depend on: a new field belongs here, or into one of the two sets.
WEIGHTS: dict[str, Any] = {
    "crop_size": 24,
    "value_range": (0.0, 4095.0),
    "channels": 4,
    "order": "archives",
    "arch": "resnet34",
    "init_sha256": "0" * 64,
    "width": 0.5,
    "stem": "imagenet",
    "stem_init": "torch",
    "moco_dim": 64,
    "moco_k": 64,
    "moco_t": 0.2,
    "symmetric": True,
    "objective": None,  # there is only one
    "mechanism": "memory-bank",
    "bn_splits": 1,
    "optimizer": None,
    "batch_size": 16,
    "wd": 1e-3,
    "sgd_momentum": 0.8,
    "exclude_bn_from_wd": True,
    "seed": 9,
    "amp": "bf16",
    "grad_comm": "bf16",
}
FREE: dict[str, Any] = {
    "data_root": "/elsewhere",
    "workers": 7,
    "bad_images": "quarantine",
    "truncated": "accept",
    "train_folder": "photos",
    "test_folder": "held-out",
    "no_labels": True,
    "init": "/elsewhere.pth",
    "init_prefix": "teacher",
    "out": "/elsewhere",
    "resume_from": "/elsewhere",
    "allow_large_queue": True,
    "log_every": 3,
    "checkpoint_every": 5,
    "keep_checkpoints": 9,
    "tensorboard": False,
    "wandb": True,
    "mlflow": True,
    "knn_every": 4,
    "knn_k": 3,
    "knn_t": 0.3,
    "knn_on": "output",
    "deterministic": True,
    "compile": "default",
    "cuda_graph": "on",
    "kernels": "triton",
    "stem_format": "contiguous",
    "prefetch": "on",
    "check": "off",
    "tune": "off",
    "device": "cuda",
    "checkpoint_activations": True,
    "cpu_threads": 3,
    "gpus": 4,
    "dist_timeout": 30.0,
    "paranoid": True,
    "max_skipped_steps": 7,
    "lr_scaling": "none",
}


def config(**given: Any) -> ResolvedConfig:
    usual = {"data": "/photos", "batch_size": 32, "epochs": 20, "amp": "fp32", "pipeline": "resident"}
    return resolve(RunConfig().replace(**(usual | given)), IMAGES, torch.device("cpu"))[0]


def meta(before: ResolvedConfig, step: int = 5 * STEPS, without: str = "") -> CheckpointMeta:
    named = frozenset(before.flat().keys() - {without})
    return CheckpointMeta(step, before, named, "", None, None, {})


def changed(before: ResolvedConfig, step: int = 5 * STEPS, **values: Any) -> set[str]:
    return set(changed_settings(before.replace(**values), meta(before, step), STEPS))


# ---- every field -----------------------------------------------------------------------------------------------------


def test_every_setting_is_classified() -> None:
    """A new field is free, compared by effect, or one that the weights depend on."""
    permits = {"overwrite", "resume", "allow_changed", "allow_changed_data", "aug_plus"}
    assert FREE.keys() | permits == FREE_ON_RESUME
    assert not FREE_ON_RESUME & COMPARED_BY_EFFECT
    assert WEIGHTS.keys() == RunConfig().flat().keys() - FREE_ON_RESUME - COMPARED_BY_EFFECT


@pytest.mark.parametrize("name", [name for name, value in WEIGHTS.items() if value is not None])
def test_a_setting_that_the_weights_depend_on_is_named(name: str) -> None:
    before = config(seed=1)
    assert before.flat()[name] != WEIGHTS[name]
    needed = {"mechanism": {"moco_m": 0.0}, "init_sha256": {"init": "/weights.pth"}}
    needed |= {"channels": {"mean": (0.5,), "std": (0.5,)}}  # of RGB they are known
    needed = needed.get(name, {})
    after = before.replace(**{name: WEIGHTS[name]}, **needed)
    assert changed_settings(after, meta(before), STEPS)[name] == (
        f"{name} is {WEIGHTS[name]!r} and was {before.flat()[name]!r}"
    )
    assert name not in changed_settings(after, meta(before, without=name), STEPS)


@pytest.mark.parametrize("name", FREE)
def test_a_free_setting_may_change(name: str) -> None:
    before = config()
    needed = {"checkpoint_activations": {"compile": "off"}, "init_prefix": {"init": "/weights.pth"}}
    values = needed.get(name, {})
    assert changed(before.replace(**values), **{name: FREE[name]}) == set()


@pytest.mark.parametrize(
    ("given", "values"),
    [
        ({}, {"pipeline": "torch"}),
        ({}, {"pipeline": "dali"}),
        ({"pipeline": "torch"}, {"pipeline": "ffcv"}),
        ({"aug": "v2"}, {"aug_plus": True}),
        ({"aug": "v2"}, {"crop_scale_min": 0.2}),
        ({"mlp": True}, {"mlp": False, "head": (512,)}),
        ({"width": 0.25, "head": (128,)}, {"mlp": True, "head": None}),
        ({}, {"bank_m": 0.9}),
        ({}, {"order_buffer": 3}),
        ({"head": ()}, {"head": None}),
        ({}, {"epochs": 40}),
        ({}, {"epochs": 6}),
        ({"schedule": (8, 12)}, {"schedule": (8, 14)}),  # both later than the step
        ({"schedule": (8, 12)}, {"schedule": None, "cos": False}),
        ({"schedule": (2, 12)}, {"schedule": (4, 24), "epochs": 40}),  # as planned anew
        ({"warmup_epochs": 0, "schedule": (8,)}, {"final_lr": 0.0}),
        ({"moco_m_cos": True}, {"epochs": 40}),
        ({}, {"data": "/elsewhere", "limit": 320}),  # the images are compared
        ({"aug": "v2"}, {"hflip": 0.5, "vflip": 0.0, "color_jitter": 1.0, "grayscale": 0.2, "blur": 0.5}),
        ({"color_jitter": 0.0}, {"aug": "cifar"}),
        ({"aug": "v2"}, {"normalization": "imagenet"}),
        ({"aug": "v2"}, {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}),
    ],
)
def test_the_same_effect_in_other_words_is_no_change(given: dict[str, Any], values: dict[str, Any]) -> None:
    assert changed(config(**given), **values) == set()


@pytest.mark.parametrize(
    ("given", "values", "names"),
    [
        ({}, {"pipeline": "dataloader"}, {"pipeline"}),
        ({"pipeline": "dataloader"}, {"pipeline": "torch"}, {"pipeline"}),
        ({"aug": "v2"}, {"crop_scale_min": 0.1}, {"crop_scale_min"}),
        ({"aug": "v2"}, {"aug": "v1"}, {"aug"}),
        ({}, {"hflip": 0.0}, {"hflip"}),
        ({}, {"vflip": 0.5}, {"vflip"}),
        ({}, {"color_jitter": 0.5}, {"color_jitter"}),
        ({}, {"grayscale": 0.0, "blur": 0.1, "solarize": 0.1}, {"grayscale", "blur", "solarize"}),
        ({"aug": "cifar"}, {"normalization": "imagenet"}, {"normalization"}),
        ({}, {"mean": (0.5,), "std": (0.2,)}, {"mean", "std"}),
        ({"mlp": True}, {"mlp": False}, {"mlp"}),
        ({"head": (64,)}, {"head": (64, 64)}, {"head"}),
        ({"mechanism": "memory-bank"}, {"bank_m": 0.9}, {"bank_m"}),
        ({"order": "archives"}, {"order_buffer": 3}, {"order_buffer"}),
        ({}, {"lr": 0.5}, {"lr"}),
        ({}, {"lr": 0.5, "epochs": 40}, {"lr"}),
        ({"schedule": (2, 12)}, {"schedule": (6, 12)}, {"schedule"}),
        ({"schedule": (8, 12)}, {"schedule": None, "cos": True}, {"schedule", "cos"}),
        ({"cos": True}, {"final_lr": 0.001}, {"final_lr"}),
        ({"cos": True}, {"first_epoch": 1}, {"first_epoch"}),
        ({}, {"warmup_epochs": 3}, {"warmup_epochs"}),
        ({}, {"moco_m": 0.5}, {"moco_m"}),
        ({}, {"moco_m_cos": True}, {"moco_m_cos"}),
    ],
)
def test_another_effect_is_a_change(given: dict[str, Any], values: dict[str, Any], names: set[str]) -> None:
    assert changed(config(**given), **values) == names


def test_a_later_milestone_counts_once_it_is_reached() -> None:
    before = config(schedule=(8, 12))
    assert changed(before, 12 * STEPS, schedule=(8, 14)) == set()
    assert changed(before, 12 * STEPS + 1, schedule=(8, 14)) == {"schedule"}


def test_a_run_from_before_epochs_could_count_from_1_keeps_its_rates() -> None:
    before = config(cos=True)
    assert changed_settings(before, meta(before, without="first_epoch"), STEPS) == {}
    changes = changed_settings(before.replace(first_epoch=1), meta(before, without="first_epoch"), STEPS)
    assert changes == {"first_epoch": "first_epoch is 1 and was 0"}


# ---- more epochs -----------------------------------------------------------------------------------------------------


def plan(before: ResolvedConfig, step: int, **values: Any) -> list[str]:
    return new_plan(before.replace(**values), meta(before, step), STEPS)


def test_the_new_plan_is_said_in_one_line() -> None:
    cosine = config(lr=1.0, cos=True)
    assert plan(cosine, 50, lr=1.0) == []
    (line,) = plan(cosine, 100, epochs=40)
    assert line == "extended from 20 to 40 epochs: the learning rate at step 100 is 0.8536 (was 0.5)"
    (line,) = plan(cosine, 200, epochs=40)  # finished
    assert line == "extended from 20 to 40 epochs: the learning rate at step 200 is 0.5 (was 0.006156)"
    (line,) = plan(cosine, 50, epochs=10)
    assert line == "shortened from 20 to 10 epochs: the learning rate at step 50 is 0.5 (was 0.8536)"
    (line,) = plan(config(lr=1.0, cos=True, moco_m=0.9, moco_m_cos=True), 100, epochs=40)
    assert line.endswith("(was 0.5), the EMA momentum at step 100 is 0.9146 (was 0.95)")
    (line,) = plan(config(lr=1.0, schedule=(12,)), 50, epochs=40)
    assert line == "extended from 20 to 40 epochs: the learning rate at step 50 is 1, as planned before"
    (line,) = plan(config(lr=1.0, schedule=(12, 16)), 200, epochs=40, schedule=(24, 32))
    assert line == (
        "extended from 20 to 40 epochs: the learning rate at step 200 is 1 (was 0.01); it falls at epochs 24 32 "
        "(--schedule sets others)"
    )


def test_milestones_keep_their_fractions_unless_they_are_given() -> None:
    saved = RunConfig().replace(epochs=200, schedule=(120, 160))
    longer = saved.replace(epochs=400)
    assert replanned(longer, saved, ["--resume", "--epochs", "400"]).optim.schedule == (240, 320)
    assert replanned(longer, saved, ["--schedule", "120", "160"]).optim.schedule == (120, 160)
    assert replanned(longer, saved, ["--schedule=120"]).optim.schedule == (120, 160)
    assert replanned(saved, saved, []).optim.schedule == (120, 160)
    assert replanned(longer.replace(schedule=None, cos=True), saved.replace(schedule=None, cos=True), []).optim.cos
    assert rescaled((1, 2), 200, 3) == (1,)


# ---- images ----------------------------------------------------------------------------------------------------------


def test_paths_become_absolute_and_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_data(("cifar10",)) == ("cifar10",)
    assert absolute_data(("./cifar10",)) == (str(tmp_path / "cifar10"),)
    assert absolute_data(("a/../photos",)) == (str(tmp_path / "photos"),)
    assert absolute_data(("train-{000..003}.tar",)) == (str(tmp_path / "train-{000..003}.tar"),)
    assert absolute_data(("shapes", "photos")) == ("shapes", str(tmp_path / "photos"))
    assert absolute_data(("~/photos",)) == (str(Path.home() / "photos"),)
    assert absolute_data(("/a/b",)) == ("/a/b",)


def test_what_was_moved_is_said() -> None:
    before = config()
    assert moved(before, before) == []
    assert moved(before.replace(data="/scratch/photos", pipeline="torch"), before) == [
        "the same images, now in /scratch/photos (were in /photos)",
        "the same views, now by --pipeline torch (were by resident)",
    ]


def test_images_are_the_same_without_their_folders_and_labels() -> None:
    labelled = ImageIndex(
        "y", IMAGES.sizes, np.zeros(320, np.int64), ("a",), paths=tuple(f"/b/{i}.png" for i in range(320))
    )
    assert other_images(identity(labelled, None), identity(IMAGES, None)) == ("", "")
    renamed = ImageIndex("y", IMAGES.sizes, paths=tuple(f"/b/{i}.jpg" for i in range(320)))
    assert other_images(identity(renamed, None), identity(IMAGES, None)).error.startswith("the images have other file")
    fewer = ImageIndex("y", IMAGES.sizes[1:], paths=(IMAGES.paths or ())[1:])
    assert other_images(identity(fewer, None), identity(IMAGES, None)).error == "the images are 319 and were 320"
