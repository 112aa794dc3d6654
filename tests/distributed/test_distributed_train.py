"""Complete runs on several ranks: one folder, the result of one rank, stopped and resumed on any number of ranks."""

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

from fastmoco import trainer
from fastmoco.commands.train_arguments import parse_train
from fastmoco.console import shown_path
from fastmoco.distributed.world import World
from fastmoco.errors import AlreadyReportedError, ExitCode
from fastmoco.run.metrics import read_metrics
from pipelines.backends.two_view import TwoViewPipeline
from pipelines.errors import DataError
from tests.ranks import Died, Failed, results, start
from tests.run.test_train import RESIDENT, exact_metrics, newest

# The learning rate is so low that float32 runs do not diverge from each other, and kNN finds the same neighbours.
BASE = [*RESIDENT, "--no-tensorboard", "--lr", "1e-5", "--log-every", "1", "--knn-every", "1", "--dist-timeout", "30"]
BASE += ["--cpu-threads", "1"]  # per rank


def ending(out: Path, *arguments: str, console: Console | None = None) -> str:
    """Run one rank; returns how it ended."""
    config = parse_train([*BASE, "--out", str(out), *arguments])
    try:
        trainer.train(config, console or Console(file=io.StringIO()))
    except AlreadyReportedError as error:
        return f"already reported {error.code}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def interrupted(out: Path, *arguments: str, rank: int, at: int, how: str) -> str:
    """As `ending`, but something happens to one rank when it requests batch `at`."""
    original = TwoViewPipeline.views

    def views(self: TwoViewPipeline, start: int, stop: int):
        for step, batch in enumerate(original(self, start, stop), start):
            if step == at and stop == 8 and self.planner.rank == rank:  # others are for views.png and evaluations
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
    """Use one world for all runs of this process, because ranks can join the store of a launch only once."""
    world = World.join("cpu", timeout_s)
    setattr(World, "join", staticmethod(lambda *_: world))  # noqa: B010 - of another type, in this process only
    world.close = lambda: None
    return world


def two_ranks(folder: Path, photos: Path) -> dict[str, Any]:
    outputs: dict[str, Any] = {}
    world = stay_joined()
    console = Console(file=io.StringIO(), width=200)
    outputs["complete"] = ending(folder / "complete", "--paranoid", console=console)
    outputs["printed"] = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    outputs["sync"] = ending(folder / "sync", "--bn-splits", "1", "--knn-every", "0")
    outputs["unlabelled"] = ending(folder / "unlabelled", "--data", str(photos))
    # Ends by a signal to one rank, on which both agree one step later.
    outputs["stopped"] = interrupted(folder / "stopped", rank=1, at=3, how="signal")
    return outputs | {"rank": world.rank}


def resume_with_two(folder: Path) -> dict[str, Any]:
    stay_joined()
    return {name: ending(folder / name, "--resume", "--paranoid") for name in ("stopped", "four")}


def four_ranks(folder: Path) -> str:
    """Two batch norm groups over four ranks; resumed with two ranks, one on each."""
    stay_joined()
    return interrupted(folder / "four", rank=2, at=3, how="signal")


def fails_on_a_bad_image(folder: Path) -> str:
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
    """Results of `two_ranks` on both ranks."""
    return results(start(2, two_ranks, folder, photos))


@pytest.fixture(scope="module")
def one(folder: Path, photos: Path) -> Path:
    """The same runs with one rank, in this process."""
    for name, arguments in (
        ("complete", []),
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
    status = json.loads((run / "status.json").read_text())
    return status["state"], status["exit_code"], status["step"]


@pytest.mark.slow
def test_one_rank_writes_and_prints(two: list[dict[str, Any]], folder: Path) -> None:
    assert [own["complete"] for own in two] == ["done", "done"]
    assert "8 images, 4 on each of 2 devices; 2 batch norm splits, 1 on each" in two[0]["printed"]
    assert two[1]["printed"] == ""
    assert status(folder / "complete") == ("done", 0, 8)
    names = {path.name for path in (folder / "complete").iterdir()}
    assert names >= {"views.png", "curves.png", "backbone.safetensors", "metrics.jsonl", "config.json"}
    assert len(losses(folder / "complete")) == 8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["complete", "sync", "unlabelled"])
