"""Flipped bits in files of tensors: what is loaded is what was written."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastmoco.backbones.read import LoadedBackbone, read_backbone
from fastmoco.backbones.write import export
from fastmoco.errors import CheckpointError
from fastmoco.evaluation.cache import FeatureCache
from fastmoco.model.architectures import family
from fastmoco.run.sealed import SEAL, sealed_bytes

FLIPS = 40


def flipped(data: bytes, seed: int) -> bytes:
    """One bit flipped: at every fourth seed in the first 2 kB, where the header is."""
    draw = random.Random(seed)
    bit = draw.randrange(8 * (min(2048, len(data)) if seed % 4 == 0 else len(data)))
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    module = family("resnet18").build("resnet18", width=0.125, stem="cifar")
    return {name: tensor for name, tensor in module.state_dict().items() if not name.startswith("fc.")}


def same(found: LoadedBackbone, expected: LoadedBackbone) -> bool:
    said = [(b.arch, b.stem, b.width, b.side, b.mean, b.std, b.data) for b in (found, expected)]
    states: list[dict[str, Tensor]] = [b.module.state_dict() for b in (found, expected)]
    return said[0] == said[1] and all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def assert_no_flip_is_loaded(path: Path) -> None:
    """Every flip is refused in one line that names the file, or has no effect."""
    whole, expected, refusals = path.read_bytes(), read_backbone(path), []
    for seed in range(FLIPS):
        path.write_bytes(flipped(whole, seed))
        try:
            assert same(read_backbone(path), expected), seed
        except CheckpointError as error:
            refusals.append(str(error))
    assert all(path.name in refusal and "\n" not in refusal for refusal in refusals), refusals
    assert len(refusals) > 0.7 * FLIPS


def test_a_flipped_bit_in_a_backbone_is_refused(tensors, tmp_path):
    """A flipped bit in a run's backbone is found when it is loaded."""
    (tmp_path / "backbone.safetensors").write_bytes(sealed_bytes(tensors))
    assert_no_flip_is_loaded(tmp_path / "backbone.safetensors")


def test_a_flipped_bit_in_an_exported_backbone_is_refused(tensors, tmp_path):
    """A flipped bit in an exported backbone, or in what it says about images, is found when it is loaded."""
    (tmp_path / "backbone.safetensors").write_bytes(sealed_bytes(tensors))
    done = export(read_backbone(tmp_path / "backbone.safetensors"), "safetensors", tmp_path / "exported.safetensors")
    assert_no_flip_is_loaded(done.path)


def test_a_swap_of_two_tensors_is_refused(tensors, tmp_path):
    """Two tensors under each other's names are refused."""
    path, one, two = tmp_path / "backbone.safetensors", b"layer1.0.bn1.weight", b"layer1.0.bn2.weight"
    path.write_bytes(sealed_bytes(tensors | {one.decode(): tensors[one.decode()] * 2}))
    path.write_bytes(path.read_bytes().replace(one, b"placeholder").replace(two, one).replace(b"placeholder", two))
    with pytest.raises(CheckpointError, match="is damaged: its SHA-256 is not the one recorded"):
        read_backbone(path)


def test_files_without_a_hash_load_as_before(tensors, tmp_path, recwarn):
    """A file of an earlier version or of another program has no hash, and loads as it is."""
    save_file(tensors, tmp_path / "older.safetensors")
    save_file(tensors, tmp_path / "other.safetensors", {"format": "pt", "sha1": "0" * 40})
    (tmp_path / "sealed.safetensors").write_bytes(sealed_bytes(tensors))
    found = [read_backbone(tmp_path / f"{name}.safetensors") for name in ("older", "other", "sealed")]
    assert same(found[0], found[2])
    assert same(found[1], found[2])
    assert not recwarn.list


def test_other_programs_load_a_sealed_file(tensors, tmp_path):
    """A sealed file is a plain safetensors file for everybody else."""
    (tmp_path / "backbone.safetensors").write_bytes(sealed_bytes(tensors))
    loaded = load_file(tmp_path / "backbone.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_a_flipped_bit_in_cached_features_is_a_miss(tmp_path):
    """A damaged entry of the feature cache counts as missing, and the features are extracted again."""
    cache, device = FeatureCache(tmp_path), torch.device("cpu")
    features = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    assert cache.store("a", features) is None
    path = tmp_path / "a.safetensors"
    whole, missed = path.read_bytes(), 0
    for seed in range(FLIPS):
        path.write_bytes(flipped(whole, seed))
        found = cache.load("a", 50, 8, device)
        assert found is None or torch.equal(found, features), seed
        missed += found is None
    assert missed > 0.7 * FLIPS
    assert cache.store("a", features) is None
    assert torch.equal(torch.as_tensor(cache.load("a", 50, 8, device)), features)


def test_cached_features_of_an_earlier_version_are_used(tmp_path):
    """Features that an earlier version cached need not be extracted again."""
    features = torch.randn(5, 8)
    save_file({"features": features}, tmp_path / "a.safetensors")
    assert torch.equal(torch.as_tensor(FeatureCache(tmp_path).load("a", 5, 8, torch.device("cpu"))), features)


def test_the_hash_covers_every_kind_of_tensor(tmp_path):
    """Scalars, empty tensors, integers, booleans, 16-bit floats and strided views are all hashed."""
    kinds: dict[str, Tensor] = {
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 4),
        "flags": torch.tensor([True, False]),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "view": torch.arange(12.0).view(3, 4).T,
        "norm": nn.BatchNorm1d(3).running_var,  # pyright: ignore[reportAssignmentType]
    }
    seals = {name: _seal({name: tensor}, tmp_path) for name, tensor in kinds.items()}
    assert len(set(seals.values())) == len(kinds)
    assert _seal({"view": kinds["view"] + 1}, tmp_path) != seals["view"]
    assert _seal({"other": kinds["view"]}, tmp_path) != seals["view"]


def _seal(tensors: dict[str, Tensor], folder: Path) -> str:
    (folder / "any.safetensors").write_bytes(sealed_bytes(tensors))
    with safe_open(folder / "any.safetensors", framework="pt") as file:
        return file.metadata()[SEAL]
