"""Everything that a run consists of at a step, to and from one checkpoint."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmoco.config import ResolvedConfig
from fastmoco.device import DTYPES
from fastmoco.distributed.world import World
from fastmoco.errors import CheckpointError
from fastmoco.model.dictionaries import BatchKeys, Dictionary, MemoryBank
from fastmoco.model.encoder import build_encoder, feature_dim, reset_first_convolution
from fastmoco.model.init_weights import InitWeights, start_from
from fastmoco.model.key_queue import KeyQueue
from fastmoco.model.moco import MoCo
from fastmoco.run import checkpoint, data_record
from fastmoco.run.changes import changed_settings, moved, new_plan
from fastmoco.run.checkpoint_meta import CheckpointMeta
from fastmoco.run.data_record import DataRecord, Difference
from fastmoco.run.divergence import not_finite
from fastmoco.run.environment import versions
from fastmoco.run.fingerprint import fingerprint, identity, other_images
from fastmoco.run.snapshot import HostBuffers
from fastmoco.step.train_step import TrainStep
from pipelines.data.index import ImageIndex
from pipelines.errors import DataError

_SCALER = {"step/scaler/scale": ((), torch.float32), "step/scaler/good_steps": ((), torch.int64)}  # of float16 only


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

    @property
    def chance_loss(self) -> float:
        """The loss if every candidate were as likely."""
        model = self.config.model
        candidates = model.moco_k + (model.mechanism != "end-to-end")  # end-to-end: the positive is among the K
        return self.train_step.objective.chance_loss(candidates) * (2 if model.symmetric else 1)

    def tensors(self) -> dict[str, Tensor]:
        """Live tensors by the names they have in a checkpoint."""
        named = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        kept = self.dictionary.state_dict()
        named |= {f"{self.dictionary.NAME}/{name}": tensor for name, tensor in kept.items()}
        for encoder, flat in (("query", self.train_step.query), ("key", self.train_step.key)):
            named |= {f"model/{encoder}.{name}": tensor for name, tensor in flat.named_buffers().items()}
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
            "images": self._identity,
            "data_content": None if self.data_record is None else self.data_record.content,
            "versions": versions(),
        }

    def load(self, path: Path, steps_per_epoch: int) -> list[str]:
        """Load a checkpoint, and return what changes, one line each.

        Only rank 0 reads, and broadcasts its tensors, so that the others need no access to its disk. A checkpoint does
        not depend on the number of ranks that wrote it.

        Raises CheckpointError: damaged, after the last epoch, or of another architecture or configuration; DataError:
        of other images.
        """
        world = self.train_step.world
        self.step, lines = world.on_main(lambda: self._read(path, steps_per_epoch))
        with torch.no_grad():
            for tensor in self.tensors().values():
                world.broadcast(tensor)
        self.train_step.round()  # a broadcast does not show as a change
        return lines

    def _read(self, path: Path, steps_per_epoch: int) -> tuple[int, list[str]]:
        """Reads the tensors and returns the step they belong to, and what changes."""
        own = self.tensors()
        try:
            saved, said = checkpoint.load(path, own)
        except CheckpointError:
            meta = CheckpointMeta.of(path, checkpoint.verify(path))
            self._check(path, meta, steps_per_epoch)  # settings explain other tensors
            if meta.config.run.amp == self.config.run.amp:
                raise
            scaler = _SCALER if meta.config.run.amp == "fp16" else {}
            saved, said = checkpoint.load(path, {k: v for k, v in own.items() if k not in _SCALER} | scaler)
        meta = CheckpointMeta.of(path, said)
        lines = self._check(path, meta, steps_per_epoch)
        if bad := not_finite(saved):
            raise CheckpointError(
                f"{path} has values in {bad[0]} that are not finite: delete it to resume from the one before"
            )
        with torch.no_grad():
            for name in own.keys() & saved.keys():
                own[name].copy_(saved[name])
        return meta.step, lines

    def _check(self, path: Path, meta: CheckpointMeta, steps_per_epoch: int) -> list[str]:
        """What changes, one line each. Raises CheckpointError or DataError if that is not allowed."""
        epochs, total_steps = self.config.optim.epochs, self.config.optim.epochs * steps_per_epoch
        if meta.step > total_steps:
            raise CheckpointError(
                f"{path} is from step {meta.step:,}, and --epochs {epochs} are {total_steps:,} steps: use more "
                "--epochs, or start again with --overwrite"
            )
        run, before = self.config.run, meta.config
        other, note = self._other_images(path, meta)
        changed = changed_settings(self.config, meta, steps_per_epoch)
        if other and self.config.data.limit != before.data.limit:
            changed["limit"] = f"limit is {self.config.data.limit} and was {before.data.limit}"
        if changed.keys() - {name.replace("-", "_") for name in run.allow_changed}:
            names = " ".join(name.replace("_", "-") for name in changed)
            raise CheckpointError(
                f"{path} belongs to another run: {'; '.join(changed.values())}; resume with the same settings, or add "
                f"--allow-changed {names}"
            )
        if other and not run.allow_changed_data:
            raise DataError(
                f"{path} was trained on other images: {other}; restore the data set, start a new run with --out, "
                "or add --allow-changed-data"
            )
        although = [*changed.values(), *filter(None, [other or note]), *_changed_versions(meta.versions)]
        lines = [f"resumed although {line}" for line in although]
        return [*([] if other else moved(self.config, before)), *new_plan(self.config, meta, steps_per_epoch), *lines]

    @cached_property
    def _identity(self) -> dict[str, Any]:
        return identity(self.images, self.data_record)

    def _other_images(self, path: Path, meta: CheckpointMeta) -> Difference:
        """How the images differ from those of a checkpoint, as far as their headers and samples tell."""
        if meta.images is None and meta.data != self.data_fingerprint:
            return Difference(f"the images are {self.data_fingerprint} and were {meta.data}")
        if meta.images is not None:
            found = other_images(self._identity, meta.images)
            if found.error or found.note:
                return found
        if self.data_record is None:
            return Difference()
        known = data_record.read(path.parent.parent / data_record.FILE_NAME)
        return data_record.difference(known, meta.data_content, self.data_record, self.images)


def _changed_versions(before: dict[str, str | None]) -> list[str]:
    """The libraries of other versions than those that wrote a checkpoint, in one line if there are any."""
    changed = [
        f"{name} is {now} and was {before.get(name)}" for name, now in versions().items() if before.get(name) != now
    ]
    return [", ".join(changed)] if changed else []


def build_state(
    config: ResolvedConfig, world: World, images: ImageIndex, init: InitWeights | None = None
) -> TrainState:
    """Step 0 of a run: weights, dictionary and training step, all from the seed, the same on every rank.

    init  rank 0's weights of --init, in place of random ones; none where a checkpoint will be loaded
    """
    step = build_train_step(config, world, len(images))
    if config.model.init is not None and not config.run.resume:
        assert init is not None or not world.is_main, "run_context reads --init"
        start_from(init, step.model, world)
        step.round()
    record = data_record.take(images) if world.is_main else None  # rank 0 reads and writes all checkpoints
    return TrainState(config, step.model, step.dictionary, step, fingerprint(images), images, record)


def build_train_step(config: ResolvedConfig, world: World, images: int) -> TrainStep[Dictionary]:
    """The training step at step 0 of a run on a number of images."""
    m, optim = config.model, config.optim
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        head = (feature_dim(m.arch, m.width),) if m.mlp else m.head or ()
        query = build_encoder(
            m.arch,
            width=m.width,
            stem=m.stem,
            head=head,
            dim=m.moco_dim,
            bn_splits=m.bn_splits,
            channels=config.data.channels,
        )
        if m.stem_init == "torch":
            reset_first_convolution(query.backbone)
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
