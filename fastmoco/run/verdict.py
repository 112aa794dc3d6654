"""Is it learning? A verdict on a run at an evaluation, from its metrics alone, and what to do about it.

The rules, of which the first that holds decides; the thresholds are the constants below, each with its reason:

    collapsed         all images have the same embedding (uniformity), or these vary in few directions (effective rank)
    pinned at chance  the loss is that of guessing which of the keys belongs to a query
    not yet           the loss, the spread of the embeddings or kNN accuracy has not moved far enough from the start
    learning          none of these

All but "collapsed" are followed by "input-bound: 41 % waiting" if the device waits for images.

Loss: cross-entropy of one positive among K negatives, ln(K + 1) at chance. Alignment and uniformity: Wang & Isola 2020
(understanding contrastive representation learning), section 4.1, lower is better for both. Effective rank: Roy &
Vetterli 2007. All three are of the embeddings on which the loss is computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastmoco.run.metrics import finite_number, finite_values

# Uniformity is about -2 times the mean squared distance of two images, if that is small: 0.005 is a distance of 0.05.
# Untrained encoders have -0.06, and after an epoch that learns -0.44 (drawn shapes).
COLLAPSED_UNIFORMITY = -0.005
# Of the embeddings around their mean; of fewer than ten directions, half of them. A few directions cannot separate more
# than a few groups. Of 128, on drawn shapes: 12 to 17 in a run that learns; 2.0 to 3.0 with learning rate 3, where
# the loss is as low as in a good run; 1.3 to 2.8 with momentum 0; 30 untrained.
COLLAPSED_RANK = 5.0
# Relative distance of the loss from chance. On drawn shapes, without learning (learning rate 0) 0.5 to 0.8 %, since two
# views of an image are always a little closer than those of two images; a run that learns 33 to 43 %.
PINNED = 0.02
# Untrained encoders map all images into a narrow cone: measured -0.06. After one epoch on drawn shapes -0.44, after
# five -1.4; -4 is the whole sphere in high dimensions.
SPREAD_UNIFORMITY = -0.3
# Alignment over -uniformity / 2, which is the mean squared distance of two images or less (Jensen). 1: two views of an
# image are as far apart as views of two images. Measured 0.64 and 0.90 untrained (before and after its batch norms have
# seen images), 0.10 to 0.16 where it learns.
UNRELATED_VIEWS = 0.5
# The queue begins with random keys, which are easy negatives: until all were replaced once, a low loss says nothing.
ROUNDS_OF_QUEUE = 1.0
# A device that waits for a fifth of the time would train 1.25 times as fast with a faster loader. Measured: 3 to 6 %
# with decoded images in memory, 86 to 91 % with PNG files of 2000×2000 pixels and one worker.
INPUT_BOUND_PERCENT = 20.0
# kNN accuracy of a hundred to a thousand queries has a standard error of about two points.
KNN_MARGIN = 2.0

MOMENTUM_REMEDY = "--moco-m 0.99 or more, a lower --lr, and --bn-splits above 1"


class Verdict(NamedTuple):
    """A verdict in the words above, and its remedy: the reason and what to do, in one line."""

    verdict: str
    remedy: str


@dataclass(frozen=True, kw_only=True)
class Signs:
    """What an evaluation and the steps before it have measured; None if it was not.

    loss, chance_loss  of the last log entry, and of embeddings that are all the same
    keys_replaced      keys that were enqueued since the start over the size of the queue; inf without a queue
    most_directions    that the effective rank can have: images less one, or the length of an embedding
    knn_percent        top-1 at this evaluation, at the first one, and of raw pixels
    data_wait_percent  of the time since the last evaluation
    """

    loss: float | None = None
    chance_loss: float
    keys_replaced: float = math.inf
    alignment: float | None = None
    uniformity: float | None = None
    effective_rank: float | None = None
    most_directions: float = math.inf
    knn_percent: float | None = None
    knn_first_percent: float | None = None
    knn_pixels_percent: float | None = None
    data_wait_percent: float | None = None


def judge_run(signs: Signs) -> Verdict:
    """The verdict of the rules above: a pure function."""
    if signs.uniformity is not None and signs.uniformity > COLLAPSED_UNIFORMITY:
        reason = f"all images have nearly the same embedding (uniformity {signs.uniformity:.3f}, 0 is the worst)"
        return Verdict("collapsed", f"{reason}: start again with {MOMENTUM_REMEDY}")
    if signs.effective_rank is not None and signs.effective_rank < min(COLLAPSED_RANK, signs.most_directions / 2):
        reason = f"the embeddings vary in {signs.effective_rank:.1f} directions only"
        return Verdict("collapsed", f"{reason}: start again with {MOMENTUM_REMEDY}")
    state, remedy = _progress(signs)
    wait = signs.data_wait_percent
    if wait is None or wait < INPUT_BOUND_PERCENT:
        return Verdict(state, remedy)
    faster = (
        "more --workers, smaller images, or --pipeline resident, dali or ffcv would make it up to "
        f"{100 / (100 - min(wait, 99)):.1f} times as fast"
    )
    return Verdict(f"{state}, input-bound: {wait:.0f} % waiting", f"{faster}; {remedy}")


def _progress(signs: Signs) -> tuple[str, str]:
    """The word for a run that has not collapsed, and the remedy."""
    if signs.loss is not None and abs(signs.loss - signs.chance_loss) < PINNED * signs.chance_loss:
        reason = f"the loss {signs.loss:.3f} is that of guessing ({signs.chance_loss:.3f})"
        return "pinned at chance", f"{reason}: more --epochs or a higher --lr; if it stays, weaken the augmentation"
    if signs.keys_replaced < ROUNDS_OF_QUEUE:
        reason = f"{signs.keys_replaced:.0%} of the queue's random first keys are replaced"
        return "not yet", f"{reason}, and the loss says nothing before: more --epochs, or a smaller --moco-k"
    if signs.uniformity is not None and signs.uniformity > SPREAD_UNIFORMITY:
        reason = f"the embeddings are as close together as untrained ones (uniformity {signs.uniformity:.2f})"
        return "not yet", f"{reason}: train on, and raise --lr if it does not fall"
    if signs.alignment is not None and signs.uniformity is not None:
        apart = -signs.uniformity / 2
        if signs.alignment > UNRELATED_VIEWS * apart:
            reason = f"two views of an image are {signs.alignment / apart:.0%} as far apart as those of two images"
            return "not yet", f"{reason}: train on; if it stays, raise --lr or weaken the augmentation (views.png)"
    knn, first, pixels = signs.knn_percent, signs.knn_first_percent, signs.knn_pixels_percent
    if knn is not None and first is not None and knn < first + KNN_MARGIN:
        reason = f"kNN {knn:.1f} % is no better than at the start ({first:.1f} %)"
        return "not yet", f"{reason}: train on; if it stays, look at views.png and try another --lr"
    if knn is not None and pixels is not None and knn < pixels:
        return "learning", f"kNN {knn:.1f} % is still below that of raw pixels ({pixels:.1f} %): train on"
    return "learning", "train on while the metrics improve"


def signs_of(
    records: Sequence[Mapping[str, Any]],
    chance_loss: float,
    *,
    batch_size: int,
    queue: int | None,
    most_directions: float = math.inf,
) -> Signs:
    """The signs at the last evaluation in the records of `read_metrics`, oldest first, of a run from its start.

    queue  number of keys that are replaced one batch after another; None for other dictionaries
    """
    evaluations = [i for i, record in enumerate(records) if "loss" not in record]
    last = records[evaluations[-1]] if evaluations else {}
    end = evaluations[-1] if evaluations else len(records)
    begin = evaluations[-2] if len(evaluations) > 1 else 0
    waits, losses = finite_values(records[begin:end], "data_wait_percent"), finite_values(records[:end], "loss")
    knn = next((name for name in ("knn_top1_percent", "knn_output_top1_percent") if name in last), "knn_top1_percent")
    firsts, pixels = finite_values(records[:end], knn), finite_values(records, "knn_pixels_top1_percent")
    return Signs(
        loss=losses[-1] if losses else None,
        chance_loss=chance_loss,
        keys_replaced=last.get("step", 0) * batch_size / queue if queue else math.inf,
        alignment=finite_number(last.get("alignment")),
        uniformity=finite_number(last.get("uniformity")),
        effective_rank=finite_number(last.get("effective_rank")),
        most_directions=most_directions,
        knn_percent=finite_number(last.get(knn)),
        knn_first_percent=firsts[0] if firsts else None,
        knn_pixels_percent=pixels[0] if pixels else None,
        data_wait_percent=sum(waits) / len(waits) if waits else None,
    )


def last_verdict(records: Sequence[Mapping[str, Any]]) -> Verdict | None:
    """The verdict of the last record that has one: of metrics.jsonl, or a status."""
    for record in reversed(records):
        verdict, remedy = record.get("verdict"), record.get("remedy")
        if isinstance(verdict, str) and isinstance(remedy, str):
            return Verdict(verdict, remedy)
    return None


def verdict_line(verdict: Verdict) -> str:
    return f"is it learning? {verdict.verdict}: {verdict.remedy}"
