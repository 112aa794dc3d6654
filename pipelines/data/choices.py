"""What was taken as data, as labels and as the evaluation set, and why: shown where a command begins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipelines.data.file_kinds import describe_others


@dataclass(frozen=True, eq=False)
class Choices:
    """Reasons for how a data set was read; parts of sentences, empty if there is nothing to say.

    labels      what the labels are taken from, or why there are none
    evaluation  why some or all images of the test split do not evaluate
    not_used    (what, why) of folders with images and of outputs of fastmoco that are not trained on
    others      number of files that are no images, by extension
    """

    labels: str = ""
    evaluation: str = ""
    not_used: tuple[tuple[str, str], ...] = ()
    others: Mapping[str, int] = field(default_factory=dict)

    def passed_over(self) -> str:
        """`9 files: 6 .txt, 2 .json, 1 .mp4`; empty if none was."""
        return describe_others(self.others) if self.others else ""


def merged(choices: Sequence[Choices]) -> Choices:
    """Those of several data sets that are used as one."""
    others: Counter[str] = Counter()
    for one in choices:
        others.update(one.others)
    return Choices(
        labels="; ".join(dict.fromkeys(one.labels for one in choices if one.labels)),
        evaluation="; ".join(dict.fromkeys(one.evaluation for one in choices if one.evaluation)),
        not_used=tuple(entry for one in choices for entry in one.not_used),
        others=others,
    )
