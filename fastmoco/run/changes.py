"""What differs between a run and the checkpoint that it goes on from, by its effect on the weights.

N completed steps
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastmoco.config import COMPARED_BY_EFFECT, FREE_ON_RESUME, ResolvedConfig, differences
from fastmoco.config.augment import augmentation_of
from fastmoco.config.resume import absolute_data, rescaled
from fastmoco.model.encoder import feature_dim
from fastmoco.run.checkpoint_meta import CheckpointMeta
from fastmoco.step.schedules import Rates
from pipelines.registry import BACKENDS

_RATES = ("lr", "final_lr", "cos", "schedule", "first_epoch", "warmup_epochs", "moco_m", "moco_m_cos")
_IMAGES = ("data", "limit")  # compared as images


def changed_settings(ours: ResolvedConfig, meta: CheckpointMeta, steps_per_epoch: int) -> dict[str, str]:
    """Settings whose change would give other weights than those of the run so far: a sentence of each, by name.

    More epochs are no such change, nor is what follows from them for the coming steps. Settings that the checkpoint
    does not have are newer than it: only those of the rates are compared, with their defaults.
    """
    before = meta.config
    differing = {
        name: f"{name} is {new!r} and was {old!r}"
        for name, new, old in differences(ours, before)
        if name not in FREE_ON_RESUME | {"epochs", *_IMAGES} and name in {*meta.named, *_RATES}
    }
    now, then = _effects(ours), _effects(before)
    rates_differ = differing.keys() & _RATES and not _same_rates_so_far(ours, before, meta.step, steps_per_epoch)
    return {
        name: text
        for name, text in differing.items()
        if (rates_differ if name in _RATES else name not in COMPARED_BY_EFFECT or now[name] != then[name])
    }


def new_plan(ours: ResolvedConfig, meta: CheckpointMeta, steps_per_epoch: int) -> list[str]:
    """What changes for the coming steps, one line each: number of epochs, learning rate and EMA momentum."""
    before, step = meta.config, meta.step
    was, now = before.optim.epochs, ours.optim.epochs
    if was == now:
        return []
    last = was * steps_per_epoch - 1  # a finished run has no later rate
    old, new = Rates(before, steps_per_epoch), Rates(ours, steps_per_epoch)
    values = [("learning rate", old.lr(min(step, last)), new.lr(step))]
    values.append(("EMA momentum", old.ema_momentum(min(step, last)), new.ema_momentum(step)))
    rates = [f"the {name} at step {step:,} is {b:.4g} (was {a:.4g})" for name, a, b in values if a != b]
    if not rates:
        rates = [f"the learning rate at step {step:,} is {values[0][2]:.4g}, as planned before"]
    milestones = ""
    if _is_rescaled(ours, before):
        epochs = " ".join(map(str, ours.optim.schedule or ()))
        milestones = f"; it falls at epochs {epochs} (--schedule sets others)"
    verb = "extended" if now > was else "shortened"
    return [f"{verb} from {was:,} to {now:,} epochs: {', '.join(rates)}{milestones}"]


def moved(ours: ResolvedConfig, before: ResolvedConfig) -> list[str]:
    """What was found to be the same under another name, for images that were compared, one line each."""
    lines = []
    if absolute_data(ours.data.data) != absolute_data(before.data.data):
        now, then = (", ".join(config.data.data) for config in (ours, before))
        lines.append(f"the same images, now in {now} (were in {then})")
    if ours.data.pipeline != before.data.pipeline:
        lines.append(f"the same views, now by --pipeline {ours.data.pipeline} (were by {before.data.pipeline})")
    return lines


def _effects(config: ResolvedConfig) -> dict[str, Any]:
    """The effect of each setting that can be written in several ways, or that only matters beside another."""
    data, augment, model = config.data, config.augment, config.model
    head = (feature_dim(model.arch, model.width),) if model.mlp else model.head or ()
    own = replace(augmentation_of(augment, data.channels), name="")
    jitter = own.jitter_p, own.brightness, own.contrast, own.saturation, own.hue
    return {
        "pipeline": BACKENDS[data.pipeline].pipeline,  # the others draw the views that are planned
        "order_buffer": data.order_buffer if data.order == "archives" else None,
        "aug": own,
        "crop_scale_min": own.scale,
        "hflip": own.flip_p,
        "vflip": own.vertical_flip_p,
        "color_jitter": jitter if own.jitter_p else None,
        "grayscale": own.grey_p,
        "blur": own.blur_p,
        "solarize": own.solarise_p,
        "mean": own.mean,
        "std": own.std,
        "normalization": (own.mean, own.std),
        "mlp": head,
        "head": head,
        "bank_m": model.bank_m if model.mechanism == "memory-bank" else None,
    }


def _is_rescaled(ours: ResolvedConfig, before: ResolvedConfig) -> bool:
    """Whether the milestones of the learning rate are those of before, at the same fractions of other epochs."""
    a, b = ours.optim, before.optim
    if a.schedule is None or b.schedule is None or a.schedule == b.schedule:
        return False
    return a.schedule == rescaled(b.schedule, b.epochs, a.epochs)


def _same_rates_so_far(ours: ResolvedConfig, before: ResolvedConfig, done: int, steps_per_epoch: int) -> bool:
    """Whether our settings give the N steps the rates that they had, if the number of epochs had been the same.

    Rates are compared at the first and the last step of each epoch: between these they are constant or monotonic.
    """
    epochs = before.optim.epochs
    if ours.optim.warmup_epochs >= epochs:
        return False
    schedule = before.optim.schedule if _is_rescaled(ours, before) else ours.optim.schedule
    new, old = Rates(ours.replace(epochs=epochs, schedule=schedule), steps_per_epoch), Rates(before, steps_per_epoch)
    firsts = range(0, done, steps_per_epoch)
    steps = {step for first in firsts for step in (first, min(done, first + steps_per_epoch) - 1)}
    return all(new.lr(step) == old.lr(step) and new.ema_momentum(step) == old.ema_momentum(step) for step in steps)
