"""Everything that a run consists of at a step, to and from one checkpoint."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmoco.config import FREE_ON_RESUME, ResolvedConfig, differences
from fastmoco.device import DTYPES
from fastmoco.distributed.world import World
from fastmoco.errors import CheckpointError
from fastmoco.model.dictionaries import BatchKeys, Dictionary, MemoryBank
from fastmoco.model.encoder import build_encoder, feature_dim
from fastmoco.model.key_queue import KeyQueue
from fastmoco.model.moco import MoCo
from fastmoco.run import checkpoint, data_record
from fastmoco.run.checkpoint_meta import CheckpointMeta
from fastmoco.run.data_record import DataRecord
from fastmoco.run.divergence import not_finite
from fastmoco.run.environment import versions
from fastmoco.run.fingerprint import fingerprint
from fastmoco.run.snapshot import HostBuffers
from fastmoco.step.train_step import TrainStep
from pipelines.data.index import ImageIndex
from pipelines.errors import DataError


@dataclass
class TrainState:
    """Model, dictionary, optimiser and sums; `step` counts the completed steps.

    There is no state of a loader or random number generator: the data of a step follow from (seed, step).
    """

    config: ResolvedConfig
    model: MoCo
    dictionary: Dictionary
    train_step: TrainStep
    data_fingerprint: str
    images: ImageIndex
    data_record: DataRecord | None
    step: int = 0
    _digested: HostBuffers = field(default_factory=HostBuffers, init=False, repr=False)

    def tensors(self) -> dict[str, Tensor]:
        """Live tensors by the names they have in a checkpoint."""
        named = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        kept = self.dictionary.state_dict()
        named |= {f"{self.dictionary.NAME}/{name}": tensor for name, tensor in kept.items()}
        for group, tensors in self.train_step.state_dict().items():
            named |= {f"step/{group}/{name}": tensor for name, tensor in tensors.items()}
        return named

    def digests(self) -> dict[str, bytes]:
        """SHA-256 of each part of the state, which must be the same on all ranks."""
        found: dict[str, Any] = {}
        for name, tensor in self._digested.take(self.tensors()).wait().items():
            part = "/".join(name.split("/")[:2]).split(".")[0]
            data = tensor.contiguous().flatten().view(torch.uint8).numpy()
            found.setdefault(part, hashlib.sha256()).update(data)
        return {part: digest.digest() for part, digest in found.items()}

    def meta(self) -> dict[str, Any]:
        """What a checkpoint stores besides the tensors."""
        return {
            "step": self.step,
            "config": self.config.flat(),
            "data": self.data_fingerprint,
            "data_content": None if self.data_record is None else self.data_record.content,
            "versions": versions(),
        }

    def load(self, path: Path, total_steps: int) -> list[str]:
        """Load a checkpoint, and return what differs from it and was allowed to, one line each.

        Only rank 0 reads, and broadcasts its tensors, so that the others need no access to its disk. A checkpoint does
        not depend on the number of ranks that wrote it.

        Raises CheckpointError: damaged, after the last of `total_steps`, or of another architecture or configuration;
        DataError: of other images.
        """
        world = self.train_step.world
        self.step, notes = world.on_main(lambda: self._read(path, total_steps))
        with torch.no_grad():
            for tensor in self.tensors().values():
                world.broadcast(tensor)
        return notes

    def _read(self, path: Path, total_steps: int) -> tuple[int, list[str]]:
        """Reads the tensors and returns the step they belong to, and the differences that were allowed."""
        own = self.tensors()
        try:
            saved, said = checkpoint.load(path, own)
        except CheckpointError:
            self._check(path, CheckpointMeta.of(path, checkpoint.verify(path)))  # settings explain other tensors
            raise
        meta = CheckpointMeta.of(path, said)
        notes = self._check(path, meta)
        if meta.step > total_steps:
            raise CheckpointError(
                f"{path} is from step {meta.step:,}, and --epochs {self.config.optim.epochs} are {total_steps:,} "
                "steps: use more --epochs, or start again with --overwrite"
            )
        if bad := not_finite(saved):
            raise CheckpointError(
                f"{path} has values in {bad[0]} that are not finite: delete it to resume from the one before"
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(saved[name])
        return meta.step, notes

    def _check(self, path: Path, meta: CheckpointMeta) -> list[str]:
        """Differences that are allowed. Raises CheckpointError or DataError for any other."""
        changed = {
            name: f"{name} is {ours!r} and was {before!r}"
            for name, ours, before in differences(self.config, meta.config)
            if name not in FREE_ON_RESUME and name in meta.named  # else the field is newer than the checkpoint
        }
        allowed = {name.replace("-", "_") for name in self.config.run.allow_changed}
        if changed.keys() - allowed:
            names = " ".join(name.replace("_", "-") for name in changed)
            raise CheckpointError(
                f"{path} belongs to another run: {'; '.join(changed.values())}; resume with the same settings, or add "
                f"--allow-changed {names}"
            )
        return [*changed.values(), *self._changed_data(path, meta), *_changed_versions(meta.versions)]

    def _changed_data(self, path: Path, meta: CheckpointMeta) -> list[str]:
        """The difference of the images, if there is one and it is allowed. Raises DataError if it is not."""
        difference = note = ""
        if meta.data != self.data_fingerprint:
            difference = f"the images are {self.data_fingerprint} and were {meta.data}"
        elif self.data_record is not None:
            before = data_record.read(path.parent.parent / data_record.FILE_NAME)
            difference, note = data_record.difference(before, meta.data_content, self.data_record, self.images)
        if not difference:
            return [note] if note else []
        if not self.config.run.allow_changed_data:
            raise DataError(
                f"{path} was trained on other images: {difference}; restore the data set, start a new run with --out, "
                "or add --allow-changed-data"
            )
        return [difference]


def _changed_versions(before: dict[str, str | None]) -> list[str]:
    """The libraries of other versions than those that wrote a checkpoint, in one line if there are any."""
    changed = [
        f"{name} is {now} and was {before.get(name)}" for name, now in versions().items() if before.get(name) != now
    ]
    return [", ".join(changed)] if changed else []


def build_state(config: ResolvedConfig, world: World, images: ImageIndex) -> TrainState:
    """Step 0 of a run: weights, dictionary and training step, all from the seed, the same on every rank."""
    step = build_train_step(config, world, len(images))
    record = data_record.take(images) if world.is_main else None  # rank 0 reads and writes all checkpoints
    return TrainState(config, step.model, step.dictionary, step, fingerprint(images), images, record)


def build_train_step(config: ResolvedConfig, world: World, images: int) -> TrainStep[Dictionary]:
    """The training step at step 0 of a run on a number of images."""
    m, optim = config.model, config.optim
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        head = (feature_dim(m.arch, m.width),) if m.mlp else m.head or ()
        query = build_encoder(m.arch, width=m.width, stem=m.stem, head=head, dim=m.moco_dim, bn_splits=m.bn_splits)
    dictionary = _build_dictionary(config, world, images).to(world.device)
    model = MoCo(query, tied=dictionary.TIED, world=world).to(world.device)
    return TrainStep(
        model,
        dictionary,
        temperature=m.moco_t,
        symmetric=m.symmetric,
        sgd_momentum=optim.sgd_momentum,
        weight_decay=optim.wd,
        decay_norm_and_bias=not optim.exclude_bn_from_wd,
        dtype=DTYPES[config.run.amp],
        compile=config.run.compile,
        kernels=config.run.kernels,
        checkpoint_activations=config.run.checkpoint_activations,
        stem_format=config.run.stem_format,
        half_gradients=config.scale.grad_comm == "bf16",
        objective=m.objective,
        optimizer=optim.optimizer,
    )


def _build_dictionary(config: ResolvedConfig, world: World, images: int) -> KeyQueue | BatchKeys | MemoryBank:
    """The source of keys and negatives, on the CPU, so that its random initial values are the same on every device."""
    m, seed = config.model, config.run.seed
    if m.mechanism == "end-to-end":
        return BatchKeys()
    generator = torch.Generator().manual_seed(seed)
    if m.mechanism == "memory-bank":
        return MemoryBank(images, m.moco_dim, generator, negatives=m.moco_k, momentum=m.bank_m, seed=seed, world=world)
    return KeyQueue(m.moco_k, m.moco_dim, generator)
