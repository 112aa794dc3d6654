"""Terminal output: all values, no control characters from the data, and few lines in a file."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from fastmoco.console import (
    Fact,
    StepMetrics,
    TrainingProgress,
    counted,
    duration,
    say,
    short,
    show_facts,
    summary_facts,
)

HOSTILE = "[red]not markup[/red] [/] \x1b[2J\u202efdp.exe\r\n\udcff"


def output_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def plain() -> Console:
    return Console(file=io.StringIO(), highlight=False)


def terminal() -> Console:
    return Console(file=io.StringIO(), highlight=False, force_terminal=True, width=100, color_system="truecolor")


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def train(
    console: Console, *, epochs: int, steps_per_epoch: int, step_s: float, log_every: int, first_step: int = 0
) -> str:
    clock, chance = Clock(), math.log(4097)
    steps = epochs * steps_per_epoch
    with TrainingProgress(
        console, first_step=first_step, steps=steps, steps_per_epoch=steps_per_epoch, chance_loss=chance, clock=clock
    ) as progress:
        for done in range(first_step + 1, steps + 1):
            clock.now_s += step_s
            if done % log_every == 0 or done == steps:
                progress.update(done, StepMetrics(7.12345, 0.0299, 9512.4, 2.6, 3 * 2**30), (steps - done) * step_s)
    return output_of(console)


@pytest.mark.parametrize("console", [plain(), terminal()], ids=["file", "terminal"])
def test_names_from_the_data_are_neither_markup_nor_control_characters(console: Console) -> None:
    show_facts(console, HOSTILE, [Fact(HOSTILE, HOSTILE, HOSTILE)])
    text = output_of(console)
    assert text.count("[red]not markup[/red] [/]") >= 1
    assert "\\x1b[2J" in text.replace("\n", "")
    assert not {"\x1b[2J", "\u202e", "\r", "\udcff"} & {text[i : i + n] for n in (1, 4) for i in range(len(text))}


def test_a_file_gets_one_line_per_epoch_without_control_characters() -> None:
    lines = train(plain(), epochs=3, steps_per_epoch=100, step_s=0.5, log_every=50).splitlines()
    assert len(lines) == 3
    assert lines[0].split("  ") == [
        "epoch 1/3",
        "step 100/300",
        "loss 7.1235 (chance 8.32)",
        "lr 0.0299",
        "9,512 images/s",
        "data wait 3 %",
        "3.0 GiB",
        "1 min 40 s left",
    ]
    assert all(line.isprintable() for line in lines)


def test_a_file_gets_at_most_one_line_in_ten_seconds_and_always_the_last() -> None:
    lines = train(plain(), epochs=200, steps_per_epoch=10, step_s=0.02, log_every=5).splitlines()
    assert 4 <= len(lines) <= 6  # 40 seconds
    assert lines[-1].startswith("epoch 200/200  step 2,000/2,000")


def test_long_epochs_are_reported_every_minute() -> None:
    lines = train(plain(), epochs=1, steps_per_epoch=1000, step_s=1.0, log_every=10).splitlines()
    assert 15 <= len(lines) <= 18
    assert "epoch 0.05/1" in lines[0]


def test_a_terminal_shows_the_same_values_in_one_block() -> None:
    text = train(terminal(), epochs=2, steps_per_epoch=10, step_s=1.0, log_every=5)
    last = text[text.rindex("epoch 2/2") :]
    for text in ("step 20/20", "loss 7.1235 (chance 8.32)", "9,512 images/s", "data wait 3 %", "0 s left"):
        assert text in last


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (3599.6, "1 h 00 min"), (3900, "1 h 05 min"), (2e5, "2 d 07 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_summary_has_the_accuracy_before_training_and_of_raw_pixels() -> None:
    facts = summary_facts(
        minutes=3.5,
        images_per_s=50123.4,
        knn_before_percent=30.12,
        knn_after_percent=82.6,
        raw_pixels_percent=35.0,
        files=["runs/a/backbone.safetensors", "runs/a/curves.png"],
    )
    console = plain()
    show_facts(console, "done", facts)
    lines = output_of(console).splitlines()
    assert lines[1] == "  kNN top-1  30.1 % → 82.6 %  (raw pixels: 35.0 %)"
    assert lines[2] == "  time       3 min 30 s"
    assert lines[3] == "  speed      50,123 images/s"
    assert lines[5].strip() == "runs/a/curves.png"


@pytest.mark.parametrize("width", [40, 80, 120])
def test_what_is_copied_from_a_terminal_is_whole(width: int) -> None:
    path = "/data/" + "a-long-folder/" * 9 + "backbone.safetensors"
    command = f"fastmoco eval {path} --probes knn,linear"
    console = Console(file=io.StringIO(), highlight=False, force_terminal=True, width=width, color_system=None)
    show_facts(
        console, "done", [Fact("folder", path, "chosen since the disk of the other one is full"), Fact("next", command)]
    )
    say(console, command)
    lines = output_of(console).splitlines()
    assert f"  folder  {path}" in lines
    assert f"  next    {command}" in lines
    assert command in lines
    assert not {"│", "╭", "─"} & set(output_of(console))
    reasons = [line.strip() for line in lines if line.startswith(" " * 10)]
    assert " ".join(reasons) == "(chosen since the disk of the other one is full)"
    assert all(len(line) <= width for line in lines if line.strip() in reasons)


def test_numbers_and_plurals_read_as_people_write_them() -> None:
    assert [short(value) for value in (1000, 0.0299, 1e-12, 12_345.6, 0)] == ["1,000", "0.0299", "1e-12", "12,346", "0"]
    assert [counted(number, "thread") for number in (0, 1, 2, 2_000)] == [
        "0 threads",
        "1 thread",
        "2 threads",
        "2,000 threads",
    ]
