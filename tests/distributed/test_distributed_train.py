"""Whole runs on several ranks: one folder, one result, stopped and resumed together, on as many ranks as there are."""

from __future__ import annotations

import io
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fastmoco import train as train_module
from fastmoco.cli import parse_train
from fastmoco.distributed.world import World
from fastmoco.errors import AlreadyReportedError, ExitCode
from fastmoco.run.metrics import read_metrics
from pipelines.backends.two_view import TwoViewPipeline
from pipelines.errors import DataError
from tests.ranks import Died, Failed, results, start
from tests.run.test_train import RESIDENT, exact_metrics, newest

# So low a rate that float32 runs stay together; kNN then tells features that differ in their last digits alike.
BASE = [*RESIDENT, "--no-tensorboard", "--lr", "1e-5", "--log-every", "1", "--knn-every", "1", "--dist-timeout", "30"]
BASE += ["--cpu-threads", "1"]  # of each rank


def ending(out: Path, *arguments: str, console: Console | None = None) -> str:
    """One rank's part of a run, and how it ended for it."""
    config = parse_train([*BASE, "--out", str(out), *arguments])
    try:
        train_module.train(config, console or Console(file=io.StringIO()))
    except AlreadyReportedError as told:
        return f"told {told.code}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def interrupted(out: Path, *arguments: str, rank: int, at: int, how: str) -> str:
    """As `ending`, where something happens to one rank as it asks for batch `at`."""
    original = TwoViewPipeline.views

    def views(self: TwoViewPipeline, start: int, stop: int):
        for step, batch in enumerate(original(self, start, stop), start):
            if step == at and stop > start + 1 and self.planner.rank == rank:
                if how == "signal":
                    signal.raise_signal(signal.SIGTERM)
                elif how == "bad image":
                    raise DataError("photo.jpg is empty")
                elif how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                elif how == "stall":
                    time.sleep(60)
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TwoViewPipeline, "views", views)
        return ending(out, *arguments)


def stay_joined(timeout_s: float = 30) -> World:
    """One world for all runs of this process: the store of a start knows its ranks once."""
    world = World.join("cpu", timeout_s)
    setattr(World, "join", staticmethod(lambda *_: world))  # noqa: B010 - of another type, in this process alone
    world.close = lambda: None
    return world


def two_ranks(folder: Path, photos: Path) -> dict[str, Any]:
    said: dict[str, Any] = {}
    world = stay_joined()
    console = Console(file=io.StringIO(), width=200)
    said["whole"] = ending(folder / "whole", "--paranoid", console=console)
    said["printed"] = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    said["sync"] = ending(folder / "sync", "--bn-splits", "1", "--knn-every", "0")
    said["unlabelled"] = ending(folder / "unlabelled", "--data", str(photos))
    # The first start ends by a signal to one rank, agreed by both a step later.
    said["stopped"] = interrupted(folder / "stopped", rank=1, at=3, how="signal")
    return said | {"rank": world.rank}


def again_with_two(folder: Path) -> dict[str, Any]:
    stay_joined()
    return {name: ending(folder / name, "--resume", "--paranoid") for name in ("stopped", "four")}


def four_ranks(folder: Path) -> str:
    """Two batch norm groups over four ranks, and then, resumed with two, one on each."""
    stay_joined()
    return interrupted(folder / "four", rank=2, at=3, how="signal")


def meets_a_bad_image(folder: Path) -> str:
    stay_joined()
    return interrupted(folder / "bad", rank=1, at=3, how="bad image")


