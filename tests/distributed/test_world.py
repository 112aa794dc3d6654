"""Communication between ranks: collectives, shards, outcomes and votes; and a world of one rank."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmoco.distributed.world import StopVote, World, all_gather_with_grad
from fastmoco.errors import ConfigError, DivergedError, ExitCode, RankLostError, exit_code
from pipelines.errors import DataError
from tests.ranks import Died, Failed, results, start

# ---- one rank --------------------------------------------------------------------------------------------------------


def single_rank() -> World:
    return World(torch.device("cpu"))


def test_with_one_rank_every_collective_is_the_identity() -> None:
    world, tensor = single_rank(), torch.arange(6.0).view(3, 2)
    assert world.all_reduce(tensor).wait() is tensor
    assert world.all_gather(tensor).wait() is tensor
    assert all_gather_with_grad(tensor, world) is tensor
    assert world.subgroup(1) is world
    torch.testing.assert_close(world.share(tensor), tensor)
    before = tensor.clone()
    world.broadcast(tensor)
    assert torch.equal(tensor, before)
    world.check_same({"queue": b"12"})
    assert world.first_failure() is None
    assert world.report_failure(ValueError())


def test_with_one_rank_a_vote_is_immediate() -> None:
    vote = StopVote(single_rank())
    assert [vote(requested) for requested in (False, True, False)] == [False, True, False]


def test_with_one_rank_outcomes_pass_through() -> None:
    world = single_rank()
    assert world.on_main(lambda: (1, 2)) == (1, 2)
    assert world.local_main_first(lambda: 3) == 3
    with pytest.raises(DataError, match="no images"):
        world.on_main(lambda: _raise(DataError("no images")))


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "1", "RANK": "0"}])
def test_without_other_ranks_nothing_is_started(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with World.join("cpu") as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
    assert not torch.distributed.is_initialized()


def test_a_broken_environment_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 'two', expected a number"):
        World.join("cpu")


def test_a_lost_rank_is_resumable() -> None:
    assert exit_code(RankLostError()) == ExitCode.PREEMPTED


# ---- several ---------------------------------------------------------------------------------------------------------


def communicate(folder: Path) -> dict[str, Any]:
    """Every operation that does not fail, on one rank."""
    with World.join("cpu", timeout_s=30) as world:
        rank, outputs = world.rank, {}
        outputs["identity"] = (rank, world.size, world.is_main, *world.rank_info[2:4])
        outputs["sum"] = world.all_reduce(torch.full((3,), float(rank + 1))).wait().tolist()
        outputs["bf16"] = world.all_reduce(torch.full((3,), rank + 1, dtype=torch.bfloat16)).wait().tolist()
        outputs["gather"] = world.all_gather(torch.full((2, 1), rank)).wait().flatten().tolist()
        strided = torch.arange(8.0).view(2, 4).T[:, :1] + 10 * rank
        outputs["strided"] = world.all_gather(strided).wait().flatten().tolist()
        outputs["share"] = world.share(torch.arange(8)).tolist()

        rows = torch.tensor([1.0 + rank], requires_grad=True)
        weights = torch.arange(1.0, 1 + world.size) * 10**rank
        (all_gather_with_grad(rows, world) * weights).sum().backward()
        assert rows.grad is not None
        outputs["gradient"] = rows.grad.item()

        received = torch.full((2, 2), float(rank)).T
        world.broadcast(received)
        outputs["broadcast"] = received.tolist()

        pair = world.subgroup(world.size // 2)
        outputs["subgroup"] = (pair.rank, pair.size, pair.all_reduce(torch.tensor([rank])).wait().item())
        single = world.subgroup(world.size)
        outputs["single"] = (single.size, single.all_gather(torch.tensor([rank])).wait().item())

        outputs["outcome"] = world.on_main(lambda: {"rank": rank})
        try:
            world.on_main(lambda: _raise(DataError(f"rank {rank} finds no images")))
        except DataError as error:
            outputs["error"] = str(error)

        def index() -> str:
            exists = (folder / "index").exists()
            (folder / "index").touch()
            return f"{'read' if exists else 'made'} by {rank}"

        outputs["index"] = world.local_main_first(index)
        vote = StopVote(world)
        outputs["votes"] = [vote(requested) for requested in (False, rank == 1, False, False)]
        vote.close()

        world.check_same({"queue": b"same"})
        try:
            world.check_same({"queue": b"same", "weights": b"odd!" if rank == 1 else b"even"})
        except DivergedError as error:
            outputs["difference"] = str(error)
        outputs["first to fail"] = world.report_failure(DataError(f"of rank {rank}"))
        return outputs


@pytest.mark.slow
def test_four_ranks_communicate(tmp_path: Path) -> None:
    ranks = results(start(4, communicate, tmp_path))
    for rank, own in enumerate(ranks):
        assert own["identity"] == (rank, 4, rank == 0, rank, 4)
        assert own["sum"] == own["bf16"] == [10.0] * 3
        assert own["gather"] == [0, 0, 1, 1, 2, 2, 3, 3]
        assert own["strided"] == [10.0 * source + row for source in range(4) for row in range(4)]
        assert own["share"] == [2 * rank, 2 * rank + 1]
        assert own["gradient"] == (rank + 1) * 1111  # sum of the gradients of all four losses
        assert own["broadcast"] == [[0.0, 0.0], [0.0, 0.0]]
        assert own["subgroup"] == (rank % 2, 2, 1 if rank < 2 else 5)
        assert own["single"] == (1, rank)
        assert own["outcome"] == {"rank": 0}
        assert own["error"] == "rank 0 finds no images"
        assert own["index"] == ("made by 0" if rank == 0 else f"read by {rank}")
        assert own["votes"] == [False, False, True, False]  # one call later
        assert own["difference"].startswith("weights of rank 1 differs from that of rank 0")
    assert sum(own["first to fail"] for own in ranks) == 1


def loses_a_rank(how: str) -> Any:
    """Rank 1 is lost in some way; rank 0 returns what it raises then, and after how long."""
    world = World.join("cpu", timeout_s=2)
    world.all_reduce(torch.ones(2)).wait()
    began = time.monotonic()
    if world.rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "stalled":
            time.sleep(5)
        error = DataError("photo.jpg is empty")
        world.report_failure(error)
        raise error
    try:
        world.all_reduce(torch.ones(2)).wait()
    except (RankLostError, DataError) as error:
        return type(error).__name__, str(error), time.monotonic() - began
    return None


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "stalled", "failed"])
def test_a_lost_rank_is_reported(how: str) -> None:
    left, right = start(2, loses_a_rank, how) if how != "stalled" else (*start(2, loses_a_rank, how)[:1], None)
    kind, message, seconds = left
    assert seconds < 6
    if how == "failed":
        assert (kind, message) == ("DataError", "photo.jpg is empty")
        assert isinstance(right, Failed)
    else:
        assert kind == "RankLostError"
        assert message.startswith("another rank exited or was unresponsive for 2 s (")
        assert message.endswith("): resume with --resume")
    if how == "killed":
        assert right == Died(-signal.SIGKILL)


def test_one_module_imports_torch_distributed_beside_the_launcher_and_the_probe() -> None:
    root = Path(__file__).resolve().parents[2]
    files = [path for folder in ("fastmoco", "pipelines") for path in (root / folder).rglob("*.py")]
    users = {path.name for path in files if "torch.distributed" in path.read_text()}
    assert users - {"outcomes.py"} == {"world.py", "launch.py", "probe.py"}  # outcomes.py only mentions it