def test_the_run_equals_that_of_one_process(name: str, two: list[dict[str, Any]], one: Path, folder: Path) -> None:
    """Losses, evaluations, picture and queue, for shuffled and for synchronised batch norm."""
    assert [own[name] for own in two] == ["done", "done"]
    assert losses(folder / name) == pytest.approx(losses(one / name), rel=1e-5)
    state, expected = newest(folder / name), newest(one / name)
    torch.testing.assert_close(state["queue/keys"], expected["queue/keys"], rtol=0, atol=1e-4)
    assert state["queue/pointer"] == expected["queue/pointer"]
    assert (folder / name / "views.png").read_bytes() == (one / name / "views.png").read_bytes()


@pytest.mark.slow
def test_the_evaluation_is_that_of_one_rank(two: list[dict[str, Any]], one: Path, folder: Path) -> None:
    results, expected = evaluations(folder / "complete"), evaluations(one / "complete")
    assert len(results) == 3
    assert results[0] == expected[0]  # exactly, of the same weights
    assert "knn_pixels_top1_percent" in results[0]
    for result, reference in zip(evaluations(folder / "unlabelled"), evaluations(one / "unlabelled"), strict=True):
        assert result.get("verdict") == reference.get("verdict")
        numbers, expected = ({k: v for k, v in r.items() if not isinstance(v, str)} for r in (result, reference))
        assert numbers == pytest.approx(expected, rel=1e-4)
        assert "uniformity" in result


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_and_the_run_resumes(two: list[dict[str, Any]], folder: Path) -> None:
    """The resumed run is bit-identical to the uninterrupted one. And a run of four ranks resumes with two."""
    endings = [own["stopped"] for own in two]
    assert sorted(ending.partition(":")[0] for ending in endings) == ["Preempted", "already reported 75"]
    assert f"saved: resume with: fastmoco train --resume {shown_path(folder / 'stopped')}" in "".join(endings)
    assert status(folder / "stopped")[:2] == ("preempted", ExitCode.PREEMPTED)

    endings = results(start(4, four_ranks, folder))
    assert sorted(ending.partition(":")[0] for ending in endings) == ["Preempted"] + 3 * ["already reported 75"]
    assert status(folder / "four")[0] == "preempted"
    assert 0 < status(folder / "four")[2] < 8

    resumed = results(start(2, resume_with_two, folder))
    assert resumed == 2 * [{"stopped": "done", "four": "done"}]
    state, expected = newest(folder / "stopped"), newest(folder / "complete")
    assert [name for name, tensor in state.items() if not torch.equal(tensor, expected[name])] == []
    assert exact_metrics(folder / "stopped") == exact_metrics(folder / "complete")


@pytest.mark.slow
def test_a_run_of_four_resumed_with_two_equals_that_of_one(one: Path, folder: Path) -> None:
    assert status(folder / "four") == ("done", 0, 8), "must run after the test above"
    assert losses(folder / "four") == pytest.approx(losses(one / "complete"), rel=1e-5)


@pytest.mark.slow
def test_an_error_of_one_rank_reaches_all(folder: Path) -> None:
    """It determines the exit code of the run and status.json, which another rank writes."""
    endings = results(start(2, fails_on_a_bad_image, folder))
    assert endings == ["already reported 3", "DataError: photo.jpg is empty"]
    assert status(folder / "bad")[:2] == ("failed", ExitCode.DATA)
    assert json.loads((folder / "bad" / "status.json").read_text())["message"] == "photo.jpg is empty"


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [("kill", -signal.SIGKILL), ("stall", ExitCode.PREEMPTED)])
def test_a_rank_that_is_lost_ends_the_run_resumable(how: str, code: int, folder: Path) -> None:
    """Within the timeout; a rank that has stalled exits by itself."""
    began_s = time.monotonic()
    main, other = start(2, loses_rank_1, folder, how)
    assert time.monotonic() - began_s < 40
    assert other == Died(code)
    assert not isinstance(main, Failed)
    assert main.startswith("RankLostError: another rank exited or was unresponsive")
    assert status(folder / how)[:2] == ("preempted", ExitCode.PREEMPTED)
    assert ending(folder / how, "--resume") == "done"
    assert status(folder / how) == ("done", 0, 8)