def loses_rank_1(folder: Path, how: str) -> str:
    stay_joined(4)
    return interrupted(folder / how, rank=1, at=6, how=how)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 unlabelled files."""
    from tests.oddities import encode, picture

    folder = tmp_path_factory.mktemp("photos")
    for i in range(40):
        (folder / f"{i:02}.png").write_bytes(encode(picture(14 + i, 60 - i), "PNG"))
    return folder


@pytest.fixture(scope="module")
def two(folder: Path, photos: Path) -> list[dict[str, Any]]:
    """What both ranks say of the runs of `two_ranks`."""
    return results(start(2, two_ranks, folder, photos))


@pytest.fixture(scope="module")
def one(folder: Path, photos: Path) -> Path:
    """The same runs in this process."""
    for name, arguments in (
        ("whole", []),
        ("sync", ["--bn-splits", "1", "--knn-every", "0"]),
        ("unlabelled", ["--data", str(photos)]),
    ):
        assert ending(folder / "one" / name, *arguments) == "done"
    return folder / "one"


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl") if "loss" in record]


def evaluations(run: Path) -> list[dict[str, float]]:
    return [record for record in read_metrics(run / "metrics.jsonl") if "loss" not in record]


def status(run: Path) -> tuple[str, int, int]:
    said = json.loads((run / "status.json").read_text())
    return said["state"], said["exit_code"], said["step"]


@pytest.mark.slow
def test_one_folder_and_one_voice(two: list[dict[str, Any]], folder: Path) -> None:
    assert [mine["whole"] for mine in two] == ["done", "done"]
    assert "8 images, 4 on each of 2 devices; 2 batch norm splits, 1 on each" in two[0]["printed"]
    assert two[1]["printed"] == ""
    assert status(folder / "whole") == ("done", 0, 8)
    names = {path.name for path in (folder / "whole").iterdir()}
    assert names >= {"views.png", "curves.png", "backbone.safetensors", "metrics.jsonl", "config.json"}
    assert len(losses(folder / "whole")) == 8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["whole", "sync", "unlabelled"])
def test_the_run_of_one_process(name: str, two: list[dict[str, Any]], one: Path, folder: Path) -> None:
    """Losses, evaluations, picture and queue, for shuffled and for synchronised batch norm."""
    assert [mine[name] for mine in two] == ["done", "done"]
    assert losses(folder / name) == pytest.approx(losses(one / name), rel=1e-5)
    ours, theirs = newest(folder / name), newest(one / name)
    torch.testing.assert_close(ours["queue/keys"], theirs["queue/keys"], rtol=0, atol=1e-4)
    assert ours["queue/pointer"] == theirs["queue/pointer"]
    assert (folder / name / "views.png").read_bytes() == (one / name / "views.png").read_bytes()


@pytest.mark.slow
def test_the_evaluation_is_that_of_one_rank(two: list[dict[str, Any]], one: Path, folder: Path) -> None:
    found, expected = evaluations(folder / "whole"), evaluations(one / "whole")
    assert len(found) == 3
    assert found[0] == expected[0]  # of the same weights, in every digit
    assert "knn_pixels_top1_percent" in found[0]
    for mine, theirs in zip(evaluations(folder / "unlabelled"), evaluations(one / "unlabelled"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
        assert "uniformity" in mine


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_and_they_go_on_together(two: list[dict[str, Any]], folder: Path) -> None:
    """The run that was stopped ends bit for bit as the one that was not. And a run of four goes on with two."""
    endings = [mine["stopped"] for mine in two]
    assert sorted(ending.partition(":")[0] for ending in endings) == ["Preempted", "told 75"]
    assert "saved: resume with --resume" in "".join(endings)
    assert status(folder / "stopped")[:2] == ("preempted", ExitCode.PREEMPTED)

    endings = results(start(4, four_ranks, folder))
    assert sorted(ending.partition(":")[0] for ending in endings) == ["Preempted"] + 3 * ["told 75"]
    assert status(folder / "four")[0] == "preempted"
    assert 0 < status(folder / "four")[2] < 8

    again = results(start(2, again_with_two, folder))
    assert again == 2 * [{"stopped": "done", "four": "done"}]
    ours, theirs = newest(folder / "stopped"), newest(folder / "whole")
    assert [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])] == []
    assert exact_metrics(folder / "stopped") == exact_metrics(folder / "whole")


@pytest.mark.slow
def test_a_run_of_four_ended_with_two_is_one_of_one(one: Path, folder: Path) -> None:
    assert status(folder / "four") == ("done", 0, 8), "runs after the test above"
    assert losses(folder / "four") == pytest.approx(losses(one / "whole"), rel=1e-5)


@pytest.mark.slow
def test_a_rank_that_fails_is_heard_by_all(folder: Path) -> None:
    """Its error is the run's, in the exit code and in status.json, which another rank writes."""
    endings = results(start(2, meets_a_bad_image, folder))
    assert endings == ["told 3", "DataError: photo.jpg is empty"]
    assert status(folder / "bad")[:2] == ("failed", ExitCode.DATA)
    assert json.loads((folder / "bad" / "status.json").read_text())["message"] == "photo.jpg is empty"


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [("kill", -signal.SIGKILL), ("stall", ExitCode.PREEMPTED)])
def test_a_rank_that_is_lost_ends_the_run_resumable(how: str, code: int, folder: Path) -> None:
    """Within the time-out; a rank that has stalled ends itself."""
    began = time.monotonic()
    left, right = start(2, loses_rank_1, folder, how)
    assert time.monotonic() - began < 40
    assert right == Died(code)
    assert not isinstance(left, Failed)
    assert left.startswith("RankLostError: another rank is gone")
    assert status(folder / how)[:2] == ("preempted", ExitCode.PREEMPTED)
    assert ending(folder / how, "--resume") == "done"
    assert status(folder / how) == ("done", 0, 8)
