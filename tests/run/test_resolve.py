"""What is filled in for images of every size, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmoco.config import RunConfig
from fastmoco.config.resume import absolute_data
from fastmoco.distributed.launch import RankInfo
from fastmoco.errors import ConfigError
from fastmoco.recipes import RECIPES, recipe
from fastmoco.run.resolve import resolve
from pipelines.data.index import ImageIndex

CPU = torch.device("cpu")
MAY_STAY_OPEN = {
    "cpu_threads",
    "limit",
    "train_folder",
    "test_folder",
    "value_range",
    "crop_scale_min",
    "head",
    "out",
    "checkpoint_every",
    "schedule",
    "gpus",
    "resume_from",
    "init",
    "init_prefix",
    "init_sha256",
} | {"hflip", "vflip", "color_jitter", "grayscale", "blur", "solarize", "mean", "std"}  # those of --aug


def images(count: int, height: int, width: int) -> ImageIndex:
    """An index of files that nobody will open."""
    return ImageIndex("x", np.tile(np.array([[height, width]], np.int32), (count, 1)), paths=("x.png",) * count)


def resolved(index: ImageIndex, **given) -> dict:
    return resolve(RunConfig().replace(data="./folder", **given), index, CPU)[0].flat()


def resolved_on_gpu(index: ImageIndex, **given) -> dict:
    """Resolve for a GPU, which need not be here if format, kernels and pipeline are given."""
    known = {"amp": "bf16", "kernels": "torch", "pipeline": "torch"} | given
    return resolve(RunConfig().replace(data="./folder", **known), index, torch.device("cuda"))[0].flat()


def test_small_images_get_the_cifar_recipe() -> None:
    found = resolved_on_gpu(images(50_000, 32, 32))
    wanted = {
        "arch": "resnet18",
        "stem": "cifar",
        "crop_size": 32,
        "aug": "cifar",
        "moco_k": 4096,
        "moco_m": 0.99,
        "moco_t": 0.1,
        "bn_splits": 8,
        "batch_size": 512,
        "lr": 0.06,
        "wd": 5e-4,
        "epochs": 200,
        "cos": True,
        "schedule": None,
    }
    assert {name: found[name] for name in wanted} == wanted


def test_photographs_get_the_imagenet_recipe() -> None:
    found = resolved_on_gpu(images(200_000, 375, 500))
    wanted = {
        "arch": "resnet50",
        "stem": "imagenet",
        "crop_size": 224,
        "aug": "v1",
        "moco_k": 65536,
        "moco_m": 0.999,
        "moco_t": 0.07,
        "bn_splits": 8,
        "batch_size": 256,
        "lr": 0.03,
        "wd": 1e-4,
        "epochs": 200,
        "cos": False,
        "schedule": (120, 160),
    }
    assert {name: found[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("count", "side", "wanted"),
    [
        (60, 300, {"epochs": 200, "batch_size": 56, "moco_k": 60, "lr": 0.03 * 56 / 64}),
        (10_000, 300, {"epochs": 20, "batch_size": 64, "moco_k": 4096, "lr": 0.03}),
        (1_281_167, 300, {"epochs": 1}),
        (50_000, 32, {"arch": "resnet18", "stem": "cifar", "crop_size": 32, "moco_t": 0.1, "epochs": 4}),
    ],
)
def test_a_cpu_gets_a_run_of_hours(count: int, side: int, wanted: dict[str, object]) -> None:
    found = resolved(images(count, side, side))
    if side > 112:
        wanted = {"arch": "resnet18", "stem": "imagenet", "crop_size": 112, "aug": "v1", "moco_m": 0.99} | wanted
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)
    assert (found["cos"], found["schedule"]) == (True, None)
    reasons = resolve(RunConfig().replace(data="./folder"), images(count, side, side), CPU)[1]
    assert reasons["batch_size"] == "the device is a CPU"
    assert reasons.get("epochs", "") == ("" if count == 60 else "the device is a CPU; 200 on a GPU")


def test_settings_that_are_given_win_on_a_cpu_too() -> None:
    given = {"arch": "resnet50", "crop_size": 224, "batch_size": 256, "epochs": 200, "schedule": (120, 160)}
    found = resolved(images(10_000, 300, 300), **given)
    assert {name: found[name] for name in given} == given


@pytest.mark.parametrize(
    ("height", "width", "side", "stem"),
    [
        (28, 28, 28, "cifar"),  # MNIST
        (32, 32, 32, "cifar"),
        (64, 64, 64, "cifar"),  # Tiny ImageNet
        (70, 65, 64, "cifar"),
        (96, 96, 96, "imagenet"),  # STL-10
        (99, 130, 96, "imagenet"),
        (224, 224, 224, "imagenet"),
        (1, 4, 8, "cifar"),
        (3000, 4000, 224, "imagenet"),
    ],
)
def test_the_view_is_as_large_as_the_images_allow(height: int, width: int, side: int, stem: str) -> None:
    found = resolved_on_gpu(images(1000, height, width))
    assert (found["crop_size"], found["stem"]) == (side, stem)


def test_the_median_decides_among_mixed_sizes() -> None:
    sizes = np.array([[32, 32]] * 3 + [[500, 400]] * 8 + [[20, 900]], dtype=np.int32)
    assert resolved_on_gpu(ImageIndex("x", sizes, paths=("x.png",) * 12))["crop_size"] == 224


@given(st.integers(2, 3000), st.integers(1, 700), st.integers(1, 700))
def test_any_data_set_resolves_to_something_that_fits(count: int, height: int, width: int) -> None:
    found = resolved(images(count, height, width))
    assert {name for name, value in found.items() if value is None} <= MAY_STAY_OPEN
    assert 2 <= found["batch_size"] <= count
    assert found["batch_size"] % found["bn_splits"] == 0
    assert found["batch_size"] // found["bn_splits"] >= 2
    assert found["moco_k"] <= count
    assert "auto" not in [found[name] for name in ("stem", "amp", "compile", "pipeline", "kernels", "cuda_graph")]


@given(st.sampled_from(sorted(RECIPES)), st.integers(16, 2000), st.sampled_from([28, 32, 96, 300]))
def test_what_is_resolved_stays_as_it_is(name: str, count: int, side: int) -> None:
    """A resumed run reads its own config.json and must find the same values in it."""
    once, _ = resolve(recipe(name).replace(moco_k=None, batch_size=None), images(count, side, side), CPU)
    again, _ = resolve(RunConfig.from_json(once.to_json()), images(count, side, side), CPU)
    assert again == once


EXPLICIT = {
    "arch": "resnet34",
    "width": 0.5,
    "stem": "imagenet",
    "crop_size": 40,
    "aug": "v2",
    "moco_k": 100,
    "moco_m": 0.5,
    "moco_t": 0.3,
    "bn_splits": 4,
    "batch_size": 20,
    "lr": 0.7,
    "wd": 0.0,
    "epochs": 7,
    "schedule": (3, 5),
    "amp": "fp32",
    "compile": "off",
    "kernels": "torch",
    "cuda_graph": "off",
    "pipeline": "torch",
    "workers": 0,
    "knn_every": 0,
}


@pytest.mark.parametrize("side", [32, 300])
def test_explicit_values_win(side: int) -> None:
    found = resolved(images(200, side, side), **EXPLICIT)
    assert {name: found[name] for name in EXPLICIT} == EXPLICIT
    assert not found["cos"]


@pytest.mark.parametrize("name", sorted(EXPLICIT))
def test_each_explicit_value_wins_alone(name: str) -> None:
    assert resolved(images(2000, 32, 32), **{name: EXPLICIT[name]})[name] == EXPLICIT[name]


def test_aug_plus_is_v2() -> None:
    assert resolved(images(100, 32, 32), aug_plus=True)["aug"] == "v2"


def test_the_learning_rate_follows_the_batch() -> None:
    index = images(5000, 32, 32)
    assert resolved(index, batch_size=128)["lr"] == pytest.approx(0.06 / 4)
    assert resolved(index, batch_size=128, lr=0.5)["lr"] == 0.5
    assert resolved(index, batch_size=512)["lr"] == 0.06
    config, reasons = resolve(RunConfig().replace(data="./x", batch_size=1024), index, CPU)
    assert config.optim.lr == pytest.approx(0.12)
    assert reasons["lr"] == "0.06 for a batch of 512, scaled to 1024"


@pytest.mark.parametrize(
    ("epochs", "schedule"), [(200, (120, 160)), (100, (60, 80)), (10, (6, 8)), (3, (2,)), (1, (1,)), (800, (480, 640))]
)
def test_the_schedule_keeps_its_fractions(epochs: int, schedule: tuple[int, ...]) -> None:
    assert resolved_on_gpu(images(1000, 300, 300), epochs=epochs)["schedule"] == schedule


def test_cosine_replaces_the_schedule() -> None:
    found = resolved_on_gpu(images(1000, 300, 300), cos=True)
    assert found["cos"]
    assert found["schedule"] is None


@pytest.mark.parametrize(
    ("batch", "splits"), [(2, 1), (16, 1), (32, 2), (34, 2), (63, 1), (66, 2), (64, 4), (120, 4), (128, 8), (200, 8)]
)
def test_the_splits_fit_the_batch_and_leave_16_images_each(batch: int, splits: int) -> None:
    assert resolved(images(200, 32, 32), batch_size=batch)["bn_splits"] == splits


def test_a_small_data_set_gets_a_small_batch_and_queue() -> None:
    found = resolved(images(21, 32, 32))
    assert (found["batch_size"], found["moco_k"]) == (16, 21)
    found = resolved(images(5, 32, 32))
    assert (found["batch_size"], found["moco_k"], found["bn_splits"]) == (5, 5, 1)


def test_a_queue_larger_than_the_data_set_is_refused_unless_forced() -> None:
    with pytest.raises(
        ConfigError, match=r"--moco-k 101 is larger than the 100 images.*--moco-k 100 or less, or --allow"
    ):
        resolved(images(100, 32, 32), moco_k=101)
    assert resolved(images(100, 32, 32), moco_k=100)["moco_k"] == 100
    assert resolved(images(100, 32, 32), moco_k=500, allow_large_queue=True)["moco_k"] == 500


def test_a_batch_larger_than_the_data_set_is_refused() -> None:
    with pytest.raises(ConfigError, match="--batch-size 101 is larger than the 100 images: use 100 or less"):
        resolved(images(100, 32, 32), batch_size=101)
    assert resolved(images(100, 32, 32), batch_size=100)["batch_size"] == 100


def test_one_image_is_no_data_set() -> None:
    with pytest.raises(ConfigError, match="found 1 image: a batch needs 2 or more"):
        resolved(images(1, 32, 32))


def test_every_choice_of_consequence_has_a_reason() -> None:
    _, reasons = resolve(RunConfig().replace(data="./x"), images(1000, 32, 32), CPU)
    assert reasons["crop_size"] == "the images are 32×32"
    assert reasons["arch"] == "as in the recipe cifar10-demo"
    assert reasons["stem"] == "crops of 32 pixels"
    assert "1,000 decoded images take 3 MiB" in reasons["pipeline"]


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_no_setting_of_a_recipe_is_replaced(name: str) -> None:
    config = recipe(name)
    assert RunConfig.from_json(config.to_json()) == config
    found, _ = resolve(config, images(70_000, 32, 32), CPU)
    for field, value in (config.flat() | {"data": absolute_data(config.data.data)}).items():
        if value is not None and value != "auto":
            assert found.flat()[field] == value, field


def test_an_unknown_recipe_comes_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown recipe 'cifar-demo'; did you mean 'cifar10-demo'"):
        recipe("cifar-demo")


@pytest.mark.parametrize(
    ("device", "given", "kernels", "compile", "cuda_graph"),
    [
        ("cpu", {}, "torch", "off", "off"),
        ("cpu", {"epochs": 100_000}, "torch", "off", "off"),
        ("cuda", {}, "triton", "off", "on"),
        ("cuda", {"epochs": 100_000}, "triton", "default", "on"),
        ("cuda", {"epochs": 100_000, "compile": "off"}, "triton", "off", "on"),
        ("cuda", {"epochs": 100_000, "checkpoint_activations": True}, "triton", "off", "on"),
        ("cuda", {"kernels": "torch"}, "torch", "default", "on"),
        ("cuda", {"kernels": "torch", "checkpoint_activations": True}, "torch", "off", "on"),
        ("cuda", {"compile": "max-autotune", "cuda_graph": "off"}, "triton", "max-autotune", "off"),
    ],
)
def test_how_a_step_is_computed_follows_from_the_device(
    device: str, given: dict, kernels: str, compile: str, cuda_graph: str, require_backend: Callable[[str], None]
) -> None:
    require_backend("triton")
    config = RunConfig().replace(data="./x", amp="bf16", pipeline="torch", **given)
    found = resolve(config, images(1000, 32, 32), torch.device(device))[0].run
    assert (found.kernels, found.compile, found.cuda_graph) == (kernels, compile, cuda_graph)


def test_long_runs_on_a_gpu_are_compiled_where_that_is_possible(
    monkeypatch: pytest.MonkeyPatch, require_backend: Callable[[str], None]
) -> None:
    require_backend("triton")
    config = RunConfig().replace(data="./x", amp="bf16", pipeline="torch", epochs=100_000, batch_size=100)
    device, found = torch.device("cuda"), images(1000, 32, 32)
    assert resolve(config, found, device)[0].run.compile == "default"
    assert resolve(config.replace(epochs=9_999), found, device)[0].run.compile == "off"
    assert resolve(config, found, device, RankInfo(size=2, local_size=2))[0].run.compile == "off"
    monkeypatch.setattr("shutil.which", lambda name: None)
    resolved, reasons = resolve(config, found, device)
    assert (resolved.run.compile, resolved.run.kernels) == ("off", "triton")
    assert reasons["compile"] == "without torch.compile: no C compiler is installed"


def test_settings_for_a_gpu_are_refused_without_one() -> None:
    with pytest.raises(ConfigError, match="--cuda-graph on needs a GPU, and the device is cpu: use --cuda-graph off"):
        resolved(images(100, 32, 32), cuda_graph="on")
    with pytest.raises(ConfigError, match="--checkpoint-activations needs --compile off, and it is default"):
        RunConfig().replace(checkpoint_activations=True, compile="default")


# ---- several devices -------------------------------------------------------------------------------------------------


def resolved_for(devices: int, count: int = 50_000, **given) -> dict:
    rank_info = RankInfo(size=devices, local_size=min(devices, 8))
    known = {"amp": "bf16", "kernels": "torch", "pipeline": "torch"} | given
    config = RunConfig().replace(data="./folder", **known)
    return resolve(config, images(count, 32, 32), torch.device("cuda"), rank_info)[0].flat()


@pytest.mark.parametrize(
    ("devices", "batch", "splits"), [(1, 512, 8), (2, 512, 8), (8, 512, 8), (3, 510, 6), (16, 512, 16), (64, 512, 8)]
)
def test_what_was_left_open_can_be_shared_out(devices: int, batch: int, splits: int) -> None:
    found = resolved_for(devices)
    assert (found["batch_size"], found["bn_splits"]) == (batch, splits)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"batch_size": 100}, ["--batch-size 100", "8 devices", "--batch-size 96"]),
        ({"batch_size": 64, "bn_splits": 3}, ["--batch-size 64", "3 equal groups"]),
        ({"batch_size": 72, "bn_splits": 6}, ["--bn-splits 6", "8 devices", "--bn-splits 8"]),
    ],
)
def test_what_cannot_be_shared_out_is_refused(given: dict[str, int], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        resolved_for(8, **given)
    assert all(word in str(error.value) for word in words), error.value


def test_the_learning_rate_follows_the_whole_batch_or_not_at_all() -> None:
    assert resolved_for(2, batch_size=256)["lr"] == resolved_for(1, batch_size=256)["lr"] == 0.03
    assert resolved_for(2, batch_size=256, lr_scaling="none")["lr"] == 0.06
    assert resolved_for(2, batch_size=256, lr=0.5)["lr"] == 0.5


def test_ranks_of_a_machine_share_its_cores() -> None:
    cores = resolved_for(1)["workers"]
    assert resolved_for(8)["workers"] == max(1, cores // 8)
    assert resolved_for(8, workers=5)["workers"] == 5


def test_a_recipe_adapts_to_fewer_images_and_a_flag_does_not() -> None:
    demo = recipe("cifar10-demo").replace(data="./folder")
    fields = frozenset(demo.flat())
    config, reasons = resolve(demo, images(300, 32, 32), CPU, from_recipe=fields)
    found = config.flat()
    assert (found["batch_size"], found["moco_k"], found["lr"]) == (296, 300, (demo.optim.lr or 0) * 296 / 512)
    assert reasons["moco_k"] == "the recipe's 4,096 are more than the 300 images"
    assert reasons["batch_size"] == "the recipe's 512 are more than the 300 images"
    for flag in ("moco_k", "batch_size"):
        with pytest.raises(ConfigError, match=f"--{flag.replace('_', '-')} .* is larger than the 300 images"):
            resolve(demo, images(300, 32, 32), CPU, from_recipe=fields - {flag})
    config, reasons = resolve(demo, images(50_000, 32, 32), CPU, from_recipe=fields)
    assert (config.optim.batch_size, config.model.moco_k) == (512, 4096)
    assert not reasons.keys() & {"moco_k", "batch_size"}


def test_small_crops_of_photographs_keep_the_mean_and_std_of_imagenet() -> None:
    config, reasons = resolve(RunConfig().replace(data="./folder", crop_size=64), images(500, 300, 400), CPU)
    assert (config.augment.aug, config.augment.normalization, config.model.stem) == ("cifar", "imagenet", "cifar")
    assert reasons["crop_size"] == (
        "crops up to 64 pixels: as in the recipe cifar10-demo, but with ImageNet's mean and std, since the images are "
        "larger"
    )
    for flags, side in (({}, 64), ({"crop_size": 32}, 48), ({"crop_size": 64, "aug": "cifar"}, 300)):
        assert resolved(images(500, side, side), **flags)["normalization"] == "aug"
    own = resolved(images(500, 300, 400), crop_size=64, mean=(0.5,), std=(0.5,))
    assert (own["normalization"], own["mean"]) == ("aug", (0.5,))
