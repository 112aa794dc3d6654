"""What a command says about its images: what was taken as data, as labels and as the test split, and why."""

from __future__ import annotations

from fastmoco.console import Fact
from pipelines.data.choices import Choices
from pipelines.data.index import Dataset

OTHERWISE = "--train-folder, --test-folder, --no-labels, or a list with labels (CSV)"
_MOST_SHOWN = 3


def data_facts(dataset: Dataset) -> list[Fact]:
    """Rows for the images of a run."""
    data = Fact("data", dataset.train.describe(), dataset.indexing)
    return [data, *choice_facts(dataset.choices, classes_of(dataset)), _evaluated_on(dataset)]


def classes_of(dataset: Dataset) -> int:
    """The number of classes; 0 without labels."""
    return 0 if dataset.bank is None else len(dataset.bank.class_names)


def _evaluated_on(dataset: Dataset) -> Fact:
    test, why = dataset.test, dataset.choices.evaluation
    if test is None or (test.labels is None and dataset.bank is not None):
        return Fact("evaluated on", "held-out images" if dataset.bank is not None else "pairs of views", why)
    return Fact("evaluated on", test.describe(), why)


def choice_facts(choices: Choices, classes: int) -> list[Fact]:
    """Rows for the labels, and for files and folders that are not used."""
    facts = []
    if choices.labels:
        found = f"{classes:,} class{'es' * (classes != 1)}" if classes else "none"
        facts.append(Fact("labels", found, choices.labels))
    for i, (what, why) in enumerate(choices.not_used[:_MOST_SHOWN]):
        facts.append(Fact("" if i else "not used", what, why))
    if len(choices.not_used) > _MOST_SHOWN:
        facts.append(Fact("", f"and {len(choices.not_used) - _MOST_SHOWN:,} more folders"))
    if passed_over := choices.passed_over():
        facts.append(Fact("passed over", passed_over))
    if choices.not_used or choices.evaluation or (choices.labels and not classes):
        facts.append(Fact("otherwise", OTHERWISE))
    return facts


def choice_lines(choices: Choices, classes: int) -> list[str]:
    """The rows of `choice_facts` as lines, for the converters."""
    facts = choice_facts(choices, classes)
    return [f"{fact.name or 'and'}: {fact.value}" + (f" ({fact.why})" if fact.why else "") for fact in facts]
